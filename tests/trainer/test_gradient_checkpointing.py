"""Layers recompute their activations where memory asks for it, and the result does not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import losses, manifest
from tunewright.errors import ConfigError
from tunewright.trainer.model import gradient_checkpointing
from tunewright.trainer.model.gradient_checkpointing import Activations, measure
from tunewright.trainer.model.layers import separate_layers

QUICK = ["train.max_steps=4", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
QUICK += ["data.eval_names=[]", "train.learning_rate=1e-2"]
# What a plan that does not fit otherwise makes of auto.
AUTO = ["train.gradient_checkpointing=true", "automatic=[train.gradient_checkpointing]"]


def test_as_few_layers_recompute_as_fit() -> None:
    need = Activations(layers=10, layer=100, entry=10)
    assert need.recomputed(room=10 * 100 + 2 * 100 + 100) == 0
    assert need.recomputed(room=0) == 10
    assert need.recomputed(room=-50) == 10
    fits = [
        (room, need.recomputed(room) * 10 + (10 - need.recomputed(room)) * 100 + 200) for room in range(300, 1400, 7)
    ]
    assert all(used <= room + 100 for room, used in fits)
    assert {need.recomputed(room) for room, _ in fits} == set(range(11))
    assert [need.recomputed(room) for room, _ in fits] == sorted((need.recomputed(r) for r, _ in fits), reverse=True)


@pytest.mark.parametrize(
    "settings",
    [
        ["method.dropout=0.1", "train.neftune_alpha=5"],
        ["method=full", "model.dtype=bfloat16", "train.learning_rate=1e-3"],
        ["method=prompt_tuning"],
        ["data.packing=true", "data.cutoff_len=256"],
    ],
    ids=["lora", "full", "prompt_tuning", "packing"],
)
def test_what_is_trained_does_not_change(
    settings: list[str],
    request: pytest.FixtureRequest,
    small_model: Path,
    train_here: Callable[..., Path],
    trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = request.node.callspec.id
    model = ["model=folder", f"model.path={small_model}"]
    plain = train_here(f"plain-{name}", *model, *QUICK, *settings)
    plenty = train_here(f"plenty-{name}", *model, *QUICK, *settings, *AUTO)
    assert manifest(plenty)["recomputed_layers"] == 0

    # Room for one layer and a half, beside the one whose backward pass runs.
    layers = separate_layers(trainers[-1].model, "auto")
    need = measure(trainers[-1], layers)
    monkeypatch.setattr(gradient_checkpointing, "states_to_come", lambda trainer: 0)
    monkeypatch.setattr(gradient_checkpointing, "free_bytes", lambda device: 3.5 * need.layer)
    tight = train_here(f"tight-{name}", *model, *QUICK, *settings, *AUTO)
    assert manifest(tight)["recomputed_layers"] == 1
    assert [layer.gradient_checkpointing for layer in separate_layers(trainers[-1].model, "auto")] == [True, False]

    for run in (plenty, tight):
        assert losses(run) == pytest.approx(losses(plain), rel=1e-6)
        weights, expected = (load_file(next((one / "final").glob("*model.safetensors"))) for one in (run, plain))
        assert all(torch.allclose(weights[key], expected[key], atol=1e-6) for key in expected)


def test_layers_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`train.compile` looks at each layer, and the layers of this model cannot"):
        separate_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), "train.compile")


def test_what_is_measured_is_what_a_layer_keeps(
    small_model: Path, train_here: Callable[..., Path], trainers: list[Any]
) -> None:
    """Counted over the whole model with and without recomputation, on the largest micro-batch."""
    train_here("measured", "model=folder", f"model.path={small_model}", *QUICK, *AUTO)
    (trained,) = trainers
    layers = separate_layers(trained.model, "auto")
    need = measure(trained, layers)
    batch = trained._prepare_inputs(trained.largest_batch())

    def kept(recompute: bool) -> int:
        for layer in layers:
            layer.gradient_checkpointing = recompute
        sizes: dict[int, int] = {}
        weights = {weight.untyped_storage().data_ptr() for weight in trained.model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trained.compute_loss(trained.model, batch)
        assert loss > 0
        return sum(sizes.values())

    # The inputs of layers that recompute are not among what autograd saves: transformers holds on to them.
    saved = kept(False) - kept(True)
    # A little too much: the first layer keeps less, and what layers share (the rotary angles) is counted in each.
    assert saved <= 2 * need.layer <= 1.1 * saved
    assert need.entry == batch["input_ids"].numel() * 64 * 4


def test_the_largest_micro_batch_is_as_large_as_any(
    small_model: Path, train_here: Callable[..., Path], trainers: list[Any]
) -> None:
    settings = [[], ["data.packing=true"], ["train.global_batch_size=null", "train.tokens_per_batch=600"]]
    for number, more in enumerate(settings):
        cut = ["data.cutoff_len=200", "train.micro_batch_size=2", "train.max_steps=1"]
        train_here(f"largest-{number}", "model=folder", f"model.path={small_model}", *QUICK, *cut, *more)
        largest = trainers[-1].largest_batch()["input_ids"].numel()
        loader = trainers[-1].get_train_dataloader()
        for epoch in range(5):
            loader.set_epoch(epoch)
            assert all(batch["input_ids"].numel() <= largest for batch in loader)


def test_ranks_agree(train: Callable[..., Path]) -> None:
    """Under ZeRO-3, which gathers weights once more for a layer that recomputes."""
    quick = ["train.max_steps=2", "data.max_samples=8", "train.logging_steps=1", "data.eval_names=[]"]
    plain = train("recompute-false", "strategy=zero3", *quick)
    auto = train("recompute-auto", "strategy=zero3", *quick, *AUTO)
    assert manifest(auto)["recomputed_layers"] == 0
    assert losses(auto) == pytest.approx(losses(plain), rel=1e-6)
