"""Which combinations of settings cannot work, with the reason and what to choose instead.

Every check looks at the configuration and the devices alone, so that all of them run before a rank is started.
"""

from __future__ import annotations

import math
from pathlib import Path

from omegaconf import DictConfig

from launch.batching import BatchPlan, batch_plan
from launch.compose import DEEPSPEED_DIR
from launch.errors import ConfigError, did_you_mean
from launch.hardware import Devices
from launch.schema import Launcher, Mix
from launch.templates import template_file

PARTITIONED = ("zero3", "zero3_offload", "zeropp")
QUANT_TYPES = ("nf4", "fp4")
CPU_RANKS = 2
# transformers' names that need no settings or packages beyond ours; kept here to be checked without importing it.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit",
    "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
)  # fmt: skip


def world_size(config: DictConfig, devices: Devices) -> int:
    """Return how many ranks the configuration starts on this machine."""
    if config.cluster.num_processes is not None:
        return int(config.cluster.num_processes)
    if config.strategy.launcher is Launcher.single:
        return 1
    return devices.count if devices.gpu else CPU_RANKS


def check(config: DictConfig, devices: Devices) -> BatchPlan:
    """Refuse what cannot work and return the batch plan of what can.

    Raises:
        ConfigError: with the reason and the alternative.
    """
    ranks = world_size(config, devices)
    _check_method(config)
    _check_strategy(config, devices, ranks)
    _check_numbers(config)
    _check_data(config)
    return batch_plan(config.train, ranks)


def _check_method(config: DictConfig) -> None:
    method, strategy = config.method, config.strategy
    if method.name == "qlora":
        if strategy.name in PARTITIONED:
            raise ConfigError(
                f"`method=qlora` cannot run under `strategy={strategy.name}`: ZeRO-3 splits weights over the ranks, "
                f"and weights quantised to 4 bits cannot be split, so each rank would hold them whole. "
                f"Use strategy=zero2 or strategy=ddp with method=qlora, or method=lora with strategy={strategy.name}."
            )
        if method.quant_type not in QUANT_TYPES:
            raise ConfigError(
                f"`method.quant_type` is '{method.quant_type}'.{did_you_mean(method.quant_type, QUANT_TYPES)} "
                f"Write nf4 or fp4."
            )
    if method.name != "full":
        if method.r < 1:
            raise ConfigError(f"`method.r` is {method.r}: the rank is a whole number from 1.")
        if not 0 <= method.dropout < 1:
            raise ConfigError(f"`method.dropout` is {method.dropout}: write a share from 0 to below 1.")
        if isinstance(method.target_modules, str) and method.target_modules != "all-linear":
            raise ConfigError(
                f"`method.target_modules` is '{method.target_modules}': write all-linear or a list such as "
                f"[q_proj,v_proj]."
            )


def _check_strategy(config: DictConfig, devices: Devices, ranks: int) -> None:
    strategy = config.strategy
    if ranks < 1:
        raise ConfigError(f"`cluster.num_processes` is {ranks}: write a whole number from 1.")
    if strategy.launcher is Launcher.single and ranks != 1:
        raise ConfigError(
            f"`strategy=single` runs one process, but `cluster.num_processes` is {ranks}. Use strategy=ddp or "
            f"strategy=zero2 for {ranks} ranks."
        )
    if devices.gpu and ranks > devices.count:
        raise ConfigError(
            f"`cluster.num_processes` is {ranks}, but {devices.count} GPUs are visible. Write {devices.count} or less, "
            f"or check CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES."
        )
    if strategy.name == "zeropp" and devices.kind != "cuda":
        raise ConfigError(
            f"`strategy=zeropp` needs NVIDIA GPUs: its quantised collectives are CUDA kernels, and this machine has "
            f"{'AMD GPUs' if devices.kind == 'rocm' else 'no GPU'}. Use strategy=zero3."
        )
    if strategy.launcher is Launcher.deepspeed:
        deepspeed_file(config)


