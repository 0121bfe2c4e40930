"""torch.compile, a layer at a time.

The layers of a model are alike, so that what is compiled for the first serves all, and the model's size does not show
in the time it takes ("regional compilation"). Compiled as a whole, a large model takes many minutes.
"""

from __future__ import annotations

import torch

from tunewright.trainer.model.layers import separate_layers


def compile_layers(model: torch.nn.Module) -> int:
    """Let each layer compile itself when it is first called, for any number of tokens; return how many there are.

    Layers stay the modules they are: names, hooks and what is saved do not change.

    Raises:
        ConfigError: see `separate_layers`.
    """
    layers = separate_layers(model, "train.compile")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
