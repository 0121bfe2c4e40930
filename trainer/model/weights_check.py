"""Whether the weights that were loaded are numbers: a damaged base trains without a word until the loss is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tunewright.errors import StorageError
from tunewright.safetensors_header import shapes
from tunewright.trainer.process_group import all_gather

LOOKED_AT = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of 8 bits, their scales


def check_weights(model: Any, folder: Path, device: torch.device | None = None) -> None:
    """Look at all weights in memory once, each rank at the part that it holds; every rank has to call it.

    Args:
        folder: from which they were read, or of the adapter that was added.
        device: of this rank, over which it speaks with the others; the weights may still lie elsewhere.

    Raises:
        StorageError: a weight is not finite, on whichever rank.
    """
    device = device or torch.device("cpu")
    named = list(model.named_parameters())
    parts = [[part for part in _parts(weight) if part.numel()] for _, weight in named]
    # One pass without a copy: what is not a number comes through in both extremes.
    extremes = [[end.to(device, torch.float64) for part in own for end in torch.aminmax(part)] for own in parts if own]
    finite = torch.isfinite(torch.stack([torch.stack(ends).sum() for ends in extremes])).tolist() if extremes else []
    numbers = [number for number, own in enumerate(parts) if own]
    mine = next((number for number, good in zip(numbers, finite, strict=True) if not good), len(named))
    first = int(min(row[0] for row in all_gather([mine], device)))
    if first < len(named):
        name = named[first][0]
        file = _file_of(name, folder)
        raise StorageError(
            f"{file or folder}: the weight {name} holds values that are not finite (NaN or infinite). No loss can be "
            f"computed with it: fetch or convert the model again."
        )


def _parts(weight: Any) -> Iterator[torch.Tensor]:
    """Yield what this rank holds of a weight: of one split by ZeRO-3 its part, of a quantised one its scales."""
    state = getattr(weight, "quant_state", None)  # in 4 bits, which may lie in a tensor that says it is bfloat16
    if weight.dtype in LOOKED_AT and state is None:
        yield getattr(weight, "ds_tensor", weight).detach()
    for scales in (state, getattr(state, "state2", None)):
        yield from (one for one in (getattr(scales, "absmax", None), getattr(scales, "offset", None)) if _floats(one))
    if _floats(getattr(weight, "SCB", None)):  # in 8 bits
        yield weight.SCB


def _floats(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in LOOKED_AT


def _file_of(name: str, folder: Path) -> Path | None:
    """Return the file of a folder that holds a weight of this name, or None: some are called otherwise there."""
    for index in folder.glob("*.safetensors.index.json"):
        file = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).get(name)
        if file:
            return folder / file
    return next((file for file in sorted(folder.glob("*.safetensors")) if name in shapes(file)), None)
