"""What a training writes into the manifest of its run, and into TensorBoard's table of hyper-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.tensorboard import SummaryWriter

from tunewright.metrics import final_train_loss, mean_train_loss, read_metrics
from tunewright.run_folder import RunDir
from tunewright.trainer.data.token_cache import TokenCache, as_json
from tunewright.trainer.hardware import describe_hardware
from tunewright.trainer.peak import certain

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "datasets", "bitsandbytes", "hydra-core")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what is trained."""
    return {name: version(name) for name in PACKAGES}


def describe_training(
    config: DictConfig, cache: TokenCache, parameters: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what is known when a training begins; `parameters` are (trainable, total)."""
    trainable, total = parameters
    return {
        "strategy": config.strategy.name,
        "method": config.method.name,
        "model": config.model.name,
        "datasets": list(config.data.names),
        "data": as_json(cache),
        "parameters": {"trainable": trainable, "total": total},
        "hardware": describe_hardware(device),
        "versions": package_versions(),
        "dtype": name_of(dtype),
    }


def describe_result(
    run: RunDir,
    trainer: Any,
    seconds: float,
    memory: float,
    peak: dict[str, float | None],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Return what a finished training comes to: its losses, how long it took, and the most `memory` of any rank.

    `peak` is what its devices can compute (`Peak.at_end`).
    """
    lines = read_metrics(run.metrics)
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    kept = trainer.state.best_metric if trainer.args.load_best_model_at_end else evals[-1] if evals else None
    trained = [line for line in lines if "step_seconds" in line]
    step_seconds = sum(line["step_seconds"] for line in trained)
    tokens = sum(line["step_tokens"] for line in trained)
    counted = [line for line in trained if "flops_per_second" in line]  # lines of older versions have none
    counted_seconds = sum(line["step_seconds"] for line in counted)
    flops = sum(line["flops_per_second"] * line["step_seconds"] for line in counted)
    rate, best = flops / counted_seconds if counted_seconds else None, certain(peak)
    return {
        "status": "done",
        "warnings": list(warnings),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "wall_seconds": seconds,
        "step_seconds": step_seconds,
        "tokens_seen": int(tokens),
        "tokens_per_second": tokens / step_seconds if step_seconds else None,
        "flops_per_second": rate,
        "peak_flops_per_second": peak,
        "mfu": rate / best if rate and best else None,
        "peak_memory_bytes": int(max([memory, *(line["peak_memory_bytes"] for line in trained)])),
        "final": {
            "train_loss": final_train_loss(lines),
            "mean_train_loss": mean_train_loss(lines),
            "eval_loss": kept,
        },
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_hyperparameters(run: RunDir, final: dict[str, Any]) -> None:
    """Put settings and final losses where TensorBoard's table of hyper-parameters finds them."""
    settings = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in run.read_manifest()["identity"].items()
    }
    results = {f"final/{key}": value for key, value in final.items() if value is not None}
    with SummaryWriter(str(run.tensorboard)) as writer:
        writer.add_hparams(settings, results, run_name=".")
