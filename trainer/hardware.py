"""The device of a rank: what it is called, what it can compute, what it has held."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return what the manifest says about the device of the first rank."""
    return {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's peak in FLOP/s: of a GPU from TRL's table, of a CPU rank measured on a large matmul.

    None for a GPU that the table does not have.
    """
    if device.type == "cuda":
        from trl.trainer.utils import get_peak_flops

        return get_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
    size = 1024
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this rank has held: reserved on its GPU, or resident in host memory for a CPU rank."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
