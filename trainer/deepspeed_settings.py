"""What DeepSpeed gets of a DeepSpeed JSON."""

from __future__ import annotations

import copy
from typing import Any

from tunewright.plan.zero_memory import LARGEST_BUCKET

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def for_trainer(settings: dict[str, Any], *, universal: bool = False) -> dict[str, Any]:
    """Return DeepSpeed settings with what the trainer decides left to it; `deepspeed_file` tells the user which.

    `universal` says that the checkpoint to go on from is in DeepSpeed's universal format.
    """
    settings = copy.deepcopy(settings)
    settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": universal}
    for key in (*BATCH, "gradient_clipping"):
        settings[key] = "auto"
    for key in ("fp16", "amp", "optimizer", "scheduler"):
        settings.pop(key, None)
    settings["bf16"] = {**settings.get("bf16", {}), "enabled": "auto"}
    # Optimisers of transformers' names are not on DeepSpeed's list of tested ones.
    settings["zero_allow_untested_optimizer"] = True
    zero = settings.get("zero_optimization", {})
    if "offload_optimizer" in zero:
        settings["zero_force_ds_cpu_optimizer"] = False
    if zero.get("stage") == 3:  # without it DeepSpeed gives nobody the whole weights, and no result is saved
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return settings


def fill_bucket_size(settings: dict[str, Any], trained: int) -> None:
    """Put a number in place of "auto" for `reduce_bucket_size` at stage 1 and 2, where so many weights are trained.

    transformers would put the hidden size squared there: little for a small model, more than an adapter has for a
    large one.
    """
    zero = settings["zero_optimization"]
    if zero["stage"] < 3 and zero.get("reduce_bucket_size") == "auto":
        zero["reduce_bucket_size"] = min(trained, LARGEST_BUCKET)
