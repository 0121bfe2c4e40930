"""What an optimiser keeps for each trained weight, and what it needs for a moment while it steps.

Read from PyTorch 2.15 (`torch/optim`), transformers 5.23 (`Adafactor`) and bitsandbytes 0.50 (`optim/optimizer.py`,
`backends/cpu/ops.py`). Optimisers step float32 weights here: the weights themselves, or their masters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 256  # weights whose 8-bit states share a float32 scale
LEAST_8BIT = 4096  # a tensor of fewer weights has states in float32
LEAST_PAGED = 100_000  # a tensor of fewer weights has states that stay on the device

Shapes = list[tuple[list[int], int]]  # of tensors, each with how many there are


@dataclass(frozen=True)
class _Optimizer:
    states: int  # float32 numbers for each weight
    step_cpu: int  # float32 copies of the largest tensor that exist at once while it is stepped on a CPU
    step_gpu: int = 0  # the same of all tensors, which PyTorch's `foreach` steps together on a GPU


_KNOWN = {
    "adamw_torch_fused": _Optimizer(2, 0),
    "adamw_torch": _Optimizer(2, 2, 1),
    "sgd": _Optimizer(0, 0),
    "adagrad": _Optimizer(1, 1, 2),
    "rmsprop": _Optimizer(1, 1, 1),
    "adamw_32bit": _Optimizer(2, 3),
    "adamw_8bit": _Optimizer(2, 5),
    "ademamix_32bit": _Optimizer(3, 4),
    "ademamix_8bit": _Optimizer(3, 9),
    "lion_32bit": _Optimizer(1, 3),
    "lion_8bit": _Optimizer(1, 4),
}


def states(name: str, shapes: Shapes) -> int:
    """Return the bytes of what the optimiser of transformers' `name` keeps for tensors of these shapes."""
    return sum(count * _of_tensor(name, shape) for shape, count in shapes)


def paged(name: str, shapes: Shapes) -> int:
    """Return the bytes of states that a GPU's driver may move to the host's memory (bitsandbytes)."""
    if not name.startswith("paged_"):
        return 0
    return states(name, [(shape, count) for shape, count in shapes if math.prod(shape) >= LEAST_PAGED])


def while_stepping(name: str, shapes: Shapes, *, gpu: bool) -> int:
    """Return the bytes that a step needs beside weights, gradients and states."""
    sizes = [math.prod(shape) for shape, _ in shapes]
    largest, total = max(sizes, default=0), sum(size * count for size, (_, count) in zip(sizes, shapes, strict=True))
    if name == "adafactor":
        return 2 * 4 * largest  # the squared gradient and the update, then the update and what is subtracted
    found = _known(name)
    return 4 * (found.step_gpu * total if gpu else found.step_cpu * largest)


def _of_tensor(name: str, shape: list[int]) -> int:
    size = math.prod(shape)
    if name == "adafactor":  # of a matrix, the means of its rows and of its columns
        return 4 * (size // shape[-1] + size // shape[-2] if len(shape) > 1 else size)
    found = _known(name)
    if name.endswith("8bit") and size >= LEAST_8BIT:
        return found.states * (size + 4 * math.ceil(size / BLOCK))
    return 4 * found.states * size


def _known(name: str) -> _Optimizer:
    if name in _KNOWN:
        return _KNOWN[name]
    kind = name.removeprefix("paged_").replace("bnb_", "")
    return _KNOWN.get(kind) or _KNOWN[f"{kind}_32bit"]
