"""When a checkpoint is written where no number of steps says so: often enough that little is lost, and never dear."""

from __future__ import annotations

import time
from typing import Any

from tunewright.trainer.checkpointing import Checkpoints

EVERY_SECONDS = 600.0
PARTS = 10  # of a run's time, with a checkpoint at the end of each
SHARE = 0.03  # of the time that saving may take
BYTES_PER_SECOND, LEAST_SECONDS = 3e8, 0.3  # of the first save, which has not been measured


class SaveSchedule:
    """A question of `Agreement`: is a checkpoint due? The first rank's clock says so.

    Args:
        checkpoints: what saves, and knows how long that takes.
        parameters: trained ones, in all ranks together: what the first save is guessed from.
        main: whether this is the first rank.
    """

    def __init__(self, checkpoints: Checkpoints, parameters: int, *, main: bool) -> None:
        self.checkpoints, self.main = checkpoints, main
        self.guess = LEAST_SECONDS + 16 * parameters / BYTES_PER_SECOND  # weights, and three float32 of AdamW's
        self.begun: tuple[float, int] | None = None  # time and step

    def seconds(self) -> float:
        """Return how long a save takes, measured or guessed."""
        return self.guess if self.checkpoints.seconds is None else self.checkpoints.seconds

    def asked(self, state: Any) -> float:
        now = time.perf_counter()
        if self.begun is None:  # the first step, with whatever is compiled in it, is no measure of the others
            self.begun = now, state.global_step
        begun, first = self.begun
        if not self.main:
            return 0.0
        waited = now - self.checkpoints.saved_at
        dear = self.seconds() / SHARE
        if state.global_step >= state.max_steps:  # a run that is to be longer some day goes on from here
            return float(waited >= dear)
        whole = (now - begun) / max(state.global_step - first, 1) * state.max_steps
        return float(waited >= max(min(EVERY_SECONDS, whole / PARTS), dear))

    def answered(self, value: float, args: Any, state: Any, control: Any) -> None:
        control.should_save = True
