"""Which devices a run can use, told without importing torch: configuration errors must not wait for it."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Devices:
    """The devices of this machine that the installed torch can use and that the environment leaves visible."""

    kind: str  # "cuda", "rocm" or "cpu"
    count: int  # GPUs; 0 on a CPU machine
    cores: int

    @property
    def gpu(self) -> bool:
        return self.kind != "cpu"


def find_devices() -> Devices:
    """Count visible GPUs from the device files of the driver that torch was built for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    build = _torch_build()
    if build == "cuda":
        count = _visible(_count(Path("/dev"), r"nvidia\d+"), ("CUDA_VISIBLE_DEVICES",))
    elif build == "rocm":
        count = _visible(_count_amd(), ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"))
    else:
        count = 0
    return Devices(build if count else "cpu", count, cores)


def _torch_build() -> str:
    """Return "cuda", "rocm" or "cpu": what the installed torch was built for, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return "cpu"
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    for name, key in (("cuda", "cuda"), ("rocm", "hip")):
        if re.search(rf"^{key}\b[^=]*=\s*['\"]", text, flags=re.MULTILINE):
            return name
    return "cpu"


def _count(folder: Path, pattern: str) -> int:
    return sum(1 for path in folder.iterdir() if re.fullmatch(pattern, path.name))


def _count_amd(nodes: Path = Path("/sys/class/kfd/kfd/topology/nodes")) -> int:
    if not nodes.is_dir():
        return 0
    ids = [(node / "gpu_id").read_text().strip() for node in nodes.iterdir() if (node / "gpu_id").exists()]
    return sum(1 for gpu_id in ids if gpu_id not in ("", "0"))  # 0 is a CPU node


def _visible(count: int, variables: tuple[str, ...]) -> int:
    """Apply CUDA_VISIBLE_DEVICES and its kin: a list of indices or ids; an empty value or -1 hides the rest."""
    for variable in variables:
        value = os.environ.get(variable)
        if value is not None:
            listed = [item.strip() for item in value.split(",")]
            stop = next((i for i, item in enumerate(listed) if item in ("", "-1")), len(listed))
            count = min(count, stop)
    return count
