"""torch.compile, a layer at a time.

The layers of a model are alike, so that what is compiled for the first serves all, and the model's size does not show
in the time it takes ("regional compilation"). Compiled as a whole, a large model takes many minutes.
"""

from __future__ import annotations

import torch
from accelerate.utils.other import is_repeated_blocks


def compile_layers(model: torch.nn.Module) -> int:
    """Let each layer compile itself when it is first called, for any number of tokens; return how many there are.

    Layers stay the modules they are: names, hooks and what is saved do not change.
    """
    layers = [layer for block in _outermost_lists(model) for layer in block]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _outermost_lists(module: torch.nn.Module) -> list[torch.nn.ModuleList]:
    """Return the lists of layers: the experts inside a layer are a part of it."""
    if isinstance(module, torch.nn.ModuleList) and is_repeated_blocks(module):
        return [module]
    return [found for child in module.children() for found in _outermost_lists(child)]