def deepspeed_file(config: DictConfig) -> str:
    """Return the path of the strategy's DeepSpeed JSON."""
    name = config.strategy.deepspeed
    if name is None:
        raise ConfigError(
            "`strategy.launcher=deepspeed` needs `strategy.deepspeed`: a name in configs/deepspeed or a path."
        )
    shipped = DEEPSPEED_DIR / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = sorted(file.stem for file in DEEPSPEED_DIR.glob("*.json"))
        raise ConfigError(
            f"`strategy.deepspeed` is '{name}': no such file, and not one of {', '.join(names)}."
            f"{did_you_mean(name, names)}"
        )
    return str(path)


def _check_numbers(config: DictConfig) -> None:
    train, data = config.train, config.data
    positive = {
        "train.learning_rate": train.learning_rate,
        "train.epochs": train.epochs,
        "train.max_steps": train.max_steps,
        "train.logging_steps": train.logging_steps,
        "train.eval_steps": train.eval_steps,
        "train.save_steps": train.save_steps,
        "train.save_total_limit": train.save_total_limit,
        "train.timeout_minutes": train.timeout_minutes,
        "data.max_samples": data.max_samples,
        "data.workers": data.workers,
        "data.shuffle_buffer": data.shuffle_buffer,
        "cluster.threads_per_process": config.cluster.threads_per_process,
    }
    for key, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"`{key}` is {value}: write a number above 0.")
    for key, value, names in (
        ("train.scheduler", train.scheduler, SCHEDULERS),
        ("train.optimizer", train.optimizer, OPTIMIZERS),
    ):
        if value not in names:
            raise ConfigError(f"`{key}` is '{value}'.{did_you_mean(value, names)} Choices: {', '.join(names)}.")
    if not 0 <= train.warmup_ratio <= 1:
        raise ConfigError(f"`train.warmup_ratio` is {train.warmup_ratio}: write a share from 0 to 1.")
    if train.max_grad_norm < 0:
        raise ConfigError(f"`train.max_grad_norm` is {train.max_grad_norm}: write 0 to turn clipping off.")


def _check_data(config: DictConfig) -> None:
    data, train = config.data, config.train
    if data.cutoff_len < 16:
        raise ConfigError(f"`data.cutoff_len` is {data.cutoff_len}: write a number of tokens from 16.")
    if data.eval_size < 0:
        raise ConfigError(f"`data.eval_size` is {data.eval_size}: write a share below 1 or a number of rows.")
    if not 0 <= data.max_dropped <= 1:
        raise ConfigError(f"`data.max_dropped` is {data.max_dropped}: write a share from 0 to 1.")
    if data.train_on_prompt and data.mask_history:
        raise ConfigError(
            "`data.train_on_prompt` and `data.mask_history` are both true: one learns every token, the other only the "
            "last answer. Set one of them to false."
        )
    held = [key for key in ("eval_names", "eval_split", "eval_size") if data[key]]
    if len(held) > 1:
        raise ConfigError(
            f"{' and '.join(f'`data.{key}`' for key in held)} each say what is held out: keep one of them."
        )
    if data.weights and (len(data.weights) != len(data.names) or min(data.weights) <= 0):
        raise ConfigError(
            f"`data.weights` is {list(data.weights)}: write one positive number for each of the {len(data.names)} "
            f"datasets of `data.names`."
        )
    if config.model.template:
        template_file(config.model.template)
    if not isinstance(config.model.template_kwargs, (DictConfig, type(None))):
        raise ConfigError(
            f"`model.template_kwargs` is {config.model.template_kwargs!r}: write a mapping such as "
            f"{{enable_thinking: false}}."
        )
    if not data.streaming:
        return
    if train.max_steps is None:
        raise ConfigError("`data.streaming` is true, so nobody knows how long an epoch is: set train.max_steps.")
    for key in ("eval_size", "max_samples"):
        if data[key]:
            raise ConfigError(
                f"`data.{key}` counts rows, which `data.streaming=true` does not do before training: leave it out"
                + (", and hold rows out with data.eval_names or data.eval_split." if key == "eval_size" else ".")
            )
    if len(data.names) > 1 and data.mix is Mix.concat:
        raise ConfigError(
            "`data.mix` is concat, which would stream one dataset after the other: choose interleave_under, "
            "interleave_over or interleave_once."
        )
