"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PreTrainedModel:
    return model
