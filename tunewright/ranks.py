"""One rank as a process: what its environment says, and how it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

# Set by `tunewright train`: it reads the error files and shows one of them, so that ranks need not.
LAUNCHED_BY = "TUNEWRIGHT_LAUNCHER_PID"
SPARE_ERRORS = "TUNEWRIGHT_SPARE_ERRORS"  # the folder for error files that find no room in the run's
# What launchers tell their ranks, and torchrun (PET_) and MPI theirs. Whoever starts ranks owns these: what another
# launch left in the environment would make them wait for ranks that nobody starts.
RANK_NAMES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "FORK_LAUNCHED",
    LAUNCHED_BY,
    SPARE_ERRORS,
}
RANK_PREFIXES = (
    "ACCELERATE_",
    "FSDP_",
    "MV2_COMM_WORLD_",
    "OMPI_COMM_WORLD_",
    "PET_",
    "PMI_",
    "TORCHELASTIC_",
)


def leave(exit_code: int) -> NoReturn:
    """End this process at once: what it printed is shown, what libraries do at the interpreter's end is not done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def rank_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that make a process a rank, sorted.

    OMP_NUM_THREADS is one of them where there are others: torchrun and accelerate set it for their ranks.
    """
    found = [name for name in environment if name in RANK_NAMES or name.startswith(RANK_PREFIXES)]
    return sorted([*found, *(["OMP_NUM_THREADS"] if found and "OMP_NUM_THREADS" in environment else [])])


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a process is no rank of anything."""
    left_out = set(rank_variables(environment))
    return {name: value for name, value in environment.items() if name not in left_out}


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def machine() -> str:
    """Return this machine's number among those of the launch, as torchrun or DeepSpeed's launcher tell it."""
    return os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or "0"


def machines() -> int | None:
    """Return on how many machines ranks were started, or None where the launcher does not tell."""
    told = os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("CROSS_SIZE")
    return int(told) if told else None


def launched() -> bool:
    return LAUNCHED_BY in os.environ


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to signal this process when the process that started it dies: no orphan goes on training."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
