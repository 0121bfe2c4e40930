"""What the machine's matrix product does, in FLOP/s: python bench/gemm.py bfloat16

The best of several products of two square matrices, which no training step can beat.
"""

from __future__ import annotations

import sys
import time

import torch


def rate(dtype: torch.dtype, device: str, size: int, times: int = 12) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (4096, 8192) if device == "cuda" else (1024, 2048)
    print(max(rate(getattr(torch, sys.argv[1]), device, size) for size in sizes))


if __name__ == "__main__":
    main()
