"""What any rank asks for, known to all of them at the end of the same step: to stop, to save, that a loss is no number.

A rank that acted on its own would sit in a collective which the others never enter. So each step ends with one small
all-reduce between the ranks' CPUs; the devices go on working meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from transformers import TrainerCallback


class Question(Protocol):
    """One thing that ranks have to be of one mind about."""

    def asked(self, state: Any) -> float:
        """Return what this rank says at the end of a step, 0 where there is nothing; nothing waits for the device."""

    def answered(self, value: float, args: Any, state: Any, control: Any) -> None:
        """Act on the largest value of all ranks, which is above 0. Every rank is called at the same step."""


class Agreement(TrainerCallback):
    """Asks each of its questions at the end of each step, in all ranks.

    Args:
        timeout_minutes: how long a rank waits for the others.
    """

    def __init__(self, questions: Sequence[Question], timeout_minutes: float) -> None:
        self.questions = list(questions)
        self.group: Any = None
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # A group of its own also where the ranks' is gloo: these wait for `timeout_minutes` whatever a library set.
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for question, value in zip(self.questions, self.largest([q.asked(state) for q in self.questions]), strict=True):
            if value > 0:
                question.answered(value, args, state, control)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each value over all ranks; every rank has to call it."""
        if self.group is None:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return told.tolist()  # type: ignore[no-any-return]

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank says, a value that can be pickled; every rank has to call it."""
        if self.group is None:
            return [value]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, value, group=self.group)
        return everyone
