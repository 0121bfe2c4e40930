"""One rank as a process: where its output goes, how it joins the others, how it ends.

What was asked for and what was started are compared here: today's versions train on one process, or without ZeRO,
without a word when the environment is not exactly right on a CPU machine.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from tunewright.errors import ConfigError, PeerError, TunewrightError
from tunewright.redaction import redact

if TYPE_CHECKING:
    from accelerate import PartialState

# Set by `tunewright train`: it reads the error files and shows one of them, so that ranks need not.
LAUNCHED_BY = "TUNEWRIGHT_LAUNCHER_PID"
# What launchers tell their ranks, and torchrun (PET_) and MPI theirs. Whoever starts ranks owns these: what another
# launch left in the environment would make them wait for ranks that nobody starts.
RANK_NAMES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "FORK_LAUNCHED",
    LAUNCHED_BY,
}
RANK_PREFIXES = (
    "ACCELERATE_",
    "FSDP_",
    "MV2_COMM_WORLD_",
    "OMPI_COMM_WORLD_",
    "PET_",
    "PMI_",
    "TORCHELASTIC_",
)
PATIENCE = 15.0  # seconds between two lines that say for whom a rank waits
PEER_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out waiting")


def leave(exit_code: int) -> NoReturn:
    """End this process at once: what it printed is shown, what libraries do at the interpreter's end is not done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


@contextmanager
def interrupt_waits() -> Iterator[None]:
    """Let Ctrl-C wait, for this process until the end and for one begun here until it calls `interrupt_may_come`.

    A new Python process answers it with a traceback before and while it imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interrupt_may_come() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """Import without garbage collection, and leave what was imported out of every later one.

    torch, transformers, PEFT and TRL make a million objects, none of them garbage; Python looks through them again and
    again while they grow, for a quarter of the time that a rank's imports take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def rank_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that make a process a rank, sorted."""
    return sorted(name for name in environment if name in RANK_NAMES or name.startswith(RANK_PREFIXES))


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a process is no rank of anything."""
    left_out = set(rank_variables(environment))
    return {name: value for name, value in environment.items() if name not in left_out}


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    return LAUNCHED_BY in os.environ


def die_with_parent() -> None:
    """Ask Linux to kill this process when the process that started it dies: no orphan goes on training."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Console:
    """What the user sees of a rank: the first rank speaks, everything else goes to logs/rankN.log."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.log_path = logs / f"rank{rank()}.log"
        sys.stdout.flush()
        sys.stderr.flush()
        # The descriptors themselves are turned over, so that what libraries write from C++ is kept as well.
        self._terminal: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        faulthandler.enable()

    def say(self, text: str) -> None:
        """Show a line to the user, from the first rank only, and keep it in the log."""
        text = redact(text)
        print(text)
        if rank() == 0:
            # Nobody reads any more (`| head`): the log has the line.
            with suppress(BrokenPipeError):
                print(text, file=self._terminal, flush=True)

    def fail(self, text: str) -> None:
        """Show a failure of any rank, unless a launcher does it for all of them."""
        if not launched():
            print(text, file=self._terminal, flush=True)


@contextmanager
def reported_errors(logs: Path, console: Console) -> Iterator[None]:
    """Write what ends this rank to logs/rankN.error.json and exit with the code of its class."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        known = as_known_error(error)
        record = {
            "rank": rank(),
            "time": time.time(),
            "type": type(known).__name__,
            "exit_code": getattr(known, "exit_code", 70),
            "message": redact(str(known)) or type(known).__name__,
            "traceback": redact(traceback.format_exc()),
        }
        print(record["traceback"], file=sys.stderr)
        (logs / f"rank{rank()}.error.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        console.fail(f"Rank {rank()} failed: {record['type']}: {record['message']} (log: {console.log_path})")
        # Without waiting for the others: a rank that still sits in a collective would hold the exit up.
        sys.stdout.flush()
        os._exit(int(record["exit_code"]))


def as_known_error(error: BaseException) -> BaseException:
    """Tell a failed peer from a failure of this rank's own."""
    if isinstance(error, TunewrightError):
        return error
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_SIGNS):
        return PeerError(f"lost contact with another rank: {str(error).splitlines()[0]}")
    return error


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
        reason = str(error).splitlines()[0]
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
