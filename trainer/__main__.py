"""`python -m trainer`: one rank, as `accelerate launch -m trainer` starts it.

accelerate launch ... -m trainer --run runs/NAME              what `tunewright train` starts
accelerate launch ... -m trainer strategy=zero2 train.epochs=1   the same settings without `tunewright`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from launch.batching import BatchPlan
from launch.compose import compose_config, load_config
from launch.deepspeed import deepspeed_path, read
from launch.errors import ConfigError, TunewrightError
from launch.hardware import find_devices
from launch.rundir import Claim, RunDir, claim, prepare_folder
from launch.schema import Dtype, Launcher, Resume
from launch.train import check_all
from trainer.prepare import ensure_prepared
from trainer.process import (
    Console,
    die_with_parent,
    imports_that_stay,
    join,
    launched,
    leave,
    rank,
    reported_errors,
    world_size,
)

if TYPE_CHECKING:
    from accelerate import PartialState


def main(argv: list[str]) -> int:
    """Run this rank and return its exit code."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    die_with_parent()
    try:
        config, claimed = _from_launcher(argv) if argv[:1] == ["--run"] else _from_overrides(argv)
        prepared = ensure_prepared(config, quiet=rank() > 0 or launched())
    except TunewrightError as error:
        if rank() == 0 and not error.shown:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    run = claimed.run
    state = None if launched() else _join_and_prepare(config, claimed)
    console = Console(run.logs)
    with reported_errors(run.logs, console):
        with imports_that_stay():
            state = state or join(config.strategy.launcher.name, config.train.timeout_minutes)
            from trainer.run import train

        train(config, run, prepared.cache, prepared.model_path, state, console, claimed.checkpoint)
        state.destroy_process_group()
    # At the interpreter's own end a rank over gloo aborts now and then (torch 2.13), and a finished run would count as
    # failed.
    leave(0)


def _join_and_prepare(config: DictConfig, claimed: Claim) -> PartialState:
    """Without the launcher, the first rank makes the run folder: after all joined, before any writes into it."""
    state = join(config.strategy.launcher.name, config.train.timeout_minutes)
    if state.is_main_process:
        prepare_folder(config, claimed)
    state.wait_for_everyone()
    return state


def _from_launcher(argv: list[str]) -> tuple[DictConfig, Claim]:
    run = RunDir(Path(argv[1]))
    checkpoint = Path(argv[3]) if argv[2:3] == ["--checkpoint"] else None
    config = load_config(run.config)
    # The launcher has fetched everything; a hub that changes meanwhile must not give the ranks other rows.
    config.offline = config.offline or not config.data.streaming
    return config, Claim(run, checkpoint)


def _from_overrides(argv: list[str]) -> tuple[DictConfig, Claim]:
    """Compose from the command line; the strategy is what the launcher around this process started."""
    overrides = [*_strategy_of_environment(argv), *argv, f"cluster.num_processes={world_size()}"]
    config = compose_config(overrides)
    plan, settled = check_all(config, find_devices())
    settled += overruled(config, plan)
    if config.strategy.launcher is Launcher.deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        raise ConfigError(
            f"`strategy={config.strategy.name}` is not what runs: this process was started without DeepSpeed. Use "
            f"`tunewright train`, or `accelerate launch --use_deepspeed` without --cpu, which turns DeepSpeed off."
        )
    if rank() == 0:
        print("\n".join(settled), end="\n" if settled else "", flush=True)
        return config, claim(config)
    run = RunDir(Path(config.output_root) / config.name)
    return config, Claim(run, None if config.resume is Resume.never else run.last_checkpoint())


def overruled(config: DictConfig, plan: BatchPlan) -> list[str]:
    """Say which values of an accelerate configuration of the user's own do not count, and what does."""
    told = []
    for name, found, setting in (
        ("mixed_precision", "bf16" if config.model.dtype is Dtype.bfloat16 else "no", "model.dtype"),
        ("gradient_accumulation_steps", str(plan.accumulation), "train.gradient_accumulation_steps"),
        ("gradient_clipping", str(config.train.max_grad_norm), "train.max_grad_norm"),
    ):
        value = os.environ.get(f"ACCELERATE_{name.upper()}")
        if value not in (None, "no", "none", "1", "auto", found):
            told.append(f"accelerate's {name}={value} does not count: {setting} decides.")
    return told


def _strategy_of_environment(argv: list[str]) -> list[str]:
    if any(item.startswith("strategy=") for item in argv):
        return []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file:
            quoted = file.replace("\\", "\\\\").replace("'", "\\'")
            return [f"strategy={read(deepspeed_path(file)).strategy}", f"strategy.deepspeed='{quoted}'"]
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2", "3"):
            raise ConfigError(f"`zero_stage` of the accelerate configuration is {stage}: write 1, 2 or 3.")
        return [f"strategy=zero{stage}"]
    return ["strategy=ddp" if world_size() > 1 else "strategy=single"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
