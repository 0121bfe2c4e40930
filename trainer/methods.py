"""What each tuning method trains, through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapt(model: PreTrainedModel, method: Any) -> Any:
    """Return the model with what `method` trains ready to train, everything else frozen.

    Adapters are kept in the format of the base: the optimiser holds the float32 copy (see `optimizer.py`).
    PEFT's default, float32 adapters, casts the activations twice in every adapted layer.
    """
    if method.name == "full":
        return model
    import peft

    if method.name == "qlora":
        _keep_differentiable(model)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules),
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on a CPU in the layout that training needs.

    With AVX512-BF16, bitsandbytes 0.50.2 repacks a layer for inference at the first evaluation, for good, and the
    kernel for that layout has no backward: training would go on without gradients below it, or stop.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return (trainable, total) parameters, right under ZeRO-3 (sharded) and for 4-bit weights (two in a byte)."""
    import peft

    if isinstance(model, peft.PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    sizes = [(getattr(p, "ds_numel", None) or p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
