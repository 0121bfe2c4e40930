"""The device of a rank: what it is called, what it can compute, what it has held."""

from __future__ import annotations

import os
import platform
import resource
import time
from typing import Any

import torch

from tunewright.plan.machine import processor


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return what the manifest says about the device of the first rank."""
    return {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def listed_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a GPU's peak in FLOP/s from TRL's table; None for one that it does not have."""
    from trl.trainer.utils import get_peak_flops

    return get_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))


def product_rates(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[list[float], list[float]]:
    """Return the rates in FLOP/s of products of two square matrices, small ones and large ones.

    No training step can beat the best of them.

    Args:
        seconds: how long to go on; each size is tried at least once.
    """
    small, large = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    return _rates(device, dtype, small, seconds / 2), _rates(device, dtype, large, seconds / 2)


def _rates(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> list[float]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates: list[float] = []
    begun = time.perf_counter()
    while not rates or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        a @ b
        drain(device)
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return rates


def drain(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU does it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this rank has held: reserved on its GPU, or resident in host memory for a CPU rank."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
