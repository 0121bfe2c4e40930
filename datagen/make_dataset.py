"""`tunewright datagen`: make a plan, ask for examples, log every reply, write the dataset."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shlex
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from tunewright.datagen.batch_api import Batches
from tunewright.datagen.budget import Budget, BudgetSpent, Reservation
from tunewright.datagen.curation import Harvest, score_id
from tunewright.datagen.display import Display, Progress
from tunewright.datagen.documents import Chunk, read_sources
from tunewright.datagen.grid import PROMPTS_VERSION, SCORE_SCHEMA, Cell, cell_count, digest, schema_of, score_prompt
from tunewright.datagen.limiter import Limiter, Stopped
from tunewright.datagen.outputs import Files, write_outputs
from tunewright.datagen.plan import SCHEMA as PLAN_SCHEMA
from tunewright.datagen.plan import Plan, as_plan, plan_prompt, read_plan
from tunewright.datagen.provider import Ask, Provider, RequestFailed
from tunewright.datagen.replies import ReplyLog, object_of, row_of, scrubbed
from tunewright.datagen.settings import DatagenConfig, Endpoint, Mode, identity, prices
from tunewright.errors import ConfigError, DataError, PeerError, StorageError

TICK = 0.5  # seconds between two looks at the clock
DRAIN_SECONDS = 10.0
FAILURES_IN_A_ROW = 5
PLAN_TRIES = 3
EXPECTED_YIELD = 0.8  # for estimates
EXPECTED_REPLY = 350  # tokens, likewise
BYTES_PER_TOKEN = 4


def generate(
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
            return _estimate(config, endpoint, given, chunks, _open_log(files, config, endpoint, given, chunks), say)
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


def logged_plan(config: DatagenConfig, log: ReplyLog) -> Plan | None:
    """Return the plan that the log has."""
    for number in range(PLAN_TRIES):
        found = object_of(log.records.get(_plan_id(config, number), {"error": ""}))
        plan = as_plan(scrubbed(found, log.scrub)) if isinstance(found, dict) else None
        if plan:
            return plan
    return None


def _plan_id(config: DatagenConfig, number: int) -> str:
    return f"plan-{number}-{digest([config.model, plan_prompt(config.task)])}"


class Job:
    """The asking: fills the log until enough replies are rows or a cap is reached."""

    def __init__(
        self,
        config: DatagenConfig,
        endpoint: Endpoint,
        log: ReplyLog,
        plan: Plan | None,
        chunks: list[Chunk],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.endpoint, self.log, self.plan, self.chunks = config, endpoint, log, plan, chunks
        self.budget = Budget(config.budget, partial(prices, config))
        self.budget.count([*log.replies(), *log.orphans])
        self.display = Display(say)
        self.limiter = Limiter(config.concurrency if config.mode is Mode.parallel else 1)
        self.provider = Provider(config, endpoint, self.budget, self.limiter, log, self.display.say)
        self.harvest: Harvest | None = None
        self.pending: dict[asyncio.Task[None], int] = {}
        self.hopeful: set[int] = set()  # cells with a row in the log that the harvest has not reached
        self.stop_by: float | None = None  # set by Ctrl-C
        self.capped: str | None = None  # the budget that ended it
        self.failures = 0
        self.began, self.found_before = time.monotonic(), 0

    async def run(self, plan_only: bool = False) -> None:
        """Ask for what is missing."""
        main = asyncio.current_task()
        assert main is not None
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt, main)
        try:
            with self.display:
                self.plan = self.plan or await self._make_plan()
                if plan_only:
                    return
                self.harvest = Harvest(self.config, self.plan, self.chunks)
                self.harvest.advance(self.log)
                if not self.harvest.full:
                    self._forget_failures()
                    await self._collect()
        finally:
            for task in self.pending:
                task.cancel()
            await asyncio.gather(*self.pending, return_exceptions=True)
            await self.provider.close()

    def _forget_failures(self) -> None:
        """Ask again, once for each run, for what no reply came for."""
        assert self.plan is not None
        if self.config.mode is not Mode.batch:  # in which a single request fails for good
            self.log.forget_errors(last_only=self.config.mode is Mode.sequential)
        self.harvest = Harvest(self.config, self.plan, self.chunks)
        self.harvest.advance(self.log)
        self.found_before = len(self.harvest.rows)

    async def _make_plan(self) -> Plan:
        messages = [{"role": "user", "content": plan_prompt(self.config.task)}]
        for number in range(PLAN_TRIES):
            if plan := logged_plan(self.config, self.log):
                return plan
            key = _plan_id(self.config, number)
            if key not in self.log.records:
                request = Ask(messages, key, PLAN_SCHEMA)
                try:
                    self.log.append({"id": key, **await self.provider.ask(request), **self.provider.lost(request)})
                except BudgetSpent as error:
                    raise ConfigError(f"{error}: not even the plan can be asked for.") from error
        if plan := logged_plan(self.config, self.log):
            return plan
        raise DataError(
            f"No usable plan in {PLAN_TRIES} replies: see {self.log.path}. Write one yourself: plan=FILE with system, "
            f"topics and personas."
        )

    async def _collect(self) -> None:
        assert self.harvest is not None
        if self.config.mode is Mode.batch:
            await self._batches()
            return
        ahead = self.harvest.next
        failed: BaseException | None = None
        while True:
            # Never more in flight than rows are missing, so that nothing is paid for that is not wanted. The first one
            # goes alone, to find out what the server accepts.
            ahead = max(ahead, self.harvest.next)
            while self._open and len(self.pending) < self._room and (cell := self._next_missing(ahead)) is not None:
                ahead = cell.index + 1
                self.pending[asyncio.create_task(self._ask(cell))] = cell.index
            self._show()
            if not self.pending or (self.stop_by is not None and time.monotonic() > self.stop_by):
                break
            finished, _ = await asyncio.wait(self.pending, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                del self.pending[task]
                if (error := task.exception()) is not None:
                    # The others may be paid for already: they get the time to end.
                    failed = failed or error
                    self._stop()
            self.harvest.advance(self.log)
            self.hopeful = {index for index in self.hopeful if index >= self.harvest.next}
        if failed is not None:
            raise failed
        if self.stop_by is not None:
            raise asyncio.CancelledError

    async def _batches(self) -> None:
        assert self.harvest is not None
        try:
            batches = Batches(self.config, self.endpoint, self.provider, self.log, self.display.say)
            await batches.run(self.harvest, self._ask)
        except BudgetSpent as error:
            self.capped = str(error)

    def _stop(self) -> None:
        self.limiter.stop()
        if self.stop_by is None:
            self.stop_by = time.monotonic() + DRAIN_SECONDS

    @property
    def _room(self) -> int:
        """How many requests there may be in flight."""
        assert self.harvest is not None
        missing = self.config.examples - len(self.harvest.rows) - len(self.hopeful)
        return min(missing, self.limiter.room if self.provider.negotiated else 1)

    @property
    def _open(self) -> bool:
        if self.capped is None and self.budget.out_of_time():
            self.limiter.stop()
            self.capped = f"budget.minutes = {self.config.budget.minutes:g} are over"
        return self.stop_by is None and self.capped is None

    def _next_missing(self, ahead: int) -> Cell | None:
        """Return the next cell that the log is not complete for, noting those on the way that it is."""
        assert self.harvest is not None
        assert self.plan is not None
        if self.config.mode is Mode.sequential and self.pending:
            return None
        while (cell := self.harvest.cell_at(ahead)) is not None:
            record = self.log.records.get(cell.id)
            if record is None:
                return cell
            row = row_of(record, self.config.turns)
            if not isinstance(row, str):
                scored = self.config.judge.threshold is not None
                if scored and score_id(self.config, self.plan, row) not in self.log.records:
                    return cell
                self.hopeful.add(cell.index)
            ahead += 1
        return None

    async def _ask(self, cell: Cell) -> None:
        """Fill what the log lacks of a cell: the example, and where it is to be scored its score."""
        assert self.plan is not None
        try:
            if cell.id not in self.log.records:
                await self._log(cell.where, Ask(cell.request(), cell.id, schema_of(self.config)))
            row = row_of(self.log.records[cell.id], self.config.turns)
            if isinstance(row, str):
                return
            judge = self.config.judge
            key = score_id(self.config, self.plan, row)
            if judge.threshold is not None and key not in self.log.records:
                prompt = score_prompt(self.config, self.plan, row)
                messages = [{"role": "user", "content": prompt}]
                await self._log({"id": key}, Ask(messages, key, SCORE_SCHEMA, judge.model, 0.0))
            self.hopeful.add(cell.index)
        except BudgetSpent as error:
            self.capped = str(error)
        except Stopped:
            pass

    async def _log(self, where: dict[str, object], request: Ask) -> None:
        try:
            record = {**where, **await self.provider.ask(request)}
            self.failures = 0
        except RequestFailed as error:
            # No reply came: it counts as a rejected one now, and the next run asks again.
            record = {**where, "error": str(error), "tries": request.tries, **request.marks}
            self.failures += 1
        self.log.append({**record, **self.provider.lost(request)})
        if self.failures >= FAILURES_IN_A_ROW or (self.failures and not self.provider.negotiated):
            raise PeerError(f"{record['error']} The replies so far are kept; the same command continues.")

    def _interrupt(self, main: asyncio.Task[None]) -> None:
        if self.stop_by is not None or not self.pending:
            main.cancel()
            return
        self._stop()
        self.display.say(f"Stopping after {len(self.pending)} requests in flight; Ctrl-C again drops them.")

    def _show(self) -> None:
        assert self.harvest is not None
        self.display.update(
            Progress(
                accepted=len(self.harvest.rows) + len(self.hopeful),
                wanted=self.config.examples,
                rejects=self.harvest.rejects,
                in_flight=len(self.pending),
                tokens=self.budget.tokens,
                usd=self.budget.spent(),
                made_since_start=len(self.harvest.rows) + len(self.hopeful) - self.found_before,
                seconds=time.monotonic() - self.began,
            )
        )


def _show_plan(plan: Plan, files: Files, say: Callable[[str], None]) -> int:
    plan.write(files.plan)
    say(f"System message:\n  {plan.system}\n")
    for name in ("topics", "personas", "difficulties", "forms"):
        say(f"{name.capitalize()}:")
        for text in getattr(plan, name):
            say(f"  {text}")
    say(f"\nWritten to {files.plan}. Edit it and go on with plan={shlex.quote(str(files.plan))}, or go on as it is.")
    return 0


def _estimate(
    config: DatagenConfig,
    endpoint: Endpoint,
    plan: Plan | None,
    chunks: list[Chunk],
    log: ReplyLog,
    say: Callable[[str], None],
) -> int:
    """Say what would be asked, and what it would about take."""
    shown = (
        plan
        or logged_plan(config, log)
        or Plan("(written by the first request)", ("(a topic of the plan)",), ("(a persona of the plan)",))
    )
    first = Harvest(config, shown, chunks).cell_at(0)
    assert first is not None
    prompt = first.messages[0][1]
    done = sum("index" in record and "error" not in record for record in log.records.values())
    calls = max(math.ceil(config.examples / EXPECTED_YIELD) - done, 0)
    each = len(prompt.encode()) / BYTES_PER_TOKEN
    if config.mode is Mode.sequential:
        each += min(config.examples, 10) * EXPECTED_REPLY  # the earlier ones that it shows
    if config.judge.threshold is not None:
        calls, each = 2 * calls, each + EXPECTED_REPLY / 2
    reply = min(config.max_tokens, EXPECTED_REPLY * config.turns)
    tokens_in, tokens_out = round(calls * each), round(calls * reply)
    price = Budget(config.budget, partial(prices, config)).price(batch=config.mode is Mode.batch)
    cost = Reservation(0, 0, price).usd(tokens_in, tokens_out) if price else None
    say(
        f"{config.examples} rows from {config.model} at {endpoint.base_url}, mode {config.mode.name}, at most "
        f"{config.concurrency} requests at once"
    )
    say(f"{done} replies in {log.path}; at most {cell_count(config)} example requests in all")
    say(
        f"Estimate: about {calls:,} requests, {tokens_in:,} tokens in, {tokens_out:,} out"
        + (f", ${cost:.2f}" if cost is not None else "; no price is known for this model (price.input=, price.output=)")
        + f"; {EXPECTED_YIELD:.0%} of replies kept and {reply} tokens each are assumed"
    )
    say(f"The first example request:\n\n{prompt}")
    return 0


def _finish(job: Job, files: Files, say: Callable[[str], None]) -> int:
    """Write the files from the log alone."""
    assert job.plan is not None
    config = job.config
    harvest = Harvest(config, job.plan, job.chunks)
    harvest.advance(job.log, gaps=True)
    why = f"{job.capped}. " if job.capped else ""
    if not harvest.rows:
        raise DataError(f"{why}No reply was a row; rejected: {harvest.reasons()}. The replies are in {files.log}.")
    written = write_outputs(files, config, job.endpoint, job.plan, harvest, job.log, job.budget)
    kept, held = len(written.train), len(written.test)
    if not harvest.full:
        raise DataError(
            f"{why}Only {len(harvest.rows)} of {config.examples} rows after {harvest.replies} replies; rejected: "
            f"{harvest.reasons()}. What there is was written to {files.out}; the replies are in {files.log}. "
            + (
                "Raise the budget to go on."
                if job.capped
                else "Describe the task in more detail, or ask for fewer examples."
            )
        )
    say(f"{kept} rows in {files.rows}, {held} held out in {files.eval_rows}; rejected: {harvest.reasons()}")
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
