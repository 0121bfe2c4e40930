"""P-tuning: virtual tokens that a small network makes are learnt (https://arxiv.org/abs/2103.10385)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, PromptEncoderConfig, TaskType
from transformers import PreTrainedModel

from tunewright.trainer.methods.adapter import add_adapter, width


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PeftModel:
    config = PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=method.virtual_tokens,
        encoder_reparameterization_type=method.encoder.value.upper(),
        encoder_hidden_size=method.hidden_size or width(model),
    )
    return add_adapter(model, config)
