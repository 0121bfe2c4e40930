"""How many bytes one rank needs on its device, by part."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment; `host` is beside the device, and part of the same memory on a CPU."""

    weights: int  # of the base, in their formats; a rank's share under ZeRO-3
    trained: int  # adapters, or the weights themselves
    masters: int  # float32 copies of trained weights
    optimizer: int
    gradients: int
    activations: int  # without head and scratch
    head: int
    scratch: int  # weights out of 4 bits for a moment
    gathered: int  # whole weights of ZeRO-3
    buckets: int  # of communication
    slack: int  # the allocator's gaps
    context: int  # the device's own: libraries, kernels
    host: int = 0

    @property
    def needed(self) -> int:
        """On the device."""
        return sum(getattr(self, item.name) for item in fields(self) if item.name != "host")
