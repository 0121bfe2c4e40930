"""What becomes of settings that are `auto`: the fastest way to run that fits."""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig

from tunewright.config.schema import Launcher
from tunewright.plan.auto import STRATEGY, Choice, chosen_before, open_settings, plain_choice
from tunewright.plan.devices import Devices


def choose(config: DictConfig, devices: Devices, *, here: bool = False) -> Choice:
    """Return what was chosen for the run that this configuration continues, else what is chosen for these devices.

    Args:
        config: with settings left open; it is changed.
        here: training must happen in this process.
    """
    alone = here and STRATEGY in open_settings(config)
    if alone:
        config.strategy.name, config.strategy.launcher = "single", Launcher.single
    found = chosen_before(config) or choose_anew(config, devices)
    return replace(found, strategy="single") if alone else found


def choose_anew(config: DictConfig, devices: Devices) -> Choice:
    """Return what is chosen for these devices."""
    return plain_choice(config)
