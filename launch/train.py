"""`tunewright train`: compose, check, prepare the data once, start the ranks."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from tunewright import threads
from tunewright.checkpoints import bytes_of
from tunewright.claims import Claim, check_inputs, claim, prepare_folder, sole_user
from tunewright.config.compose import compose_config, expand_sweep
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.schema import Launcher, Resume
from tunewright.errors import ConfigError, MemoryShortage
from tunewright.launch.choosing import choose, choose_anew, fit, head, planned
from tunewright.launch.command import Command, build_command, write_accelerate_config
from tunewright.launch.convert import ensure_readable
from tunewright.launch.supervise import run_ranks
from tunewright.launch.writable_cache import use_writable_cache
from tunewright.plan.auto import MICRO_BATCH, settle
from tunewright.plan.batch_plan import BatchPlan, batch_plan
from tunewright.plan.conversion import Start, start_from
from tunewright.plan.deepspeed_rules import account
from tunewright.plan.devices import Devices, find_devices
from tunewright.plan.module_rules import check_modules
from tunewright.plan.rules import check
from tunewright.plan.substitutes import substitute
from tunewright.ranks import rank_variables
from tunewright.restore import bring_back
from tunewright.text import size

if TYPE_CHECKING:
    from tunewright.trainer.prepared import Prepared

LARGE = 5_000_000_000  # bytes: more take seconds to read


@dataclass(frozen=True)
class Job:
    """One checked run: nothing of it has been started or written yet."""

    config: DictConfig
    decided: list[str]  # what was decided for the user, and why
    plan: BatchPlan
    claimed: Claim
    devices: Devices

    @property
    def origin(self) -> Start | None:
        """What a run that continues goes on from.

        Raises:
            ConfigError: its checkpoint is of other ranks, and cannot be converted.
        """
        checkpoint = self.claimed.checkpoint
        return start_from(checkpoint, self.config, self.plan.world_size) if checkpoint else None

    @property
    def command(self) -> Command:
        """What starts the ranks."""
        checkpoint = self.origin.folder if self.origin else None
        return build_command(self.config, self.claimed.run, self.plan, self.devices, checkpoint)


def plan_job(config: DictConfig, devices: Devices, *, dry_run: bool = False) -> Job:
    """Check a configuration as far as can be done without starting anything; a lost checkpoint is fetched, though.

    Raises:
        ConfigError, DataError: see `rules.check`, `check_modules`, `substitute`, `bring_back`, `claim` and
            `find_prepared`.
    """
    settle(config, partial(choose_anew, devices=devices))  # of an older version's run, or opened again
    plan, decided = check_all(config, devices)
    from tunewright.trainer.inputs import planned_inputs

    decided += bring_back(config, dry_run=dry_run)
    claimed = claim(config)
    if claimed.checkpoint:
        check_inputs(claimed, planned_inputs(plan), config.resume_allow)
    job = Job(config, decided, plan, claimed, devices)
    _ = job.origin  # what cannot be gone on from is refused now
    return job


def check_all(config: DictConfig, devices: Devices) -> tuple[BatchPlan, list[str]]:
    """Check a configuration against the devices and the model's architecture; return its plan and what was decided.

    Raises:
        ConfigError, StorageError: see `rules.check`, `check_modules` and `substitute`.
    """
    plan = check(config, devices)
    told = use_writable_cache(config)
    from tunewright.launch.ask_torch import ensure_architecture  # not before: a configuration error comes at once

    architecture = ensure_architecture(config)
    decided = substitute(config, architecture, devices)
    check_modules(config, architecture)
    return plan, [*told, *decided, *_own_deepspeed_file(config)]


def _own_deepspeed_file(config: DictConfig) -> list[str]:
    """Let DeepSpeed look at a DeepSpeed JSON of the user's own, and say what becomes of its keys."""
    if config.strategy.launcher is not Launcher.deepspeed:
        return []
    file = deepspeed_file(config)
    if file.shipped:
        return []
    from tunewright.launch.ask_torch import ensure_accepted

    return [account(file, config, ensure_accepted(config))]


