"""Ranks, started as training starts them: whether all of them meet, how fast they sum, and who is late or absent.

Each writes what it has done into a folder (trainer/rank_check.py). A rank is named when its process has ended or is
stopped, when others have waited for it for BEHIND seconds, and with all others when none has done anything for SILENT
seconds.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml
from omegaconf import DictConfig

from tunewright.findings import Finding, fix, note, ok
from tunewright.launch.children import OUT_OF_MEMORY, kill, start
from tunewright.launch.command import accelerate_config, accelerate_launch, environment_of
from tunewright.plan.device_table import find_device
from tunewright.plan.devices import Devices
from tunewright.plan.machine import free_memory
from tunewright.text import listed, size
from tunewright.trainer.rank_check import STAGES

GROUP = "ranks"
MODULE = "tunewright.trainer.rank_check"
# Seconds. A rank imports torch for two to twenty; together they name a rank within a minute.
BEHIND, SILENT, STOPPED = 20.0, 35.0, 4.0
LATE = 5.0  # seconds between the first and the last to come that are worth a word
SLOW_LINK = 0.4  # of what such GPUs send to each other
SLOWER = 0.75  # of the median rank's rate
LOOK_SECONDS = 0.2
RANK_BYTES = 400 * 2**20  # of memory that a rank has for itself, once it has imported torch
TAIL_LINES = 12
# torchrun's report of the failure that it saw first
ROOT_CAUSE = re.compile(r"Root Cause.*?\brank\s*:\s*(\d+).*?\bexitcode\s*:\s*(-?\d+)", re.DOTALL)
DOING = {  # what a rank is at, that has done the stage before
    "started": "has not begun",
    "imported": "imports torch",
    "met": "has not met the others",
    "reduced": "is not through the first all-reduce",
    "measured": "is not through the all-reduces",
}


@dataclass
class Rank:
    """What is known of one rank."""

    number: int
    lines: list[dict[str, Any]]
    pid: int | None = None
    stopped_since: float | None = None

    @property
    def done(self) -> int:
        """How many of the stages it has done."""
        return len([line for line in self.lines if line["stage"] in STAGES])

    @property
    def failed(self) -> str | None:
        return next((line["error"] for line in self.lines if line["stage"] == "failed"), None)

    def line(self, stage: str) -> dict[str, Any]:
        return next(line for line in self.lines if line["stage"] == stage)

    def when(self, stage: str) -> float:
        return float(self.line(stage)["time"])

    def process(self) -> psutil.Process | None:
        """Return its process while it lives."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid) if self.pid else None
            return process if process and process.status() != psutil.STATUS_ZOMBIE else None
        return None


