"""One way to run a configuration, with what it needs."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.plan.held import Memory


@dataclass(frozen=True)
class Pace:
    """How fast a way to run is expected to be."""

    steps: int | None  # of the run; None for a stream without an end, or rows that nobody has counted
    tokens_per_step: float
    flops_per_step: float  # of all ranks
    compute_seconds: float  # a step, of one rank
    communication_seconds: float  # a step, of which part hides behind computation
    seconds: float  # a step
    reason: str  # where rate and share come from
    price: float | None = None  # of all devices for an hour

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds

    @property
    def hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.seconds / 3600

    @property
    def cost(self) -> float | None:
        """What the run costs, in the currency of the price."""
        return None if self.hours is None or self.price is None else self.hours * self.price


@dataclass(frozen=True)
class Option:
    """A method, strategy, recomputation and micro-batch, and what becomes of them on a machine."""

    method: str
    strategy: str
    ranks: int
    micro_batch: int
    recompute: bool
    refusal: str | None  # why it cannot run at all
    memory: Memory | None
    room: int  # bytes that a rank can have
    pace: Pace | None
    host_room: float | None = None  # the same of host memory, beside GPUs where that is known
    layers: int | None = None  # that recompute, where it is some of them: as few as memory asks for
    configured: bool = False  # as the configuration says, or leaves open

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.share <= 1

    @property
    def share(self) -> float:
        """Of the memory that a rank can have, on its device or beside it, 1 and less where it fits."""
        if self.memory is None or not self.room:
            return float("inf")
        return max(self.memory.needed / self.room, self.memory.host / self.host_room if self.host_room else 0.0)

    @property
    def seconds(self) -> float:
        """Of a token: with `train.gradient_accumulation_steps` the steps of more ranks have more of them."""
        return self.pace.seconds / self.pace.tokens_per_step if self.pace else float("inf")