def sweep_jobs(
    overrides: Sequence[str],
    extra_dir: Path | None,
    *,
    multirun: bool,
    say: Callable[[str], None] = lambda text: None,
) -> list[DictConfig]:
    """Return the configuration of each run, all of them checked for type and spelling before the first is used."""
    devices = find_devices()
    chosen = partial(choose, devices=devices, say=say)
    if not multirun:
        return [compose_config(overrides, extra_dir, chosen)]
    points = list(expand_sweep(overrides))
    if devices.gpu:  # where it may take seconds to choose
        for point in points:
            compose_config(point, extra_dir)
    configs = [compose_config(point, extra_dir, chosen) for point in points]
    if len({config.name for config in configs}) == len(configs):
        return configs
    # Runs of a sweep must not share a folder: what varies goes into the name.
    varying = [[item for item in point if item not in overrides] for point in points]
    for config, changes in zip(configs, varying, strict=True):
        config.name = "-".join([config.name, *map(_in_a_name, changes)])
    if len({config.name for config in configs}) < len(configs):
        raise ConfigError("The runs of this sweep would share a folder: put what varies into `name`.")
    return configs


def _in_a_name(change: str) -> str:
    """Return `train.learning_rate=0.1` as `learning_rate=0.1`, without what a folder's name cannot have."""
    key, _, value = change.partition("=")
    return re.sub(r"[^\w.=+-]", "_", f"{key.rpartition('.')[2]}={value}")


def run_job(
    job: Job,
    say: Callable[[str], None],
    make_ready: Callable[[DictConfig], Prepared] | None = None,
    start: Callable[[Job, Prepared], int] | None = None,
) -> int:
    """Prepare the data, start the ranks, and return the exit code.

    Where memory was not enough and the size of the micro-batch was left open, they are started once more with half of
    it. A program that prepares and trains in its own process gives the functions that do.
    """
    from tunewright.launch.prepare import ensure_prepared
    from tunewright.trainer.prepared import find_prepared

    make_ready = make_ready or ensure_prepared
    code = _attempt(job, say, make_ready, start)
    if code != MemoryShortage.exit_code:
        return code
    say(planned(job.config, job.devices, find_prepared(job.config) or make_ready(job.config)))
    smaller = halved(job)
    if smaller is None:
        return code
    again = replace(plan_job(smaller, job.devices), decided=[])
    checkpoint = again.claimed.checkpoint
    say(
        f"Once more with train.micro_batch_size={smaller.train.micro_batch_size}, which was auto, and the same "
        f"{again.plan.describe()}, from {checkpoint.name if checkpoint else 'the beginning'}."
    )
    code = _attempt(again, say, lambda config: find_prepared(config) or make_ready(config), start)
    if code == MemoryShortage.exit_code:
        say(planned(again.config, job.devices, find_prepared(again.config) or make_ready(again.config)))
    return code


def halved(job: Job) -> DictConfig | None:
    """Return the configuration of a job with half the micro-batch and the same steps, where that may be chosen.

    With `gradient_accumulation_steps` the micro-batch says how many rows a step has, and stays.
    """
    config, train = job.config, job.config.train  # which `fit` may have changed after `job.plan` was made
    if MICRO_BATCH not in config.automatic or train.gradient_accumulation_steps:
        return None
    rows = train.micro_batch_size
    if train.global_batch_size:  # no rank gets more of a step at once
        rows = min(rows, math.ceil(train.global_batch_size / job.plan.world_size))
    if rows < 2:
        return None
    smaller = config.copy()
    smaller.train.micro_batch_size = rows // 2
    smaller.resume, smaller.overwrite = Resume.auto, False
    return smaller