def look(config: DictConfig, ranks: int, devices: Devices) -> list[Finding]:
    """Start so many ranks on this machine, and tell of them.

    Args:
        config: of a strategy whose ranks are plain ones, `ddp`.
    """
    free, needed = free_memory(), ranks * RANK_BYTES
    if needed > free:  # all that runs here would be in danger
        told = (
            f"{ranks:,} ranks were not started: their libraries alone take about {size(needed)}, {size(free)} are free."
        )
        return [fix(GROUP, told, "Ask for fewer, as many as there are GPUs or cores.")]
    with TemporaryDirectory(prefix="tunewright-ranks-") as scratch:
        folder = Path(scratch)
        settings = folder / "accelerate.yaml"
        settings.write_text(yaml.safe_dump(accelerate_config(config, ranks), sort_keys=False), encoding="utf-8")
        command = [*accelerate_launch(), "--config_file", str(settings), "-m", MODULE, str(folder)]
        env = environment_of(config, ranks, devices)
        with (folder / "launch.log").open("w") as log:
            process = start(command, env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            return list(_watch(process, folder, ranks))
        finally:
            kill(process)
            process.wait()


def _watch(process: subprocess.Popen[str], folder: Path, count: int) -> Iterator[Finding]:
    """Wait until all are through, or one is known not to be."""
    ranks = [Rank(number, []) for number in range(count)]
    begun = time.monotonic()
    moved = [begun] * count  # when each was last seen to do a stage
    while True:
        ended = process.poll() is not None  # before the files are read: what it wrote is in them
        now = time.monotonic()
        for rank in ranks:
            before = rank.done
            rank.lines = _read(folder / f"rank{rank.number}.jsonl")
            if rank.done > before:
                moved[rank.number] = now
        if not ended:
            _find(process, ranks)
        if all(rank.done == len(STAGES) for rank in ranks):
            yield from _figures(ranks)
            return
        if ended or any(rank.failed for rank in ranks):
            yield _failed(ranks, folder)
            return
        behind = _behind(ranks, moved, now)
        if behind:
            yield _absent(behind, ranks, folder, now - begun)
            return
        time.sleep(LOOK_SECONDS)


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines that a rank has written."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def _find(process: subprocess.Popen[str], ranks: list[Rank]) -> None:
    """Find the processes of the ranks, which are below accelerate's, also of those that have not begun to write."""
    if all(rank.pid for rank in ranks):
        return
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                number = child.environ().get("RANK", "")
                if number.isdecimal() and MODULE in child.cmdline():
                    ranks[int(number)].pid = child.pid


def _behind(ranks: list[Rank], moved: list[float], now: float) -> list[Rank]:
    """Return the ranks for which nobody should wait any longer."""
    for rank in ranks:
        process = rank.process()
        stopped = process is not None and process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        rank.stopped_since = (rank.stopped_since or now) if stopped else None
    held = [rank for rank in ranks if rank.stopped_since and now - rank.stopped_since > STOPPED]
    if held:
        return held
    first = max(rank.done for rank in ranks)
    last = [rank for rank in ranks if rank.done < first]
    ahead = [moved[rank.number] for rank in ranks if rank.done == first]
    if last and now - min(ahead) > BEHIND and all(now - moved[rank.number] > BEHIND for rank in last):
        return last
    return ranks if now - max(moved) > SILENT else []


def _absent(behind: list[Rank], ranks: list[Rank], folder: Path, seconds: float) -> Finding:
    told = [_told(rank, folder) for rank in behind]
    if len(behind) == len(ranks) and all(rank.done >= STAGES.index("met") + 1 for rank in behind):
        return fix(
            GROUP,
            f"All {len(ranks)} ranks have met, and none is through what follows after {seconds:.0f} s: {told[0]}.",
            "Their first data does not arrive. On GPUs, try NCCL_P2P_DISABLE=1: if that helps, the machine's IOMMU or "
            "PCIe ACS is in the way. Else see NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME, /dev/shm and the firewall.",
        )
    rest = len(ranks) - len(behind)
    waited = f" {rest} other{'' if rest == 1 else 's'} waited for it." if rest else ""
    stopped = [rank.pid for rank in behind if rank.stopped_since]
    do = "Look at that device, and at what else runs there; NCCL_DEBUG=INFO tells more."
    if stopped:
        do = f"Something has stopped it (a debugger, a scheduler that suspends): kill -CONT {stopped[0]} lets it go on."
    elif any(rank.pid is None for rank in behind):
        do = f"Its launcher says: {_tail(folder / 'launch.log')}"
    return fix(GROUP, f"{listed([f'rank {told_of}' for told_of in told])}, after {seconds:.0f} s.{waited}", do)


def _told(rank: Rank, folder: Path) -> str:
    """Say what a rank is at, and in which call where it can still be asked."""
    doing = DOING[STAGES[rank.done]]
    process = rank.process()
    if process is None:
        return f"{rank.number} {doing}"
    if rank.stopped_since:
        return f"{rank.number} (process {rank.pid}) is stopped and {doing}"
    if not rank.lines:  # it hears nothing yet
        return f"{rank.number} (process {rank.pid}) {doing}"
    file = folder / f"rank{rank.number}.stack"
    with suppress(psutil.NoSuchProcess, OSError):
        process.send_signal(signal.SIGUSR2)  # faulthandler writes where it is, also within C
        time.sleep(0.3)
        frame = next((line.strip() for line in file.read_text().splitlines() if line.startswith("  File")), "")
        return f"{rank.number} (process {rank.pid}) {doing}{f', in {frame}' if frame else ''}"
    return f"{rank.number} (process {rank.pid}) {doing}"


def _failed(ranks: list[Rank], folder: Path) -> Finding:
    failed = [rank for rank in ranks if rank.failed]
    if failed:
        first = min(failed, key=lambda rank: rank.lines[-1]["time"])
        return fix(
            GROUP,
            f"rank {first.number} {DOING[STAGES[first.done]]}: {first.failed}",
            "Training would end there as well; NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL tell more.",
        )
    log = (folder / "launch.log").read_text(encoding="utf-8", errors="replace")
    cause = ROOT_CAUSE.search(log)  # the others were ended after it
    if cause:
        rank, code = ranks[int(cause[1])], int(cause[2])
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended with {code}"
        hint = OUT_OF_MEMORY if -code == signal.SIGKILL else ""
        found = f"rank {rank.number} {DOING[STAGES[rank.done]]} and {how}{hint}."
        return fix(GROUP, found, "Training would end there as well: see dmesg, and what else starts with Python here.")
    missing = [rank for rank in ranks if rank.done < len(STAGES)]
    told = listed([f"rank {rank.number} {DOING[STAGES[rank.done]]}" for rank in missing])
    return fix(GROUP, f"`accelerate launch` has ended: {told}.", f"It says: {_tail(folder / 'launch.log')}")


def _figures(ranks: list[Rank]) -> Iterator[Finding]:
    """Tell of ranks that all came through."""
    figures = [rank.line("measured") for rank in ranks]
    count, gpu = len(ranks), figures[0]["gpu"]
    came = {rank.number: rank.when("imported") for rank in ranks}
    first, last = min(came.values()), max(came, key=lambda number: came[number])
    seconds, moved = max(line["seconds"] for line in figures), figures[0]["bytes"]
    # What each rank sends and receives of it, whatever the algorithm: NCCL's tests call it bus bandwidth.
    bandwidth = moved * 2 * (count - 1) / count / seconds
    met = max(rank.when("met") for rank in ranks) - min(rank.when("started") for rank in ranks)
    told = (
        f"{count} {'GPU' if gpu else 'CPU'} ranks met after {met:.1f} s; an all-reduce of {size(moved)} takes "
        f"{seconds * 1000:,.1f} ms, {size(bandwidth)}/s a rank"
    )
    listed_gpu = find_device(gpu) if gpu else None
    if listed_gpu and bandwidth < SLOW_LINK * listed_gpu.link(count):
        yield note(
            GROUP,
            f"{told}; {size(listed_gpu.link(count))}/s are usual between such GPUs",
            "See how NCCL connects them: NCCL_DEBUG=INFO, nvidia-smi topo -m, and NCCL_* in the environment above.",
        )
    else:
        yield ok(GROUP, told)
    if came[last] - first > LATE:
        yield note(
            GROUP,
            f"Rank {last} came {came[last] - first:.0f} s after the first.",
            "All wait for the last at each start: look at what else runs on its cores, and where it reads Python from.",
        )
    rates = sorted(line["rate"] for line in figures)
    median = rates[len(rates) // 2]
    slow = [rank for rank in ranks if rank.line("measured")["rate"] < SLOWER * median]
    if slow:
        told = listed([f"rank {one.number} at {one.line('measured')['rate'] / median:.0%}" for one in slow])
        found = f"While all multiply, {told} of the median's rate: all others wait for it at every step."
        if gpu:
            yield fix(GROUP, found, "Look at that GPU's heat, power and clocks: nvidia-smi -q -d PERFORMANCE")
        else:
            yield note(GROUP, found, "Something else wants its cores.")


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(line.strip() for line in lines[-TAIL_LINES:]) or "its launcher says nothing"
