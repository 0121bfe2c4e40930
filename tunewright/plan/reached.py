"""How fast runs were on this machine, and how much memory they took beside what was planned: kept in the cache.

CACHE/reached/KEY.json: a way to train, points of (tokens, FLOPs, seconds) of a rank's micro-batch with its share of a
step's end, the rate of the best matrix product at that time, and seen by planned memory. Written at the end of each
run whose speed is certain (`tunewright.trainer.keeping`) and by `tunewright plan --measure`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.method_schema import PROMPT_LEARNING
from tunewright.files import write_json
from tunewright.plan.held import Memory
from tunewright.plan.machine import Machine, computes_in
from tunewright.plan.support import known_strategy
from tunewright.trees import digest

MUCH_SMALLER = 4  # times as many weights: most of the time of a small model's step is not spent in products
SAME_MODEL = 0.01  # weights of a model may be counted a little differently: tied ones, or what a plug-in adds
# Methods whose steps are alike: what is frozen and differentiated, in which format, with padding or without.
ALIKE = (("lora", "ia3"), ("qlora",), ("full", "freeze"), PROMPT_LEARNING)


@dataclass(frozen=True)
class Way:
    """What decides how fast a micro-batch is."""

    device: str
    ranks: int
    method: str
    strategy: str
    dtype: str
    padded: bool
    recompute: bool
    compiled: bool
    trained: int  # weights
    total: int

    def is_like(self, other: Way) -> bool:
        """Tell whether it is the same way to train the same model."""
        same_model = abs(self.total - other.total) <= SAME_MODEL * other.total
        return same_model and replace(self, total=0) == replace(other, total=0)

    def distance(self, other: Way) -> float:
        """Return how little another way tells about this one; infinite where it tells nothing."""
        if (self.device, self.dtype, self.padded, self.compiled) != (
            other.device, other.dtype, other.padded, other.compiled
        ):  # fmt: skip
            return math.inf
        if kind_of(self.method) != kind_of(other.method) or self.total > MUCH_SMALLER * other.total:
            return math.inf
        apart = 2.0 * (self.strategy != other.strategy) + 1.0 * (self.ranks != other.ranks)
        apart += 1.0 * (self.recompute != other.recompute) + 0.25 * (self.method != other.method)
        return apart + 0.5 * abs(math.log2(self.total / other.total))


@dataclass(frozen=True)
class Point:
    """A rank's micro-batch as it was seen."""

    tokens: float
    flops: float  # that the method needs for them
    seconds: float  # with its share of what a step does once


@dataclass(frozen=True)
class Reached:
    """What was seen of one way to train."""

    way: Way
    points: list[Point]
    rate: float | None  # FLOP/s of a rank's best matrix product then
    memory: float | None = None  # seen by planned
    measured: bool = False  # by `plan --measure`

    def seconds(self, tokens: float) -> float:
        """Return the seconds of a micro-batch of so many tokens: on the line through the nearest points."""
        points = sorted(self.points, key=lambda point: point.tokens)
        if len(points) == 1:
            return points[0].seconds * tokens / points[0].tokens
        after = min(max(sum(point.tokens < tokens for point in points), 1), len(points) - 1)
        one, two = points[after - 1], points[after]
        slope = (two.seconds - one.seconds) / max(two.tokens - one.tokens, 1.0)
        # Noise may turn the line; a micro-batch never takes less than its part of a larger one.
        return max(one.seconds + slope * (tokens - one.tokens), two.seconds * min(tokens / two.tokens, 1.0))

    @property
    def of_a_token(self) -> float:
        """Seconds of a rank for one of its tokens, of all points together."""
        return sum(point.seconds for point in self.points) / sum(point.tokens for point in self.points)

    @property
    def share(self) -> float | None:
        """FLOP/s by those of the best matrix product, of all points together."""
        seconds = sum(point.seconds for point in self.points)
        return sum(point.flops for point in self.points) / seconds / self.rate if self.rate and seconds else None


