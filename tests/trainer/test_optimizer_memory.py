"""What optimisers keep, as the plan works it out, beside what they really have after a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from transformers import Trainer, TrainingArguments

from tunewright.plan.optimizer_memory import states
from tunewright.plan.rules import OPTIMIZERS

SHAPES: list[tuple[list[int], int]] = [([96, 64], 2), ([3, 40, 50], 1), ([5000], 1), ([70], 3)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_what_the_optimiser_keeps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trainings before in this process have bitsandbytes keep some weights' states in 32 bits, by their numbers.
    monkeypatch.setattr(GlobalOptimManager.get_instance(), "index2config", {})
    made, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name, use_cpu=True))
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape, count in SHAPES for _ in range(count)]
    optimizer = made(weights, **options)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    # A scale's table is one for all tensors, and a counter a number.
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap") and value.numel() > 1
    )
    assert kept == states(name, SHAPES)
