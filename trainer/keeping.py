"""What a run reached, kept in the cache at its end for those who plan the next one (`tunewright.plan.reached`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig

from tunewright.plan.auto import RECOMPUTE
from tunewright.plan.batch_plan import BatchPlan
from tunewright.plan.device_table import called, find_device
from tunewright.plan.machine import processor
from tunewright.plan.reached import Point, Reached, Way, keep
from tunewright.plan.support import known_strategy
from tunewright.trainer.peak import certain

LEAST_STEPS = 10  # behind the first log line, in which things are made that stay


def keep_reached(
    config: DictConfig,
    plan: BatchPlan,
    parameters: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    lines: Sequence[dict[str, Any]],
    peak: dict[str, float | None],
) -> None:
    """Keep the speed of a run that was not continued, so that all of its log lines are of this machine.

    Not where something else ran on a CPU meanwhile, where only some layers may recompute, or where it was too short.

    Args:
        parameters: how many are (trained, there).
        lines: of metrics.jsonl.
        peak: of all ranks (`Peak.at_end`).
    """
    recompute, best = bool(config.train.gradient_checkpointing), certain(peak)
    partly = recompute and RECOMPUTE in config.automatic  # as few layers as memory asked for (`FitCheckpointing`)
    trained = [line for line in lines if "step_seconds" in line]
    if partly or (best is None and device.type == "cpu") or len(trained) < 2:
        return
    steps = trained[-1]["step"] - trained[0]["step"]
    if steps < LEAST_STEPS:
        return
    batches, counted = steps * plan.accumulation, trained[1:]
    tokens = sum(line["step_tokens"] for line in counted)
    flops = sum(line["flops_per_second"] * line["step_seconds"] for line in counted)
    # The median, because compiling, and what else a machine does for a moment, is in a line or two.
    of_a_token = median(line["step_seconds"] / line["step_tokens"] for line in counted)
    point = Point(tokens / batches / plan.world_size, flops / batches / plan.world_size, of_a_token * tokens / batches)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    listed = find_device(name)
    rate = listed.rate if listed else best and best / plan.world_size
    way = Way(
        device=called(name),
        ranks=plan.world_size,
        method=config.method.name,
        strategy=known_strategy(config),
        dtype=str(dtype).removeprefix("torch."),
        padded=not config.train.padding_free,
        recompute=recompute,
        compiled=bool(config.train.compile),
        trained=parameters[0],
        total=parameters[1],
    )
    with suppress(OSError):  # a disk that is full or read-only: another run will be kept
        keep(config.data.cache_dir, Reached(way, [point], rate))
