"""LoRA, with rsLoRA, DoRA, PiSSA and LoRA+ as settings of it (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from tunewright.config.method_schema import LoraInit
from tunewright.trainer.methods.adapter import add_adapter
from tunewright.trainer.model.fused_lora import fuse
from tunewright.trees import plain

PISSA_START = "pissa_start"


def build(model: PreTrainedModel, method: Any, model_path: Path | None) -> PeftModel:
    """Add adapters, or go on with those of `method.adapter`."""
    if method.adapter:
        adapted = PeftModel.from_pretrained(
            model, method.adapter, is_trainable=True, autocast_adapter_dtype=False, low_cpu_mem_usage=False
        )
    else:
        adapted = add_adapter(model, peft_config(method))
    fuse(adapted)
    return adapted


def peft_config(method: Any) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=plain(method.target_modules),
        modules_to_save=plain(method.modules_to_save) or None,
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=True if method.init is LoraInit.default else method.init.value,
    )


def starts_as_pissa(method: Any) -> bool:
    return method.name == "lora" and method.init in (LoraInit.pissa, LoraInit.pissa_niter_16) and not method.adapter


def keep_pissa_start(model: PeftModel, run: Path) -> None:
    """Write down the components that PiSSA moved from the base into the adapter."""
    config = model.active_peft_config
    asked, config.init_lora_weights = config.init_lora_weights, True  # as PEFT wants it for what is converted from
    model.save_pretrained(str(run / PISSA_START))
    config.init_lora_weights = asked


def save_as_plain_lora(model: PeftModel, run: Path, folder: Path) -> None:
    """Save a PiSSA adapter as one for the base as it was: of twice the rank, its start subtracted.

    PiSSA trains beside a changed base (https://arxiv.org/abs/2404.02948); nobody who loads the result has that one.
    """
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(run / PISSA_START))
