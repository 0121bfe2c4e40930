"""LoRA's two small products in one autograd node, added to the base layer's output in place.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling` as four operations, each with its own pass over the whole output,
forward and backward, and its own rounding. Here the sum is part of a matrix product, which accumulates in float32.

PEFT lets a "variant" (DoRA is one) take over that sum; this is such a variant. Weights, names and what is saved stay
PEFT's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant


class FusedSum(LoraVariant):  # type: ignore[misc]
    """Plain LoRA. It can only train: nothing is merged while it is in place."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x, scaling = module.lora_dropout[active_adapter](x), module.scaling[active_adapter]
        if result.dtype != a.weight.dtype:  # quantised layers may compute in another format than the adapters
            return result + b(a(x)).to(result.dtype) * scaling
        if torch.compiler.is_compiling():  # in-place nodes come out wrong there: pytorch issue 184113, torch 2.13
            summed = torch.addmm(result.flatten(0, -2), a(x).flatten(0, -2), b.weight.t(), alpha=scaling)
            return summed.view_as(result)
        if result._base is not None and type(module.get_base_layer()) is not torch.nn.Linear:
            result = result.clone()  # a view that bitsandbytes' 8-bit layer made, which must not be written to
        return _FusedSum.apply(result, x, a.weight, b.weight, scaling)  # type: ignore[no-any-return]


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Return result (..., out) + scaling * x (..., in) @ a.T (in, r) @ b.T (r, out), in the memory of `result`."""
        flat = x.flatten(0, -2)
        inner = flat @ a.t()  # (tokens, r)
        result.view(-1, result.size(-1)).addmm_(inner, b.t(), alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(flat, inner, a, b)
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx: Any, d_result: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, inner, a, b = ctx.saved_tensors
        d_flat = d_result.flatten(0, -2)
        d_inner = (d_flat @ b).mul_(ctx.scaling)
        d_x = (d_inner @ a).view(*d_result.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        # The product with few rows is the faster of the two ways to write it.
        d_b = (inner.t() @ d_flat).t().mul_(ctx.scaling)
        return d_result, d_x, d_inner.t() @ x, d_b, None


def fuse(model: torch.nn.Module) -> int:
    """Let every plain LoRA layer of a model that is about to train use the fused sum; return how many there are.

    Left to PEFT: variants such as DoRA, layers with a bias in the adapter, embeddings and convolutions.
    """
    count = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer) or not hasattr(module, "lora_variant"):
            continue
        for name in module.lora_A:
            if _is_plain(module, name):
                module.lora_variant[name] = FusedSum()
                _gather_with(module, name)
                count += 1
    return count


def _gather_with(module: Any, name: str) -> None:
    """Let ZeRO-3, where it has split the weights, gather the adapter's when the layer is called.

    It gathers a module's weights when that module is called, and the adapter's two are not called here.
    """
    weights = module.lora_A[name].weight, module.lora_B[name].weight
    if any(hasattr(weight, "ds_id") for weight in weights):
        from deepspeed.zero import register_external_parameter

        for weight in weights:
            register_external_parameter(module, weight)


def _is_plain(module: Any, name: str) -> bool:
    layers = module.get_base_layer(), module.lora_A[name], module.lora_B[name]
    return (
        name not in module.lora_variant
        and all(isinstance(layer, torch.nn.Linear) for layer in layers)
        and all(layer.bias is None for layer in layers[1:])
        and len(module.lora_A) == 1
    )
