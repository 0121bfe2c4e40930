"""`tunewright datagen`: ask for examples concurrently, log every reply, write the dataset."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from datagen.cells import PROMPTS_VERSION, REQUESTS_PER_EXAMPLE, Cell, cells, system_prompt
from datagen.outputs import Files, write_outputs
from datagen.provider import Provider, RequestFailed
from datagen.replies import ReplyLog, Tally
from datagen.settings import DatagenConfig, Endpoint, identity
from launch.errors import ConfigError, DataError, PeerError, StorageError

PROGRESS_SECONDS = 2.0
DRAIN_SECONDS = 10.0
FAILURES_IN_A_ROW = 5
SYSTEM_TRIES = 3


def generate(config: DatagenConfig, endpoint: Endpoint, *, dry_run: bool, say: Callable[[str], None]) -> int:
    """Make the dataset, or continue it where its log ends, and return the exit code.

    Raises:
        ConfigError: the name is taken, the log is for other settings, or the server refuses key or model.
        DataError: fewer rows than asked for; what there is was written.
        PeerError, StorageError: the server fails for good, or the folder cannot be used.
        KeyboardInterrupt: stopped; every reply received is in the log.
    """
    files = Files(Path(config.out), config.name)
    try:
        files.check_ours()
        if dry_run:
            return _show(config, endpoint, files, say)
        files.out.mkdir(parents=True, exist_ok=True)
        with FileLock(files.lock, timeout=0), contextlib.closing(_open_log(config, files)) as log:
            job = _Job(config, endpoint, log, say)
            try:
                asyncio.run(job.run())
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            return _finish(config, endpoint, files, log, job.system, say)
    except Timeout as error:
        raise ConfigError(
            f"Another process is making '{config.name}' in {files.out}; it holds {files.lock}."
        ) from error
    except OSError as error:
        raise StorageError(f"Cannot use {error.filename or files.out}: {error.strerror or error}.") from error


def _open_log(config: DatagenConfig, files: Files) -> ReplyLog:
    return ReplyLog(files.log, {**identity(config), "prompts_version": PROMPTS_VERSION})


def _show(config: DatagenConfig, endpoint: Endpoint, files: Files, say: Callable[[str], None]) -> int:
    done = sum("index" in record and "error" not in record for record in _open_log(config, files).records.values())
    first = next(cells(config, "(written by the first request)"))
    say(f"{config.examples} rows from {config.model} at {endpoint.base_url}, {config.concurrency} requests at once")
    say(f"{done} replies in {files.log}; at most {REQUESTS_PER_EXAMPLE * config.examples} requests in all")
    say(f"The first example request:\n\n{first.prompt}")
    return 0


class _Job:
    """The asking: fills the log until enough replies are rows or the cap is reached."""

    def __init__(self, config: DatagenConfig, endpoint: Endpoint, log: ReplyLog, say: Callable[[str], None]) -> None:
        self.config, self.log, self.say = config, log, say
        self.provider = Provider(config, endpoint, say)
        self.system = ""
        self.tally = Tally()
        self.pending: set[asyncio.Task[None]] = set()
        self.stop_by: float | None = None  # set by Ctrl-C
        self.failures = 0
        self.began, self.reported, self.found_before = time.monotonic(), 0.0, 0

    async def run(self) -> None:
        main = asyncio.current_task()
        assert main is not None
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt, main)
        try:
            self.system = await self._system_message()
            await self._collect()
        finally:
            for task in self.pending:
                task.cancel()
            await asyncio.gather(*self.pending, return_exceptions=True)
            await self.provider.close()

    async def _system_message(self) -> str:
        for number in range(SYSTEM_TRIES):
            key = f"system-{number}"
            if key not in self.log.records:
                self.log.append({"id": key, **await self.provider.ask(system_prompt(self.config.task))})
            text = system_text(self.log, number)
            if text:
                return text
        raise DataError(f"No usable system message in {SYSTEM_TRIES} replies: see {self.log.path}.")

    async def _collect(self) -> None:
        missing: list[Cell] = []
        for cell in cells(self.config, self.system):
            record = self.log.records.get(cell.id)
            if record is None or "error" in record:
                missing.append(cell)
            else:
                self.tally.add(record)
        self.found_before = len(self.tally.rows)
        queue = iter(missing)
        while True:
            # Never more in flight than rows are missing: which cells are asked depends on the replies alone, not on
            # their timing, and a run that was killed ends with the files of one that was not. The first goes alone,
            # to find out what the server accepts.
            wanted = min(
                self.config.examples - len(self.tally.rows),
                self.config.concurrency if self.provider.negotiated else 1,
            )
            while self.stop_by is None and len(self.pending) < wanted and (chosen := next(queue, None)):
                self.pending.add(asyncio.create_task(self._ask(chosen)))
            self._progress()
            if not self.pending or (self.stop_by is not None and time.monotonic() > self.stop_by):
                break
            finished, self.pending = await asyncio.wait(
                self.pending, timeout=PROGRESS_SECONDS / 4, return_when=asyncio.FIRST_COMPLETED
            )
            for task in finished:
                task.result()
        if self.stop_by is not None:
            raise asyncio.CancelledError

    async def _ask(self, cell: Cell) -> None:
        where = {"id": cell.id, "index": cell.index, "difficulty": cell.difficulty, "form": cell.form}
        try:
            record = {**where, **await self.provider.ask(cell.prompt, structured=True)}
            self.failures = 0
        except RequestFailed as error:
            # Nothing was paid for: it counts as a rejected reply now, and the next run asks again.
            record = {**where, "error": str(error)}
            self.failures += 1
        self.log.append(record)
        self.tally.add(record)
        if self.failures >= FAILURES_IN_A_ROW or (self.failures and not self.provider.negotiated):
            raise PeerError(f"{record['error']} The replies so far are kept; the same command continues.")

    def _interrupt(self, main: asyncio.Task[None]) -> None:
        if self.stop_by is not None or not self.pending:
            main.cancel()
            return
        self.stop_by = time.monotonic() + DRAIN_SECONDS
        self.say(f"Stopping after {len(self.pending)} requests in flight; Ctrl-C again drops them.")

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self.reported < PROGRESS_SECONDS:
            return
        self.reported = now
        rows, wanted = len(self.tally.rows), self.config.examples
        made = rows - self.found_before
        left = f", about {(wanted - rows) * (now - self.began) / made:.0f} s left" if made and rows < wanted else ""
        self.say(
            f"{rows}/{wanted} accepted, {self.tally.rejects.total()} rejected, {len(self.pending)} in flight, "
            f"{self.log.usage().total():,} tokens{left}"
        )


def system_text(log: ReplyLog, number: int) -> str:
    """Return the system message of a logged reply, or an empty string when it is none."""
    record = log.records[f"system-{number}"]
    complete = record["finish_reason"] not in ("length", "content_filter") and not record["refusal"]
    return (record["content"] or "").strip() if complete else ""


def _finish(
    config: DatagenConfig, endpoint: Endpoint, files: Files, log: ReplyLog, system: str, say: Callable[[str], None]
) -> int:
    """Write the files from the log alone: the first replies in the order of their cells that are rows."""
    tally = Tally()
    for cell in cells(config, system):
        if len(tally.rows) < config.examples and cell.id in log.records:
            tally.add(log.records[cell.id])
    kept, held = write_outputs(files, config, endpoint, system, tally, log)
    if len(tally.rows) < config.examples:
        raise DataError(
            f"Only {len(tally.rows)} of {config.examples} rows after {tally.rejects.total() + len(tally.rows)} "
            f"requests; rejected: {tally.reasons()}. What there is was written to {files.out}; the replies are in "
            f"{files.log}. Describe the task in more detail, or ask for fewer examples."
        )
    usage = log.usage()
    say(f"{kept} rows in {files.rows}, {held} held out in {files.eval_rows}; rejected: {tally.reasons()}")
    if not held:
        say("Nothing is held out, because no instruction is rare enough; data.eval_size=0.1 splits while training.")
    say(f"{usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out; details in {files.manifest}")
    names = f"'data.names=[{config.name}]'" + (f" 'data.eval_names=[{config.name}_eval]'" if held else "")
    say(f"Next: tunewright train data=registry data.dir={shlex.quote(str(files.out))} {names}")
    return 0
