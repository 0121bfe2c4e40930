"""Hard limits on what a dataset may cost: the worst case of a request is reserved before it is sent."""

from __future__ import annotations

import time
from dataclasses import dataclass

from datagen.settings import BudgetConfig

OVERHEAD = 64  # tokens around a prompt: roles, the schema's wrapping
BATCH_PRICE = 0.5


class BudgetSpent(Exception):
    """Nothing more may be sent; the text names the setting that says so."""


@dataclass(frozen=True)
class Reservation:
    """The most that one request can cost."""

    tokens_in: int
    tokens_out: int


class Budget:
    """Counts what was spent and what is reserved; both together never exceed a limit.

    What a request really took replaces its reservation when the reply says so. Without that, or when the connection
    broke and nobody knows what was billed, the worst case stays.
    """

    def __init__(self, limits: BudgetConfig, price: tuple[float, float] | None, *, factor: float = 1.0) -> None:
        self.limits, self.price, self.factor = limits, price, factor
        self.tokens_in = self.tokens_out = self.requests = 0
        self.reserved_in = self.reserved_out = 0
        self.began = time.monotonic()

    @staticmethod
    def worst_case(prompt: str, max_tokens: int) -> Reservation:
        """Return the most tokens a request can take: no byte-level tokenizer makes more tokens than bytes."""
        return Reservation(len(prompt.encode()) + OVERHEAD, max_tokens)

    def reserve(self, wanted: Reservation, requests: int = 1) -> None:
        """Set a request's worst case aside.

        Raises:
            BudgetSpent: it does not fit.
        """
        limits = self.limits
        tokens_in = self.tokens_in + self.reserved_in + wanted.tokens_in
        tokens_out = self.tokens_out + self.reserved_out + wanted.tokens_out
        if limits.requests is not None and self.requests + requests > limits.requests:
            raise BudgetSpent(f"budget.requests = {limits.requests} is reached")
        if limits.tokens is not None and tokens_in + tokens_out > limits.tokens:
            raise BudgetSpent(f"budget.tokens = {limits.tokens:,} leaves no room for another request")
        if limits.usd is not None and (self.cost(tokens_in, tokens_out) or 0.0) > limits.usd:
            raise BudgetSpent(f"budget.usd = {limits.usd:g} leaves no room for another request")
        if self.out_of_time():
            raise BudgetSpent(f"budget.minutes = {limits.minutes:g} are over")
        self.requests += requests
        self.reserved_in += wanted.tokens_in
        self.reserved_out += wanted.tokens_out

    def settle(self, held: Reservation, tokens_in: int | None, tokens_out: int | None) -> None:
        """Replace a reservation by what the request took, or by its worst case where that is not known."""
        self.reserved_in -= held.tokens_in
        self.reserved_out -= held.tokens_out
        self.tokens_in += held.tokens_in if tokens_in is None else tokens_in
        self.tokens_out += held.tokens_out if tokens_out is None else tokens_out

    def out_of_time(self) -> bool:
        minutes = self.limits.minutes
        return minutes is not None and time.monotonic() - self.began > 60 * minutes

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Return dollars, or None where no price is known."""
        if self.price is None:
            return None
        return self.factor * (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6

    def spent(self) -> float | None:
        return self.cost(self.tokens_in, self.tokens_out)
