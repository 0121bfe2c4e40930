"""The ways in which a configuration can run on some devices.

A way is a method, a strategy, the size of a micro-batch and whether layers recompute. A setting that is `auto` is open;
what a person has set stays.
"""

from __future__ import annotations

import copy
import math
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf

from tunewright.config.method_schema import METHODS, PROMPT_LEARNING
from tunewright.config.schema import STRATEGIES, Launcher
from tunewright.errors import ConfigError
from tunewright.plan.architecture import Architecture
from tunewright.plan.auto import AUTO
from tunewright.plan.devices import Devices
from tunewright.plan.footprint import Batch
from tunewright.plan.machine import Machine
from tunewright.plan.module_rules import check_modules
from tunewright.plan.option import Option
from tunewright.plan.rules import CPU_RANKS, check, world_size
from tunewright.plan.substitutes import substitute
from tunewright.plan.support import combination_of, known_strategy, support_of

# Methods that learn much the same, in less memory or less time.
OTHERS = {"full": ("lora", "qlora"), "freeze": ("lora", "qlora"), "lora": ("qlora",), "qlora": ("lora",)}
OFFLOADING = ("zero2_offload", "zero3_offload")
MOST_TOKENS = 65_536  # of a micro-batch that is looked at: larger ones are no faster
USUAL = 4  # rows of a micro-batch where their number would change the global batch; on a CPU more are no faster


def devices_of(machine: Machine, cores: int) -> Devices:
    """Return what rules and support table know of a machine."""
    return Devices(machine.kind, machine.count if machine.kind != "cpu" else 0, cores)


def with_method(config: DictConfig, name: str) -> DictConfig:
    """Return the configuration with another method, which keeps what the two have in common."""
    other = copy.deepcopy(config)
    known = {item.name for item in fields(METHODS[name])} - {"name"}
    kept = {key: value for key, value in config.method.items() if key in known}
    other.method = OmegaConf.merge(OmegaConf.structured(METHODS[name]), kept)
    return other


def with_strategy(config: DictConfig, name: str) -> DictConfig:
    """Return the configuration under a shipped strategy; a DeepSpeed JSON that makes it already stays."""
    other = copy.deepcopy(config)
    if config.strategy.launcher is not Launcher.auto and known_strategy(config) == name:
        return other
    launcher = name if name in ("single", "ddp") else "deepspeed"
    other.strategy.name, other.strategy.launcher = name, Launcher(launcher)
    other.strategy.deepspeed = name if launcher == "deepspeed" else None
    return other


def at(config: DictConfig, option: Option) -> DictConfig:
    """Return the configuration as an option has it, with nothing left open."""
    settled = with_strategy(config, option.strategy)
    if option.method != config.method.name:
        settled = with_method(settled, option.method)
    settled.train.micro_batch_size, settled.train.gradient_checkpointing = option.micro_batch, option.recompute
    return settled


def agrees(config: DictConfig, strategy: str, micro_batch: int, *, recompute: bool) -> bool:
    """Tell whether a way is as the configuration says, or as it leaves open."""
    train = config.train
    return (
        (config.strategy.launcher is Launcher.auto or known_strategy(config) == strategy)
        and train.micro_batch_size in (AUTO, micro_batch)
        and train.gradient_checkpointing in (AUTO, recompute)
    )


def other_methods(config: DictConfig, devices: Devices, architecture: Architecture) -> list[DictConfig]:
    """Return the configuration with each other method that could run on the devices."""
    found = []
    for other in (with_method(config, name) for name in OTHERS.get(config.method.name, ())):
        for strategy in strategies(other, devices):
            one = with_strategy(other, strategy)
            one.train.micro_batch_size, one.train.gradient_checkpointing = 1, False
            if refusal(one, devices, architecture) is None:
                found.append(other)
                break
    return found


def strategies(config: DictConfig, devices: Devices) -> list[str]:
    """Return the strategies to look at: the configured one, and those that make a difference on these devices."""
    asked = config.cluster.num_processes
    ranks = asked or (devices.count if devices.gpu else CPU_RANKS)
    names = {"single", *OFFLOADING} if ranks == 1 else set(STRATEGIES) - {"zeropp"} - ({"single"} if asked else set())
    if not devices.gpu:  # where host memory is the device's
        names -= set(OFFLOADING)
    if config.strategy.launcher is not Launcher.auto:
        names.add(known_strategy(config))
    return [name for name in STRATEGIES if name in names]


def recomputations(config: DictConfig, architecture: Architecture) -> list[bool]:
    """Return whether to look at layers that recompute, and at layers that do not."""
    asked = config.train.gradient_checkpointing
    return [False, True] if architecture.recomputes else sorted({False, asked is True})


def micro_batches(config: DictConfig, devices: Devices, ranks: int) -> list[int]:
    """Return the sizes of micro-batches to look at: those that leave the global batch as it is."""
    train, length = config.train, config.data.cutoff_len
    own = set() if train.micro_batch_size == AUTO else {int(train.micro_batch_size)}
    if train.gradient_accumulation_steps:
        return sorted(own or {USUAL})
    share = train.tokens_per_batch // (ranks * length) if train.tokens_per_batch else _share(config, ranks)
    most = max(min(share, MOST_TOKENS // length if devices.gpu else USUAL), 1)
    return sorted({2**power for power in range(most.bit_length())} | {most} | own)


def _share(config: DictConfig, ranks: int) -> int:
    """Return the rows of a step that a rank gets."""
    return math.ceil((config.train.global_batch_size or 1) / ranks)


def largest_batch(config: DictConfig, devices: Devices, architecture: Architecture) -> Batch:
    """Return the largest micro-batch that can come, of the longest rows, where nothing is left open."""
    train, method = config.train, config.method
    rows = train.micro_batch_size
    if not train.gradient_accumulation_steps and not train.tokens_per_batch:
        rows = min(rows, _share(config, world_size(config, devices)))
    virtual = method.virtual_tokens if method.name in PROMPT_LEARNING else 0  # which count towards cutoff_len
    padded = support_of(combination_of(config, devices)).outcome == "padded" or bool(architecture.padding_free_problem)
    return Batch(
        rows, config.data.cutoff_len - virtual, padded or not train.padding_free, bool(train.gradient_checkpointing)
    )


def batches(config: DictConfig, devices: Devices, architecture: Architecture) -> list[Batch]:
    """Return the largest micro-batch of every way to run a method."""
    found: dict[Batch, None] = {}
    for strategy in strategies(config, devices):
        one = with_strategy(config, strategy)
        for micro_batch in micro_batches(config, devices, world_size(one, devices)):
            for recompute in recomputations(config, architecture):
                one.train.micro_batch_size, one.train.gradient_checkpointing = micro_batch, recompute
                found[largest_batch(one, devices, architecture)] = None
    return list(found)


def refusal(config: DictConfig, devices: Devices, architecture: Architecture) -> str | None:
    """Return why a configuration that leaves nothing open cannot run, or None; what has a substitute gets it."""
    try:
        check(config, devices)
        substitute(config, architecture, devices)
        check_modules(config, architecture)
    except ConfigError as error:
        return str(error)
    return None
