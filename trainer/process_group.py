"""How ranks join, and what they tell each other.

The group is made here, because today's versions train on one process, or without ZeRO, without a word when the
environment is not exactly right on a CPU machine.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tunewright.errors import ConfigError, PeerError, first_line
from tunewright.ranks import rank, world_size

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

PATIENCE = 15.0  # seconds between two lines that say for whom a rank waits


def join(backend_wanted: str | None, timeout_minutes: float, say: Callable[[str], None] = print) -> PartialState:
    """Join the process group, on GPUs over NCCL or RCCL and otherwise over gloo, and return accelerate's state.

    The state is made here and handed to `TrainingArguments` as configured already, because what they would make on a
    CPU machine is either without DeepSpeed or blind to the other ranks (transformers 5.23, accelerate 1.15).

    Raises:
        ConfigError, PeerError: see `meet`.
    """
    import torch
    from accelerate import PartialState

    timeout = timedelta(minutes=timeout_minutes)
    options: dict[str, Any] = {"timeout": timeout} if world_size() > 1 else {}
    # Held until the group is made, which goes on with the first rank's server.
    store = meet(timeout, say) if world_size() > 1 else None
    try:
        if torch.cuda.is_available():
            return PartialState(**options)
        if backend_wanted == "deepspeed":
            # DeepSpeed wants a process group even of one.
            for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
                os.environ.setdefault(key, value)
            os.environ.setdefault("MASTER_PORT", "0")
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            _skip_shared_memory_kernel()
            return PartialState(backend="gloo", **options)
        state = PartialState(cpu=True, backend="gloo" if world_size() > 1 else None, **options)
        # Ranks would have "cpu:0" and "cpu:1", which transformers 5.17 cannot load its own checkpoints to.
        state.device = torch.device("cpu")
        return state
    finally:
        del store


def meet(timeout: timedelta, say: Callable[[str], None]) -> Any:
    """Wait until every rank is there, saying for whom, and return the store in which they said so.

    PyTorch alone waits in silence, and when it gives up does not say who is missing.

    Raises:
        ConfigError: the environment says that there are other ranks, but not where.
        PeerError: somebody has not come in time, or the first rank cannot listen.
    """
    from torch.distributed import DistError, PrefixStore, TCPStore

    me, size, listens = rank(), world_size(), _listens()
    host, port = _address()
    waiting = Waiting(timeout, say)
    if not listens:
        _reach(host, port, waiting)
    try:
        store = TCPStore(host, port, size, listens, timeout, wait_for_workers=False, multi_tenant=True)
        arrived = PrefixStore(f"arrived/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        arrived.set(str(me), "")
        everyone = [str(other) for other in range(size)]
        while not arrived.check(everyone):
            missing = [other for other in everyone if not arrived.check([other])]
            waiting.a_moment(f"rank{'' if len(missing) == 1 else 's'} {', '.join(missing)}")
    except DistError as error:
        reason = first_line(error)
        doing = "listen" if listens else "stay connected"
        raise PeerError(f"{waiting.who} cannot {doing} at {host}:{port}: {reason}.") from error
    return store


class Waiting:
    """A rank's patience with others: says now and then for whom it waits, and gives up in the end."""

    def __init__(self, timeout: timedelta, say: Callable[[str], None]) -> None:
        self.timeout, self.say = timeout, say
        now = time.monotonic()
        self.deadline, self.next_line = now + timeout.total_seconds(), now + PATIENCE
        self.who = f"Rank {rank()} of {world_size()} on {socket.gethostname()}"

    def a_moment(self, whom: str) -> None:
        """Wait a little for `whom`, or raise PeerError when it was long enough."""
        now = time.monotonic()
        if now > self.deadline:
            raise PeerError(
                f"{self.who} has waited {self.timeout} (`train.timeout_minutes`) for {whom}: look there for the "
                f"reason. That there are {world_size()} ranks is said by RANK, WORLD_SIZE and MASTER_ADDR="
                f"{os.environ['MASTER_ADDR']} in the environment; unset them where nobody starts the others."
            )
        if now > self.next_line:
            self.next_line = now + PATIENCE
            self.say(f"{self.who} waits for {whom}.")
        time.sleep(0.2)


def _address() -> tuple[str, int]:
    """Return where ranks meet.

    Raises:
        ConfigError: the environment does not say it, or has a rank that cannot be.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if host and port.isdigit() and 0 <= rank() < world_size():
        return host, int(port)
    raise ConfigError(
        f"The environment says that this is rank {rank()} of {world_size()}, with MASTER_ADDR={host} and MASTER_PORT="
        f"{port or None}, which no launcher sets. Start with `tunewright train` or `accelerate launch`, or unset RANK "
        f"and WORLD_SIZE."
    )


def _listens() -> bool:
    """Tell whether this rank hosts the store; torchrun does it for its ranks."""
    return rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _reach(host: str, port: int, waiting: Waiting) -> None:
    """Wait until somebody listens; PyTorch's own attempts end with a page of C++ on standard error."""
    while True:
        try:
            socket.create_connection((host, port), timeout=PATIENCE).close()
            return
        except OSError as error:
            waiting.a_moment(f"rank 0 at {host}:{port} ({error})")


def _skip_shared_memory_kernel() -> None:
    """Tell DeepSpeed that its shared-memory all-reduce for CPU inference is not to be compiled.

    Training never calls it, and without a C++ compiler on the machine its build ends the run (deepspeed 0.19.8,
    comm/torch.py: build_shm_op); with one it costs 20 seconds on first use.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def limit_waiting(timeout_minutes: float) -> None:
    """Let collectives of every group wait so long at most.

    DeepSpeed makes groups of its own for ZeRO-1 and ZeRO-2, and names no timeout: they would get PyTorch's default of
    half an hour over gloo (deepspeed 0.19.8, utils/groups.py).
    """
    from torch import distributed

    if not distributed.is_initialized():
        return
    # `set_timeout` is newer than the oldest torch that is supported, 2.11, which has it under its own name.
    name = "set_timeout" if hasattr(distributed, "set_timeout") else "_set_pg_timeout"
    limit = getattr(distributed.distributed_c10d, name)
    for group in list(distributed.distributed_c10d._world.pg_map):
        limit(timedelta(minutes=timeout_minutes), group)


def all_gather(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """Return one list of values for each rank; every rank has to call it, with as many of them."""
    import torch

    if not torch.distributed.is_initialized():
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    return [tensor.tolist() for tensor in everyone]
