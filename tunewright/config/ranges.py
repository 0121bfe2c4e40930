"""How large each number of the configuration may be: what lies outside would end in a rank, or never."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tunewright.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; with `above` or `below` without that bound itself."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    hint: str = ""

    def holds(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and math.isfinite(value)

    def wanted(self) -> str:
        low = f"{'above' if self.above else 'from'} {_shown(self.least)}"
        high = f" {'to below' if self.below else 'to'} {_shown(self.most)}" if math.isfinite(self.most) else ""
        return f"write a number {low}{high}{self.hint}"


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


POSITIVE = Range(0, above=True)
MODERATE = Range(0, 1e30)  # what float32 still holds
MODERATE_POSITIVE = Range(0, 1e30, above=True)
# What is counted on a machine: rows, processes, threads. More of them than this is a slip, and would never begin.
COUNT = Range(1, 4096)
SHARE = Range(0, 1)
WIDTH = Range(1, 65_536)  # of what is learnt: more than any weight matrix has
RANGES: dict[str, Range] = {
    "train.learning_rate": MODERATE_POSITIVE,
    "train.epochs": Range(0, 1_000_000, above=True),
    "train.max_steps": POSITIVE,
    "train.warmup_ratio": SHARE,
    "train.weight_decay": MODERATE,
    "train.max_grad_norm": Range(0, 1e30, hint="; 0 turns clipping off"),
    "train.seed": Range(0, 2**32 - 1),
    "train.logging_steps": POSITIVE,
    "train.eval_steps": POSITIVE,
    "train.save_steps": Range(0, hint="; 0 writes no checkpoints"),
    "train.save_total_limit": Range(2, hint=": the newest may turn out to be damaged"),
    "train.timeout_minutes": Range(0, 1_000_000, above=True),
    "train.grace_seconds": POSITIVE,
    "train.neftune_alpha": MODERATE_POSITIVE,
    "train.early_stopping": POSITIVE,
    "train.router_aux_loss": Range(0, 1e30, hint="; 0 turns it off"),
    "data.max_samples": POSITIVE,
    "data.eval_size": Range(0, hint=": a share below 1 or a number of rows"),
    "data.max_dropped": SHARE,
    "data.workers": COUNT,
    "data.shuffle_buffer": POSITIVE,
    "cluster.threads_per_process": COUNT,
    "cluster.num_processes": COUNT,
    "method.r": WIDTH,
    "method.alpha": Range(
        0, 1_000_000_000, above=True, hint=", for example 2 x r: with a scale of 0 nothing is learnt"
    ),
    "method.dropout": Range(0, 1, below=True),
    "method.loraplus_ratio": Range(1, 1_000_000, hint=", for example 16"),
    "method.virtual_tokens": WIDTH,
    "method.hidden_size": WIDTH,
}


def check_ranges(config: DictConfig, ranges: dict[str, Range] = RANGES) -> None:
    """Look at each number.

    Raises:
        ConfigError: the first that is outside its range.
    """
    for key, allowed in ranges.items():
        value: Any = OmegaConf.select(config, key)
        if value is not None and not allowed.holds(value):
            raise ConfigError(f"`{key}` is {value}: {allowed.wanted()}.")
