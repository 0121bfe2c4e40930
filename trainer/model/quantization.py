"""A base in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from tunewright.config.method_schema import ComputeDtype


def quantization_config(method: Any, dtype: torch.dtype) -> Any:
    """Return how bitsandbytes quantises the base of QLoRA."""
    if method.bits == 8:
        # It warns at each matmul that LLM.int8 multiplies in float16, as it always does.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if method.compute_dtype is ComputeDtype.auto else getattr(torch, method.compute_dtype.value)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quant_type.value,
        bnb_4bit_use_double_quant=method.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on a CPU in the layout that training needs.

    With AVX512-BF16, bitsandbytes 0.50.2 repacks a layer for inference at the first evaluation, for good, and the
    kernel for that layout has no backward: training would go on without gradients below it, or stop.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
