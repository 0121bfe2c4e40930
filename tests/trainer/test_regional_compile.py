"""Compiled layers train as uncompiled ones do."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from tests.conftest import losses, read_metrics

HEADERS = Path(sysconfig.get_path("include")) / "Python.h"
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and HEADERS.is_file()), reason="torch.compile needs g++ and Python's header files"
)
METHODS = {
    "lora": ["method.dropout=0"],
    "lora-bfloat16": ["model.dtype=bfloat16"],
    "qlora": ["method=qlora"],
    "prompt_tuning": ["method=prompt_tuning", "train.learning_rate=0.3"],
    "prefix_tuning": ["method=prefix_tuning", "train.learning_rate=0.3"],
    "dora": ["method.dora=true"],
    "full": ["method=full"],
    "checkpointing": ["train.gradient_checkpointing=true"],
}


def quick(model: Path) -> list[str]:
    few = ["train.max_steps=4", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
    return ["model=folder", f"model.path={model}", "train.learning_rate=1e-2", *few]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize(
    "name", [name if name == "lora-bfloat16" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_compiled_layers_train_as_uncompiled_ones_do(
    name: str, small_model: Path, train_here: Callable[..., Path], trainers: list[Any]
) -> None:
    plain = train_here(f"plain-{name}", *quick(small_model), *METHODS[name])
    assert not counters["stats"]["unique_graphs"]
    compiled = train_here(f"compiled-{name}", *quick(small_model), *METHODS[name], "train.compile=true")
    assert counters["stats"]["unique_graphs"]

    close = {"rel": 2e-3} if "bfloat16" in name else {"rel": 1e-4}
    assert losses(compiled) == pytest.approx(losses(plain), **close)
    assert losses(plain)[-1] < 0.99 * losses(plain)[0]
    assert read_metrics(compiled)[-1]["eval_loss"] == pytest.approx(read_metrics(plain)[-1]["eval_loss"], **close)
    norms = [[line["grad_norm"] for line in read_metrics(run) if "grad_norm" in line] for run in (compiled, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    saved, expected = (load_file(next((run / "final").glob("*model.safetensors"))) for run in (compiled, plain))
    assert saved.keys() == expected.keys()


def test_batches_of_other_lengths_are_not_compiled_anew(small_model: Path, train_here: Callable[..., Path]) -> None:
    """Nor for another model of the same shape."""
    rows = [*quick(small_model), "train.compile=true", "train.global_batch_size=1"]
    train_here("one-length", *rows, "train.max_steps=2")  # the first micro-batch runs uncompiled
    graphs = counters["stats"]["unique_graphs"]
    lengths = train_here("lengths", *rows)
    assert len({line["step_tokens"] for line in read_metrics(lengths) if "loss" in line}) > 1
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_ranks_compile_too(strategy: str, train: Callable[..., Path]) -> None:
    few = [f"strategy={strategy}", "train.max_steps=3", "data.max_samples=12", "train.logging_steps=1"]
    plain, compiled = train(f"uncompiled-{strategy}", *few), train(f"compiled-{strategy}", *few, "train.compile=true")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
