"""Whether the gradients of a step's micro-batches are summed in float32 where weights are bfloat16."""

from __future__ import annotations

from omegaconf import DictConfig

from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.schema import Dtype, Launcher
from tunewright.errors import ConfigError

IN_THE_FILE = "data_types.grad_accum_dtype"  # of a DeepSpeed JSON


def sums_in_float32(config: DictConfig) -> bool:
    """Tell whether they are by `train.grad_accum_dtype`; what a DeepSpeed JSON says itself is left to it.

    "auto" is float32 wherever that takes no more than the step does. Not so at ZeRO stage 1, where DeepSpeed (0.19.8)
    would keep the sums of all weights in each rank, and write checkpoints of another kind; nor at stage 2 with the
    optimiser in host memory, where each rank's share of the sums would stay on the device.
    """
    asked = config.train.grad_accum_dtype
    if asked is not Dtype.auto or config.strategy.launcher is not Launcher.deepspeed:
        return asked is not Dtype.bfloat16
    file = deepspeed_file(config)
    return file.get(IN_THE_FILE) is None and (file.stage == 3 or (file.stage == 2 and not file.offloads))


def check_accumulation(config: DictConfig) -> None:
    """Refuse a format of the sums that cannot be had.

    Raises:
        ConfigError: float32 at ZeRO stage 1, or a DeepSpeed JSON that says a format as well.
    """
    asked = config.train.grad_accum_dtype
    if asked is Dtype.auto or config.strategy.launcher is not Launcher.deepspeed:
        return
    file = deepspeed_file(config)
    said = file.get(IN_THE_FILE)
    if said is not None:
        raise ConfigError(
            f"`train.grad_accum_dtype` is {asked.value}, and `{IN_THE_FILE}` of {file.path} is '{said}': leave one of "
            f"them out."
        )
    if asked is Dtype.float32 and file.stage == 1:
        raise ConfigError(
            f"`train.grad_accum_dtype` is float32, and `strategy={config.strategy.name}` sums gradients in the format "
            f"of the weights, as DeepSpeed does at ZeRO stage 1: write strategy=zero2, or leave it out."
        )
