"""What differs between the versions of the declared window (pyproject.toml), each with where it begins and its reason.

Everything else in the code is written against what all of them have. docs/versions.md tells what was run on which.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch


@cache
def kernel_is_told_of_grouped_heads() -> bool:
    """Whether `varlen_attn` wants `enable_gqa=True` where there are fewer key than query heads.

    torch 2.13 has the argument and refuses such heads without it; torch 2.11 has no such argument, and its flash
    attention takes them as they are.
    """
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@cache
def flash_attention_runs_on(device: torch.device) -> bool:
    """Whether PyTorch's flash attention has kernels for this GPU: not for a T4 or V100, nor for every AMD card.

    PyTorch keeps the list, which grows with its versions and is another one on ROCm.
    """
    probe = torch.empty(1, 1, 8, 64, dtype=torch.float16, device=device)
    return bool(
        torch.backends.cuda.can_use_flash_attention(
            torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, True, False)
        )
    )
