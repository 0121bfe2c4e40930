"""Attention over a flat row of documents: each token sees its own document only, without a mask over the row.

Registered with transformers' attention interface, so that every model that uses the interface can run on it. No mask
function is registered beside it: transformers then builds none, which is right for flat rows only. Padded batches and
generation use a model loaded with one of transformers' own implementations. `padding_free.py` tells which models may
run on flat rows; what only shows when one runs (an argument that changes the scores, a mask of the model's own) is
refused here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from tunewright.config.schema import AttentionKernel
from tunewright.errors import ConfigError
from tunewright.plan.kernel_rules import FLASH3, installed
from tunewright.trainer.model.cpu_varlen_attention import cpu_varlen_attention
from tunewright.trainer.model.planned_device import device_type, planned
from tunewright.trainer.versions import flash_attention_runs_on, kernel_is_told_of_grouped_heads

NAME = "tunewright_varlen"

# Tensors that models hand to every attention function and that do not change the scores.
HARMLESS_TENSORS = {"cu_seq_lens_q", "cu_seq_lens_k", "position_ids", "cache_position"}

# What configurations call the share of attention weights that is dropped.
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")

# The largest head of PyTorch's flash attention, and what the size of a head must be a multiple of.
KERNEL_HEAD_DIM, KERNEL_HEAD_STEP = 256, 8

ADVICE = ". Set `train.padding_free=false`."


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
        key: (1, kv_heads, T, head_dim).
        value: (1, kv_heads, T, value_dim).
        dropout: probability with which a weight is dropped; models give 0 outside training.
        kwargs: `cu_seq_lens_q` (documents + 1,) int32 and `max_length_q` from `FlatCollator`, and from models that have
            one `sliding_window`: how many tokens a token sees, itself among them, or None for all before it.

    Returns:
        (1, T, heads, value_dim) and no weights.

    Raises:
        ConfigError: the model asks for something that this attention would leave out.
    """
    _refuse_what_is_left_out(module, attention_mask, kwargs)
    cu_seq_lens, sliding_window = kwargs["cu_seq_lens_q"], kwargs.get("sliding_window")
    if query.device.type == "meta":  # shapes only, see `_dry_run`
        return query.new_empty(1, query.size(2), query.size(1), value.size(-1)), None
    if kernel_can(query, value, dropout):
        longest = kwargs["max_length_q"]
        return _varlen_kernel(query, key, value, cu_seq_lens, longest, scaling, sliding_window), None
    return _per_document(query, key, value, cu_seq_lens, scaling, sliding_window, dropout), None


def _refuse_what_is_left_out(module: torch.nn.Module, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise ConfigError for an argument that would change the result, were it not ignored here.

    Attention sinks, position biases and chosen blocks are tensors, under a name of each model's own. So an unknown
    tensor is refused, whereas unknown flags, which models pass down by the dozen, are let through.
    """
    unknown = [
        name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in HARMLESS_TENSORS
    ]
    if mask is not None:
        unknown.append("attention_mask")
    if kwargs.get("softcap") is not None:
        unknown.append("softcap")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unknown.append("is_causal=False")
    if "sliding_window" not in kwargs and _slides(module):
        unknown.append("sliding_window, in a mask of its own")
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} asks for {', '.join(unknown)}, which attention without padding leaves out"
            + ADVICE
        )
    if "cu_seq_lens_q" not in kwargs:
        raise ConfigError(f"{type(module).__name__} is not told where the rows of a batch end" + ADVICE)


def _slides(module: torch.nn.Module) -> bool:
    """Whether a layer has a sliding window. Some models put it into the mask only, and there is none here."""
    config = getattr(module, "config", None)
    layer_types, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if layer_types and layer is not None:
        return bool(layer_types[layer] == "sliding_attention")
    return bool(getattr(config, "sliding_window", None))


def kernel_can(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether PyTorch's kernel takes this: half precision, heads of a size that it has, no dropout, a GPU it is for."""
    size = query.size(-1)
    fits = size == value.size(-1) <= KERNEL_HEAD_DIM and size % KERNEL_HEAD_STEP == 0
    if device_type(query) != "cuda" or query.dtype == torch.float32 or not fits or dropout > 0:
        return False
    # Of a GPU that is planned for nothing can be asked: all but old ones have it.
    return planned(query) is not None or flash_attention_runs_on(query.device)


def _varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """PyTorch's flash attention for ragged rows, on CUDA and ROCm. It wants (T, heads, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    # Kernels take rows that lie apart, as those of a fused projection do; only a head's own values must lie together.
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    flat = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in flat]
    # A window of n tokens counts the token itself; the kernel counts those to its left. -1 is all of them.
    left = -1 if sliding_window is None else sliding_window - 1
    grouped = {"enable_gqa": query.size(1) != key.size(1)} if kernel_is_told_of_grouped_heads() else {}
    out = varlen_attn(
        *flat,
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),  # causal: nothing to the right
        **grouped,
    )
    return out[None]  # type: ignore[index, no-any-return]


def dropout_of(config: PreTrainedConfig) -> float:
    """Return the share of attention weights that a model drops while it trains."""
    return max(getattr(config.get_text_config(), name, None) or 0.0 for name in DROPOUTS)


def choose_kernel(choice: AttentionKernel, device: torch.device, dropout: float) -> bool:
    """Let flat rows run on FlashAttention 3, or on what PyTorch chooses; return whether it is the former.

    Both are switches of the process, so they are set for each training. FlashAttention 3 drops no attention weights.

    Raises:
        ConfigError: FlashAttention 3 is asked for where it cannot run.
    """
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    if device.type != "cuda":
        return False
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    can = hopper and dropout == 0
    if choice is AttentionKernel.flash3 and not can:
        reason = f"the model drops attention weights ({dropout:g})" if hopper else "this GPU is not of that kind"
        raise ConfigError(
            f"`train.attention_kernel=flash3` runs on compute capability 9 (Hopper), without dropout in attention, and "
            f"{reason}: write train.attention_kernel=torch."
        )
    flash3 = can and (choice is AttentionKernel.flash3 or (choice is AttentionKernel.auto and installed(FLASH3)))
    torch.backends.cuda.enable_cudnn_sdp(not flash3)  # PyTorch prefers cuDNN's kernel where it has it (torch 2.15)
    if flash3:
        activate_flash_attention_impl("FA3")
    elif current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    return flash3


@torch.compiler.disable  # it reads the rows' lengths, for which a graph would have to be cut anyway
def _per_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
) -> torch.Tensor:
    lengths = _lengths(cu_seq_lens, query.size(2))
    if device_type(query) == "cpu" and dropout == 0:
        return cpu_varlen_attention(query, key, value, lengths, scaling, sliding_window)
    parts = []
    # One split instead of a slice for each document: the gradient of a slice is a whole tensor of zeros around it.
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = _band(q.size(2), sliding_window, q.device)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.size(1) != key.size(1),
        )
        parts.append(out)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()  # some models take a view of it


def _lengths(cu_seq_lens: torch.Tensor, tokens: int) -> list[int]:
    """Return the tokens of each document. Those of a footprint, which has no values, are all alike."""
    documents = len(cu_seq_lens) - 1
    return [tokens // documents] * documents if planned(cu_seq_lens) else cu_seq_lens.diff().tolist()


def _band(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return what each token of a document sees, (length, length), or None where it is every token before it."""
    if sliding_window is None or length <= sliding_window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - sliding_window)


def register() -> str:
    """Make the attention known to transformers and return the name to load models with."""
    AttentionInterface.register(NAME, varlen_attention)
    return NAME
