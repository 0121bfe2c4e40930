"""OpenMP's threads on a CPU: how many a process has, and how long they spin while they wait for work.

libgomp, which PyTorch brings on Linux, reads both when torch is imported: whoever sets them does it before. Left to
itself it lets a waiting thread spin for milliseconds, which takes the core from whatever else wants to run, the
threads of this process that have work among them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from omegaconf import DictConfig

from tunewright.errors import ConfigError
from tunewright.plan.devices import Devices
from tunewright.ranks import without_ranks

# Rounds of a loop, tens of nanoseconds each. By `bench/busy.py` the best over a quiet and a busy machine: some percent
# slower than libgomp's 300,000 on the former, three times as fast on the latter (docs/benchmarks.md).
SPIN = 1_000
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
COUNT = "OMP_NUM_THREADS"


def waiting() -> dict[str, str]:
    """Return how long threads spin, for a process that computes on a CPU; nothing where the environment says it."""
    return {} if any(name in os.environ for name in WAITING) else {"GOMP_SPINCOUNT": str(SPIN)}


def exported(environment: Mapping[str, str]) -> str | None:
    """Return the user's own OMP_NUM_THREADS; inside another launch it is that launch's.

    Raises:
        ConfigError: it is no number, nor a list of them, whose first one is for threads that are not nested.
    """
    found = without_ranks(environment).get(COUNT)
    if not found:
        return None
    first = found.partition(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ConfigError(
            f"OMP_NUM_THREADS is {found!r} in the environment: export a whole number from 1, or unset it."
        )
    return first


def of_each_rank(config: DictConfig, ranks: int, devices: Devices) -> str:
    """Return the threads of each rank: what was typed, else what is exported, else its share of the cores.

    Two ranks that each start a thread per core are several times slower than with their share.
    """
    typed = config.cluster.threads_per_process
    return str(typed) if typed else exported(os.environ) or str(max(devices.cores // ranks, 1))


def remarks(config: DictConfig, ranks: int, devices: Devices) -> list[str]:
    """Say what an exported OMP_NUM_THREADS decides, or what counts in its place."""
    found, typed = exported(os.environ), config.cluster.threads_per_process
    if found is None or found == str(typed):
        return []
    if typed:
        return [f"cluster.threads_per_process={typed} counts, not the exported OMP_NUM_THREADS={found}."]
    share = max(devices.cores // ranks, 1)
    if found == str(share):
        return []
    return [f"Each rank has OMP_NUM_THREADS={found} threads, as exported; its share of the cores is {share}."]
