"""Attention of rows that lie end to end, on a CPU: blocks of queries, each against the keys that it sees.

PyTorch's own kernel for a CPU walks such short rows slowly, above all backwards. Here each block is a few batched
matrix products: with torch 2.15 on a processor with AVX512-BF16, rows of 235 tokens take 0.4 times as long forward and
backward, of 900 tokens 0.65 times, of 3,000 tokens 0.85 times.

Scores are computed in float32 whatever the model's format, as a flash kernel does: some models have scores in the
hundreds, which bfloat16 would round to whole numbers. PyTorch (2.15) has no product of bfloat16 with a float32 result
on a CPU. What was bfloat16 is multiplied by oneDNN all the same, as float32 that may be read as bfloat16, which loses
nothing: with AMX it is such a product, and on an AMD processor oneDNN's float32 does 2.2 times what MKL's does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunewright.trainer.model.planned_device import telling

# Queries of a block, about. Longer ones compute more scores that nothing looks at, shorter ones start more small
# products.
BLOCK = 128
# The probabilities of documents up to this many tokens are kept for the backward pass, those of longer ones computed
# again: what is kept grows with the square of the length.
KEPT = 512


def cpu_varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query: (1, heads, T, head_dim), T the tokens of all documents.
        key: (1, kv_heads, T, head_dim).
        value: (1, kv_heads, T, value_dim).
        lengths: tokens of each document; their sum is T.
        scaling: what scores are multiplied by; None: head_dim ** -0.5.
        sliding_window: how many tokens a token sees, itself among them; None: all before it.

    Returns:
        (1, T, heads, value_dim).
    """
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return _CpuVarlenAttention.apply(query, key, value, lengths, scale, sliding_window)  # type: ignore[no-any-return]


class _CpuVarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: list[int],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        out = query.new_empty(1, query.size(2), query.size(1), value.size(-1))
        outs = _by_token(out.transpose(1, 2), key.size(1))
        # As they are read below, once: of a block nothing has to be copied then.
        queries, keys, values = _by_token(query, key.size(1)).contiguous(), key[0].contiguous(), value[0].contiguous()
        float_queries, float_keys = queries.float(), keys.float()
        unseen, exact = _Unseen(window), query.dtype == torch.bfloat16
        kept = []
        for block, seen, length in _blocks(_told(lengths, query), window):
            with _read_as_bfloat16(exact):
                scores = _scores(float_queries[:, block], float_keys[:, seen], scale)
            probabilities = _probabilities(scores, unseen, queries.size(2)).to(value.dtype)
            outs[:, block] = torch.bmm(probabilities, values[:, seen]).unflatten(1, (-1, outs.size(2)))
            if any(ctx.needs_input_grad) and length <= KEPT:
                kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.lengths, ctx.scale, ctx.window = lengths, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        queries, keys, values, *kept = ctx.saved_tensors
        kv_heads, tokens, groups, size = queries.shape
        d_query = queries.new_empty(1, tokens, kv_heads * groups, size).transpose(1, 2)
        d_queries, d_outs = _by_token(d_query, kv_heads), _by_token(d_out.transpose(1, 2), kv_heads).contiguous()
        # Several blocks add to the same keys: in float32.
        d_keys, d_values = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (keys, values))
        unseen, exact = _Unseen(ctx.window), queries.dtype == torch.bfloat16
        still_kept = iter(kept)
        for block, seen, length in _blocks(_told(ctx.lengths, queries), ctx.window):
            if length <= KEPT:
                probabilities = next(still_kept)
            else:
                with _read_as_bfloat16(exact):
                    scores = _scores(queries[:, block].float(), keys[:, seen].float(), ctx.scale)
                probabilities = _probabilities(scores, unseen, groups).to(values.dtype)
            d_block = d_outs[:, block].flatten(1, 2)
            d_values[:, seen] += torch.bmm(probabilities.mT, d_block)
            d_probabilities = torch.bmm(d_block, values[:, seen].mT)
            # The gradient through a softmax, which reads bfloat16 and computes in float32.
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, d_probabilities.dtype)
            d_queries[:, block] = torch.bmm(d_scores, keys[:, seen]).unflatten(1, (-1, groups))
            d_keys[:, seen] += torch.bmm(d_scores.mT, queries[:, block].flatten(1, 2))
        d_query *= ctx.scale
        return d_query, d_keys.mul_(ctx.scale).to(keys.dtype)[None], d_values.to(values.dtype)[None], None, None, None


def _told(lengths: list[int], query: torch.Tensor) -> list[int]:
    """Return the documents to go through: those of which nothing is kept have one after the other the same memory."""
    return lengths if lengths[0] <= KEPT else list(telling(lengths, query))


def _blocks(lengths: list[int], window: int | None) -> Iterator[tuple[slice, slice, int]]:
    """Yield each block's queries, the keys that they see, which end at the same token, and its document's length."""
    begin = 0
    for length in lengths:
        size = math.ceil(length / max(round(length / BLOCK), 1))
        for first in range(begin, begin + length, size):
            last = min(first + size, begin + length)
            yield slice(first, last), slice(begin if window is None else max(begin, first - window + 1), last), length
        begin += length


def _by_token(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return (1, heads, T, size) as (kv_heads, T, query heads of each, size), without copying."""
    return tensor[0].unflatten(0, (kv_heads, -1)).transpose(1, 2)


@contextmanager
def _read_as_bfloat16(exact: bool) -> Iterator[None]:
    """Let float32 matrices that hold bfloat16 numbers be multiplied as such; the sums are of float32."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if exact else before
    try:
        yield
    finally:
        settings.fp32_precision = before


def _scores(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Return what each query says of each key, (kv_heads, queries x groups, keys) in float32.

    Args:
        queries: (kv_heads, queries, groups, size) of a block, in float32.
        keys: (kv_heads, keys, size), in float32.
    """
    flat = queries.flatten(1, 2)
    return flat.new_empty(*flat.shape[:2], keys.size(1)).baddbmm_(flat, keys.mT, beta=0, alpha=scale)


def _probabilities(scores: torch.Tensor, unseen: _Unseen, groups: int) -> torch.Tensor:
    """Return what each query takes from each key, in the memory of its scores (kv_heads, queries x groups, keys)."""
    unseen.take_off(scores.unflatten(1, (-1, groups)))
    return torch.softmax(scores, -1, out=scores)


class _Unseen:
    """Minus infinity for what a query of a block does not see: made once for each number of queries and of keys."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.made: dict[tuple[int, int], torch.Tensor] = {}

    def take_off(self, scores: torch.Tensor) -> None:
        """Add it to scores (kv_heads, queries, groups, keys); queries and keys end at the same token."""
        queries, keys = scores.size(1), scores.size(-1)
        if self.window is None:  # every query sees the keys before the block
            keys, scores = queries, scores[..., -queries:]
        if (queries, keys) not in self.made:
            unseen = scores.new_full((queries, keys), -torch.inf).triu_(1 + keys - queries)
            if self.window is not None:
                unseen += scores.new_full((queries, keys), -torch.inf).tril_(keys - queries - self.window)
            self.made[queries, keys] = unseen.unsqueeze(1)
        scores.add_(self.made[queries, keys])
