"""PEFT's adapters, in the format of the base."""

from __future__ import annotations

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Add a new adapter in the base's format: the optimiser holds the float32 copy (see `master_weights.py`).

    PEFT's default, float32 adapters, casts the activations twice in every adapted layer.
    """
    return get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[return-value]


def width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)
