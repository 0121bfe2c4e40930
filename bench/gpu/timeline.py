"""Where the device's time goes: python bench/gpu/timeline.py OUT.json [--tiny]

Three steps of 8B LoRA under PyTorch's profiler: seconds by kernel, and the gaps in which the device waits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from cells import SPEED, tiny  # noqa: E402
from worker import Clock, Said, forget, job_of, synchronise, train_here  # noqa: E402

FIRST, LAST = 2, 5  # steps whose end begins and ends the profile
GROUPS = {  # the first that a kernel's name has in it
    "attention": ("flash", "attention", "fmha"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "mm_", "::mm", "addmm"),
    "optimiser": ("adam", "multi_tensor", "foreach"),
    "reductions": ("reduce", "softmax", "norm"),
    "copies": ("memcpy", "memset", "copy", "cat"),
    "elementwise": ("elementwise", "triton", "vectorized", "mul", "add", "silu"),
}


class Profiled(Said):
    """Profiles from the end of one step to the end of another."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.profiler = torch.profiler.profile()

    def __call__(self, text: str) -> None:
        before = len(self.clock.marks)
        super().__call__(text)
        if len(self.clock.marks) == before:
            return
        if len(self.clock.marks) == FIRST:
            self.profiler.start()
        elif len(self.clock.marks) == LAST:
            synchronise()
            self.profiler.stop()


def busy(intervals: Iterable[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """Return how long at least one interval lasts, and the gaps between them as (start, length)."""
    total, gaps, end = 0.0, [], None
    for start, stop in sorted(intervals):
        if end is not None and start > end:
            gaps.append((end, start - end))
        total += max(stop - max(start, end if end is not None else start), 0.0)
        end = stop if end is None else max(end, stop)
    return total, gaps


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "others")


def summary(profiler: Any, wall: float) -> dict[str, Any]:
    """Return seconds by kernel, by group of kernels, and the device's gaps; of CPU operations where there is no GPU."""
    kind = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind]
    by_kernel: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in events:
        by_kernel[event.name] += event.time_range.elapsed_us() / 1e6
        counts[event.name] += 1
    by_group: dict[str, float] = defaultdict(float)
    for name, seconds in by_kernel.items():
        by_group[group_of(name)] += seconds
    worked, gaps = busy((event.time_range.start, event.time_range.end) for event in events)
    longest = sorted(gaps, key=lambda gap: -gap[1])[:10]
    return {
        "steps": LAST - FIRST,
        "wall_s": wall,
        "device_busy_s": worked / 1e6,
        "device_busy": worked / 1e6 / wall,
        "gaps": len(gaps),
        "longest_gaps_ms": [length / 1e3 for _, length in longest],
        "by_group_s": dict(sorted(by_group.items(), key=lambda item: -item[1])),
        "by_kernel": [
            {"name": name[:160], "s": seconds, "calls": counts[name]}
            for name, seconds in sorted(by_kernel.items(), key=lambda item: -item[1])[:40]
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    cell = tiny(SPEED[0]) if args.tiny else SPEED[0]
    with tempfile.TemporaryDirectory(prefix="tunewright-timeline-") as scratch:
        forget()
        job, _ = job_of(cell, Path(scratch), {})
        clock = Clock()
        said = Profiled(clock)
        train_here(job, cell.lever, said)
    found = summary(said.profiler, clock.marks[LAST - 1] - clock.marks[FIRST - 1])
    args.out.write_text(json.dumps({"cell": cell.as_json(), **found}, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
