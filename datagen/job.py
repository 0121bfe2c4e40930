"""The asking: fills the log until enough replies are rows, or a limit is reached."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from functools import partial

from tunewright.datagen.batch_api import Batches
from tunewright.datagen.budget import Budget, BudgetSpent
from tunewright.datagen.curation import Curation, score_id
from tunewright.datagen.documents import Chunk
from tunewright.datagen.endpoint import Endpoint
from tunewright.datagen.grid import Cell
from tunewright.datagen.limiter import Limiter, Stopped
from tunewright.datagen.plan import SCHEMA as PLAN_SCHEMA
from tunewright.datagen.plan import Plan, as_plan, plan_prompt
from tunewright.datagen.prompts import SCORE_SCHEMA, schema_of, score_prompt
from tunewright.datagen.provider import Ask, Provider, RequestFailed
from tunewright.datagen.replies import object_of, row_of
from tunewright.datagen.reply_log import ReplyLog
from tunewright.datagen.settings import DatagenConfig, Mode, prices
from tunewright.errors import ConfigError, DataError, PeerError
from tunewright.terminal import Progress
from tunewright.trees import digest, map_texts

TICK = 0.5  # seconds between two looks at the clock
DRAIN_SECONDS = 10.0
FAILURES_IN_A_ROW = 5
PLAN_TRIES = 3
REASONS_SHOWN = 3


class Job:
    """Fills the log until enough replies are rows or a limit is reached."""

    curation: Curation  # once there is a plan

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
        self.display = Progress(say)
        self.limiter = Limiter(config.concurrency if config.mode is Mode.parallel else 1)
        self.provider = Provider(config, endpoint, self.budget, self.limiter, log, self.display.say)
        self.pending: dict[asyncio.Task[None], int] = {}
        self.hopeful: set[int] = set()  # cells with a row in the log that the curation has not reached
        self.stop_by: float | None = None  # set by Ctrl-C
        self.capped: str | None = None  # the budget that ended it
        self.failures = 0

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
                self._curate(self.plan)
                if not self.curation.full:
                    if self.config.mode is not Mode.batch:  # in which a single request fails for good
                        # What no reply came for is asked again, once for each run.
                        self.log.forget_errors(last_only=self.config.mode is Mode.sequential)
                        self._curate(self.plan)
                    self.found_before = len(self.curation.rows)
                    await self._collect()
        finally:
            for task in self.pending:
                task.cancel()
            await asyncio.gather(*self.pending, return_exceptions=True)
            await self.provider.close()

    def _curate(self, plan: Plan) -> None:
        self.curation = Curation(self.config, plan, self.chunks)
        self.curation.advance(self.log)

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
        if self.config.mode is Mode.batch:
            await self._batches()
            return
        ahead = self.curation.next
        failed: BaseException | None = None
        while True:
            # Never more in flight than rows are missing, so that nothing is paid for that is not wanted. The first one
            # goes alone, to find out what the server accepts.
            ahead = max(ahead, self.curation.next)
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
            self.curation.advance(self.log)
            self.hopeful = {index for index in self.hopeful if index >= self.curation.next}
        if failed is not None:
            raise failed
        if self.stop_by is not None:
            raise asyncio.CancelledError

    async def _batches(self) -> None:
        try:
            batches = Batches(self.config, self.endpoint, self.provider, self.log, self.display.say)
            await batches.run(self.curation, self._ask)
        except BudgetSpent as error:
            self.capped = str(error)

    def _stop(self) -> None:
        self.limiter.stop()
        if self.stop_by is None:
            self.stop_by = time.monotonic() + DRAIN_SECONDS

    @property
    def _room(self) -> int:
        """How many requests there may be in flight."""
        missing = self.config.examples - len(self.curation.rows) - len(self.hopeful)
        return min(missing, self.limiter.room if self.provider.negotiated else 1)

    @property
    def _open(self) -> bool:
        if self.capped is None and self.budget.out_of_time():
            self.limiter.stop()
            self.capped = f"budget.minutes = {self.config.budget.minutes:g} are over"
        return self.stop_by is None and self.capped is None

    def _next_missing(self, ahead: int) -> Cell | None:
        """Return the next cell that the log is not complete for, noting those on the way that it is."""
        if self.config.mode is Mode.sequential and self.pending:
            return None
        while (cell := self.curation.cell_at(ahead)) is not None:
            record = self.log.records.get(cell.id)
            if record is None:
                return cell
            row = row_of(record, self.config.turns)
            if not isinstance(row, str):
                scored = self.config.judge.threshold is not None
                if scored and score_id(self.config, self.curation.plan, row) not in self.log.records:
                    return cell
                self.hopeful.add(cell.index)
            ahead += 1
        return None

    async def _ask(self, cell: Cell) -> None:
        """Fill what the log lacks of a cell: the example, and where it is to be scored its score."""
        try:
            if cell.id not in self.log.records:
                await self._log(cell.where, Ask(cell.request(), cell.id, schema_of(self.config)))
            row = row_of(self.log.records[cell.id], self.config.turns)
            if isinstance(row, str):
                return
            judge = self.config.judge
            key = score_id(self.config, self.curation.plan, row)
            if judge.threshold is not None and key not in self.log.records:
                prompt = score_prompt(self.config, self.curation.plan, row)
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
        usd, rejected = self.budget.spent(), self.curation.rejects.total()
        self.display.update(
            "accepted",
            len(self.curation.rows) + len(self.hopeful),
            self.config.examples,
            f"{len(self.pending):,} in flight",
            f"{self.budget.tokens:,} tokens",
            "" if usd is None else f"${usd:,.{2 if usd >= 10 else 4}f}",
            f"{rejected:,} rejected" + (f" ({self.curation.reasons(REASONS_SHOWN)})" if rejected else ""),
        )


def logged_plan(config: DatagenConfig, log: ReplyLog) -> Plan | None:
    """Return the plan that the log has."""
    for number in range(PLAN_TRIES):
        found = object_of(log.records.get(_plan_id(config, number), {"error": ""}))
        plan = as_plan(map_texts(found, log.scrub)) if isinstance(found, dict) else None
        if plan:
            return plan
    return None


def _plan_id(config: DatagenConfig, number: int) -> str:
    return f"plan-{number}-{digest([config.model, plan_prompt(config.task)])}"
