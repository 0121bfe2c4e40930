"""What usual devices can do, by their data sheets: to plan for machines that are not here.

Rates are of dense products in bfloat16 with float32 sums (float16 where a device has no bfloat16), without sparsity.
Memory is what a driver reports, which is less than what is printed on a device. Links: `SM80_NVLINK_BW` and its kin in
NCCL's own model of a machine (NVIDIA/nccl 2.27, src/graph/topo.h), times the links of a device; Infinity Fabric at four
fifths of its data sheet, as NCCL has it for NVLink.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunewright.errors import ConfigError, closest

GB, GIB, TERA = 1e9, 2**30, 1e12
# bytes/s in one direction of 16 lanes, and of the way between two processors of that time (nccl, src/graph/topo.h:
# PCI_BW and its multiples; BDW_QPI_BW, SKL_QPI_BW, SRP_QPI_BW). All ranks of more than four cards share the latter.
PCIE = {3: (12 * GB, 6 * GB), 4: (24 * GB, 10 * GB), 5: (48 * GB, 22 * GB)}
ONE_SOCKET = 4  # cards that usually hang on one processor
# Words of a driver's name for a device that tell nothing of it.
SAID_BY_ALL = {"NVIDIA", "AMD", "TESLA", "GEFORCE", "INSTINCT", "RADEON", "GRAPHICS", "GPU"}
SAID_BY_ALL |= {"SXM", "SXM2", "SXM3", "SXM4", "SXM5", "OAM"}  # as the table has them, where it says nothing else


@dataclass(frozen=True)
class Device:
    """One device as a rank sees it: of an MI250, which has two halves, a half."""

    name: str
    kind: str  # "cuda" or "rocm"
    memory: float  # GiB
    rate: float  # FLOP/s
    bandwidth: float  # bytes/s of its own memory
    fabric: float | None  # bytes/s in one direction to all devices of its host together; None: PCIe alone
    pcie: int  # generation

    def link(self, devices: int) -> float:
        """Return the bytes/s that each of so many devices of a host sends while all do."""
        return self.fabric or PCIE[self.pcie][devices > ONE_SOCKET]

    @property
    def host_link(self) -> float:
        """Bytes/s between the device and the host's memory."""
        return PCIE[self.pcie][0]


def _nvidia(name: str, memory: float, rate: float, bandwidth: float, fabric: float | None, pcie: int) -> Device:
    return Device(name, "cuda", memory, rate * TERA, bandwidth * GB, fabric and fabric * GB, pcie)


def _amd(name: str, memory: float, rate: float, bandwidth: float, fabric: float) -> Device:
    return Device(name, "rocm", memory, rate * TERA, bandwidth * GB, fabric * GB, 5 if "3" in name[:3] else 4)


