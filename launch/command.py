"""The `accelerate launch` command of a run: built as a list of arguments, shown to the user, then started.

Nothing in it is special: a person can type it, and `--dry-run` prints it instead of running it.
"""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import DictConfig

from tunewright import threads
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.schema import Launcher
from tunewright.files import write_text
from tunewright.launch.children import SAFE_PATH
from tunewright.plan.batch_plan import BatchPlan
from tunewright.plan.devices import Devices
from tunewright.ranks import rank_variables
from tunewright.run_folder import RunDir

RANK_MODULE = "tunewright.trainer"


@dataclass(frozen=True)
class Command:
    """What is run: `accelerate launch`, its arguments, what is added to the environment, its configuration file."""

    program: list[str]
    arguments: list[str]
    env: dict[str, str]
    accelerate: dict[str, object]

    def shown(self) -> str:
        """Return the command as a person would type it."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in {**SAFE_PATH, **self.env}.items()]
        left_over = rank_variables(os.environ)
        if left_over:
            settings = ["env", *(f"-u {name}" for name in left_over), *settings]
        program = [str(path_from_here(self.program[0])), *self.program[1:]]
        return " ".join([*settings, shlex.join([*program, *self.arguments])])


def accelerate_launch() -> list[str]:
    """Return how `accelerate launch` is called here: by its script, where it was installed with this Python.

    Python 3.10 would let `-m` import what lies in the working directory.
    """
    script = Path(sysconfig.get_path("scripts"), "accelerate")
    return [str(script), "launch"] if script.is_file() else [sys.executable, "-m", "accelerate.commands.launch"]


def path_from_here(path: str) -> Path:
    """Return a path as one would type it here: `.venv/bin/accelerate`."""
    whole, here = Path(path), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole


def accelerate_config(config: DictConfig, ranks: int) -> dict[str, object]:
    """Return the accelerate configuration of a strategy on this machine."""
    kinds = {Launcher.single: "NO", Launcher.ddp: "MULTI_GPU", Launcher.deepspeed: "DEEPSPEED"}
    launcher = config.strategy.launcher
    settings: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        # Also for CPU ranks: with MULTI_CPU, or `use_cpu`, accelerate 1.15 starts one process whatever is asked for.
        "distributed_type": kinds[launcher] if ranks > 1 or launcher is Launcher.deepspeed else "NO",
        "num_machines": 1,
        "num_processes": ranks,
        "machine_rank": 0,
        "main_process_port": 0,
        "use_cpu": False,
        "rdzv_backend": "static",
    }
    if launcher is Launcher.deepspeed:
        settings["deepspeed_config"] = {"deepspeed_config_file": str(deepspeed_file(config).path)}
    return settings


def build_command(
    config: DictConfig, run: RunDir, plan: BatchPlan, devices: Devices, checkpoint: Path | None
) -> Command:
    """Build the command that starts the ranks of a run."""
    script = ["-m", RANK_MODULE, "--run", str(run.path)]
    if checkpoint:
        script += ["--checkpoint", str(checkpoint)]
    return Command(
        accelerate_launch(),
        ["--config_file", str(run.path / "accelerate.yaml"), *script],
        environment_of(config, plan.world_size, devices),
        accelerate_config(config, plan.world_size),
    )


def write_accelerate_config(command: Command, run: RunDir) -> None:
    write_text(run.path / "accelerate.yaml", yaml.safe_dump(command.accelerate, sort_keys=False))


def environment_of(config: DictConfig, ranks: int, devices: Devices) -> dict[str, str]:
    """Return what is added to the environment of the ranks."""
    env = {threads.COUNT: threads.of_each_rank(config, ranks, devices), "TOKENIZERS_PARALLELISM": "false"}
    if not devices.gpu:
        env |= threads.waiting()
    if config.strategy.launcher is Launcher.deepspeed and not devices.gpu:
        env["DS_ACCELERATOR"] = "cpu"
    if config.strategy.launcher is not Launcher.deepspeed and devices.gpu and ranks == 1:
        env |= _first_gpu(devices)
    return env


def _first_gpu(devices: Devices) -> dict[str, str]:
    """Return what shows a process alone the first visible GPU: with more, transformers would share batches out.

    Not accelerate's `gpu_ids`, which sets CUDA_VISIBLE_DEVICES over what the user chose with AMD's variables. There
    ROCR_VISIBLE_DEVICES comes first; HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES in its place, counts what it left.
    """
    names = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if devices.kind == "rocm" else ("CUDA_VISIBLE_DEVICES",)
    chosen = next((os.environ[name] for name in names if name in os.environ), "0")
    return {names[0]: chosen.split(",")[0].strip()}
