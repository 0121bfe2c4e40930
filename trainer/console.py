"""What the user sees of a training: the lines of its first rank, and the error that ended any of them."""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TextIO

from tunewright.errors import PeerError, Preempted, StorageError, TunewrightError, first_line
from tunewright.files import write_json
from tunewright.ranks import SPARE_ERRORS, launched, rank
from tunewright.redaction import redact
from tunewright.space import STORAGE_ERRNOS, refused

if TYPE_CHECKING:
    from tunewright.trainer.pulse import Pulse

PEER_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out waiting")


class Output(Protocol):
    """Where a training tells how it goes."""

    @property
    def stream(self) -> TextIO:
        """Where a progress bar is drawn, if that is a terminal."""

    def say(self, text: str) -> None:
        """Show a line to the user, from the first rank only, and keep it in the log."""

    def log(self, text: str) -> None:
        """Keep a line in the log, where there is one."""


class Printer:
    """The output of a training in the caller's own process, a notebook's for example: lines are printed.

    Args:
        write: takes the lines in place of `print`; then there is no bar.
    """

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write or partial(print, flush=True)
        self.stream: TextIO = io.StringIO() if write else sys.stdout

    def say(self, text: str) -> None:
        self._write(redact(text))

    def log(self, text: str) -> None:
        pass


class _Kept(io.FileIO):
    """A file that keeps what its disk has room for: a line that finds none, or no reader, ends no training."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in {*STORAGE_ERRNOS, errno.EPIPE}:
                raise
            return len(data)


def _writer(descriptor: int, *, closefd: bool = True) -> TextIO:
    raw = io.BufferedWriter(_Kept(descriptor, "w", closefd=closefd))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="replace", line_buffering=True)


class Console:
    """The output of a rank: the first rank speaks, everything else goes to logs/rankN.log."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.log_path = logs / f"rank{rank()}.log"
        sys.stdout.flush()
        sys.stderr.flush()
        # The descriptors themselves are turned over, so that what libraries write from C++ is kept as well.
        self._terminal = _writer(os.dup(1))
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.stdout, sys.stderr = _writer(1, closefd=False), _writer(2, closefd=False)
        faulthandler.enable()

    @property
    def stream(self) -> TextIO:
        return self._terminal if rank() == 0 else sys.stdout

    def say(self, text: str) -> None:
        self.log(text)
        if rank() == 0:
            print(redact(text), file=self._terminal, flush=True)

    def log(self, text: str) -> None:
        print(redact(text))

    def fail(self, text: str) -> None:
        """Show a failure of any rank, unless a launcher does it for all of them."""
        if not launched():
            print(text, file=self._terminal, flush=True)


@contextmanager
def reported_errors(logs: Path, console: Console, pulse: Pulse | None = None) -> Iterator[None]:
    """End this rank with whatever is raised, see `end_rank`; the pulse tells the others, or what they told."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        known = as_known_error(error)
        if pulse and isinstance(known, PeerError):
            known = PeerError(pulse.explain(known))
        elif pulse and isinstance(known, Preempted):
            pulse.stop()  # as all do, at the same step
        elif pulse:
            pulse.fail(known)
        end_rank(known, "" if isinstance(known, Preempted) else traceback.format_exc(), logs, console)


def end_rank(error: BaseException, trace: str, logs: Path, console: Console) -> NoReturn:
    """Tell what ends this rank, and exit with the code of its class."""
    tell_error(logs, console, error, trace)
    # Without waiting for the others: a rank that still sits in a collective would hold the exit up.
    sys.stdout.flush()
    os._exit(getattr(error, "exit_code", 70))


def tell_error(logs: Path, console: Console, error: BaseException, trace: str = "") -> None:
    """Write down what ends this rank, and show it where no launcher does."""
    kind, told = type(error).__name__, redact(str(error))
    print(redact(trace) or told, file=sys.stderr)
    write_error(logs, error, trace)
    ended = "" if isinstance(error, Preempted) else f" failed: {kind}"
    console.fail(f"Rank {rank()}{ended}: {told or kind} (log: {console.log_path})")


def write_error(logs: Path, error: BaseException, trace: str = "") -> None:
    """Write what ends this rank to logs/rankN.error.json or, where is no room, where its launcher looks as well."""
    record = {
        "rank": rank(),
        "time": time.time(),
        "type": type(error).__name__,
        "exit_code": getattr(error, "exit_code", 70),
        "message": redact(str(error)) or type(error).__name__,
        "traceback": redact(trace),
    }
    name, spare = f"rank{rank()}.error.json", os.environ.get(SPARE_ERRORS)
    try:
        write_json(logs / name, record)
    except OSError:
        if spare:
            write_json(Path(spare) / name, record)


def as_known_error(error: BaseException) -> BaseException:
    """Tell a failed peer and a disk that refuses from a failure of this rank's own."""
    if isinstance(error, TunewrightError):
        return error
    if refused(error):
        return StorageError(str(error))
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_SIGNS):
        return PeerError(f"lost contact with another rank: {first_line(error)}")
    return error
