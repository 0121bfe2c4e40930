"""A DeepSpeed JSON: where it is, what it says, and which strategy it makes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.errors import ConfigError, did_you_mean
from tunewright.shipped import shipped

DEEPSPEED_DIR = shipped("configs") / "deepspeed"
# Mappings whose keys are looked at one by one; written as something else, they cannot be.
SECTIONS = ("zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "amp", "activation_checkpointing")


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
        raise ConfigError(f"{path}, {_notas_json(text, error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`strategy.deepspeed` is {path}, which cannot be read as text: {error}.") from error
    except _Twice as error:
        raise ConfigError(f"{path} has `{error}` twice: which one counts? Leave one of them out.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds {as_json(settings)}: a DeepSpeed configuration is a mapping, {{...}}.")
    for key in SECTIONS:
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"{path}: `{key}` is {as_json(settings[key])}: write a mapping, {{...}}.")
    found = DeepSpeedFile(path, settings)
    stage = found.get("zero_optimization.stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        said = "there is no ZeRO stage" if stage is None else f"`zero_optimization.stage` is {as_json(stage)}"
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


def _notas_json(text: str, error: json.JSONDecodeError) -> str:
    """Say where the text stops being JSON, and why if it is one of the usual reasons."""
    before = text[: error.pos].rstrip()
    if re.match(r"//|/\*|#", text[error.pos :]):
        return f"line {error.lineno}, column {error.colno}: JSON has no comments. Take this one out."
    if before.endswith(",") and text[error.pos : error.pos + 1] in ("}", "]"):
        error = json.JSONDecodeError(error.msg, text, len(before) - 1)
    if re.match(r",\s*[}\]]", text[error.pos :]):  # where newer Pythons say the fault is
        return f"line {error.lineno}, column {error.colno}: nothing follows this comma. Take it out."
    return f"line {error.lineno}, column {error.colno}: no JSON. {error.msg}."


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def follow_file(config: DictConfig) -> None:
    """Give one of the shipped strategies the name of the one that its DeepSpeed JSON makes.

    Raises:
        ConfigError: see `deepspeed_file`.
    """
    strategy = config.strategy
    if re.fullmatch(r"zero[0-9]?(_offload)?|zeropp", strategy.name):
        strategy.name = deepspeed_file(config).strategy
