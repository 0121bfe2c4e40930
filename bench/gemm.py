"""What the machine's matrix product does, in FLOP/s: python bench/gemm.py bfloat16

The best of several products of two square matrices, which no training step can beat, and the median of the larger ones,
which tells how quiet the machine is.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch


def gemm_rates(dtype: str) -> tuple[float, float]:
    """Return the best and the median matrix product, FLOP/s, with the threads that torch takes here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (4096, 8192) if device == "cuda" else (1024, 2048)
    small, large = (_rates(getattr(torch, dtype), device, size) for size in sizes)
    if device == "cuda":
        torch.cuda.empty_cache()  # for those who are measured next
    return max(*small, *large), statistics.median(large)


def _rates(dtype: torch.dtype, device: str, size: int, times: int = 12) -> list[float]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return [2 * size**3 / taken for taken in seconds]


if __name__ == "__main__":
    print(*gemm_rates(sys.argv[1]))
