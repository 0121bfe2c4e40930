"""A DeepSpeed JSON: which strategy it makes, and what becomes of each of its keys.

The shipped files say "auto" wherever a setting of tunewright's decides. A file of the user's own may say more. What it
says is used, or has to agree with the setting that decides, or is refused; nothing of it is ignored without a word.
What DeepSpeed itself says about it is asked in `tunewright.launch.deepspeed_check`, since DeepSpeed imports torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.config.schema import Dtype
from tunewright.errors import ConfigError, did_you_mean
from tunewright.plan.batch_plan import BatchPlan
from tunewright.shipped import shipped

DEEPSPEED_DIR = shipped("configs") / "deepspeed"
# Mappings whose keys are looked at one by one; written as something else, they cannot be.
SECTIONS = ("zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "amp", "activation_checkpointing")
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
SIMILAR = 0.85  # of a key that DeepSpeed does not know to one that it does: a slip of the pen


@dataclass(frozen=True)
class DeepSpeedFile:
    """What a DeepSpeed JSON says."""

    path: Path
    settings: dict[str, Any]

    @property
    def shipped(self) -> bool:
        return self.path.resolve().parent == DEEPSPEED_DIR

    @property
    def stage(self) -> int:
        return int(self.get("zero_optimization.stage"))

    @property
    def offloads(self) -> bool:
        """Whether states or weights lie in host memory or on a disk."""
        devices = [self.get(f"zero_optimization.offload_{what}.device") for what in ("optimizer", "param")]
        return any(device not in (None, "none", "auto") for device in devices)

    @property
    def strategy(self) -> str:
        """The shipped strategy that it amounts to, in the words of `tunewright.plan.support`."""
        quantized = ("zero_quantized_weights", "zero_quantized_gradients")
        if self.stage == 3 and any(self.get(f"zero_optimization.{key}") is True for key in quantized):
            return "zeropp"
        return f"zero{self.stage}" + ("_offload" if self.offloads and self.stage > 1 else "")

    def get(self, key: str) -> Any:
        """Return the value of a dotted key, or None where there is none."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def deepspeed_path(name: str | None) -> Path:
    """Return the file that `strategy.deepspeed` names.

    Raises:
        ConfigError: no name, or no such file.
    """
    if name is None:
        raise ConfigError(
            "`strategy.launcher=deepspeed` needs `strategy.deepspeed`: a name in configs/deepspeed or a path."
        )
    shipped = DEEPSPEED_DIR / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name).expanduser()
    if not path.is_file():
        names = sorted(file.stem for file in DEEPSPEED_DIR.glob("*.json"))
        raise ConfigError(
            f"`strategy.deepspeed` is '{name}': no such file, and not one of {', '.join(names)}."
            f"{did_you_mean(name, names)}"
        )
    return path


def deepspeed_file(config: DictConfig) -> DeepSpeedFile:
    """Read the strategy's DeepSpeed JSON.

    Raises:
        ConfigError: see `deepspeed_path` and `read`.
    """
    return read(deepspeed_path(config.strategy.deepspeed))


def read(path: Path) -> DeepSpeedFile:
    """Read a DeepSpeed JSON.

    Raises:
        ConfigError: it is no JSON, with line and column; or it has no ZeRO stage.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, {_not_json(text, error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`strategy.deepspeed` is {path}, which cannot be read as text: {error}.") from error
    except _Twice as error:
        raise ConfigError(f"{path} has `{error}` twice: which one counts? Leave one of them out.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds {_json(settings)}: a DeepSpeed configuration is a mapping, {{...}}.")
    for key in SECTIONS:
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"{path}: `{key}` is {_json(settings[key])}: write a mapping, {{...}}.")
    found = DeepSpeedFile(path, settings)
    stage = found.get("zero_optimization.stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        said = "there is no ZeRO stage" if stage is None else f"`zero_optimization.stage` is {_json(stage)}"
        raise ConfigError(
            f'{path}: {said}. Write "zero_optimization": {{"stage": 2}}, or 1 or 3; without ZeRO use strategy=ddp.'
        )
    return found


class _Twice(Exception):
    pass


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise _Twice(key)
        read[key] = value
    return read


def _not_json(text: str, error: json.JSONDecodeError) -> str:
    """Say where the text stops being JSON, and why if it is one of the usual reasons."""
    before = text[: error.pos].rstrip()
    if re.match(r"//|/\*|#", text[error.pos :]):
        return f"line {error.lineno}, column {error.colno}: JSON has no comments. Take this one out."
    if before.endswith(",") and text[error.pos : error.pos + 1] in ("}", "]"):
        error = json.JSONDecodeError(error.msg, text, len(before) - 1)
    if re.match(r",\s*[}\]]", text[error.pos :]):  # where newer Pythons say the fault is
        return f"line {error.lineno}, column {error.colno}: nothing follows this comma. Take it out."
    return f"line {error.lineno}, column {error.colno}: no JSON. {error.msg}."


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def follow_file(config: DictConfig) -> None:
    """Give one of the shipped strategies the name of the one that its DeepSpeed JSON makes.

    Raises:
        ConfigError: see `deepspeed_file`.
    """
    strategy = config.strategy
    if re.fullmatch(r"zero[0-9]?(_offload)?|zeropp", strategy.name):
        strategy.name = deepspeed_file(config).strategy


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
            yield f"`{key}` is {_json(value)}: {reason}."
    for key, (kind, wanted) in TYPES.items():
        value = file.get(key)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            yield f"`{key}` is {_json(value)}: write {wanted}."
    for key in file.settings:
        if key not in MAY_BE_AUTO and key not in TYPES and '"auto"' in _json(file.settings[key]):
            yield f'`{key}` is {_json(file.settings[key])}: nobody puts a value in place of "auto" there. Write one.'
    if file.get("gradient_allreduce_op") not in (None, "mean", "avg"):
        yield "`gradient_allreduce_op` is not mean, and the loss is divided for a mean over the ranks. Leave it out."
    for section, usual in USUAL.items():
        kind = file.get(f"{section}.type")
        if kind is not None and str(kind).lower() not in usual:
            yield f"`{section}.type` is {_json(kind)}, and `train.{section}` decides. Leave `{section}` out."


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
            yield f'`{key}` is {_json(said)}, which no setting takes over. Write "auto"; `{wanted}` decides.'
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
        return f'`{key}` is {_json(said)}, and here it is always {_json(value)}. Write that, or "auto".'
    if key == "bf16.enabled":
        dtype = "bfloat16" if said is True else "float32"
        now = f"{'bfloat16' if value else 'float32'} (`model.dtype={config.model.dtype.value}`)"
        return f'`{key}` is {_json(said)}, and this run computes in {now}. Write model.dtype={dtype}, or "auto".'
    write = f"{setting}={_json(said)}"
    if key == "gradient_accumulation_steps":
        if isinstance(file.get("train_batch_size"), int):
            return f'`{key}` is {_json(said)}, and rows, micro-batches and ranks make it {value}. Write "auto".'
        write += " train.global_batch_size=null"
    now = "not fixed" if value is None else _json(value)
    return f'`{key}` is {_json(said)}, and in this run it is {now} (`{setting}`). Write {write}, or "auto".'


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
