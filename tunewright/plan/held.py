"""What one rank holds in memory at one moment, by part, and what the arithmetic of every strategy starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from tunewright.plan.accumulation import sums_in_float32
from tunewright.plan.footprint import Footprint, Pass
from tunewright.text import size

PARTS = {  # of `Memory`, what is beside the device left out
    "weights": "base weights",
    "trained": "trained weights",
    "masters": "their float32 copies",
    "optimizer": "optimiser states",
    "gradients": "gradients",
    "activations": "activations",
    "head": "head and loss",
    "scratch": "scratch",
    "gathered": "gathered weights",
    "buckets": "buckets of communication",
    "slack": "the allocator's gaps",
    "context": "libraries and kernels",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment.

    `host` is beside the device. On a CPU that is the same memory, and everything is in the other parts.
    """

    weights: int = 0  # of the base, in their formats; a rank's share under ZeRO-3
    trained: int = 0  # adapters, or the weights themselves
    masters: int = 0  # float32 copies of trained weights
    optimizer: int = 0
    gradients: int = 0
    activations: int = 0  # without head and scratch
    head: int = 0
    scratch: int = 0  # weights out of 4 bits, or what an optimiser's step needs, for a moment
    gathered: int = 0  # whole weights of ZeRO-3
    buckets: int = 0  # of communication
    slack: int = 0  # the allocator's gaps
    context: int = 0  # the device's own: libraries, kernels
    host: int = 0

    @property
    def needed(self) -> int:
        """On the device."""
        return sum(getattr(self, part) for part in PARTS)

    def by_part(self, most: int = len(PARTS)) -> str:
        """Return what is held as text, the largest part first, and so many of them at most."""
        parts = {name: getattr(self, part) for part, name in PARTS.items()}
        ordered = sorted(parts, key=lambda name: -parts[name])
        return ", ".join(f"{name} {size(parts[name])}" for name in ordered[:most] if parts[name])


@dataclass(frozen=True)
class Job:
    """A configuration on a kind of device, with the largest micro-batch that it can have."""

    config: DictConfig
    footprint: Footprint
    found: Pass
    ranks: int
    accumulates: bool  # several micro-batches a step
    gpu: bool

    @property
    def trained(self) -> int:
        return self.footprint.weights.trained

    @property
    def itemsize(self) -> int:
        return self.footprint.weights.itemsize

    @property
    def half(self) -> bool:
        return self.itemsize == 2

    @property
    def sums(self) -> bool:
        """Whether gradients of several micro-batches are added up in float32 beside half-precision weights."""
        return self.half and self.accumulates and sums_in_float32(self.config)

    def at_rest(self) -> Memory:
        """What is there before any strategy: weights in their formats."""
        weights = self.footprint.weights
        return Memory(weights=weights.frozen_bytes, trained=self.itemsize * weights.trained)

    @property
    def largest(self) -> int:
        """Weights of the largest trained tensor."""
        return max((math.prod(shape) for shape, _ in self.footprint.weights.shapes), default=0)

    def passing(
        self, always: Memory, *, once: Memory | None = None, bytes_of_gradient: int = 0, most: int | None = None
    ) -> Iterator[Memory]:
        """Yield what is held at the fullest moments of a forward and backward pass.

        Args:
            always: what is there all the time.
            once: what is there in its place once a gradient is.
            bytes_of_gradient: what a weight's gradient takes from when it is there to the end of the pass.
            most: weights whose gradients exist at once, where they are taken away before the end.
        """
        for moment in self.found.moments:
            base = once if once is not None and moment.gradients else always
            gradients = min(moment.gradients, self.trained if most is None else most)
            yield replace(
                base,
                activations=moment.activations - moment.head - moment.scratch,
                head=moment.head,
                scratch=moment.scratch,
                gradients=base.gradients + bytes_of_gradient * gradients,
            )
