"""OpenAI's Batch API: half the price, an answer within a day. The log knows what was submitted."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import openai

from datagen.budget import Budget, BudgetSpent, Reservation
from datagen.cells import CONVERSATION_SCHEMA, EXAMPLE_SCHEMA, Cell
from datagen.harvest import Harvest
from datagen.provider import Ask, client_of, request_body
from datagen.replies import ReplyLog
from datagen.settings import DatagenConfig, Endpoint
from launch.errors import ConfigError, PeerError, Preempted

URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"
WINDOW: Literal["24h"] = "24h"
SPARE = 1.25  # examples asked for, for each row that is missing
MOST = 50_000  # requests of one batch, as OpenAI allows
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


async def run_batches(
    config: DatagenConfig,
    endpoint: Endpoint,
    budget: Budget,
    harvest: Harvest,
    log: ReplyLog,
    say: Callable[[str], None],
) -> None:
    """Collect the batches that are done and submit what is missing then.

    Raises:
        Preempted: a batch is under way; the same command looks again.
        ConfigError, PeerError: the server has no batches, or refuses.
    """
    client = client_of(endpoint, config.timeout)
    try:
        if await _collect(client, endpoint, log, say):
            raise Preempted("The batch is not done yet; the same command looks again.")
        harvest.advance(log)
        if harvest.full:
            return
        waiting = _missing(harvest, log)
        if not waiting:
            return
        submitted = await _submit(client, config, budget, waiting, log)
        raise Preempted(
            f"Submitted {len(waiting)} requests as {submitted}, to be done within {WINDOW}. The same command looks "
            f"again."
        )
    except openai.NotFoundError as error:
        raise ConfigError(f"{endpoint.base_url} has no Batch API: use mode=parallel.") from error
    except openai.APIStatusError as error:
        words = endpoint.scrub(" ".join(error.message.split()))[:300]
        raise PeerError(f"{endpoint.base_url} refuses the batch, HTTP {error.status_code}: {words}") from error
    except openai.APIConnectionError as error:
        raise PeerError(f"{endpoint.base_url} cannot be reached; the same command continues.") from error
    finally:
        await client.close()


def _missing(harvest: Harvest, log: ReplyLog) -> list[Cell]:
    wanted = min(math.ceil(SPARE * (harvest.config.examples - len(harvest.rows))), MOST)
    found: list[Cell] = []
    index = harvest.next
    while len(found) < wanted and (cell := harvest.cell_at(index)) is not None:
        if cell.id not in log.records:
            found.append(cell)
        index += 1
    return found


async def _submit(
    client: openai.AsyncOpenAI, config: DatagenConfig, budget: Budget, waiting: list[Cell], log: ReplyLog
) -> str:
    schema = EXAMPLE_SCHEMA if config.turns == 1 else CONVERSATION_SCHEMA
    lines, worst = [], Reservation(0, 0)
    for cell in waiting:
        ask = Ask(cell.request(), schema)
        held = budget.worst_case(ask.prompt, config.max_tokens)
        worst = Reservation(worst.tokens_in + held.tokens_in, worst.tokens_out + held.tokens_out)
        body = request_body(config, ask, "json_schema")
        lines.append(json.dumps({"custom_id": cell.id, "method": "POST", "url": URL, "body": body}))
    try:
        budget.reserve(worst, len(waiting))
    except BudgetSpent as error:
        raise ConfigError(f"{error}, for a batch of {len(waiting)} requests at their worst.") from error
    file = await client.files.create(file=("requests.jsonl", io.BytesIO("\n".join(lines).encode())), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window=WINDOW)
    cells = {cell.id: cell.where for cell in waiting}
    log.append({"id": f"batch-{batch.id}", "batch": batch.id, "cells": cells, "tries": len(waiting)})
    return batch.id


async def _collect(client: openai.AsyncOpenAI, endpoint: Endpoint, log: ReplyLog, say: Callable[[str], None]) -> bool:
    """Put the replies of batches into the log; true when one is still under way."""
    under_way = False
    open_ones = [
        record
        for key, record in list(log.records.items())
        if key.startswith("batch-") and f"done-{record['batch']}" not in log.records
    ]
    for record in open_ones:
        batch = await client.batches.retrieve(record["batch"])
        if batch.status in UNFINISHED:
            counts = batch.request_counts
            done = f", {counts.completed} of {counts.total} done" if counts else ""
            say(f"Batch {batch.id}: {batch.status}{done}")
            under_way = True
            continue
        # An expired or cancelled batch has the replies that were made, and bills them.
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in (await client.files.content(file)).text.splitlines():
                _take(json.loads(line), record["cells"], endpoint, log)
        for key, where in record["cells"].items():
            if key not in log.records:
                log.append({**where, "error": f"not answered: the batch is {batch.status}"})
        log.append({"id": f"done-{batch.id}", "status": batch.status})
        say(f"Batch {batch.id}: {batch.status}")
        if batch.status == "failed":
            problems = [str(item.message) for item in (batch.errors.data if batch.errors and batch.errors.data else [])]
            raise ConfigError(f"The server refuses the batch: {endpoint.scrub('; '.join(problems))}")
    return under_way


def _take(line: dict[str, Any], cells: dict[str, Any], endpoint: Endpoint, log: ReplyLog) -> None:
    key = line.get("custom_id")
    if key not in cells or key in log.records:
        return
    body = (line.get("response") or {}).get("body") or {}
    choices = body.get("choices") or []
    if (line.get("response") or {}).get("status_code") != 200 or not choices:
        reason = line.get("error") or body.get("error") or "no reply"
        log.append({**cells[key], "error": endpoint.scrub(str(reason))[:300]})
        return
    message, usage = choices[0].get("message") or {}, body.get("usage") or {}
    texts = {name: message.get(name) for name in ("content", "refusal")}
    log.append(
        {
            **cells[key],
            **{name: endpoint.scrub(text) if isinstance(text, str) else None for name, text in texts.items()},
            "finish_reason": choices[0].get("finish_reason"),
            "usage": {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")} if usage else None,
            "model": body.get("model"),
            "format": "json_schema",
        }
    )
