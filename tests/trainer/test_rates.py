"""A run that goes on with another learning rate, which was allowed, learns at that rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_metrics


def rates(run: Path) -> dict[int, float]:
    return {line["step"]: line["learning_rate"] for line in read_metrics(run) if "loss" in line}


@pytest.mark.parametrize("more", [[], ["method.loraplus_ratio=4"], ["model.dtype=bfloat16"]])
def test_an_allowed_rate_and_length_are_used(
    more: list[str], train_here: Callable[..., Path], small_model: Path, trainers: list[Any]
) -> None:
    """The steps after the checkpoint have the rates of a run that began with the new settings."""
    settings = ["model=folder", f"model.path={small_model}", "data.eval_names=[]", "data.max_samples=16", *more]
    settings += ["train.global_batch_size=4", "train.logging_steps=1", "train.save_steps=3"]
    new = ["train.learning_rate=1e-4", "train.weight_decay=0.1", "train.max_steps=8"]
    whole = rates(train_here("whole", *settings, *new))
    run = train_here("changed", *settings, "train.learning_rate=1e-2", "train.max_steps=6")
    before = rates(run)
    train_here("changed", *settings, *new, checkpoint=run / "checkpoints" / "checkpoint-6")
    after = rates(run)
    assert {step: after[step] for step in range(1, 7)} == before
    assert {step: after[step] for step in (7, 8)} == {step: whole[step] for step in (7, 8)}
    decays = [group["weight_decay"] for group in trainers[-1].optimizer.param_groups]
    assert 0.1 in decays
    assert decays == [group["weight_decay"] for group in trainers[0].optimizer.param_groups]
