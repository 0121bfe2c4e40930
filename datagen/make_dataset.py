"""`tunewright datagen`: make a plan, ask for examples, log every reply, write the dataset."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from tunewright.datagen.curation import Curation
from tunewright.datagen.documents import Chunk, read_sources
from tunewright.datagen.endpoint import Endpoint
from tunewright.datagen.estimate import estimate
from tunewright.datagen.job import Job, logged_plan
from tunewright.datagen.outputs import Files, write_outputs
from tunewright.datagen.plan import Plan, read_plan
from tunewright.datagen.prompts import PROMPTS_VERSION
from tunewright.datagen.reply_log import ReplyLog
from tunewright.datagen.settings import DatagenConfig, identity
from tunewright.errors import ConfigError, DataError, StorageError
from tunewright.trees import digest


def make_dataset(
    config: DatagenConfig, endpoint: Endpoint, *, dry_run: bool, plan_only: bool, say: Callable[[str], None]
) -> int:
    """Make the dataset, or continue it where its log ends, and return the exit code.

    Raises:
        ConfigError: the name is taken, the log is for other settings, or the server refuses key or model.
        DataError: fewer rows than asked for; what there is was written.
        PeerError, StorageError: the server fails for good, or the folder cannot be used.
        KeyboardInterrupt: stopped; every reply received is in the log.
    """
    files = Files(Path(config.out), config.name)
    chunks = read_sources(config.source.split(",")) if config.source else []
    given = read_plan(Path(config.plan)) if config.plan else None
    try:
        files.check_ours()
        if dry_run:
            return estimate(config, endpoint, given, chunks, _open_log(files, config, endpoint, given, chunks), say)
        files.out.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(files.lock, timeout=0),
            contextlib.closing(_open_log(files, config, endpoint, given, chunks)) as log,
        ):
            job = Job(config, endpoint, log, given, chunks, say)
            try:
                asyncio.run(job.run(plan_only))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            assert job.plan is not None
            if plan_only:
                return _show_plan(job.plan, files, say)
            return _finish(job, files, say)
    except Timeout as error:
        raise ConfigError(
            f"Another process is making '{config.name}' in {files.out}; it holds {files.lock}."
        ) from error
    except OSError as error:
        raise StorageError(f"Cannot use {error.filename or files.out}: {error.strerror or error}.") from error


def _open_log(
    files: Files, config: DatagenConfig, endpoint: Endpoint, given: Plan | None, chunks: list[Chunk]
) -> ReplyLog:
    """Read the log.

    Raises:
        ConfigError: it is for other settings, or there is a plan that was edited and would be lost.
    """
    log = ReplyLog(files.log, endpoint.scrub)
    made = logged_plan(config, log)
    if given is None and made and files.plan.is_file() and read_plan(files.plan) != made:
        place = shlex.quote(str(files.plan))
        raise ConfigError(
            f"{files.plan} was edited: add plan={place} to use it, or delete it to use the plan as it was."
        )
    # What is in the files decides, not their names.
    asked = {**identity(config), "prompts_version": PROMPTS_VERSION}
    asked["plan"] = digest(repr(given)) if given and given != made else None
    asked["source"] = digest([chunk.digest for chunk in chunks]) if chunks else None
    log.begin(asked)
    return log


def _show_plan(plan: Plan, files: Files, say: Callable[[str], None]) -> int:
    plan.write(files.plan)
    say(f"System message:\n  {plan.system}\n")
    for name in ("topics", "personas", "difficulties", "forms"):
        say(f"{name.capitalize()}:")
        for text in getattr(plan, name):
            say(f"  {text}")
    say(f"\nWritten to {files.plan}. Edit it and go on with plan={shlex.quote(str(files.plan))}, or go on as it is.")
    return 0


def _finish(job: Job, files: Files, say: Callable[[str], None]) -> int:
    """Write the files from the log alone."""
    assert job.plan is not None
    config = job.config
    curation = Curation(config, job.plan, job.chunks)
    curation.advance(job.log, gaps=True)
    why = f"{job.capped}. " if job.capped else ""
    if not curation.rows:
        raise DataError(f"{why}No reply was a row; rejected: {curation.reasons()}. The replies are in {files.log}.")
    written = write_outputs(files, curation, job.endpoint, job.log, job.budget)
    kept, held = len(written.train), len(written.test)
    if not curation.full:
        raise DataError(
            f"{why}Only {len(curation.rows)} of {config.examples} rows after {curation.replies} replies; rejected: "
            f"{curation.reasons()}. What there is was written to {files.out}; the replies are in {files.log}. "
            + (
                "Raise the budget to go on."
                if job.capped
                else "Describe the task in more detail, or ask for fewer examples."
            )
        )
    say(f"{kept} rows in {files.rows}, {held} held out in {files.eval_rows}; rejected: {curation.reasons()}")
    if held:
        say(f"Most alike of a row to train on and one held out: {written.highest:.2f} (ROUGE-L of the prompts)")
    else:
        say("Nothing is held out, because the prompts are all alike; data.eval_size=0.1 splits while training.")
    tokens_in, tokens_out = job.log.spent()
    cost = sum(map(job.budget.cost, job.log.replies())) if job.budget.known else None
    say(f"{tokens_in:,} tokens in, {tokens_out:,} out" + (f", ${cost:.2f}" if cost is not None else ""))
    say(f"Look at it: {files.preview}; details in {files.manifest}")
    if config.push:
        from tunewright.datagen.push import push

        pushed = [files.rows, *([files.eval_rows] if held else []), files.card]
        say(f"Uploaded: {push(files.out, pushed, config.push, not config.public, say)}")
    names = f"'data.names=[{config.name}]'" + (f" 'data.eval_names=[{config.name}_eval]'" if held else "")
    say(f"Next: tunewright train data=registry data.dir={shlex.quote(str(files.out))} {names}")
    return 0
