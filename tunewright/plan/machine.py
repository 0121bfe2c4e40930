"""The devices that a run is planned for: those here, or others that a person names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Devices of one kind."""

    kind: str  # "cuda", "rocm" or "cpu"
    name: str  # "H100-80GB", or a processor's own name
    count: int  # of GPUs; of CPU ranks, which share memory and cores
    memory: int  # bytes that a rank can have
    rate: float | None  # FLOP/s of a rank in bfloat16 (float32 on a CPU that computes in it): measured, else listed
    link: float | None  # bytes/s that a rank sends while all ranks of a machine do (NVLink, PCIe, host memory)
    node: int  # devices of one host
    network: float | None  # bytes/s that a host sends to another, where there are several
    here: bool  # this machine: what was measured on it counts
