"""The signals by which schedulers, shells and people ask a training to stop, and who hears them meanwhile."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

RANK_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOP_SIGNALS = (*RANK_STOP_SIGNALS, signal.SIGUSR2)  # which has a rank write its stacks, see trainer/pulse.py
# One request may come twice: `timeout` signals its child and then the group, Slurm a launcher and its ranks.
SAME_REQUEST_SECONDS = 2.0


class StopAsked(KeyboardInterrupt):
    """A signal asked to stop where nothing can be saved yet; like Ctrl-C it passes every `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


class Requests:
    """What signals have asked for: to stop once it can go on from there, and to leave at once."""

    def __init__(self) -> None:
        self.first: str | None = None  # the signal's name
        self.again = False
        self._since = 0.0

    def hear(self, number: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._since = signal.Signals(number).name, now
        elif now - self._since > SAME_REQUEST_SECONDS:
            self.again = True


def interrupt(number: int, frame: Any) -> None:
    """Stop what runs, as Ctrl-C does.

    Raises:
        StopAsked: always.
    """
    raise StopAsked(number)


def ignore() -> None:
    """Hear no more requests: this process stops already, and its exit code is to say so."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def heard_by(
    handler: Callable[[int, Any], None],
    numbers: Collection[int] = STOP_SIGNALS,
    *,
    unless_taken: bool = False,
) -> Iterator[None]:
    """Have a function called for signals, and give them back at the end.

    Signals that are ignored stay so (`nohup`, commands in the background of a script). Only a process's main thread
    can hear any: in another one nothing is changed.

    Args:
        unless_taken: leave those alone that something else in this process hears.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        usual = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in numbers}
        before = {
            number: present
            for number, present in before.items()
            if present is not signal.SIG_IGN and not (unless_taken and present not in usual)
        }
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, present in before.items():
            signal.signal(number, present)
