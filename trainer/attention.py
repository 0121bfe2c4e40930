"""Attention over a flat row of documents: each token sees its own document only, and no mask is ever built.

Registered with transformers' attention interface, so that every model that uses the interface can run on it. No mask
function is registered beside it: transformers then builds none, which is right for flat rows only. Padded batches and
generation use a model loaded with transformers' own "sdpa".
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "tunewright_varlen"


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document.

    Args:
        query: (1, heads, T, head_dim), where T counts the tokens of all documents.
        key, value: (1, kv_heads, T, head_dim).
        kwargs: `cu_seq_lens_q` (documents + 1,) int32 and `max_length_q` from `FlatCollator`.

    Returns:
        (1, T, heads, head_dim) and no weights.
    """
    cu_seq_lens = kwargs["cu_seq_lens_q"]
    if query.device.type == "cuda" and query.dtype != torch.float32:  # the kernel is for half precision only
        return _varlen_kernel(query, key, value, cu_seq_lens, kwargs["max_length_q"], scaling), None
    return _per_document(query, key, value, cu_seq_lens, scaling), None


def _varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """PyTorch's flash attention for ragged rows, on CUDA and ROCm. It wants (T, heads, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    out = varlen_attn(
        *flat,
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal: nothing to the right
        enable_gqa=query.size(1) != key.size(1),
    )
    return out[None]  # type: ignore[index, no-any-return]


def _per_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_lens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    bounds = cu_seq_lens.tolist()
    parts = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=query.size(1) != key.size(1),
        )
        for start, end in pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def register() -> str:
    """Make the attention known to transformers and return the name to load models with."""
    AttentionInterface.register(NAME, varlen_attention)
    return NAME
