"""What to change when the numbers of a training go wrong: advice that fits the settings it was run with."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Advice:
    """Something to change, and what a run that goes on with the change has to be allowed (`resume_allow`)."""

    text: str
    allow: str | None = None


def lower_rate(config: DictConfig) -> Advice:
    """Advise a lower rate, naming the present one and what is usual for the method where that is less."""
    rate, usual = config.train.learning_rate, USUAL_RATES.get(config.method.name)
    known = f"; {usual:g} is usual for {config.method.name}" if usual and usual < rate else ""
    return Advice(f"lower `train.learning_rate` (it is {rate:g}{known})", "train.learning_rate")


def calmer_steps(config: DictConfig) -> list[Advice]:
    """Return what makes steps smaller; not the clipping that is on already."""
    clipping = Advice("set `train.max_grad_norm=1.0`", "train.max_grad_norm")
    return [lower_rate(config), *([] if config.train.max_grad_norm else [clipping])]


def other_format(config: DictConfig, dtype: Any) -> list[Advice]:
    """Return what shows whether the number format is the cause, nothing where it is float32."""
    if str(config.method.get("compute_dtype")) == "float16":
        return [Advice("set `method.compute_dtype=float32`, because float16 ends at 65,504", "method.compute_dtype")]
    if str(dtype) == "torch.float32":
        return []
    return [Advice("set `model.dtype=float32` to see whether the number format is the cause", "model.dtype")]
