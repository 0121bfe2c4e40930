"""What tunewright decides by itself because the choice asked for cannot be had here, each with its reason.

A setting that would stop or spoil a run, and has one obvious substitute, is replaced and the user told; where there is
a choice to make, `rules` and `module_rules` refuse instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.schema import Launcher
from tunewright.errors import ConfigError
from tunewright.plan.architecture import Architecture
from tunewright.plan.data_rules import counted_in_tokens
from tunewright.plan.devices import Devices
from tunewright.plan.module_rules import router_learns
from tunewright.plan.support import combination_of, support_of

# Paged optimisers need the unified memory of a GPU; what comes closest without.
UNPAGED = {
    "paged_adamw_32bit": "adamw_torch_fused",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
# What PEFT writes of every LoRA adapter, among other things.
LORA_SHAPE = {"r", "lora_alpha", "lora_dropout", "target_modules"}


def substitute(config: DictConfig, architecture: Architecture, devices: Devices) -> list[str]:
    """Replace in `config` what cannot be had, and return a sentence about each.

    Raises:
        ConfigError: `method.adapter` cannot be continued.
    """
    told = [
        _layout(config, architecture, devices),
        _optimizer(config, devices),
        _checkpoints(config),
        _adapter(config),
        _router(config, architecture),
    ]
    return [text for text in told if text]


def _layout(config: DictConfig, architecture: Architecture, devices: Devices) -> str | None:
    if not config.train.padding_free:
        return None
    support = support_of(combination_of(config, devices))
    reason = support.reason if support.outcome == "padded" else None
    if architecture.padding_free_problem:
        reason = f"Padded batches: {architecture.padding_free_problem}."
    if not reason:
        return None
    for key in counted_in_tokens(config):
        raise ConfigError(f"`{key}` needs rows without padding. {reason} Leave {key} out.")
    config.train.padding_free = False
    return reason


def _optimizer(config: DictConfig, devices: Devices) -> str | None:
    wanted = config.train.optimizer
    offloaded = config.strategy.launcher is Launcher.deepspeed and deepspeed_file(config).offloads
    if wanted not in UNPAGED or (devices.gpu and not offloaded):
        return None
    config.train.optimizer = UNPAGED[wanted]
    where = "under optimiser offload the states are in host memory already" if offloaded else "there is no GPU here"
    return f"Optimiser {UNPAGED[wanted]} for {wanted}: paging is between GPU and host memory, and {where}."


def _router(config: DictConfig, architecture: Architecture) -> str | None:
    if config.train.router_aux_loss is not None or not architecture.router_loss or router_learns(config):
        return None
    config.train.router_aux_loss = 0.0
    return (
        f"The router's loss is off: with train.gradient_checkpointing, adapters under strategy={config.strategy.name} "
        f"recompute layers in a way in which it has no gradient."
    )


def _checkpoints(config: DictConfig) -> str | None:
    train = config.train
    if not train.keep_best or train.save_steps:
        return None
    train.save_steps = train.eval_steps
    return f"Checkpoints every {train.eval_steps} steps, with each evaluation, as train.keep_best needs."


def _adapter(config: DictConfig) -> str | None:
    """Take over the shape of the adapter that training goes on with."""
    method = config.method
    if "adapter" not in method or not method.adapter:
        return None
    folder = adapter_folder(method.adapter)
    saved = _adapter_config(folder)
    if saved["peft_type"] != "LORA":
        raise ConfigError(
            f"`method.adapter` is {folder}, of the kind {saved['peft_type']}: only LoRA adapters can be continued."
        )
    method.adapter = str(folder)
    method.r, method.alpha, method.dropout = saved["r"], saved["lora_alpha"], saved["lora_dropout"]
    method.rslora, method.dora = bool(saved.get("use_rslora")), bool(saved.get("use_dora"))
    method.modules_to_save = list(saved.get("modules_to_save") or [])
    targets: Any = saved["target_modules"]
    method.target_modules = targets if isinstance(targets, str) else sorted(targets)
    return (
        f"Going on with the adapter in {folder}: r {method.r}, alpha {method.alpha:g}, dropout {method.dropout:g} on "
        f"{targets if isinstance(targets, str) else ', '.join(method.target_modules)}, as it was made."
    )


def adapter_folder(path: str) -> Path:
    """Return where the adapter is: the folder itself, or `final` of a run.

    Raises:
        ConfigError: neither holds one.
    """
    for folder in (Path(path).expanduser(), Path(path).expanduser() / "final"):
        if (folder / "adapter_config.json").is_file():
            return folder.resolve()
    raise ConfigError(
        f"`method.adapter` is '{path}', which holds no adapter_config.json: write the folder of an adapter, a "
        f"checkpoint, or a finished LoRA run."
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is damaged: {error.msg} at line {error.lineno}.") from error
    needed = {"peft_type"} if not isinstance(saved, dict) or saved.get("peft_type") != "LORA" else LORA_SHAPE
    missing = sorted(needed - set(saved))
    if missing:
        raise ConfigError(f"{file} is damaged: it has no {', '.join(missing)}.")
    return dict(saved)
