"""Tensors that have shapes and no memory, in the place of those of a device that is planned for.

PyTorch knows only those of a CPU everywhere: a backward pass over fake tensors of a GPU ends with "hasPrimaryContext
expects a valid device index" where PyTorch is built for GPUs and there is none (torch 2.11 and 2.15). So they are on a
CPU for PyTorch, and what computes otherwise on a GPU asks `device_type`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Block = TypeVar("Block")


class PlannedDevice(FakeTensorMode):
    """Makes tensors without memory that stand for those of a device of a type, "cpu" or "cuda"."""

    def __init__(self, type: str) -> None:
        super().__init__()
        self.type = type


def device_type(tensor: torch.Tensor) -> str:
    """Return the type of a tensor's device, or of the one that is planned for."""
    return planned(tensor) or tensor.device.type


def planned(tensor: torch.Tensor) -> str | None:
    """Return the type of the device that a tensor is planned for, or None where it is a real one."""
    mode = tensor.fake_mode if isinstance(tensor, FakeTensor) else None
    return mode.type if isinstance(mode, PlannedDevice) else None


def telling(blocks: Sequence[Block], tensor: torch.Tensor) -> Sequence[Block]:
    """Return the blocks of a loop over a tensor: all, or where it has no memory the first two.

    Of blocks of one size, each of which takes the memory of the one before it, these two tell what there is.
    """
    return blocks[:2] if planned(tensor) else blocks
