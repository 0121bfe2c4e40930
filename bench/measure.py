"""What the benches measure with: memory of a process and its children, time of its lines, the machine."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CORES = len(os.sched_getaffinity(0))
MIB = 2**20


@dataclass
class Watched:
    """A finished command: when each line of interest came, seconds after its start, and the most memory it held."""

    exit_code: int
    wall_s: float
    marks: list[float] = field(default_factory=list)
    peak_rss_mib: float = 0.0
    peak_private_mib: float = 0.0
    others_cpu_s: float = 0.0
    steal_s: float = 0.0  # that the host of a virtual machine gave to others
    log: str = ""


def watch(
    argv: list[str], folder: Path, env: dict[str, str], is_mark: Callable[[str], bool], timeout: float = 1800
) -> Watched:
    """Run to the end and note the times of the lines that `is_mark` picks: one clock for every contender."""
    marks: list[float] = []
    stderr = folder / "stderr.txt"
    with stderr.open("w") as errors:
        busy, stolen, started = busy_seconds(), stolen_seconds(), time.perf_counter()
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env={**env, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that ranks end with what started them
        )
        memory = Memory(process.pid)
        timer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        lines = []
        assert process.stdout
        try:
            for line in process.stdout:
                if is_mark(line):
                    marks.append(time.perf_counter() - started)
                lines.append(line)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    memory.stop()
    cpu = used.ru_utime + used.ru_stime
    log = "".join(lines) + stderr.read_text(errors="replace")[-6000:]
    others = max(busy_seconds() - busy - cpu, 0.0)
    rss = max(memory.rss, used.ru_maxrss * 1024)
    steal = stolen_seconds() - stolen
    return Watched(process.returncode, wall, marks, rss / MIB, memory.private / MIB, others, steal, log)


def busy_seconds() -> float:
    """Return seconds that all cores have spent since the machine started, on anything but this process."""
    times = psutil.cpu_times()
    idle = times.idle + times.iowait + times.guest + times.guest_nice  # guest time is part of user time
    return float(sum(times) - idle - times.steal - time.process_time())


def stolen_seconds() -> float:
    """Return seconds of all cores that the host of this virtual machine gave to others while something waited here."""
    return float(psutil.cpu_times().steal)


class Memory:
    """The largest sum over a process and its descendants, looked at from a thread, up to ten times a second."""

    def __init__(self, pid: int) -> None:
        self.rss = self.private = 0
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = 0.1
        while not self._stopped.wait(pause):
            started = time.thread_time()
            try:
                pids = [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]
            except psutil.NoSuchProcess:
                return
            sizes = [_memory_of(pid) for pid in pids]
            self.rss = max(self.rss, sum(rss for rss, _ in sizes))
            self.private = max(self.private, sum(private for _, private in sizes))
            # The kernel walks every page for it: take no more than 2 % of a core away from what is measured.
            pause = max(0.1, 50 * (time.thread_time() - started))


def _memory_of(pid: int) -> tuple[int, int]:
    """Return bytes resident, and those of them that no file backs; pages shared after a fork count by their share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0  # it has just ended
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    return sizes.get("Rss", 0), sizes.get("Pss_Anon", 0)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": CORES,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "load_before": os.getloadavg(),
    }


def versions(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Return Python's and the packages' versions in the environment of an interpreter."""
    script = "import json, platform, sys; from importlib.metadata import version; "
    script += "print(json.dumps({'python': platform.python_version(), **{p: version(p) for p in sys.argv[1:]}}))"
    return dict(json.loads(subprocess.check_output([python, "-c", script, *packages])))
