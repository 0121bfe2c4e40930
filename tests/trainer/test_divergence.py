"""A training that ends without having learnt anything says so; one that learns little, or in jumps, does not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import losses, manifest
from tunewright.deliver.compare import compare
from tunewright.trainer.console import Printer
from tunewright.trainer.divergence import trouble

TrainHere = Callable[..., Path]
VOCABULARY = 4096
CHANCE = math.log(VOCABULARY)


def curve(start: float, end: float, steps: int = 40, noise: float = 0.05) -> list[float]:
    """Losses that begin at `start` and go to `end` within a few steps."""
    draws = np.random.default_rng(0).normal(0, noise, steps)
    return [end + (start - end) * math.exp(-step / 4) + float(draw) for step, draw in enumerate(draws)]


@pytest.mark.parametrize(
    ("told", "still", "expected"),
    [
        (curve(3.6, 4.3), 0, r"the loss is at 4\.\d+, above the 3\.\d+ where it began$"),
        (curve(3.6, CHANCE), 30, r"the loss is at 8.*began; the gradient has been 0 for 30 steps; guessing .* 8\.32$"),
        (curve(CHANCE, CHANCE, noise=0.0), 38, r"the gradient has been 0 for 38 steps at a loss of 8\.32; guess"),
        ([3.6, 15.0, 12.0, 9.0, 8.0, 8.1], 0, r"the loss is at 8\.05, above the 3\.60"),
        (curve(3.6, 0.4), 0, None),
        (curve(3.6, 3.6), 0, None),  # a rate that is too low
        (curve(CHANCE, CHANCE), 0, None),  # weights that were drawn, and few steps
        (curve(1.0, 1.3, noise=0.5), 0, None),  # one row a step
        (curve(3.6, 1e-5, noise=0.0), 30, None),  # learnt by heart
        ([3.6, 5.0, 4.0, 4.5], 0, None),
        ([3.6, 9.0], 2, None),
        ([], 0, None),
    ],
)  # fmt: skip
def test_what_is_said_of_a_curve(told: list[float], still: int, expected: str | None) -> None:
    found = trouble(told, still, VOCABULARY)
    assert found is None if expected is None else re.match(expected, found or "")


def test_rows_of_a_stream_may_get_harder() -> None:
    harder = curve(2.0, 2.6)
    assert trouble(harder, 0, VOCABULARY)
    assert trouble(harder, 0, VOCABULARY, stream=True) is None
    assert trouble(curve(2.0, 4.0), 0, VOCABULARY, stream=True)


@pytest.mark.parametrize("seed", range(3))
def test_chance_alone_is_hardly_ever_called_trouble(seed: int) -> None:
    """Rows of very different losses, and nothing that changes from step to step."""
    generator = np.random.default_rng(seed)
    false = sum(
        trouble(np.exp(generator.normal(0, 0.7, (steps, rows))).mean(1).tolist(), 0, VOCABULARY) is not None
        for _ in range(100)
        for rows in (1, 8)
        for steps in (9, 15, 40, 200)
    )
    assert false <= 8  # of 800


def quick(model: Path, *more: str) -> list[str]:
    few = ["data.max_samples=24", "train.global_batch_size=4", "train.micro_batch_size=4", "train.logging_steps=4"]
    return ["model=folder", f"model.path={model}", "data.eval_names=[]", *few, *more]


def test_a_rate_that_is_far_too_high_is_said_when_it_shows_at_the_end_and_in_a_comparison(
    train_here: TrainHere, tiny_model: Path, tmp_path: Path
) -> None:
    """Also in a run that goes on: its start is that of the first process."""
    lines: list[str] = []
    settings = quick(tiny_model, "train.learning_rate=1e6", "train.save_steps=8")
    run = train_here("hot", *settings, "train.max_steps=16", output=Printer(lines.append))
    (warning,) = manifest(run)["warnings"]
    assert warning.startswith(f"The loss is at {losses(run)[-1]:.2f}, above the {losses(run)[0]:.2f} where it began; ")
    assert "the gradient has been 0 for 14 steps" in warning
    assert "lower `train.learning_rate` (it is 1e+06; 0.0002 is usual for lora), and start anew" in warning
    assert "max_grad_norm" not in warning  # clipping is on already
    assert sum(line.startswith("  Warning: The loss is at ") for line in lines) == 1
    assert lines[-1] == f"Saved to {run / 'final'}. Warning: {warning}"
    compare([run], tmp_path / "compared", echo=lines.append)
    assert "done, with a warning" in lines[-2]
    assert f"hot: {warning}" in lines[-2]
    before = len(lines)
    more = {"checkpoint": run / "checkpoints" / "checkpoint-8", "output": Printer(lines.append)}
    train_here("hot", *settings, "train.max_steps=16", **more)
    assert manifest(run)["warnings"][0].startswith(f"The loss is at {losses(run)[-1]:.2f}, above the ")
    assert any(line.startswith("  Warning: ") for line in lines[before:])


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "lora"])
def test_a_method_that_begins_at_random_is_no_trouble(method: str, train_here: TrainHere, tiny_model: Path) -> None:
    rate = {"lora": "2e-4"}.get(method, "3e-2")
    run = train_here(
        method, *quick(tiny_model, f"method={method}", f"train.learning_rate={rate}", "train.max_steps=20")
    )
    assert manifest(run)["warnings"] == []
