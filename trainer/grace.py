"""Whether there is time for a checkpoint between a request to stop and the kill that follows it."""

from __future__ import annotations

import os
import time
from typing import Any

from omegaconf import DictConfig
from transformers import TrainerCallback

from tunewright.ranks import launched
from tunewright.trainer.checkpointing import Checkpoints
from tunewright.trainer.console import Output

TORCHRUN_SECONDS = 30  # that torchrun gives its ranks, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says otherwise


class Grace(TrainerCallback):
    """Says once when a step and a checkpoint take longer than there is time, by what they took.

    Args:
        config: `train.grace_seconds`, None where nobody knows.
        seconds: that the last checkpoint of a run that goes on took to save.
    """

    def __init__(self, config: DictConfig, checkpoints: Checkpoints, output: Output, seconds: float | None) -> None:
        self.grace, self.setting = grace_of(config)
        self.checkpoints, self.output, self.before = checkpoints, output, seconds
        self.told = False
        self.begun = 0.0
        self.step: float | None = None  # seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(self.before)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = time.perf_counter() - self.begun

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(self.checkpoints.seconds)

    def _compare(self, save: float | None) -> None:
        if self.told or save is None or self.grace is None or save + (self.step or 0.0) <= self.grace:
            return
        self.told = True
        step = f" after a step of {self.step:.3g} s" if self.step is not None else ""
        self.output.say(
            f"A checkpoint takes {save:.3g} s to save{step}, and {self.setting} leaves {self.grace:g} s between the "
            f"request to stop and the kill: what this run has done since the checkpoint before would be lost then. "
            f"Give it more time."
        )


def grace_of(config: DictConfig) -> tuple[float | None, str]:
    """Return the seconds that a rank has to stop, as far as is known, and what says so."""
    known = {"train.grace_seconds": config.train.grace_seconds}
    if not launched() and "TORCHELASTIC_RUN_ID" in os.environ:  # ours keeps torchrun out of it
        name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
        known[f"torchrun's {name}"] = float(os.environ.get(name, TORCHRUN_SECONDS))
    given = [(seconds, name) for name, seconds in known.items() if seconds is not None]
    return min(given) if given else (None, "")
