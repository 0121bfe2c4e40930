"""OpenAI's Batch API: half the price, an answer within a day. The log knows what was submitted."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletion

from tunewright.datagen.budget import BudgetSpent
from tunewright.datagen.curation import Curation
from tunewright.datagen.endpoint import Endpoint
from tunewright.datagen.grid import Cell
from tunewright.datagen.prompts import schema_of
from tunewright.datagen.provider import Ask, Provider, as_usage, client_of
from tunewright.datagen.reply_log import Record, ReplyLog
from tunewright.datagen.settings import DatagenConfig
from tunewright.errors import ConfigError, PeerError, Preempted
from tunewright.trees import digest

URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"
WINDOW: Literal["24h"] = "24h"
SPARE = 1.25  # examples asked for, for each row that is missing
MOST = 50_000  # requests of one batch, as OpenAI allows
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


class Batches:
    """Submits what is missing and collects what is done.

    A batch has two lines in the log: `submit-N` before it is sent, and `batch-N` when the server has taken it. After a
    crash between the two, the server's list tells whether it was.
    """

    def __init__(
        self, config: DatagenConfig, endpoint: Endpoint, provider: Provider, log: ReplyLog, say: Callable[[str], None]
    ) -> None:
        self._config, self._endpoint, self._provider, self._log, self._say = config, endpoint, provider, log, say
        self._client = client_of(endpoint, config.timeout)

    async def run(self, curation: Curation, preflight: Callable[[Cell], Awaitable[None]]) -> None:
        """Collect the batches that are done and submit what is missing then, the first one not in the batch.

        Raises:
            Preempted: a batch is under way; the same command looks again.
            BudgetSpent: not a single request fits into what may be spent.
            ConfigError, PeerError: the server has no batches, or refuses.
        """
        url = self._endpoint.base_url
        try:
            await self._find_unsure()
            if await self._collect(curation):
                raise Preempted("The batch is not done yet; the same command looks again.")
            self._provider.budget.count([*self._log.replies(), *self._log.orphans])
            curation.advance(self._log)
            waiting = [] if curation.full else _missing(curation, self._log)
            if waiting and not self._provider.negotiated:
                await preflight(waiting.pop(0))  # what the server accepts
            if waiting:
                raise Preempted(await self._submit(waiting))
        except openai.NotFoundError as error:
            raise ConfigError(f"{url} has no Batch API, or has lost the batch: use mode=parallel.") from error
        except openai.APIStatusError as error:
            words = f"HTTP {error.status_code}: {self._endpoint.scrub(' '.join(error.message.split()))[:300]}"
            if error.status_code in (401, 403):
                raise ConfigError(f"{url} does not accept the key in {self._endpoint.key_name}, {words}") from error
            raise PeerError(f"{url} does not serve the batch, {words} The same command continues.") from error
        except openai.APIConnectionError as error:
            raise PeerError(f"{url} cannot be reached; the same command continues.") from error
        finally:
            await self._client.close()

    async def _submit(self, waiting: list[Cell]) -> str:
        """Submit as much as the budget allows, and say what."""
        log, tokens = self._log, [0, 0]
        lines: list[str] = []
        cells: dict[str, dict[str, Any]] = {}
        for cell in waiting:
            ask = Ask(cell.request(), cell.id, schema_of(self._config))
            held = self._provider.worst_case(ask, batch=True)
            try:
                self._provider.budget.reserve(held)
            except BudgetSpent:
                if not lines:
                    raise
                break
            tokens = [tokens[0] + held.tokens_in, tokens[1] + held.tokens_out]
            cells[cell.id] = cell.where
            lines.append(
                json.dumps({"custom_id": cell.id, "method": "POST", "url": URL, "body": self._provider.body(ask)})
            )
        number = sum(key.startswith("submit-") for key in log.records)
        mark = f"{self._config.name}-{number}-{digest(list(cells))}"
        # What it may cost counts from here on, until it is known.
        worst = {"batch": True, "worst_case": as_usage(*tokens), "tries": len(lines)}
        file = await self._client.files.create(
            file=("requests.jsonl", io.BytesIO("\n".join(lines).encode())), purpose="batch"
        )
        log.append({"id": f"submit-{number}", "mark": mark, "cells": cells, **worst})
        try:
            batch = await self._client.batches.create(
                input_file_id=file.id, endpoint=URL, completion_window=WINDOW, metadata={"tunewright": mark}
            )
        except openai.APIStatusError as error:
            if error.status_code < 500:
                self._not_taken(f"{number}")
            raise
        log.append({"id": f"batch-{number}", "batch": batch.id})
        return (
            f"Submitted {len(lines)} requests as {batch.id}, to be done within {WINDOW}. The same command looks again."
        )

    async def _find_unsure(self) -> None:
        """Find the batches that may have been submitted, though the log does not say so."""
        for key in [key for key in self._log.records if key.startswith("submit-")]:
            number = key.removeprefix("submit-")
            if f"batch-{number}" in self._log.records:
                continue
            found = None
            async for batch in self._client.batches.list(limit=100):
                if (batch.metadata or {}).get("tunewright") == self._log.records[key]["mark"]:
                    found = batch.id
                    break
            if found is None:
                self._not_taken(number)
            else:
                self._log.append({"id": f"batch-{number}", "batch": found})

    def _not_taken(self, number: str) -> None:
        self._log.append({"id": f"batch-{number}", "batch": None})
        self._settle(number, tries=0)

    def _settle(self, number: str, **changed: Any) -> None:
        """What a batch costs is known now: its replies have it."""
        submitted = self._log.records[f"submit-{number}"]
        self._log.append({**submitted, "worst_case": None, **changed})

    async def _collect(self, curation: Curation) -> bool:
        """Put the replies of batches into the log; true when one is still under way."""
        under_way, refused = False, None
        for key in [key for key in self._log.records if key.startswith("batch-")]:
            number, submitted = key.removeprefix("batch-"), self._log.records[key]["batch"]
            if submitted is None or f"done-{number}" in self._log.records:
                continue
            cells = self._log.records[f"submit-{number}"]["cells"]
            batch = await self._client.batches.retrieve(submitted)
            counts = batch.request_counts
            done = f", {counts.completed} of {counts.total} done" if counts else ""
            self._say(f"Batch {batch.id}: {batch.status}{done}")
            if batch.status in UNFINISHED:
                under_way = True
                continue
            # An expired or cancelled batch has the replies that were made, and bills them.
            for file in filter(None, (batch.output_file_id, batch.error_file_id)):
                for line in (await self._client.files.content(file)).text.splitlines():
                    self._take(line, cells, curation)
            # What it did not answer is missing still.
            self._log.append({"id": f"done-{number}", "status": batch.status})
            self._settle(number)
            if batch.status == "failed":
                refused = [str(item.message) for item in (batch.errors and batch.errors.data) or []]
        if refused is not None:
            words = self._endpoint.scrub("; ".join(refused)) or "without a reason"
            raise ConfigError(f"{self._endpoint.base_url} refuses the batch: {words}")
        return under_way

    def _take(self, text: str, cells: dict[str, Any], curation: Curation) -> None:
        try:
            line = json.loads(text)
            key, response = line["custom_id"], line.get("response") or {}
            body = response.get("body") or {}
            if key not in cells or key in self._log.records:
                return
            if response.get("status_code") == 200 and isinstance(body.get("choices"), list):
                cell = curation.cell_at(cells[key]["index"])
                ask = Ask(cell.request() if cell else [], key, schema_of(self._config))
                record: Record = self._provider.record(ChatCompletion.construct(**body), ask, batch=True)
                self._log.append({**cells[key], **record, "batch": True})
                return
            reason = line.get("error") or body.get("error") or "no reply"
        except (ValueError, KeyError, TypeError, AttributeError):
            self._say("A line of the batch's results cannot be read; its example is asked for again.")
            return
        self._log.append({**cells[key], "error": self._endpoint.scrub(str(reason))[:300]})


def _missing(curation: Curation, log: ReplyLog) -> list[Cell]:
    wanted = min(math.ceil(SPARE * (curation.config.examples - len(curation.rows))), MOST)
    found: list[Cell] = []
    index = curation.next
    while len(found) < wanted and (cell := curation.cell_at(index)) is not None:
        if cell.id not in log.records:
            found.append(cell)
        index += 1
    return found
