"""The devices that a run is planned for: those here, or others that a person names.

Nothing here imports torch: GPUs are asked by the tool that comes with their driver, or by the files of it.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from omegaconf import DictConfig

from tunewright.config.schema import Dtype
from tunewright.errors import ConfigError
from tunewright.plan.device_table import GB, GIB, PCIE, Device, called, find_device, known_device
from tunewright.plan.devices import Devices
from tunewright.plan.rules import world_size

NETWORK = 12.5 * GB  # bytes/s between hosts where nobody says it: 100 Gbit/s
# bytes/s that a rank on a CPU sends to another over gloo, and of its memory, where nobody measured either: a core
# copies about so fast.
GLOO, HOST_MEMORY = 1.5 * GB, 20 * GB
ASK_SECONDS = 20.0  # for a driver's tool to answer
CGROUP = Path("/sys/fs/cgroup")


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
    bandwidth: float | None = None  # bytes/s of a rank's own memory
    host_link: float | None = None  # bytes/s between a rank's device and the host's memory; None: it is the same
    host_memory: float | None = None  # bytes that a host has free beside its GPUs, where that is known

    @property
    def hosts(self) -> int:
        return -(-self.count // self.node)

    def of(self, ranks: int) -> Machine:
        """Return so many of its devices; so many CPU ranks share what one of them would have."""
        if ranks == self.count:
            return self
        node = min(self.node, ranks) if self.kind != "cpu" else ranks
        if self.kind != "cpu":
            listed = None if self.here else find_device(self.name)
            link = listed.link(node) if listed else self.link
            return replace(self, count=ranks, node=node, link=link, network=self.network if ranks > node else None)
        share = self.count / ranks
        return replace(
            self,
            count=ranks,
            node=ranks,
            memory=int(self.memory * share),
            rate=self.rate and self.rate * share,
            bandwidth=self.bandwidth and self.bandwidth * share,
        )


def parse_machine(text: str) -> Machine:
    """Return the machine that a person means by "8xH100-80GB", "4090", "2x8xH100@400Gb" (hosts, devices, network).

    Raises:
        ConfigError: it is written otherwise, or names a device that is not in the table.
    """
    match = re.fullmatch(
        r"(?:(\d+)[xX*])??(?:(\d+)[xX*])?((?!\d+[xX*])[^@]+?)(?:@(\d+(?:\.\d+)?)(G[bB])(?:/s)?)?",
        re.sub(r"(?<=\d)\s*([xX*])\s+|\s*@\s*", lambda sign: sign[0].strip(), text.strip()),
    )
    if match is None:
        raise ConfigError(
            f"`--devices` is '{text}': write a number and a device, such as 8xH100-80GB, or of several hosts "
            f"2x8xH100-80GB@400Gb."
        )
    hosts, count, name, rate, unit = match.groups()
    device, many, each = known_device(name), int(hosts or 1), int(count or 1)
    if many < 1 or each < 1:
        raise ConfigError(f"`--devices` is '{text}': write whole numbers from 1.")
    network = float(rate) * GB / (8 if unit == "Gb" else 1) if rate else NETWORK
    return Machine(
        kind=device.kind,
        name=device.name,
        count=many * each,
        memory=int(device.memory * GIB),
        rate=device.rate,
        link=device.link(each),
        node=each,
        network=network if many > 1 else None,
        here=False,
        bandwidth=device.bandwidth,
        host_link=device.host_link,
    )


def machine_here(devices: Devices, config: DictConfig) -> Machine:
    """Return this machine's devices that a run may use, and what they have free now.

    Of GPUs whose driver tells nothing, memory is 0 and rates are not known.
    """
    if devices.gpu:
        return _gpus(devices)
    ranks = world_size(config, devices)
    return Machine(
        kind="cpu",
        name=processor(),
        count=ranks,
        memory=int(free_memory() / ranks),
        rate=None,  # of what runs measured: `reached.py`
        link=GLOO,
        node=ranks,
        network=None,
        here=True,
        bandwidth=HOST_MEMORY / ranks,
    )


def processor() -> str:
    """Return the name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def computes_in(config: DictConfig, kind: str) -> str:
    """Return the format of weights and computation, as the trainer chooses it for a kind of device."""
    asked = config.model.dtype
    if asked is Dtype.auto:
        return "float32" if kind == "cpu" else "bfloat16"
    return str(asked.value)


def free_memory() -> float:
    """Return the bytes of host memory that can be had: what is free, and what limits of this process leave of it."""
    free = [float(psutil.virtual_memory().available)]
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[0].rpartition(":")[2].lstrip("/")
        for folder in (CGROUP / group, CGROUP):  # in a container its own group is the root
            most, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            if most != "max":
                free.append(float(most) - float(used))
                break
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        free.append(float(space))
    return max(min(free), 0.0)


def _gpus(devices: Devices) -> Machine:
    name, memory, linked = _ask_nvidia() if devices.kind == "cuda" else _ask_amd()
    listed = find_device(name)
    return Machine(
        kind=devices.kind,
        name=called(name),
        count=devices.count,
        memory=memory,
        rate=listed.rate if listed else None,
        link=_link(listed, devices.count, linked),
        node=devices.count,
        network=None,
        here=True,
        bandwidth=listed.bandwidth if listed else None,
        host_link=listed.host_link if listed else PCIE[4][0],
        host_memory=free_memory(),
    )


def _link(listed: Device | None, count: int, linked: bool) -> float:
    """Return what a device sends: of NVLink what the table says, where the driver tells of any, else that of PCIe."""
    if listed is None:
        return PCIE[4][count > 4]
    return listed.link(count) if linked else replace(listed, fabric=None).link(count)


def _ask_nvidia() -> tuple[str, int, bool]:
    """Return (name, bytes free on the fullest, whether there is NVLink) of the visible NVIDIA GPUs."""
    visible = [item.strip() for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]
    chosen = ["-i", ",".join(visible)] if visible else []
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    told = _answer([*query, *chosen]) or _answer(query)
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    rows = [row for row in rows if row[1].strip().isdecimal()]
    if not rows:
        return "GPU", 0, False
    linked = len(rows) > 1 and "GB/s" in _answer(["nvidia-smi", "nvlink", "--status"])
    return rows[0][0].strip(), min(int(free) for _, free in rows) * 2**20, linked


def _ask_amd(cards: Path = Path("/sys/class/drm")) -> tuple[str, int, bool]:
    """Return (name, bytes free on the fullest, whether they are linked) of AMD GPUs, from their driver's files."""
    free, names = [], []
    for card in sorted(cards.glob("card[0-9]*")):
        with suppress(OSError, ValueError):
            total, used = (int((card / "device" / f"mem_info_vram_{what}").read_text()) for what in ("total", "used"))
            free.append(total - used)
            names.append((card / "device" / "product_name").read_text().strip())
    return (names[0] if names else "GPU"), min(free, default=0), True


def _answer(command: list[str]) -> str:
    """Return what a driver's tool prints, nothing where it is not there or fails."""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS)
        return done.stdout if done.returncode == 0 else ""
    return ""