def _attempt(
    job: Job,
    say: Callable[[str], None],
    make_ready: Callable[[DictConfig], Prepared],
    start: Callable[[Job, Prepared], int] | None,
) -> int:
    from tunewright.trainer.inputs import planned_inputs, prepared_inputs
    from tunewright.trainer.model.model_folder import find_model
    from tunewright.trainer.prepared import find_prepared

    config, claimed = job.config, job.claimed
    run = claimed.run
    if claimed.finished:
        unseen = ""
        if find_model(config.model, config.data.cache_dir):
            prepared = find_prepared(config) or make_ready(config)
            check_inputs(claimed, prepared_inputs(config, prepared), config.resume_allow)
        else:  # not worth a download
            unseen = " Whether model and data are still the same was not looked at: the model is not on this machine."
        say(f"{run.path} is finished already; nothing to do.{unseen}")
        return 0
    for text in (*job.decided, *claimed.remarks):
        say(text)
    prepared = make_ready(config)
    if told := fit(config, job.devices, job.plan, prepared):
        say(told)
        data = config.data
        plan = batch_plan(config.train, job.plan.world_size, cutoff_len=data.cutoff_len, packing=data.packing)
        job = replace(job, plan=plan)
    for text in head(config, job.devices, prepared):
        say(text)
    inputs = {**planned_inputs(job.plan), **prepared_inputs(config, prepared)}
    allowed = check_inputs(claimed, inputs, config.resume_allow)
    if allowed:
        say(allowed)
    if claimed.checkpoint and (whole := bytes_of(claimed.checkpoint)) > LARGE:
        say(f"Looking at every byte of {claimed.checkpoint.name} ({size(whole)}).")
    with sole_user(config, claimed) as found:
        for text in found.remarks:
            if text not in claimed.remarks:
                say(text)
        job = replace(job, claimed=found)
        if found.checkpoint:
            say(f"Continuing {run.path} from {found.checkpoint.name}")
        aside = prepare_folder(config, found, inputs)
        if aside:
            say(f"What was in {run.path} before is in {aside} now.")
        if job.origin:
            if job.origin.remark:
                say(job.origin.remark)
            ensure_readable(job.origin, config)
        if start:
            return start(job, prepared)
        write_accelerate_config(job.command, run)
        say_command(job, say)
        return run_ranks(job.command, run, say, timeout_minutes=config.train.timeout_minutes)


def check_data(config: DictConfig) -> None:
    """Raise DataError for a dataset name, registry or file that cannot be used, before the run folder is touched."""
    from tunewright.trainer.prepared import find_prepared

    find_prepared(config)


def train(
    overrides: Sequence[str],
    *,
    extra_dir: Path | None = None,
    multirun: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Run one training, or a sweep of them one after the other, and return the exit code of the first that fails."""
    return train_each(sweep_jobs(overrides, extra_dir, multirun=multirun, say=say), dry_run=dry_run, say=say)


def train_each(configs: Sequence[DictConfig], *, dry_run: bool = False, say: Callable[[str], None] = print) -> int:
    """Check all configurations, then train one after the other; return the exit code of the first that fails."""
    devices = find_devices()
    left_over = rank_variables(os.environ)
    if left_over:
        say(f"{', '.join(left_over)} in the environment belong to another launch: not passed on to ranks.")
    jobs = []
    for config in configs:
        jobs.append(plan_job(config, devices, dry_run=dry_run))
        if not dry_run:  # which tells as much as can be known without the data
            check_data(config)
    for number, job in enumerate(jobs, 1):
        if len(jobs) > 1:
            say(f"Run {number} of {len(jobs)}: {job.config.name}")
        if dry_run:
            show_plan(job, say)
        elif code := run_job(job, say):
            return code
    return 0


def show_plan(job: Job, say: Callable[[str], None]) -> None:
    """Print what would run."""
    from tunewright.launch.forecast import forecast

    for text in chain(job.decided, job.claimed.remarks, forecast(job.config, job.plan, job.devices)):
        say(text)
    if job.claimed.finished:
        say(f"{job.claimed.run.path} is finished already; nothing would be done.")
        return
    if job.claimed.checkpoint:
        say(
            f"{job.claimed.run.path} would continue from {job.claimed.checkpoint.name}, if model and data are those it "
            f"was made from."
        )
    if job.origin and job.origin.remark:
        say(job.origin.remark)
    for key, value in job.command.accelerate.items():
        say(f"  {key}: {value}")
    say_command(job, say)


def say_command(job: Job, say: Callable[[str], None]) -> None:
    """Print what starts the ranks, and what of the user's environment decides there."""
    for text in threads.remarks(job.config, job.plan.world_size, job.devices):
        say(text)
    say(job.command.shown())
