"""What is not finite: refused before the first step, seen at its step, in no checkpoint, and told with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from tests.conftest import losses, manifest, read_metrics
from tunewright.checkpoints import listed
from tunewright.errors import NumericError, StorageError
from tunewright.trainer.divergence import trouble

TrainHere = Callable[..., Path]


def quick(model: Path, *more: str) -> list[str]:
    few = ["data.max_samples=24", "train.global_batch_size=4", "train.micro_batch_size=2", "train.logging_steps=50"]
    return ["model=folder", f"model.path={model}", "data.eval_names=[]", "train.warmup_ratio=0", *few, *more]


def damaged(model: Path, folder: Path, value: float, name: str) -> Path:
    """A copy of a model with one value of a weight that is not finite."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "name", "method"),
    [
        (float("nan"), "model.embed_tokens.weight", ["method=lora"]),
        (float("-inf"), "model.layers.1.mlp.up_proj.weight", ["method=full", "model.dtype=bfloat16"]),
        (float("nan"), "model.layers.0.self_attn.q_proj.weight", ["method=qlora"]),
        (float("nan"), "model.layers.0.self_attn.q_proj.weight", ["method=qlora", "method.double_quant=false"]),
        (float("inf"), "model.layers.0.self_attn.q_proj.weight", ["method=qlora", "method.bits=8"]),
    ],
    ids=["embedding", "bfloat16", "4 bits", "4 bits, single", "8 bits"],
)
def test_a_base_that_is_not_finite_is_refused_before_the_first_step(
    value: float, name: str, method: list[str], train_here: TrainHere, small_model: Path, tmp_path: Path
) -> None:
    folder = damaged(small_model, tmp_path / "damaged", value, name)
    with pytest.raises(StorageError, match=rf"damaged/model\.safetensors: the weight {name} holds values that are not"):
        train_here(f"refused-{len(list(tmp_path.parent.iterdir()))}", *quick(folder, *method, "train.max_steps=1"))


class OddOnce:
    """The cross-entropy, but `value` for one micro-batch."""

    def __init__(self, call: int, value: float) -> None:
        self.calls, self.call, self.value = 0, call, value

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = cross_entropy(logits, labels, reduction="sum")
        return loss * self.value if self.calls == self.call else loss