@dataclass(frozen=True)
class Known:
    """All that was seen on this machine."""

    records: list[Reached] = field(default_factory=list)
    rates: dict[tuple[str, int], float] = field(default_factory=dict)  # (format, ranks) -> FLOP/s of a CPU rank

    def of(self, way: Way) -> Reached | None:
        """Return what was seen of a way to train, measured before met by chance."""
        found = [record for record in self.records if way.is_like(record.way)]
        return max(found, key=lambda record: record.measured, default=None)

    def nearest(self, way: Way) -> Reached | None:
        """Return what was seen of the way that tells the most about this one, or None where none tells anything."""
        found = [record for record in self.records if record.share and way.distance(record.way) < math.inf]
        return min(found, key=lambda record: way.distance(record.way), default=None)

    def memory_ratio(self, way: Way) -> float | None:
        """Return seen by planned memory of this way to train, else of the nearest that was measured.

        Of models of like size alone: in a small one most of what is held is not the model.
        """
        measured = [record for record in self.records if record.memory and way.distance(record.way) < math.inf]
        found = [record for record in measured if 0.5 <= record.way.total / way.total <= 2]
        nearest = min(found, key=lambda record: way.distance(record.way), default=None)
        return nearest.memory if nearest else None

    def rate(self, dtype: str, ranks: int) -> float | None:
        """Return the FLOP/s of one of so many CPU ranks: measured with as many, else their share of all."""
        if (dtype, ranks) in self.rates:
            return self.rates[dtype, ranks]
        return max((rate * of / ranks for (other, of), rate in self.rates.items() if other == dtype), default=None)


def kind_of(method: str) -> tuple[str, ...]:
    """Return the methods that train like this one; a plug-in's like nothing else."""
    return next((alike for alike in ALIKE if method in alike), (method,))


def way_of(config: DictConfig, machine: Machine, trained: int, total: int, *, recompute: bool) -> Way:
    """Return the way to train that a configuration is on a machine."""
    return Way(
        device=machine.name,
        ranks=machine.count,
        method=config.method.name,
        strategy=known_strategy(config),
        dtype=computes_in(config, machine.kind),
        padded=not config.train.padding_free,
        recompute=recompute,
        compiled=bool(config.train.compile),
        trained=trained,
        total=total,
    )


def keep(cache_dir: str, record: Reached) -> None:
    """Write what was seen into the cache: what was measured in place of what was before, a run where it was faster.

    A busy moment makes a run slow, and nothing makes one fast.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = _folder(cache_dir)
    file = folder / f"{digest([asdict(record.way), record.measured])}.json"
    before = _read(file)
    if record.measured or before is None or record.of_a_token < before.of_a_token:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(record))


def known_here(config: DictConfig, machine: Machine) -> Known:
    """Return what was seen on a machine, if it is this one."""
    if not machine.here:
        return Known()
    records = [record for record in map(_read, _files(_folder(config.data.cache_dir))) if record]
    rates: dict[tuple[str, int], float] = {}
    for file in _files(Path(config.data.cache_dir).expanduser() / "peaks"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # half of one, or of an older version
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["device_name"] == machine.name:
                key = str(told["dtype"]).removeprefix("torch."), int(told["ranks"])
                rates[key] = max(rates.get(key, 0.0), float(told["flops_per_second"]))
    return Known([record for record in records if record.way.device == machine.name], rates)


def with_ratio(memory: Memory, ratio: float | None) -> Memory:
    """Return planned memory with what was seen beside it in `slack`, which may become less than nothing."""
    return memory if ratio is None else replace(memory, slack=memory.slack + int((ratio - 1) * memory.needed))


def _folder(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser() / "reached"


def _files(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _read(file: Path) -> Reached | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # half of one, or of an older version
        told = json.loads(file.read_text(encoding="utf-8"))
        points = [Point(**point) for point in told["points"]]
        if points and all(point.tokens > 0 and point.seconds > 0 for point in points):
            return Reached(**{**told, "way": Way(**told["way"]), "points": points})
    return None
