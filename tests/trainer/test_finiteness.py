"""What is not finite: refused before the first step, seen at its step, in no checkpoint, and told with a way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tunewright.errors import StorageError

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
