"""What a model under a method holds and computes, as found out on devices that have shapes and no memory.

`tunewright.trainer.footprint` runs one micro-batch there and keeps what it sees as JSON; here it is read, without
importing torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Batch:
    """A micro-batch, and how it is trained on."""

    rows: int
    length: int  # tokens of each row
    padded: bool
    recompute: bool  # all layers, or none
    scored: int | None = None  # positions of all rows that carry a label; None: all that can


@dataclass(frozen=True)
class Moment:
    """What one rank holds at a moment of a forward and backward pass, beside weights and what the optimiser keeps."""

    activations: int  # bytes: kept for the backward pass, and what lives for a moment only
    gradients: int  # how many trained weights have their gradient by then
    head: int = 0  # of the activations: bytes of the head and the loss
    scratch: int = 0  # of the activations: bytes of weights out of 4 or 8 bits


@dataclass(frozen=True)
class Pass:
    """One micro-batch's forward and backward pass."""

    batch: Batch
    moments: list[Moment]  # those that are the largest for some number of bytes that a gradient takes
    flops: float  # of active weights, differentiated where they are: `tunewright.trainer.flops`


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, not bytes, where nothing else is said."""

    trained: int
    frozen: int
    frozen_bytes: int  # in their formats: 4 or 8 bits with their scales where quantised, 16 or 32 for the rest
    itemsize: int  # bytes of a weight of the computation's format, which trained ones have
    layers: list[int]  # of each decoder layer, trained and frozen
    outside: int  # embedding, head, norms: what is in no layer
    small: int  # in tensors that ZeRO-3 leaves whole on each rank (`stage3_param_persistence_threshold`)
    hidden: int  # the model's width, by which transformers fills in DeepSpeed's "auto"
    shapes: list[tuple[list[int], int]]  # of trained tensors, each with how many there are, for optimisers
    head: int = 0  # of `outside`, what makes the logits, which may be the embedding as well


@dataclass(frozen=True)
class Footprint:
    """All that was found out of a model under a method, for one kind of device."""

    device: str  # "cpu", "cuda" or "rocm"
    weights: Weights
    passes: list[Pass]
    failed: tuple[Batch, ...] = ()  # whose passes could not be found out
    problem: str | None = None  # of the last of them

    def covers(self, batches: Iterable[Batch]) -> bool:
        """Tell whether all that can be known of the batches is."""
        return {*(found.batch for found in self.passes), *self.failed} >= set(batches)

    def of(self, batch: Batch) -> Pass:
        return next(found for found in self.passes if found.batch == batch)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Footprint:
        passes = [
            Pass(**{**one, "batch": Batch(**one["batch"]), "moments": [Moment(**moment) for moment in one["moments"]]})
            for one in told["passes"]
        ]
        weights = {**told["weights"], "shapes": [(shape, count) for shape, count in told["weights"]["shapes"]]}
        failed = tuple(Batch(**batch) for batch in told["failed"])
        return cls(told["device"], Weights(**weights), passes, failed, told["problem"])
