"""What each tuning method trains, through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.schema import MethodConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def adapt(model: PreTrainedModel, method: MethodConfig, dtype: torch.dtype) -> Any:
    """Return the model with what `method` trains ready to train, everything else frozen.

    Adapters are kept in `dtype`, like the base: the optimiser holds the float32 copy (see `optimizer.py`).
    PEFT's default, float32 adapters, casts the activations twice in every adapted layer.
    """
    if method.name == "full":
        return model
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules),
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return (trainable, total) parameters, right under ZeRO-3 (sharded) and for 4-bit weights (two in a byte)."""
    import peft

    if isinstance(model, peft.PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    sizes = [(getattr(p, "ds_numel", None) or p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
