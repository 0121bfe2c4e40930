"""Prefix tuning: keys and values before every row are learnt in every layer (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, PrefixTuningConfig, TaskType
from transformers import PreTrainedModel

from tunewright.trainer.methods.adapter import add_adapter, width


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PeftModel:
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=method.virtual_tokens,
        prefix_projection=method.projection,
        encoder_hidden_size=method.hidden_size or width(model),
    )
    return add_adapter(model, config)
