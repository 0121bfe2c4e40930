"""Freeze-tuning: some layers, or the named modules in them, and the named modules outside them are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tunewright.plan.architecture import ends_with
from tunewright.trainer.model.layers import decoder_layers


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PreTrainedModel:
    layers = list(decoder_layers(model))
    model.requires_grad_(False)
    for layer in layers[-method.layers :] if method.layers > 0 else layers[: -method.layers]:
        if not method.modules:
            layer.requires_grad_(True)
        for name in method.modules:
            _train(layer, name)
    inside = {module for layer in layers for module in layer.modules()}
    for name in method.extra_modules:
        _train(model, name, beside=inside)
    return model


def _train(root: nn.Module, name: str, beside: set[nn.Module] | None = None) -> None:
    for path, module in root.named_modules():
        if ends_with(path, name) and module not in (beside or ()):
            module.requires_grad_(True)
