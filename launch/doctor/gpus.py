"""GPUs as their drivers tell of them, without torch: NVIDIA's by NVML, AMD's by the files of the kernel's driver.

NVML comes with the driver, its Python side is nvidia-ml-py; written from the sources of version 13.615.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import psutil

from tunewright.findings import Finding, fix, note, of_each, ok
from tunewright.text import listed, size

GROUP = "GPUs"
FULL, CROWDED = 0.8, 0.1  # shares of a GPU's memory that others have
WATCH_SECONDS = 20.0  # that they are watched at work; trying them takes a few
LOOK_SECONDS = 0.1  # between two looks at what slows a GPU down
XGMI = 11  # HSA_IOLINK_TYPE_XGMI of the kernel's kfd
AMD = "0x1002"

# Bits of nvmlDeviceGetCurrentClocksEventReasons: what holds clocks down, and what to do about it. Left out are idle,
# and limits that a GPU at work always comes to.
HOT = "Look at fans, dust, and the temperature of the room; move work elsewhere until it is cool."
SLOWED = (
    (0x08, "the hardware slows it down", "Look at power and cooling: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"),
    (0x20, "it is too hot, the driver slows it down", HOT),
    (0x40, "it is too hot, the hardware slows it down", HOT),
    (0x80, "the power supply slows it down (power brake)", "Look at the power supply and its cables."),
)
SET = (
    (0x02, "its clocks are set lower by hand", "nvidia-smi -rac, or -rgc, gives it back its own."),
    (0x10, "its clocks follow those of the slowest GPU (sync boost)", "Take it out of its sync boost group."),
)


@dataclass(frozen=True)
class Gpu:
    """What a driver tells of one GPU; None where it does not tell."""

    index: int
    name: str
    memory: int  # bytes; 0 where it is not told
    used: int
    uuid: str = ""
    holders: tuple[str, ...] = ()  # who has memory there: "python (4711, 1.50 GiB)"
    ecc: bool | None = None
    uncorrected: int = 0  # errors of its memory since the driver was loaded
    replaced: str | None = None  # what a damaged memory needs: "a reset" or "to be replaced"
    reasons: int = 0  # bits of what holds its clocks down
    width: tuple[int, int] | None = None  # lanes of PCIe: now, at most
    exclusive: bool = False  # compute mode: one process, or none
    split: bool = False  # MIG
    links: dict[int, str] = field(default_factory=dict)  # to the GPU of that index: "NVLink", "PCIe", "other socket"


@dataclass(frozen=True)
class Seen:
    """All GPUs of a machine, and the driver's own version."""

    gpus: list[Gpu]
    driver: str = ""
    cuda: tuple[int, int] | None = None  # the newest CUDA that an NVIDIA driver can run


def see() -> Seen:
    """Return the GPUs that a driver of this machine knows, none where there is no driver."""
    amd = see_amd()
    if amd.gpus:
        return amd
    with _nvml() as nvml:
        return see_nvidia(nvml) if nvml else Seen([])


@contextmanager
def _nvml() -> Iterator[Any]:
    """Give NVIDIA's library, opened, or None where it or its driver is not there."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def see_nvidia(nvml: Any) -> Seen:
    """Ask NVML, opened as `pynvml`; what a GPU or an older driver does not tell is left out."""

    def told(question: str, *given: Any) -> Any:
        with suppress(nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            return getattr(nvml, question)(*given)
        return None

    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    gpus = []
    for index, handle in enumerate(handles):
        memory = told("nvmlDeviceGetMemoryInfo", handle)  # not of one that shares it with the processor
        rows = told("nvmlDeviceGetRemappedRows", handle) or (0, 0, 0, 0)  # corrected, uncorrected, pending, failed
        ecc, mig = told("nvmlDeviceGetEccMode", handle), told("nvmlDeviceGetMigMode", handle)
        lanes = (told("nvmlDeviceGetCurrPcieLinkWidth", handle), told("nvmlDeviceGetMaxPcieLinkWidth", handle))
        errors = (handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        default = nvml.NVML_COMPUTEMODE_DEFAULT
        gpus.append(
            Gpu(
                index,
                nvml.nvmlDeviceGetName(handle),
                memory.total if memory else 0,
                memory.used if memory else 0,
                told("nvmlDeviceGetUUID", handle) or "",
                tuple(
                    _holder(one.pid, one.usedGpuMemory)
                    for one in told("nvmlDeviceGetComputeRunningProcesses", handle) or ()
                ),
                bool(ecc[0]) if ecc else None,
                told("nvmlDeviceGetTotalEccErrors", *errors) or 0,
                "to be replaced" if rows[3] else "a reset" if rows[2] else None,
                told("nvmlDeviceGetCurrentClocksEventReasons", handle) or 0,
                lanes if None not in lanes else None,
                (told("nvmlDeviceGetComputeMode", handle) or default) != default,
                bool(mig and mig[0]),
                {other: _link(nvml, told, handle, handles[other]) for other in range(len(handles)) if other != index},
            )
        )
    version = told("nvmlSystemGetCudaDriverVersion_v2") or 0  # 12080 is 12.8
    cuda = (version // 1000, version % 1000 // 10) if version else None
    return Seen(gpus, told("nvmlSystemGetDriverVersion") or "", cuda)


def _link(nvml: Any, told: Callable[..., Any], one: Any, other: Any) -> str:
    if told("nvmlDeviceGetP2PStatus", one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
        return "NVLink"
    far = told("nvmlDeviceGetTopologyCommonAncestor", one, other) == nvml.NVML_TOPOLOGY_SYSTEM
    return "PCIe, by the other processor" if far else "PCIe"


def _holder(pid: int, used: int | None) -> str:
    name = "another container's process"
    with suppress(psutil.Error):
        name = psutil.Process(pid).name()
    return f"{name} ({pid}{f', {size(used)}' if used else ''})"


def slowed_down(gpus: list[Gpu], until: Event) -> list[Gpu]:
    """Return NVIDIA's GPUs with all that held their clocks down until `until`, while they were at work."""
    bits, deadline = {gpu.index: gpu.reasons for gpu in gpus}, time.monotonic() + WATCH_SECONDS
    with _nvml() as nvml:
        while nvml and not until.wait(LOOK_SECONDS) and time.monotonic() < deadline:
            for index in bits:
                with suppress(nvml.NVMLError):
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                    bits[index] |= nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return [replace(gpu, reasons=bits[gpu.index]) for gpu in gpus]


