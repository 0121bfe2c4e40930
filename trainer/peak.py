"""What a run's devices can compute, all together: the figure that MFU is a share of.

That of a GPU stands in a table. That of a CPU is measured with products of matrices at both ends of a run, and the best
rate that was ever found lies in the cache, because a busy moment makes a CPU look slow and the run fast. Where the two
ends do not agree the machine did something else, and the run has no MFU.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import DictConfig

from tunewright.files import write_json
from tunewright.trainer.hardware import describe_hardware, listed_peak_flops, product_rates
from tunewright.trainer.model.load import torch_dtype
from tunewright.trainer.model.model_folder import cache_folder
from tunewright.trainer.process_group import all_gather
from tunewright.trees import digest

AGREE = 0.85  # of two measurements the lower one is at least this share of the higher one
SECONDS = 0.1  # that a measurement takes, or a large product where that takes longer


class Peak:
    """Of all ranks, in FLOP/s. Every rank has to make one and to call what is said so.

    Args:
        cache: the folder `data.cache_dir`, where the best rates lie in `peaks/`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        self.start: float | None = None  # None: of a GPU that the table does not have
        self.now: float | None = None  # what is certain while the run goes on
        self.known: float | None = None  # the best of a CPU before this one
        if device.type == "cuda":
            listed = _sum(listed_peak_flops(device, dtype) or math.nan, device)
            self.start = self.now = None if math.isnan(listed) else listed
            return
        facts = describe_hardware(device)
        kind = {name: facts[name] for name in ("device_name", "cores", "threads_per_rank", "platform")}
        self._here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._kind = kind | {"dtype": str(dtype), "torch": torch.__version__, "ranks": self._here}
        self._file = cache / "peaks" / f"{digest(self._kind)}.json"
        best = _read(self._file)
        rate = self._measure()
        self.start, self.known = _sum(rate, device), _sum(best, device)
        if _agree(self.start, self.known):
            self.now = max(self.start, self.known)

    def at_end(self) -> dict[str, float | None]:
        """Return what the manifest says: the rates at both ends, and the best one. Every rank has to call it."""
        if self.device.type == "cuda":
            return {"start": self.start, "end": self.start, "best": self.start}
        end = _sum(self._measure(), self.device)
        best = _sum(_read(self._file), self.device)
        return {"start": self.start, "end": end, "best": max(self.start or 0.0, end, best)}

    def _measure(self) -> float:
        """Return this rank's rate while all ranks measure, and keep the best in the cache."""
        all_gather([0.0], self.device)  # they begin together
        small, large = product_rates(self.device, self.dtype, SECONDS)
        rate = max(*small, *large)
        if rate > _read(self._file) and os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):  # a disk that is full or read-only: another run will find it
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._file, {"flops_per_second": rate, **self._kind})
        return rate


def measure_cpu(config: DictConfig) -> None:
    """Measure what this machine's CPU computes in the configuration's format, and keep it for plans."""
    Peak(torch.device("cpu"), torch_dtype(config.model.dtype, "cpu"), cache_folder(config.data.cache_dir))


def certain(peak: dict[str, float | None]) -> float | None:
    """Return the best rate of what a manifest says, where those of both ends agree."""
    start, end = peak["start"], peak["end"]
    return peak["best"] if start and end and _agree(start, end) else None


def _agree(one: float, other: float) -> bool:
    return min(one, other) >= AGREE * max(one, other)


def _read(file: Path) -> float:
    with suppress(OSError, ValueError, KeyError):  # none, half of one, or of an older version, which plans cannot read
        told = json.loads(file.read_text(encoding="utf-8"))
        return float(told["flops_per_second"]) if told["dtype"] else 0.0
    return 0.0


def _sum(mine: float, device: torch.device) -> float:
    return sum(rate for (rate,) in all_gather([mine], device))
