"""Settings that are left to tunewright, `auto`: which ones a configuration has, and how a choice is written into it.

Also the choice where nobody has to be asked; `launch/choosing.py` asks otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from tunewright.config.schema import STRATEGIES, Launcher, Resume
from tunewright.plan.support import known_strategy

AUTO = "auto"
STRATEGY, MICRO_BATCH, RECOMPUTE = "strategy", "train.micro_batch_size", "train.gradient_checkpointing"


@dataclass(frozen=True)
class Choice:
    """What becomes of the settings that are `auto`; of the others it says nothing."""

    strategy: str
    micro_batch: int = 4
    recompute: bool = False


Choose = Callable[[DictConfig], Choice]


def open_settings(config: DictConfig) -> list[str]:
    """Return the settings that are `auto`."""
    train = config.train
    found = {
        STRATEGY: config.strategy.launcher is Launcher.auto,
        MICRO_BATCH: train.micro_batch_size == AUTO,
        RECOMPUTE: train.gradient_checkpointing == AUTO,
    }
    return [key for key, is_open in found.items() if is_open]


def plain_choice(config: DictConfig) -> Choice:
    """Return what is chosen where memory is no question: one process, or as many with DDP as are asked for."""
    return Choice("single" if config.cluster.num_processes in (None, 1) else "ddp")


def settle(config: DictConfig, choose: Choose = plain_choice) -> None:
    """Put a choice in the place of each `auto`, and note in `automatic` which these were.

    Raises:
        ConfigError: see `known_strategy`; or what `choose` raises, which is given a copy.
    """
    found = open_settings(config)
    if found:
        write(config, choose(config.copy()))
    if config.strategy.name == AUTO:  # `strategy.launcher=ddp` alone
        config.strategy.name = known_strategy(config)


def write(config: DictConfig, choice: Choice) -> None:
    """Write a choice in the place of each `auto`."""
    strategy, train, found = config.strategy, config.train, open_settings(config)
    if STRATEGY in found:
        alone = choice.strategy in Launcher.__members__
        strategy.launcher = Launcher[choice.strategy] if alone else Launcher.deepspeed
        if strategy.name == AUTO:
            strategy.name = choice.strategy
        if not alone and strategy.deepspeed is None:
            strategy.deepspeed = choice.strategy
    if MICRO_BATCH in found:
        train.micro_batch_size = choice.micro_batch
    if RECOMPUTE in found:
        train.gradient_checkpointing = choice.recompute
    config.automatic = [key for key in (STRATEGY, MICRO_BATCH, RECOMPUTE) if key in (*config.automatic, *found)]


def chosen_before(config: DictConfig) -> Choice | None:
    """Return what was chosen for the run that a configuration continues; None where it begins one.

    The run may be called after a strategy that would not be chosen today, on other devices.
    """
    if config.resume is Resume.never:
        return None
    found = []
    for strategy in STRATEGIES if STRATEGY in open_settings(config) else [config.strategy.name]:
        probe = config.copy()
        write(probe, Choice(strategy))
        file = Path(probe.output_root, probe.name, "config.yaml")
        before = _read(file)
        kept = before.get("automatic") or []
        if before.get("strategy", {}).get("name") == strategy and {*open_settings(config)} <= {*kept}:
            train = before["train"]
            choice = Choice(strategy, int(train["micro_batch_size"]), bool(train["gradient_checkpointing"]))
            found.append((file.stat().st_mtime, choice))
    return max(found, key=lambda one: one[0])[1] if found else None


def _read(file: Path) -> dict[str, Any]:
    """Return a run's settings; whether they are damaged, `claims.py` says of the run that it takes."""
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
