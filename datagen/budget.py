"""Hard limits on what a dataset may cost: the worst case of a request is reserved before it is sent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunewright.datagen.settings import BudgetConfig

OVERHEAD = 64  # tokens that a server may put around a request
BATCH_PRICE = 0.5

Price = tuple[float, float]  # dollars for a million tokens, of prompt and of reply


class BudgetSpent(Exception):
    """Nothing more may be sent; the text names the setting that says so."""


@dataclass(frozen=True)
class Reservation:
    """The most that one request can take, and its price where that is known."""

    tokens_in: int
    tokens_out: int
    price: Price | None = None

    def usd(self, tokens_in: int, tokens_out: int) -> float:
        price = self.price or (0.0, 0.0)
        return (tokens_in * price[0] + tokens_out * price[1]) / 1e6


class Budget:
    """Counts what was spent and what is reserved; both together never exceed a limit.

    What a request really took replaces its reservation when the reply says so. Without that, or when the connection
    broke and nobody knows what was billed, the worst case stays.
    """

    def __init__(self, limits: BudgetConfig, price_of: Callable[[str | None], Price | None]) -> None:
        self.limits, self._price_of = limits, price_of
        self.known = price_of(None) is not None
        self.tokens = self.requests = 0
        self.usd = 0.0
        self._reserved = 0
        self._reserved_usd = 0.0
        self.began = time.monotonic()

    def price(self, model: str | None = None, *, batch: bool = False) -> Price | None:
        """Return what a model costs (None: the one that writes); a batch costs half."""
        found, factor = self._price_of(model), BATCH_PRICE if batch else 1.0
        return found and (found[0] * factor, found[1] * factor)

    def worst_case(
        self, body: dict[str, Any], max_tokens: int, model: str | None = None, *, batch: bool = False
    ) -> Reservation:
        """Return the most a request can take: no byte-level tokenizer makes more tokens than there are bytes.

        The whole body counts, since servers put roles and schemas into the prompt too.
        """
        size = len(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
        return Reservation(size + OVERHEAD, max_tokens, self.price(model, batch=batch))

    def count(self, records: list[dict[str, Any]]) -> None:
        """Count what requests took, as the log has it, and nothing else."""
        self.tokens = self.requests = self._reserved = 0
        self.usd = self._reserved_usd = 0.0
        for record in records:
            tokens_in, tokens_out = taken(record)
            self.tokens += tokens_in + tokens_out
            self.requests += int(record.get("tries", 0))
            self.usd += self.cost(record)

    def cost(self, record: dict[str, Any]) -> float:
        price = self.price(record.get("judge"), batch=bool(record.get("batch")))
        return Reservation(0, 0, price).usd(*taken(record))

    def reserve(self, wanted: Reservation) -> None:
        """Set a request's worst case aside.

        Raises:
            BudgetSpent: it does not fit.
        """
        limits = self.limits
        tokens = self.tokens + self._reserved + wanted.tokens_in + wanted.tokens_out
        usd = self.usd + self._reserved_usd + wanted.usd(wanted.tokens_in, wanted.tokens_out)
        if limits.requests is not None and self.requests + 1 > limits.requests:
            raise BudgetSpent(f"budget.requests = {limits.requests} is reached")
        if limits.tokens is not None and tokens > limits.tokens:
            raise BudgetSpent(f"budget.tokens = {limits.tokens:,} leaves no room for another request")
        if limits.usd is not None and usd > limits.usd:
            raise BudgetSpent(f"budget.usd = {limits.usd:g} leaves no room for another request")
        if self.out_of_time():
            raise BudgetSpent(f"budget.minutes = {limits.minutes:g} are over")
        self.requests += 1
        self._reserve(wanted, 1)

    def _reserve(self, held: Reservation, sign: int) -> None:
        self._reserved += sign * (held.tokens_in + held.tokens_out)
        self._reserved_usd += sign * held.usd(held.tokens_in, held.tokens_out)

    def settle(self, held: Reservation, tokens_in: int | None, tokens_out: int | None) -> None:
        """Replace a reservation by what the request took, or by its worst case where that is not known."""
        self._reserve(held, -1)
        tokens_in = held.tokens_in if tokens_in is None else tokens_in
        tokens_out = held.tokens_out if tokens_out is None else tokens_out
        self.tokens += tokens_in + tokens_out
        self.usd += held.usd(tokens_in, tokens_out)

    def out_of_time(self) -> bool:
        minutes = self.limits.minutes
        return minutes is not None and time.monotonic() - self.began > 60 * minutes

    def spent(self) -> float | None:
        """Return dollars, or None where no price is known."""
        return self.usd if self.known else None


def taken(record: dict[str, Any]) -> tuple[int, int]:
    """Return the tokens of prompt and reply that a logged request took, at worst where nobody knows."""
    parts = [record[name] for name in ("usage", "worst_case", "lost") if record.get(name)]
    tokens_in, tokens_out = (
        sum(int(part[key] or 0) for part in parts) for key in ("prompt_tokens", "completion_tokens")
    )
    return tokens_in, tokens_out
