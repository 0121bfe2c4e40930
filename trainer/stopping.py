"""A request to stop: each rank hears signals for itself, and all of them stop after the same step, with a checkpoint.

Until the first step there is nothing to save, and a rank leaves at once. After the last one it is as good as done, and
goes on to its end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from threading import Thread
from typing import Any

import psutil

from tunewright.errors import Preempted
from tunewright.stop_signals import RANK_STOP_SIGNALS, Requests

AT_ONCE = 130  # a second signal
WITH_A_PEER = 128 + signal.SIGTERM  # torchrun ends the ranks that are left when one has failed
TELLING_SECONDS = 5.0  # then a rank has had time to say what it knows of a peer's end


class Phase(Enum):
    """How far a rank is."""

    loading = "loading"
    training = "training"
    ending = "ending"


class Stopping:
    """Whether to stop, as a question of `agreement.Agreement`, and what a rank does about a signal meanwhile.

    Args:
        leave: called in a rank that is asked to stop before its first step; tells it, and the process ends.
    """

    def __init__(self, leave: Callable[[Preempted], None] = lambda error: print(error, file=sys.stderr)) -> None:
        self.requests, self.phase, self.leave = Requests(), Phase.loading, leave
        self.stopped_at: int | None = None  # the step after which all ranks stop

    # The question

    def asked(self, state: Any) -> float:
        return float(self.requests.first is not None)

    def answered(self, value: float, args: Any, state: Any, control: Any) -> None:
        control.should_save = control.should_training_stop = True
        self.stopped_at = state.global_step

    # What the training says

    def begin(self) -> None:
        """From now on a request waits for the end of a step, and of what is evaluated after it.

        Raises:
            Preempted: there has been one.
        """
        if self.requests.first and self.phase is Phase.loading:
            raise self.before_training()
        self.phase = Phase.training

    def stopped(self) -> Preempted:
        return Preempted(
            f"Stopped after step {self.stopped_at}: resume=auto goes on from checkpoint-{self.stopped_at}."
        )

    def end(self) -> None:
        """From now on nothing stops what is left to do."""
        self.phase = Phase.ending

    def before_training(self) -> Preempted:
        return Preempted(f"Stopped by {self.requests.first} before the first step: there was nothing to save.")

    # A rank's ears

    def listen(self) -> None:
        """Hear signals from now on, to the end of this process, which is a rank's.

        In a thread: Python would call a handler only once the main thread returns from what it waits for in C++.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in RANK_STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
        os.register_at_fork(after_in_child=_deaf)
        Thread(target=self._listen, args=(reading, os.getppid()), daemon=True).start()
        # The launcher has them wait until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, RANK_STOP_SIGNALS)

    def _listen(self, reading: int, launcher: int) -> None:
        while True:
            for number in os.read(reading, 64):
                if number in RANK_STOP_SIGNALS:
                    self._hear(number, launcher)

    def _hear(self, number: int, launcher: int) -> None:
        if number == signal.SIGTERM and _peer_is_gone(launcher):
            if self.phase is not Phase.ending:
                time.sleep(TELLING_SECONDS if self.phase is Phase.training else 0)
                os._exit(WITH_A_PEER)
            return
        self.requests.hear(number)
        if self.requests.again:
            os._exit(AT_ONCE)
        if self.phase is Phase.loading:
            self.leave(self.before_training())
            os._exit(Preempted.exit_code)


def _deaf() -> None:
    """What a rank forks is no rank, and ends like any process."""
    signal.set_wakeup_fd(-1)
    for number in RANK_STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _peer_is_gone(launcher: int) -> bool:
    """Tell whether the launcher has fewer ranks than it started: then its SIGTERM means that one of them failed."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here == 1 or os.getppid() != launcher:
        return False
    there = 0
    with suppress(psutil.NoSuchProcess):
        for beside in psutil.Process(launcher).children():
            with suppress(psutil.NoSuchProcess):
                there += beside.status() != psutil.STATUS_ZOMBIE
    return there < here
