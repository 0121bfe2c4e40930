"""When a checkpoint is written where no number of steps says so: often enough that little is lost, and never dear."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tunewright.trainer.checkpointing import Checkpoints

EVERY_SECONDS = 600.0
PARTS = 12  # of a run's time: ten checkpoints, although the first one waits for its guess
SHARE = 0.03  # of the time that saving may take
BYTES_PER_SECOND, LEAST_SECONDS = 3e8, 0.3  # of the first save, which has not been measured


class SaveSchedule:
    """A question of `Agreement`: is a checkpoint due? The first rank's clock says so.

    Args:
        checkpoints: what saves, and knows how long that takes and when it was.
        parameters: trained ones, in all ranks together: what the first save is guessed from.
        main: whether this is the first rank.
        now: seconds.
    """

    def __init__(
        self, checkpoints: Checkpoints, parameters: int, *, main: bool, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.checkpoints, self.main, self.now = checkpoints, main, now
        self.guess = LEAST_SECONDS + 16 * parameters / BYTES_PER_SECOND  # weights, and three float32 of AdamW's
        self.begun: tuple[float, int] | None = None  # time and step

    def asked(self, state: Any) -> float:
        now = self.now()
        if self.begun is None:  # the first step, with whatever is compiled in it, is no measure of the others
            self.begun = now, state.global_step
        begun, first = self.begun
        if not self.main:
            return 0.0
        seconds = self.guess if self.checkpoints.seconds is None else self.checkpoints.seconds
        waited, dear = now - self.checkpoints.saved_at, seconds / SHARE
        if state.global_step >= state.max_steps:  # a run that is to be longer some day goes on from here
            return float(waited >= dear)
        if state.global_step == first:
            return 0.0
        step = (now - begun) / (state.global_step - first)
        wanted = min(EVERY_SECONDS, step * state.max_steps / PARTS)
        return float(waited >= dear and waited + step / 2 >= wanted)  # at the nearest step, not the next one

    def answered(self, value: float, args: Any, state: Any, control: Any) -> None:
        control.should_save = True
