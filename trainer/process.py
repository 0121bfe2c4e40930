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
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from launch.errors import PeerError, TunewrightError
from launch.redaction import redact

if TYPE_CHECKING:
    from accelerate import PartialState

# Set by `tunewright train`: it reads the error files and shows one of them, so that ranks need not.
LAUNCHED_BY = "TUNEWRIGHT_LAUNCHER_PID"
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


def join(backend_wanted: str | None, timeout_minutes: float) -> PartialState:
    """Join the process group, on GPUs over NCCL or RCCL and otherwise over gloo, and return accelerate's state.

    The state is made here and handed to `TrainingArguments` as configured already, because what they would make on a
    CPU machine is either without DeepSpeed or blind to the other ranks (transformers 5.23, accelerate 1.15).
    """
    import torch
    from accelerate import PartialState

    options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)} if world_size() > 1 else {}
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
    return PartialState(cpu=True, backend="gloo" if world_size() > 1 else None, **options)


def _skip_shared_memory_kernel() -> None:
    """Tell DeepSpeed that its shared-memory all-reduce for CPU inference is not to be compiled.

    Training never calls it, and without a C++ compiler on the machine its build ends the run (deepspeed 0.19.8,
    comm/torch.py: build_shm_op); with one it costs 20 seconds on first use.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
