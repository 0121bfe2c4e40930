"""Prompt tuning: the embeddings of virtual tokens before every row are learnt (https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, PromptTuningConfig, TaskType
from transformers import PreTrainedModel

from tunewright.trainer.methods.adapter import add_adapter


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PeftModel:
    options = {"prompt_tuning_init": "RANDOM"}
    if method.init_text is not None and not next(model.parameters()).is_meta:  # counting needs no text
        options = {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": method.init_text,
            "tokenizer_name_or_path": str(model_path),
        }
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=method.virtual_tokens, **options)
    return add_adapter(model, config)