def see_amd(root: Path = Path("/sys")) -> Seen:
    """Read what amdgpu and kfd tell below /sys."""
    cards = sorted((root / "class/drm").glob("card[0-9]*/device"), key=lambda card: int(card.parent.name[4:]))
    cards = [card for card in cards if _text(card / "vendor") == AMD and _text(card / "mem_info_vram_total")]
    topology = root / "class/kfd/kfd/topology/nodes"
    nodes: dict[int, int] = {}  # {number of the node: index of the GPU}
    for node in sorted(topology.glob("[0-9]*"), key=lambda node: int(node.name)):
        if _text(node / "gpu_id") not in ("", "0"):  # 0 is a processor
            nodes[int(node.name)] = len(nodes)
    links: dict[int, dict[int, str]] = {index: {} for index in nodes.values()}
    for number, index in nodes.items():
        for file in (topology / str(number)).glob("*_links/*/properties"):
            told = dict(line.split(maxsplit=1) for line in _text(file).splitlines() if " " in line)
            other = nodes.get(int(told.get("node_to", -1)))
            if other is not None and other != index:
                links[index][other] = "xGMI" if int(told.get("type", 0)) == XGMI else "PCIe"
    gpus = []
    for index, card in enumerate(cards):
        errors = dict(line.split(": ") for line in _text(card / "ras/umc_err_count").splitlines() if ": " in line)
        gpus.append(
            Gpu(
                index,
                _text(card / "product_name") or f"AMD GPU {_text(card / 'device')}",
                int(_text(card / "mem_info_vram_total")),
                int(_text(card / "mem_info_vram_used") or 0),
                holders=_kfd_holders(root, topology, nodes, index),
                uncorrected=int(errors.get("ue", 0)),
                width=_lanes(card),
                links=links.get(index, {}),
            )
        )
    return Seen(gpus, _text(root / "module/amdgpu/version"))


def _kfd_holders(root: Path, topology: Path, nodes: dict[int, int], index: int) -> tuple[str, ...]:
    number = next((node for node, one in nodes.items() if one == index), None)
    gpu_id = _text(topology / str(number) / "gpu_id")
    files = [(file, int(_text(file) or 0)) for file in (root / "class/kfd/kfd/proc").glob(f"*/vram_{gpu_id}")]
    return tuple(_holder(int(file.parent.name), used) for file, used in files if used)


def _lanes(card: Path) -> tuple[int, int] | None:
    now, most = _text(card / "current_link_width"), _text(card / "max_link_width")
    return (int(now), int(most)) if now.isdecimal() and most.isdecimal() else None


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8").strip()
    return ""


def judge(seen: Seen, visible: set[int] | None = None) -> list[Finding]:
    """Say what is wrong with GPUs; of those that are not `visible` nothing, since nobody trains on them."""
    chosen = [gpu for gpu in seen.gpus if visible is None or gpu.index in visible]
    return [*of_each([(f"GPU {gpu.index}", list(_judge_one(gpu))) for gpu in chosen]), *_judge_links(chosen)]


