"""Which layers of a model are alike, so that a few stand for all of them.

A pass over a layer allocates what the pass over the one before it did. So of a stretch of layers that repeat, in
periods of one or several (every sixth of Gemma 3's sees all tokens), only so many are run that one period has its like
on both sides; what that period allocates is then written down as often as it is there. The first and the last are run
themselves: the first may have nothing trained before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LONGEST_PERIOD = 12  # layers
NUMBERS = ("layer_idx", "layer_id", "layer_number")  # what models call a layer's number


@dataclass(frozen=True)
class Repeated:
    """Layers `first` to before `end`, of those that are run, stand for `more` like them beside themselves."""

    first: int
    end: int
    more: int


def kept_layers(kinds: Sequence[Any]) -> tuple[list[int], list[Repeated]]:
    """Return which layers to run, by what `kinds` says of each, and which of these stand for others."""
    kept: list[int] = []
    repeated: list[Repeated] = []
    at = 0
    while at < len(kinds):
        period, more = _best(kinds, at)
        if not more:
            kept.append(at)
            at += 1
            continue
        end = _end(kinds, at, period)
        kept += range(at, at + 2 * period)
        repeated.append(Repeated(len(kept) - period, len(kept), more))
        rest = at + (2 + more) * period
        kept += range(rest, end)
        at = end
    return kept, repeated


def _best(kinds: Sequence[Any], at: int) -> tuple[int, int]:
    """Return the period by which most layers from `at` on need not be run, and how many periods these are."""
    spared = {}
    for period in range(1, min(LONGEST_PERIOD, len(kinds) - at) + 1):
        # One period at the beginning, the one that is repeated, and a layer after it at least.
        spared[period] = max((_end(kinds, at, period) - at - 1) // period - 2, 0)
    period = max(spared, key=lambda period: (spared[period] * period, -period))
    return period, spared[period]


def _end(kinds: Sequence[Any], at: int, period: int) -> int:
    """Return where the stretch ends in which each layer is as the one a period before it."""
    end = at + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return min(end, len(kinds))


def kind_of(layer: nn.Module, number: int) -> tuple[Any, ...]:
    """Return what makes a layer differ from others: its modules, their plain attributes, weights, and who is trained.

    The layer's own number does not.
    """
    told: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not (key in NUMBERS and value == number)
        }
        weights = [
            (key, tuple(weight.shape), weight.dtype, weight.requires_grad)
            for key, weight in module.named_parameters(recurse=False)
        ]
        told.append((name, type(module), tuple(sorted(plain.items())), tuple(weights)))
    return tuple(told)


def keep_only(model: Any, layers: nn.ModuleList, kept: Sequence[int]) -> None:
    """Take layers out of a model, and number those that stay as if there had never been others."""
    text, total = model.config.get_text_config(), len(layers)
    modules = [layers[number] for number in kept]
    del layers[:]
    layers.extend(modules)
    for number, (before, layer) in enumerate(zip(kept, modules, strict=True)):
        for module in layer.modules():
            for key, value in vars(module).items():
                if key in NUMBERS and value == before:
                    setattr(module, key, number)
    text.num_hidden_layers = len(kept)
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == total:  # which kind each of them is
            setattr(text, key, [value[number] for number in kept])


def written_out(states: torch.Tensor, segments: Sequence[tuple[int, int, torch.Tensor, int]]) -> torch.Tensor:
    """Return states (n, quantities) with each segment repeated.

    Args:
        segments: (first state, state after the last, what was held more at its end than at its beginning, and how
            often more it is there), in order.
    """
    parts, offset, at = [], torch.zeros_like(states[0]) if len(states) else None, 0
    for first, end, growth, more in segments:
        parts.append(states[at:first] + offset)
        # (more + 1, 1, quantities) + (1, states, quantities)
        steps = offset + growth * torch.arange(more + 1)[:, None]
        parts.append((states[first:end][None] + steps[:, None]).flatten(0, 1))
        offset, at = offset + growth * more, end
    parts.append(states[at:] + offset)
    return torch.cat(parts)
