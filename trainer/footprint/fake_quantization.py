"""Layers in 4 and 8 bits on the meta device, as bitsandbytes makes them when weights are loaded."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from transformers.quantizers.auto import AutoHfQuantizer

from tunewright.trainer.model.quantization import quantization_config

NESTED_BLOCK = 256  # of scales that are quantised themselves


def quantise(model: Any, method: Any, dtype: torch.dtype) -> None:
    """Replace the layers that transformers would, each with packed weights of the size that they have."""
    quantizer: Any = AutoHfQuantizer.from_config(quantization_config(method, dtype))
    quantizer.preprocess_model(model, dtype=dtype, device_map={"": "cpu"})
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            _pack_4bit(module, dtype)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            _pack_8bit(module)
        if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
    quantizer.postprocess_model(model)


def _pack_4bit(module: Any, dtype: torch.dtype) -> None:
    """Two weights a byte; for each block a scale, which with double quantisation is a byte itself."""
    given, shape = module.weight, torch.Size((module.out_features, module.in_features))
    blocks = math.ceil(shape.numel() / given.blocksize)
    state2 = None
    if given.compress_statistics:
        scales = torch.empty(math.ceil(blocks / NESTED_BLOCK))
        state2 = QuantState(scales, code=torch.empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8 if state2 else torch.float32),
        shape=shape,
        code=torch.empty(16),
        blocksize=given.blocksize,
        quant_type=given.quant_type,
        dtype=dtype,
        offset=torch.empty(()) if state2 else None,
        state2=state2,
    )
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    options = {name: getattr(given, name) for name in names}
    packed = torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8)
    module.weight = Params4bit(packed, quant_state=state, module=module, bnb_quantized=True, **options)
    module.quant_state = state


def _pack_8bit(module: Any) -> None:
    """A byte a weight, and a scale for each row."""
    packed = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
    weight: Any = torch.nn.Parameter(packed, False)
    weight.CB = weight.SCB = None
    weight.has_fp16_weights = False
    module.weight = weight
    module.state.CB, module.state.SCB = packed, torch.empty(module.out_features)
    # Columns of outliers are a part of the input that only values tell.
    module.state.threshold = 0.0
