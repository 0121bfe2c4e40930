"""`tunewright plan --measure`: how fast and how large a configuration is here, seen in a few real steps.

A run in a folder of its own, through all that a training goes through, on rows made for it: some steps of the largest
micro-batch that can come, then some of rows as long as they are on average. What is seen goes into the cache
(`tunewright.plan.reached`), from where later plans for this machine take it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from tunewright.config.schema import Compat, Mix, Overlong, Resume
from tunewright.errors import Preempted, TunewrightError
from tunewright.launch.command import write_accelerate_config
from tunewright.launch.prepare import ensure_prepared
from tunewright.launch.supervise import INTERRUPTED, run_ranks
from tunewright.launch.train import Job, plan_job, run_job
from tunewright.metrics import read_metrics
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import Devices
from tunewright.plan.footprint import Footprint, Pass
from tunewright.plan.held import Memory
from tunewright.plan.machine import Machine
from tunewright.plan.reached import Point, Reached, keep, known_here, way_of
from tunewright.plan.rules import world_size
from tunewright.trainer.data.sampling import epoch_order
from tunewright.trainer.prepared import Prepared

STEPS = 3  # of each kind, the first to warm up
MOST_MICRO_BATCHES = 2  # of a step: more take longer and tell no more
NAME = "measuring"
WORDS = (
    "river",
    "stone",
    "light",
    "window",
    "garden",
    "paper",
    "silver",
    "morning",
    "bread",
    "music",
    "north",
    "glass",
)
# Of the average: rows differ, so that padded ones hold about twice the tokens (docs/benchmarks.md).
LENGTHS = (0.4, 0.7, 1.0, 1.9)


def measure(
    config: DictConfig,
    footprint: Footprint,
    found: Pass,
    planned: Memory,
    machine: Machine,
    devices: Devices,
    *,
    mean: float | None = None,
) -> Reached:
    """Train some steps as a configuration says, keep what was seen of time and memory, and return it.

    Args:
        found: the largest micro-batch.
        planned: for it.
        mean: tokens of a row on average, where they are known.

    Raises:
        ConfigError, StorageError: see `plan_job`.
        TunewrightError: the run failed, memory that was not enough among the reasons.
    """
    machine = machine.of(world_size(config, devices))
    with TemporaryDirectory(prefix="tunewright-measure-") as folder:
        short = min(mean or found.batch.length, found.batch.length)
        trial = _trial(config, found.batch.length, short, machine.count, Path(folder))
        manifest, lines = train_quietly(trial, devices)
    seen = [line for line in lines if "step_seconds" in line]
    long, rest = seen[1:STEPS], seen[STEPS + 1 :]
    weights, ranks = footprint.weights, machine.count
    micro_batches = batch_plan(trial.train, ranks).accumulation
    points = [_point(kind, micro_batches, ranks) for kind in (long, rest)]
    if points[1].tokens > 0.9 * points[0].tokens:  # there is one kind of rows
        points = [_point([*long, *rest], micro_batches, ranks)]
    context = 0 if machine.kind == "cpu" else planned.context  # which a GPU's allocator does not count
    memory = (manifest["peak_memory_bytes"] + context) / planned.needed
    way = way_of(config, machine, weights.trained, weights.trained + weights.frozen, recompute=found.batch.recompute)
    rate = machine.rate or known_here(config, machine).rate(way.dtype, ranks)
    record = Reached(way, points, rate, memory, measured=True)
    keep(config.data.cache_dir, record)
    return record


def train_quietly(config: DictConfig, devices: Devices) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train as `tunewright train` does, but print nothing; return the manifest and the lines of metrics.jsonl.

    Raises:
        ConfigError, DataError, StorageError: see `plan_job`.
        TunewrightError: the run failed.
        KeyboardInterrupt: it was asked to stop.
    """
    told: list[str] = []

    def start(job: Job, prepared: Prepared) -> int:
        run, minutes = job.claimed.run, job.config.train.timeout_minutes
        write_accelerate_config(job.command, run)
        return run_ranks(job.command, run, told.append, timeout_minutes=minutes, quiet=True)

    job = plan_job(config, devices)
    run = job.claimed.run
    code = run_job(job, told.append, partial(ensure_prepared, quiet=True), start)
    if code in (Preempted.exit_code, INTERRUPTED):  # nobody goes on from there: the folder is not for long
        raise KeyboardInterrupt
    if code:
        raise TunewrightError(f"The run in {run.path} failed:\n" + "\n".join(told[-3:]))
    return run.read_manifest(), read_metrics(run.metrics)


def _point(lines: Sequence[dict[str, Any]], micro_batches: int, ranks: int) -> Point:
    """Return a rank's micro-batch in the fastest of some steps that were logged one by one: others were disturbed."""
    line = min(lines, key=lambda line: line["step_seconds"] / line["step_tokens"])
    tokens, flops = line["step_tokens"], line["flops_per_second"] * line["step_seconds"]
    return Point(tokens / micro_batches / ranks, flops / micro_batches / ranks, line["step_seconds"] / micro_batches)


def _trial(config: DictConfig, longest: int, mean: float, ranks: int, folder: Path) -> DictConfig:
    """Return the configuration of a short run in a folder, whose rows lie there too."""
    trial = deepcopy(config)
    train, data = trial.train, trial.data
    plan = batch_plan(train, ranks, cutoff_len=data.cutoff_len, packing=data.packing)
    rows = plan.micro_batch * min(plan.accumulation, MOST_MICRO_BATCHES) * ranks
    train.global_batch_size, train.gradient_accumulation_steps, train.tokens_per_batch = rows, None, None
    train.max_steps, train.logging_steps, train.save_steps, train.eval_steps = 2 * STEPS, 1, 0, None
    # Words without a meaning must not make a high rate of learning end the run.
    train.scheduler, train.learning_rate = "constant", min(train.learning_rate, 1e-6)
    train.keep_best, train.early_stopping, train.mirror, train.callbacks = False, None, None, []
    train.group_by_length, train.grace_seconds = False, None
    file = folder / "rows.json"
    _write_rows(file, rows, longest, mean, train.seed)
    data.names, data.dir, data.root = [str(file)], str(folder), None
    data.eval_names, data.eval_split, data.eval_size, data.max_samples = [], None, 0.0, None
    data.mix, data.weights, data.streaming, data.packing = Mix.concat, [], False, False
    data.cutoff_len, data.overlong, data.max_dropped, data.compat = longest, Overlong.truncate, 1.0, Compat.none
    data.train_on_prompt, data.mask_history, data.allow_outside = True, False, True
    trial.name, trial.output_root, trial.automatic = NAME, str(folder / "runs"), []  # what is measured stays as it is
    trial.resume, trial.resume_allow, trial.overwrite = Resume.never, [], False
    return trial


def _write_rows(file: Path, rows: int, longest: int, mean: float, seed: int) -> None:
    """Write the rows of all steps, so that those of the first half of the steps are cut to the longest allowed."""
    order = epoch_order(2 * STEPS * rows, seed, 0)
    texts = [""] * len(order)  # plain ones, because not every model has a chat template
    for place, row in enumerate(order.tolist()):
        average = round(mean * LENGTHS[place % len(LENGTHS)])
        words = longest if place < STEPS * rows else max(average, 1)  # each is a token at least
        texts[row] = " ".join(WORDS[(row + number) % len(WORDS)] for number in range(words))
    file.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
