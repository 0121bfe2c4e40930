"""QLoRA: LoRA on a base that `load_model` has quantised (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from tunewright.trainer.methods import lora
from tunewright.trainer.model.quantization import keep_differentiable


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PeftModel:
    keep_differentiable(model)
    return lora.build(model, method, model_path)
