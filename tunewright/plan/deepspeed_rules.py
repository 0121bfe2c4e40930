"""What becomes of each key of a DeepSpeed JSON, beside the settings of a run.

The shipped files say "auto" wherever a setting of tunewright's decides. A file of the user's own may say more. What it
says is used, or has to agree with the setting that decides, or is refused; nothing of it is ignored without a word.
What DeepSpeed itself says about it is asked in `tunewright.launch.deepspeed_check`, since DeepSpeed imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig

from tunewright.config.deepspeed_file import SECTIONS, DeepSpeedFile, as_json, deepspeed_file
from tunewright.config.schema import Dtype
from tunewright.errors import ConfigError
from tunewright.plan.batch_plan import BatchPlan

# What every file about DeepSpeed and transformers has: they stand for "an optimiser" and "a schedule". Another name
# is a choice.
USUAL = {"optimizer": ("adam", "adamw"), "scheduler": ("warmuplr", "warmupdecaylr")}
# What cannot go with tunewright when it is on, and what to do.
REFUSED = {
    "fp16.enabled": 'computation is in bfloat16 or float32. Write "auto", and model.dtype=bfloat16 or float32',
    "amp.enabled": "computation is in bfloat16 or float32. Leave `amp` out, and write model.dtype=bfloat16 or float32",
    "torch_autocast.enabled": "base and adapters compute in one format. Leave it out, and write model.dtype=bfloat16",
    "data_efficiency.enabled": "tunewright deals out the rows. Leave it out",
    "autotuning.enabled": "it would start runs of its own. Leave it out",
    "hybrid_engine.enabled": "it is for reinforcement learning. Leave it out",
    "compile.deepcompile": "DeepSpeed would compile the model. Leave it out, and write train.compile=true",
    "tensor_parallel.autotp_size": "every rank trains on rows of its own. Leave it out",
    "sequence_parallel_size": "every rank trains on rows of its own. Leave it out",
    "weight_quantization": "it is for inference. Leave it out, and use method=qlora",
    "zero_optimization.zenflow": "it brings an optimiser of its own. Leave it out",
}
# Values that DeepSpeed takes unseen and stumbles over in a rank.
FLAGS = ("prescale_gradients", "dump_state", "memory_breakdown", "disable_allgather", "wall_clock_breakdown")
TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "steps_per_print": (int, "a whole number"),
    "gradient_predivide_factor": ((int, float), "a number"),
    **dict.fromkeys(FLAGS, (bool, "true or false")),
}
# Where transformers, the trainer or DeepSpeed's own models put something in place of "auto".
MAY_BE_AUTO = {*SECTIONS, "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
MAY_BE_AUTO |= {"gradient_clipping"}


def check_deepspeed(config: DictConfig, plan: BatchPlan, gpu: bool) -> None:
    """Compare what a DeepSpeed JSON says with the settings that decide.

    Raises:
        ConfigError: they differ, or something in it cannot go with tunewright; all of it is told at once.
    """
    file = deepspeed_file(config)
    problems = [*_refused(file), *_differing(file, config, plan, gpu)]
    if problems:
        raise ConfigError("\n".join([f"{file.path} says what this run would not do:", *(f"  {p}" for p in problems)]))


def _refused(file: DeepSpeedFile) -> Iterator[str]:
    for key, reason in REFUSED.items():
        value = file.get(key)
        if not (value is None or value is False or value == "auto" or (type(value) is int and value <= 1)):
            yield f"`{key}` is {as_json(value)}: {reason}."
    for key, (kind, wanted) in TYPES.items():
        value = file.get(key)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            yield f"`{key}` is {as_json(value)}: write {wanted}."
    for key in file.settings:
        if key not in MAY_BE_AUTO and key not in TYPES and '"auto"' in as_json(file.settings[key]):
            yield f'`{key}` is {as_json(file.settings[key])}: nobody puts a value in place of "auto" there. Write one.'
    if file.get("gradient_allreduce_op") not in (None, "mean", "avg"):
        yield "`gradient_allreduce_op` is not mean, and the loss is divided for a mean over the ranks. Leave it out."
    for section, usual in USUAL.items():
        kind = file.get(f"{section}.type")
        if kind is not None and str(kind).lower() not in usual:
            yield f"`{section}.type` is {as_json(kind)}, and `train.{section}` decides. Leave `{section}` out."


def _decided(config: DictConfig, plan: BatchPlan, gpu: bool) -> dict[str, tuple[Any, str]]:
    """Return {key of the file: (what it is in this run, the setting that decides it)}."""
    train = config.train
    dtype = config.model.dtype
    half = gpu if dtype is Dtype.auto else dtype is Dtype.bfloat16
    return {
        "train_batch_size": (plan.global_batch, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (plan.micro_batch, "train.micro_batch_size"),
        "gradient_accumulation_steps": (plan.accumulation, "train.gradient_accumulation_steps"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (half, "model.dtype"),
        "optimizer.params.lr": (train.learning_rate, "train.learning_rate"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
        "optimizer.params.betas": ([0.9, 0.999], ""),
        "optimizer.params.eps": (1e-8, ""),
        "optimizer.params.torch_adam": (True, ""),
        "optimizer.params.adam_w_mode": (True, ""),
        "scheduler.params.warmup_max_lr": (train.learning_rate, "train.learning_rate"),
        "scheduler.params.warmup_min_lr": (0, ""),
    }


def _differing(file: DeepSpeedFile, config: DictConfig, plan: BatchPlan, gpu: bool) -> Iterator[str]:
    known = _decided(config, plan, gpu)
    inner = [f"{section}.params.{key}" for section in USUAL for key in file.get(f"{section}.params") or {}]
    for key in dict.fromkeys([*known, *inner]):
        said = file.get(key)
        if said is None or said == "auto":
            continue
        if key not in known:
            section = key.partition(".")[0]
            wanted = "train.warmup_ratio" if "warmup" in key else f"train.{section}"
            yield f'`{key}` is {as_json(said)}, which no setting takes over. Write "auto"; `{wanted}` decides.'
            continue
        value, setting = known[key]
        if not _same(said, value):
            yield _mismatch(file, key, value, setting, config)


def _same(said: Any, value: Any) -> bool:
    if isinstance(said, bool) or isinstance(value, (bool, list)):
        return type(said) is type(value) and said == value
    return isinstance(said, (int, float)) and value is not None and math.isclose(said, value)


def _mismatch(file: DeepSpeedFile, key: str, value: Any, setting: str, config: DictConfig) -> str:
    said = file.get(key)
    if not setting:
        return f'`{key}` is {as_json(said)}, and here it is always {as_json(value)}. Write that, or "auto".'
    if key == "bf16.enabled":
        dtype = "bfloat16" if said is True else "float32"
        now = f"{'bfloat16' if value else 'float32'} (`model.dtype={config.model.dtype.value}`)"
        return f'`{key}` is {as_json(said)}, and this run computes in {now}. Write model.dtype={dtype}, or "auto".'
    write = f"{setting}={as_json(said)}"
    if key == "gradient_accumulation_steps":
        if isinstance(file.get("train_batch_size"), int):
            return f'`{key}` is {as_json(said)}, and rows, micro-batches and ranks make it {value}. Write "auto".'
        write += " train.global_batch_size=null"
    now = "not fixed" if value is None else as_json(value)
    return f'`{key}` is {as_json(said)}, and in this run it is {now} (`{setting}`). Write {write}, or "auto".'


def account(file: DeepSpeedFile, config: DictConfig, unknown: Iterable[str]) -> str:
    """Return what becomes of each key of a file of the user's own; `unknown` are those that DeepSpeed does not know."""
    train, unknown = config.train, sorted(unknown)
    batch = f"the batch of this run ({'train.tokens_per_batch' if train.tokens_per_batch else 'rows'} and ranks)"
    deciders = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": batch,
        "gradient_clipping": f"train.max_grad_norm={train.max_grad_norm}",
        "bf16": f"model.dtype={config.model.dtype.value}",
        "fp16": f"model.dtype={config.model.dtype.value}",
        "amp": f"model.dtype={config.model.dtype.value}",
        "optimizer": f"train.optimizer={train.optimizer}, train.learning_rate={train.learning_rate:g}",
        "scheduler": f"train.scheduler={train.scheduler}, train.warmup_ratio={train.warmup_ratio:g}",
        "activation_checkpointing": f"train.gradient_checkpointing={str(train.gradient_checkpointing).lower()}",
        "zero_allow_untested_optimizer": "tunewright: true, for train.optimizer",
        "zero_force_ds_cpu_optimizer": "tunewright: false, for train.optimizer",
        "dataloader_drop_last": "tunewright: no row is dropped",
    }
    by: dict[str, list[str]] = {}
    for key in file.settings:
        if key in deciders:
            by.setdefault(deciders[key], []).append(key)
    used = [key for key in file.settings if key not in deciders and key not in unknown]
    name = config.strategy.name
    parts = [f"DeepSpeed's settings are those of {file.path}: ZeRO stage {file.stage}, strategy {name}."]
    if used:
        parts.append(f"Used: {', '.join(used)}.")
    if by:
        parts.append(f"Decided elsewhere: {'; '.join(f'{_listed(keys)} by {what}' for what, keys in by.items())}.")
    if file.stage == 3 and file.get("zero_optimization.stage3_gather_16bit_weights_on_model_save") is not True:
        parts.append("stage3_gather_16bit_weights_on_model_save is true, so that the result is saved.")
    if unknown:
        parts.append(f"Without effect, as DeepSpeed knows no such key: {', '.join(unknown)}.")
    return " ".join(parts)


def _listed(keys: list[str]) -> str:
    return " and ".join([", ".join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys)