# Of a name that fits several, the first is meant.
DEVICES = (
    _nvidia("GB300", 277, 2500, 8000, 722, 5),
    _nvidia("GB200", 184, 2500, 8000, 722, 5),
    _nvidia("B300", 268, 2250, 8000, 722, 5),
    _nvidia("B200", 178, 2250, 8000, 722, 5),
    _nvidia("H200", 140, 989, 4800, 371, 5),
    _nvidia("H200-NVL", 140, 835, 4800, None, 5),
    _nvidia("H100-80GB", 79.6, 989, 3350, 371, 5),
    _nvidia("H100-NVL", 93.6, 835, 3900, None, 5),
    _nvidia("H100-PCIE", 79.6, 756, 2000, None, 5),
    _nvidia("GH200", 95, 989, 4000, None, 5),
    _nvidia("H800-80GB", 79.6, 989, 3350, 165, 5),
    _nvidia("H20", 95.6, 148, 4000, 371, 5),
    _nvidia("A100-80GB", 79.3, 312, 2000, 240, 4),
    _nvidia("A100-80GB-PCIE", 79.3, 312, 1935, None, 4),
    _nvidia("A100-40GB", 39.6, 312, 1555, 240, 4),
    _nvidia("A100-40GB-PCIE", 39.6, 312, 1555, None, 4),
    _nvidia("A800-80GB", 79.3, 312, 2000, 160, 4),
    _nvidia("L40S", 44.5, 362, 864, None, 4),
    _nvidia("L40", 44.5, 181, 864, None, 4),
    _nvidia("L20", 44.5, 119.5, 864, None, 4),
    _nvidia("L4", 22.0, 121, 300, None, 4),
    _nvidia("A40", 44.5, 149.7, 696, None, 4),
    _nvidia("A30", 23.6, 165, 933, None, 4),
    _nvidia("A10G", 22.1, 70, 600, None, 4),
    _nvidia("A10", 22.1, 125, 600, None, 4),
    _nvidia("RTX-PRO-6000", 95.0, 500, 1792, None, 5),
    _nvidia("RTX-6000-ADA", 47.5, 364.2, 960, None, 4),
    _nvidia("RTX-A6000", 47.5, 154.85, 768, None, 4),
    _nvidia("RTX-5090", 31.4, 209.5, 1792, None, 5),
    _nvidia("RTX-5080", 15.5, 112.6, 960, None, 5),
    _nvidia("RTX-4090", 23.5, 165.2, 1008, None, 4),
    _nvidia("RTX-4080", 15.7, 97.5, 717, None, 4),
    _nvidia("RTX-4070", 11.7, 58.3, 504, None, 4),
    _nvidia("RTX-4070-TI", 11.7, 80.2, 504, None, 4),
    _nvidia("RTX-4060", 7.6, 30.2, 272, None, 4),
    _nvidia("RTX-4060-TI", 15.6, 44.1, 288, None, 4),
    _nvidia("RTX-3090", 23.7, 71.2, 936, None, 4),
    _nvidia("RTX-3080", 9.8, 59.5, 760, None, 4),
    _nvidia("RTX-3060", 11.6, 25.5, 360, None, 4),
    _nvidia("V100-32GB", 31.7, 125, 900, 120, 3),
    _nvidia("V100-16GB", 15.8, 125, 900, 120, 3),
    _nvidia("V100-PCIE-32GB", 31.7, 112, 900, None, 3),
    _nvidia("T4", 14.6, 65, 320, None, 3),
    _amd("MI355X", 287, 2500, 8000, 430),
    _amd("MI325X", 255, 1300, 6000, 358),
    _amd("MI300X", 191, 1300, 5300, 358),
    _amd("MI250X", 64, 191.5, 1638, 80),
    _amd("MI250", 64, 181, 1638, 80),
    _amd("MI210", 64, 181, 1638, 120),
)


def find_device(name: str) -> Device | None:
    """Return the device that a driver or a person calls so: "NVIDIA A100-SXM4-80GB", "h100", "4090"."""
    words = _words(name) - SAID_BY_ALL
    if not words or "LAPTOP" in words or "MIG" in words:  # which are less than what they are called after
        return None
    within = [device for device in DEVICES if _words(device.name) <= words]
    if within:
        return max(within, key=lambda device: len(_words(device.name)))
    return next((device for device in DEVICES if words <= _words(device.name)), None)


def called(name: str) -> str:
    """Return the table's name for a device, or the driver's own where the table has none."""
    found = find_device(name)
    return found.name if found else name


def known_device(name: str) -> Device:
    """Return the device that a person calls so.

    Raises:
        ConfigError: the table has none of this name.
    """
    found = find_device(name)
    if found is None:
        known = [device.name for device in DEVICES]
        match = closest(name.upper(), known)
        raise ConfigError(
            f"`--devices` names '{name}', which is not known.{f' Did you mean {match}?' if match else ''} Known are "
            f"{', '.join(known)}."
        )
    return found


def _words(name: str) -> set[str]:
    return set(re.findall(r"[A-Z0-9]+", re.sub(r"RTX(?=\d)", "RTX ", name.upper())))
