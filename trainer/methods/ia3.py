"""IA3: factors on keys, values and the MLP's inner activations are learnt (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import IA3Config, PeftModel, TaskType
from transformers import PreTrainedModel

from tunewright.trainer.methods.adapter import add_adapter
from tunewright.trees import plain


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PeftModel:
    auto = method.target_modules == "auto"
    config = IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=None if auto else plain(method.target_modules),
        feedforward_modules=None if auto else plain(method.feedforward_modules),
    )
    return add_adapter(model, config)
