"""What the machine's matrix product does, in FLOP/s: python bench/gemm.py bfloat16

The best of several products of two square matrices, which no training step can beat, and the median of the larger ones,
which tells how quiet the machine is. A training on a CPU has the same yard-stick (`trainer/peak.py`).
"""

from __future__ import annotations

import statistics
import sys

import torch

from tunewright.trainer.hardware import product_rates

SECONDS = 1.5


def gemm_rates(dtype: str) -> tuple[float, float]:
    """Return the best and the median matrix product, FLOP/s, with the threads that torch takes here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, large = product_rates(device, getattr(torch, dtype), SECONDS)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for those who are measured next
    return max(*small, *large), statistics.median(large)


if __name__ == "__main__":
    print(*gemm_rates(sys.argv[1]))
