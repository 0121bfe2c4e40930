"""What to change when the numbers of a training go wrong: advice that fits the settings it was run with."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

USUAL_RATES = {  # docs/methods.md
    "full": 2e-5,
    "freeze": 5e-5,
    "lora": 2e-4,
    "qlora": 2e-4,
    "prompt_tuning": 3e-2,
    "p_tuning": 3e-3,
    "prefix_tuning": 3e-2,
    "ia3": 3e-2,
}


def lower_rate(config: DictConfig) -> str:
    """Return "lower `train.learning_rate`", with the rate and what is usual for the method where that is less."""
    rate, usual = config.train.learning_rate, USUAL_RATES.get(config.method.name)
    known = f"; {usual:g} is usual for {config.method.name}" if usual and usual < rate else ""
    return f"lower `train.learning_rate` (it is {rate:g}{known})"


def calmer_steps(config: DictConfig) -> list[str]:
    """Return what makes steps smaller; not the clipping that is on already."""
    return [lower_rate(config), *([] if config.train.max_grad_norm else ["set `train.max_grad_norm=1.0`"])]


def other_format(config: DictConfig, dtype: Any) -> list[str]:
    """Return what shows whether the number format is the cause, nothing where it is float32."""
    if str(config.method.get("compute_dtype")) == "float16":
        return ["set `method.compute_dtype=float32`, because float16 ends at 65,504"]
    if str(dtype) == "torch.float32":
        return []
    return ["set `model.dtype=float32` to see whether the number format is the cause"]