def _judge_one(gpu: Gpu) -> Iterator[Finding]:
    free = gpu.memory - gpu.used
    ecc = {True: ", ECC on", False: ", ECC off", None: ""}[gpu.ecc]
    room = f"{size(free)} of {size(gpu.memory)} free" if gpu.memory else "its driver does not tell its memory"
    told = f"{gpu.name}, {room}{ecc}"
    taken = f"{told}; taken by {listed(gpu.holders) or 'nobody that is seen from here'}"
    if gpu.used > FULL * gpu.memory:
        yield fix(GROUP, taken, "End these processes, or hide this GPU (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES).")
    elif gpu.used > CROWDED * gpu.memory:
        yield note(GROUP, taken, "Who shares a GPU shares its memory and its time.")
    else:
        yield ok(GROUP, told)
    for bit, what, do in SLOWED:
        if gpu.reasons & bit:
            yield fix(GROUP, f"{what}.", do)
    for bit, what, do in SET:
        if gpu.reasons & bit:
            yield note(GROUP, f"{what}.", do)
    if gpu.replaced == "to be replaced":
        yield fix(GROUP, "its memory has no rows left for damaged ones.", "Have the card replaced.")
    elif gpu.replaced:
        yield fix(GROUP, "damaged rows of its memory wait to be replaced.", "Reset it: nvidia-smi --gpu-reset")
    if gpu.uncorrected:
        yield fix(
            GROUP,
            f"errors of its memory that ECC could not correct: {gpu.uncorrected}",
            "Reset it and look again; if they come back, have the card replaced: wrong bits spoil a training.",
        )
    if gpu.width and gpu.width[0] < gpu.width[1]:
        yield note(
            GROUP,
            f"{gpu.width[0]} of {gpu.width[1]} PCIe lanes.",
            "Seat the card anew or look at its slot: what goes through the host is as much slower (offload, ZeRO-3).",
        )
    if gpu.exclusive:
        yield note(GROUP, "its compute mode lets one process in, or none.", "nvidia-smi -c DEFAULT (as root)")
    if gpu.split:
        yield note(GROUP, "split by MIG.", "Each rank sees one part; parts do not talk to each other.")


def _judge_links(gpus: list[Gpu]) -> Iterator[Finding]:
    kinds: dict[str, list[str]] = {}
    mine = {gpu.index for gpu in gpus}
    for gpu in gpus:
        for other, kind in gpu.links.items():
            if other in mine and gpu.index < other:
                kinds.setdefault(kind, []).append(f"{gpu.index}-{other}")
    if not kinds:
        return
    told = "; ".join(f"{kind}: {listed(pairs)}" for kind, pairs in sorted(kinds.items()))
    if any(kind.startswith("PCIe") for kind in kinds):
        yield note(
            GROUP,
            f"between GPUs, {told}",
            "Over PCIe, prefer strategy=ddp or zero2: ZeRO-3 sends all weights at every step (`tunewright plan`).",
        )
    else:
        yield ok(GROUP, f"between GPUs, {told}")


def judge_driver(
    seen: Seen, kind: str, built: str | None, available: bool, problem: str | None = None
) -> list[Finding]:
    """Compare the driver with what torch was built for.

    Args:
        kind: "cuda", "rocm" or "cpu": what torch was built for.
        built: that version, "13.0".
        available: torch can use a GPU.
        problem: what torch says where it cannot.
    """
    if not seen.gpus:
        return []
    cards = f"{len(seen.gpus)} GPU{'' if len(seen.gpus) == 1 else 's'} with driver {seen.driver}"
    if kind == "cpu":
        return [
            fix(GROUP, f"There are {cards}, and torch is built for CPUs.", "Install torch's build for CUDA or ROCm.")
        ]
    if seen.cuda and built and kind == "cuda":
        wanted = tuple(int(part) for part in built.split(".")[:2])
        here = ".".join(map(str, seen.cuda))
        # Within a major version, an older driver runs what a newer toolkit has built.
        if wanted[0] > seen.cuda[0]:
            return [
                fix(
                    GROUP,
                    f"Driver {seen.driver} runs CUDA up to {here}; torch is built for {built}.",
                    f"Update the driver, or install a torch that is built for CUDA {seen.cuda[0]}.",
                )
            ]
        cards += f" (CUDA {here})"
    if not available:
        return [
            fix(
                GROUP,
                f"There are {cards}, and torch can use none{f': {problem}' if problem else ''}.",
                "Give the container its devices (docker run --gpus all), unset CUDA_VISIBLE_DEVICES, or reboot where "
                "the driver was updated.",
            )
        ]
    return [ok(GROUP, f"{cards}; torch is built for {kind.upper()} {built}")]


def visible(seen: Seen) -> set[int] | None:
    """Return the indices that CUDA_VISIBLE_DEVICES leaves, or None for all; drivers count by PCI address."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    found = set()
    for item in (part.strip() for part in value.split(",")):
        match = [gpu.index for gpu in seen.gpus if item and (item == str(gpu.index) or gpu.uuid.startswith(item))]
        if not match:
            break  # as CUDA reads it: what follows is hidden too
        found.add(match[0])
    return found
