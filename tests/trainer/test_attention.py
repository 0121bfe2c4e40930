"""Attention over a flat row is attention over each of its rows alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from trainer.attention import varlen_attention

LENGTHS = [5, 1, 33, 12]


def tensors(device: str, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), 64) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The reference: a dense mask that lets each token see the earlier ones of its own row."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (document[:, None] == document[None]) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.device), enable_gqa=True)
    return out.transpose(1, 2)


def flat(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=query.device)
    kwargs = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(LENGTHS)}
    return varlen_attention(torch.nn.Module(), query, key, value, None, **kwargs)[0]


def compare(device: str, dtype: torch.dtype, tolerance: float) -> None:
    mine, theirs = tensors(device, dtype), tensors(device, dtype)
    out, expected = flat(*mine), alone(*theirs)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    out.square().sum().backward()
    expected.square().sum().backward()
    for my, their in zip(mine, theirs, strict=True):
        torch.testing.assert_close(my.grad, their.grad, rtol=tolerance, atol=10 * tolerance)


def test_each_row_sees_itself_only() -> None:
    compare("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
def test_each_row_sees_itself_only_in_the_kernel_of_a_gpu() -> None:
    compare("cuda", torch.bfloat16, 2e-2)
