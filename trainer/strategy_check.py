"""Whether what runs is what the strategy promises: a rank can end up alone, or without ZeRO, without a word."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import TrainerCallback

from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.schema import Launcher
from tunewright.errors import ConfigError
from tunewright.ranks import launched, machine, machines, world_size
from tunewright.run_folder import RunDir
from tunewright.trainer.console import Output
from tunewright.trainer.process_group import all_gather, limit_waiting
from tunewright.trainer.results import name_of


class VerifyStrategy(TrainerCallback):
    """Writes down, once the model is prepared, what really runs, and ends the run if that is not what was asked for."""

    def __init__(self, config: DictConfig, run: RunDir, trainer: Any, output: Output) -> None:
        self.config, self.run, self.trainer, self.output = config, run, trainer, output
        self.first = 0  # the step that this process begins with

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.first:
            return
        facts = distributed_facts(self.trainer)
        check_facts(facts, self.config)
        if state.is_world_process_zero:
            self.run.update_manifest(distributed=facts)
            self.output.log(f"ranks: {json.dumps(facts)}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = state.global_step
        limit_waiting(self.config.train.timeout_minutes)
        if state.is_world_process_zero:
            self.run.update_manifest(steps_planned=state.max_steps)


def distributed_facts(trainer: Any) -> dict[str, Any]:
    """Return what the trainer runs on, read from the live objects and not from the configuration."""
    accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
    parameters = list(trainer.model.parameters())
    facts: dict[str, Any] = {
        "world_size": accelerator.num_processes,
        "type": accelerator.distributed_type.name,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "device": accelerator.device.type,
        "engine": type(wrapped).__name__,
        "zero_stage": int(wrapped.zero_optimization_stage()) if hasattr(wrapped, "zero_optimization_stage") else None,
        "parameters_held_by_rank_0": sum(getattr(p, "ds_tensor", p).numel() for p in parameters),
        "parameters_partitioned": sum(1 for p in parameters if hasattr(p, "ds_id")),
        "gradients_summed_in": name_of(trainer.summed_in()),
        "hosts": _hosts(),
        "process_ids": [int(row[0]) for row in all_gather([os.getpid()], accelerator.device)],
    }
    return facts


def _hosts() -> list[str]:
    """Return the machine of each rank, by its number among them, which the launcher gave it, and its name."""
    mine = f"{machine()}: {socket.gethostname()}"
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def check_facts(facts: dict[str, Any], config: DictConfig) -> None:
    """Compare what runs with what the strategy promises.

    Raises:
        ConfigError: for example one process where two were asked for, or DDP in place of ZeRO.
    """
    launcher = config.strategy.launcher
    expected: dict[str, Any] = {"type": {Launcher.single: "NO", Launcher.deepspeed: "DEEPSPEED"}.get(launcher)}
    if launcher is Launcher.ddp:
        expected["type"] = "MULTI_CPU" if facts["device"] == "cpu" else "MULTI_GPU"
    if launcher is Launcher.deepspeed:
        expected |= {"engine": "DeepSpeedEngine", "zero_stage": deepspeed_file(config).stage}
    expected["world_size"] = config.cluster.num_processes or world_size()
    if machines():
        facts = {**facts, "machines": len(set(facts["hosts"]))}
        expected["machines"] = machines()
    wrong = {key: (value, facts[key]) for key, value in expected.items() if facts[key] != value}
    if wrong:
        found = ", ".join(f"{key} {now!r} instead of {want!r}" for key, (want, now) in wrong.items())
        advice = (
            "Report this, please: what was started is not what was printed."
            if launched()
            else ("Start with `tunewright train`, or give `accelerate launch` what the strategy needs.")
        )
        raise ConfigError(f"`strategy={config.strategy.name}` is not what runs: {found}. {advice}")
