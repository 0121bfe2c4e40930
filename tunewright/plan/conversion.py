"""Whether a checkpoint fits the ranks that would go on with it, has to be converted for them, or cannot be.

Weights and the optimiser's two moments of each parameter are the same whoever holds them, so a checkpoint can be cut
anew: for another number of ranks, another ZeRO stage, or none. `trainer/universal.py` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from omegaconf import DictConfig

from tunewright.checkpoints import read_record
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.method_schema import PROMPT_LEARNING
from tunewright.config.schema import Launcher
from tunewright.errors import ConfigError
from tunewright.plan.support import known_strategy

FOLDER = ".universal"  # in `checkpoints`
# Whose state of a parameter is `exp_avg` and `exp_avg_sq`, which is what the universal format has a place for.
CONVERTIBLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


class Way(Enum):
    """What is done with a checkpoint before ranks read it."""

    as_is = "as it is"
    for_deepspeed = "for DeepSpeed"
    for_torch = "for PyTorch's optimiser"


@dataclass(frozen=True)
class Layout:
    """Who holds the states: how many ranks, under which strategy, at which ZeRO stage (None without ZeRO)."""

    ranks: int
    strategy: str
    stage: int | None

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'' if self.ranks == 1 else 's'}"
        return f"{ranks} at ZeRO stage {self.stage}" if self.stage else f"{ranks} without ZeRO"


@dataclass(frozen=True)
class Start:
    """What ranks go on from."""

    checkpoint: Path  # the run's
    way: Way
    remark: str | None  # what the user should know

    @property
    def folder(self) -> Path:
        """What ranks read: the checkpoint, or what it is converted into."""
        return self.checkpoint if self.way is Way.as_is else place_of(self.checkpoint)


def place_of(checkpoint: Path) -> Path:
    """Return the folder that a checkpoint is converted into."""
    return checkpoint.parent / FOLDER / checkpoint.name


def layout_of(config: DictConfig, ranks: int) -> Layout:
    """Return the layout that a configuration makes with so many ranks."""
    deepspeed = config.strategy.launcher is Launcher.deepspeed
    return Layout(ranks, config.strategy.name, deepspeed_file(config).stage if deepspeed else None)


def start_from(checkpoint: Path, config: DictConfig, ranks: int) -> Start:
    """Return what so many ranks go on from, where `checkpoint` is a whole one.

    Raises:
        ConfigError: see `way`.
    """
    record = read_record(checkpoint)
    before, now = Layout(record["world_size"], record["strategy"], record["zero_stage"]), layout_of(config, ranks)
    found = way(checkpoint.name, before, now, config)
    return Start(checkpoint, found, remark(checkpoint.name, before, now, found, config))


def way(name: str, before: Layout, now: Layout, config: DictConfig) -> Way:
    """Decide how the checkpoint called `name` becomes one for the ranks of now.

    Raises:
        ConfigError: it does not, with the reason and what to do.
    """
    if (before.ranks, before.stage) == (now.ranks, now.stage) or not (before.stage or now.stage):
        return Way.as_is
    problem = _problem(before, now, config)
    if problem:
        strategy = f"cluster.num_processes={before.ranks} strategy={before.strategy}"
        raise ConfigError(
            f"{name} was written by {before} and cannot be converted for {now}: {problem} Go on with {strategy}, or "
            f"choose another `name` to train anew."
        )
    return Way.for_deepspeed if now.stage else Way.for_torch


def _problem(before: Layout, now: Layout, config: DictConfig) -> str | None:
    optimizer = config.train.optimizer
    if optimizer not in CONVERTIBLE_OPTIMIZERS:
        return (
            f"the states of `train.optimizer={optimizer}` are not those of AdamW, which is what DeepSpeed's universal "
            f"checkpoints hold."
        )
    if "zeropp" in (before.strategy, known_strategy(config)):
        return "`strategy=zeropp` keeps a second, quantised copy of what it splits, which a conversion does not make."
    if config.method.name in PROMPT_LEARNING and not (before.stage and now.stage):
        return f"`method={config.method.name}` keeps the network behind its tokens otherwise with ZeRO than without."
    if config.train.keep_best and now.stage:
        return "`train.keep_best=true` may end in reading an earlier checkpoint, which is cut as this one was."
    if config.strategy.launcher is Launcher.deepspeed and _on_disk(config):
        return "states that `strategy.deepspeed` keeps on a disk (nvme) are not converted."
    return None


def _on_disk(config: DictConfig) -> bool:
    file = deepspeed_file(config)
    return any(file.get(f"zero_optimization.offload_{what}.device") == "nvme" for what in ("optimizer", "param"))


def remark(name: str, before: Layout, now: Layout, found: Way, config: DictConfig) -> str | None:
    """Return what the user should know of ranks that are others than those that wrote a checkpoint, or None."""
    if (before.ranks, before.stage) == (now.ranks, now.stage):
        return None
    told = f"{name} was written by {before}"
    told += f"; it is converted for {now}." if found is not Way.as_is else f", now it is {now}."
    random = config.method.get("dropout") and (before.ranks != now.ranks or found is not Way.as_is)
    drawn = " Dropout draws other numbers than it would have." if random else ""
    return f"{told}{drawn}"
