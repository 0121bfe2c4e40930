"""A training that runs to its end and has learnt nothing: said when it is seen, at the end, and in the manifest.

Every figure is finite then: the loss is above where it began, or there is no gradient left to learn by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from omegaconf import DictConfig
from transformers import TrainerCallback

from tunewright.metrics import FINAL_STEPS, read_metrics, step_losses
from tunewright.run_folder import RunDir
from tunewright.trainer.advice import calmer_steps
from tunewright.trainer.console import Output

# By how much a loss has to be above its start: a share of that, at least so much, and more than single steps differ.
MARGIN, STREAM_MARGIN = 0.1, 0.5  # rows of a stream may get harder
LEAST_MARGIN = 0.1
DEVIATIONS = 3.0
FEW_STEPS = 15  # fewer do not tell how much they differ: then by half of its start and 1
LEAST_STEPS = 4
LEARNT = 0.1  # a loss below has nothing left to learn
LIKE_CHANCE = 0.02  # how close to ln(vocabulary) a loss is called that of guessing


def trouble(losses: Sequence[float], still: int, vocabulary: int, *, stream: bool = False) -> str | None:
    """Return what is wrong with a training that has come so far, or None.

    Args:
        losses: of each optimiser step, from the run's first on.
        still: steps in a row, up to the last, whose gradient was exactly 0.
        vocabulary: tokens that the model chooses from.
        stream: the rows come in no order that was shuffled as a whole.
    """
    if len(losses) < LEAST_STEPS:
        return None
    last = losses[-min(FINAL_STEPS, len(losses) // 3) :]
    end, start = fmean(last), losses[0]
    margin = 0.5 * abs(start) + 1
    if len(losses) >= FEW_STEPS:
        # From step to step, so that a loss which still falls or rises does not count as noise.
        noise = math.sqrt(fmean((one - before) ** 2 for before, one in pairwise(last)) / 2)
        share = STREAM_MARGIN if stream else MARGIN
        margin = max(share * abs(start), LEAST_MARGIN) + DEVIATIONS * noise * math.sqrt(1 + 1 / len(last))
    found = []
    if end > start + margin and min(last) > start + (0 if len(losses) >= FEW_STEPS else margin):
        found.append(f"the loss is at {end:.2f}, above the {start:.2f} where it began")
    if still >= max(len(last), LEAST_STEPS) and end > LEARNT:
        found.append(f"the gradient has been 0 for {still:,} steps{'' if found else f' at a loss of {end:.2f}'}")
    if found and abs(end - math.log(vocabulary)) < LIKE_CHANCE * math.log(vocabulary):
        found.append(f"guessing among {vocabulary:,} tokens has a loss of {math.log(vocabulary):.2f}")
    return "; ".join(found) or None


class Watch(TrainerCallback):
    """Says once when a training goes wrong, and keeps what is to be said at its end.

    Args:
        trainer: tells losses and gradients, and of held-out losses that are not finite.
    """

    def __init__(self, config: DictConfig, run: RunDir, trainer: Any, output: Output) -> None:
        self.config, self.run, self.trainer, self.output = config, run, trainer, output
        self.losses: list[float] = []
        self.said: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Goes on; of another rank's file nobody knows how much is written.
        if state.is_world_process_zero and state.global_step and self.run.metrics.is_file():
            lines = read_metrics(self.run.metrics)
            self.losses = step_losses(line for line in lines if line["step"] <= state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.losses += self.trainer.meter.step_losses
            if text := self._trouble():
                self._say("trouble", text)
        for text in self.trainer.finiteness.warnings:
            self._say(text, text)

    def _say(self, key: str, text: str) -> None:
        if key not in self.said:
            self.said.add(key)
            self.output.say(f"  Warning: {text}")

    def _trouble(self) -> str | None:
        vocabulary = self.trainer.model.config.get_text_config().vocab_size
        text = trouble(self.losses, self.trainer.finiteness.still, vocabulary, stream=self.config.data.streaming)
        if text is None:
            return None
        advice = " and ".join(one.text for one in calmer_steps(self.config))
        return f"{text[:1].upper()}{text[1:]}: {advice}, and start anew."

    def warnings(self) -> list[str]:
        """Return what is wrong with the training now that it is at its end."""
        return [text for text in (self._trouble(), *self.trainer.finiteness.warnings) if text]
