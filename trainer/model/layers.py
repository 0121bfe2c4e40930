"""The layers of a model, for what treats each for itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunewright.errors import ConfigError


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the list of decoder layers: the longest list of modules in the model."""
    return max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)


def layers_told_apart(model: torch.nn.Module) -> list[Any]:
    """Return the layers that transformers treats each for itself; a model of an older kind has none."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def separate_layers(model: torch.nn.Module, setting: str) -> list[Any]:
    """Return the layers that transformers treats each for itself, for a `setting` that does so too.

    Raises:
        ConfigError: the model has none.
    """
    layers = layers_told_apart(model)
    if not layers:
        raise ConfigError(
            f"`{setting}` looks at each layer, and the layers of this model cannot be told apart: leave it out."
        )
    return layers
