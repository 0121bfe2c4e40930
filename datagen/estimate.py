"""What a run would ask and about cost, for `--dry-run`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from tunewright.datagen.budget import Budget, Reservation
from tunewright.datagen.curation import Curation
from tunewright.datagen.documents import Chunk
from tunewright.datagen.endpoint import Endpoint
from tunewright.datagen.grid import cell_count
from tunewright.datagen.job import logged_plan
from tunewright.datagen.plan import Plan
from tunewright.datagen.reply_log import ReplyLog
from tunewright.datagen.settings import DatagenConfig, Mode, prices

EXPECTED_YIELD = 0.8  # of replies that are kept
EXPECTED_REPLY = 350  # tokens
BYTES_PER_TOKEN = 4


def estimate(
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
    first = Curation(config, shown, chunks).cell_at(0)
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
