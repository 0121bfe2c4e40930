"""Which of PyTorch's kernels a GPU takes, for tensors that stand for those of one.

`scaled_dot_product_attention` asks the device itself. Here it is the rule of GPUs that have all kernels: flash
attention for half precision without a mask, else the memory-efficient one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
FLASH_HEAD_DIM = 256  # the largest head that flash attention takes
ALIGNMENT = 8  # numbers of a mask's row that the memory-efficient kernel wants a multiple of


class GpuKernels(TorchFunctionMode):
    """While it is entered, what computes otherwise on a GPU takes the memory that it takes there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return attend(*args, **kwargs)
        if func is torch.dropout:  # its mask is of bytes there
            given, share, training = args
            return torch.native_dropout(given, share, training)[0] if training and share > 0 else given
        if func is torch.mm and "out_dtype" in kwargs:
            return args[0].new_empty(args[0].size(0), args[1].size(1), dtype=kwargs["out_dtype"])
        if func is torch.addmm and "out_dtype" in kwargs:
            return kwargs["out"]
        return func(*args, **kwargs)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attend as `scaled_dot_product_attention` does: query (..., heads, T, size), and so on."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.size(-1) == value.size(-1) <= FLASH_HEAD_DIM:
        size = query.size(-1)
        padded = [
            tensor if size % ALIGNMENT == 0 else torch.nn.functional.pad(tensor, (0, -size % ALIGNMENT))
            for tensor in (query, key, value)
        ]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :size]  # type: ignore[no-any-return]
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    differentiable = any(tensor.requires_grad for tensor in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, bias, differentiable, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return what a mask adds to the scores, for all heads, in memory of one head that is aligned."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    keys = mask.size(-1)
    if keys % ALIGNMENT:
        mask = torch.nn.functional.pad(mask, (0, -keys % ALIGNMENT))[..., :keys]
    return mask.expand(*query.shape[:-1], key.size(-2))
