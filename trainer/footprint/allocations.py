"""What memory the operations of a pass take, each storage from its birth to its end, on tensors without memory.

Every operation says what it makes, and Python tells when a storage is gone. What a kernel takes for itself beside its
result shows nowhere, and is in a short list here.
"""

from __future__ import annotations

import weakref
from functools import partial
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_BLOCK = 512  # bytes: PyTorch's allocator for GPUs hands out multiples of it
ACTIVATIONS, GRADIENTS, HEAD, SCRATCH = range(4)
State = tuple[int, int, int, int]  # bytes, numbers of weights, and of the bytes those of the head, and of scratch

# Flash attention adds up the gradients of queries in float32, and those of keys and values for each query head.
ATTENTION_BACKWARD = (
    "torch_attn::_varlen_attn_backward",
    "aten::_flash_attention_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
)


class Allocations(TorchDispatchMode):
    """Follows what is allocated while it is entered; tensors that exist before are told to `leave_out`.

    `states` has what is held after each operation that allocated.
    """

    def __init__(self, *, block: int = 1, masked: int = 0) -> None:
        """`masked` is what a selection by a mask selects: no values tell it."""
        super().__init__()
        self.states: list[State] = []
        self._block, self._masked = block, masked
        self._now = [0, 0, 0, 0]
        self._sizes: dict[int, tuple[int, int | None]] = {}  # of living storages: bytes, and what they count to as well
        self._ends: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._part: int | None = None

    @property
    def now(self) -> State:
        activations, gradients, head, scratch = self._now
        return activations, gradients, head, scratch

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor that was there before, nor what views it."""
        self._sizes[tensor.untyped_storage()._cdata] = 0, None

    def enter_head(self) -> None:
        """Count what is made from here on to the head as well."""
        self._part = HEAD

    def leave_head(self, *_: Any) -> None:
        self._part = None

    def became_gradient(self, parameter: torch.Tensor) -> None:
        """Count a weight's gradient as such, no longer as an activation."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, part = self._sizes.get(key, (0, None))
        self._add(-size, part)
        self._sizes[key] = 0, None
        self._now[GRADIENTS] += parameter.numel()
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        selected = _mask(args) if name == "aten::index" else None
        if selected is not None:
            made = args[0].new_empty(self._masked, *args[0].shape[selected.dim() :])
        elif name == "aten::bincount":  # of the tokens of experts, in transformers 5.17
            made = args[0].new_empty(args[2] if len(args) > 2 else kwargs["minlength"])
        else:
            made = func(*args, **kwargs)
        part = SCRATCH if _unpacks(name, args, made) else self._part
        new = False
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                new |= self._see(tensor.untyped_storage(), part)
        inside, scratch = _inside(name, args, made)
        if new or inside or scratch:
            self._note(inside, scratch)
        return made

    def _see(self, storage: torch.UntypedStorage, part: int | None) -> bool:
        """Count a storage unless it is known, and return whether that was so."""
        key = storage._cdata
        if key in self._sizes:
            return False
        size = -(-storage.nbytes() // self._block) * self._block
        self._sizes[key] = size, part
        self._ends[key] = weakref.ref(storage, partial(self._end, key))
        self._add(size, part)
        return True

    def _end(self, key: int, _: Any) -> None:
        size, part = self._sizes.pop(key)
        del self._ends[key]
        self._add(-size, part)

    def _add(self, size: int, part: int | None) -> None:
        self._now[ACTIVATIONS] += size
        if part is not None:
            self._now[part] += size

    def _note(self, inside: int = 0, scratch: int = 0) -> None:
        activations, gradients, head, before = self._now
        head += inside if self._part == HEAD else 0
        self.states.append((activations + inside + scratch, gradients, head, before + scratch))


def _mask(args: Any) -> torch.Tensor | None:
    """Return the mask that an indexing selects by."""
    return next((index for index in args[1] if index is not None and index.dtype == torch.bool), None)


def _unpacks(name: str, args: Any, made: Any) -> bool:
    """Whether an operation makes weights of the computation's format of packed ones."""
    if name.startswith("bitsandbytes::"):
        return "dequant" in name and "int8_mm" not in name
    return name == "aten::_to_copy" and args[0].dtype == torch.int8 and bool(made.is_floating_point())


def _inside(name: str, args: Any, made: Any) -> tuple[int, int]:
    """Return the bytes that a kernel takes beside its result, and those that it unpacks weights to."""
    if name == "bitsandbytes::gemm_4bit":  # bitsandbytes 0.50: of many rows, the weight is unpacked and multiplied
        given, packed, shape, _, blocksize = args[:5]
        return 0, prod(shape) * given.element_size() + 2 * 4 * 2 * packed.numel() // blocksize
    if name == "bitsandbytes::int8_scaled_mm":  # its sums are int32
        return 4 * made.numel(), 0
    if name in ATTENTION_BACKWARD:
        query, key = args[1:3]
        return 4 * query.numel() + (0 if key.shape == query.shape else 2 * query.nbytes), 0
    return 0, 0
