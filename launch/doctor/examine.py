"""`tunewright doctor`: everything is looked at side by side, and told on one screen or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.config.compose import compose_config
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.ranges import check_ranges
from tunewright.config.schema import Launcher
from tunewright.errors import ConfigError, first_line
from tunewright.findings import FIX, NOTE, OK, Finding, fix
from tunewright.launch.children import OUT_OF_MEMORY, kill, start
from tunewright.launch.doctor import clock, compiler, disks, gpus, installed, limits, meeting, network, ports, variables
from tunewright.plan.auto import STRATEGY
from tunewright.plan.devices import Devices, find_devices
from tunewright.plan.rules import world_size
from tunewright.redaction import redact
from tunewright.terminal import tell, writes
from tunewright.threads import waiting

MODULE = "tunewright.trainer.device_checks"
# Seconds until a check that has not come back is told of: a disk or a driver that hangs must not hang this.
PATIENCE, DEVICE_PATIENCE = 30.0, 90.0
LAST_WORDS = 1.0
MOST = 100  # of an exit code: from 126 on they mean something to shells
GROUPS = (
    "packages",
    "compiler",
    "GPUs",
    "device",
    "limits",
    "disks",
    "network",
    "environment",
    "clock",
    "ports",
    "ranks",
)
MARKS = {OK: ("✓", "green"), NOTE: ("!", "yellow"), FIX: ("✗", "bold red")}
PLAIN = str.maketrans({"✓": "+", "✗": "x", "→": ">"})  # for a terminal whose encoding has no such signs
PIPE_WIDTH = 120

Check = Callable[[], list[Finding]]


def run(args: argparse.Namespace) -> int:
    """Look, tell, and return how many things must be fixed.

    Raises:
        ConfigError: an override is wrong, or there are fewer GPUs than ranks are asked for.
    """
    begun = time.monotonic()
    found = examine(args.overrides, args.config_dir, args.ranks)
    seconds = time.monotonic() - begun
    todo = sum(finding.state == FIX for finding in found)
    if args.json:
        findings = [{key: redact(text) for key, text in asdict(finding).items()} for finding in found]
        tell(json.dumps({"to_fix": todo, "seconds": round(seconds, 1), "findings": findings}, indent=1))
    else:
        text = screen(found, seconds)
        tell(text if writes(sys.stdout, "✓✗→") else text.translate(PLAIN))
    return min(todo, MOST)


def examine(overrides: Sequence[str], extra_dir: Path | None, ranks: int | None) -> list[Finding]:
    """Return all findings, in the order in which they are shown.

    Args:
        overrides: of a configuration; what it does not need is no fault where it is missing.
        ranks: how many to start here, None for as many as `cluster.num_processes` says, if it does.

    Raises:
        ConfigError: see `run`.
    """
    config, devices = compose_config(overrides, extra_dir), find_devices()
    check_ranges(config)
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks {ranks}: write a number from 1.")
    ranks = ranks if ranks is not None else config.cluster.num_processes
    if ranks and devices.gpu and ranks > devices.count:
        raise ConfigError(f"{ranks} ranks need as many GPUs, and {devices.count} can be seen here.")
    device = Device(Path(config.data.cache_dir))
    try:
        found = _side_by_side(_checks(config, devices, ranks, device), PATIENCE)
        found += device.findings()
    finally:
        device.end()
    if ranks and ranks > 1:
        others = [item for item in overrides if not item.startswith(("strategy=", "cluster.num_processes="))]
        plain = compose_config([*others, "strategy=ddp", f"cluster.num_processes={ranks}"], extra_dir)
        found += meeting.look(plain, ranks, devices)
    return sorted(found, key=lambda finding: GROUPS.index(finding.group))


def _checks(config: DictConfig, devices: Devices, ranks: int | None, device: Device) -> dict[str, Check]:
    """Return what is looked at in threads of this process, by group."""
    folders = {"output_root": Path(config.output_root), "data.cache_dir": Path(config.data.cache_dir).expanduser()}
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    outlive = dict(folders)
    folders["the Hub's cache"] = Path(os.path.expanduser(home))  # as the Hub's package does, with a home or without
    offline = config.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    checks: dict[str, Check] = {
        "packages": installed.look,
        "compiler": partial(compiler.look, _builds(config)),
        "GPUs": partial(_gpus, device),
        "limits": partial(limits.look, ranks or _most_ranks(config, devices)),
        "disks": partial(disks.look, folders),
        "environment": partial(variables.look, os.environ, devices),
        "clock": partial(clock.look, outlive),
        "ports": ports.look,
    }
    for hub in network.hubs(config):
        checks[f"network ({hub.name})"] = partial(network.look, hub, offline=offline)
    return checks


def _most_ranks(config: DictConfig, devices: Devices) -> int:
    """Return how many ranks a run may have here; what is chosen for `strategy=auto` is all GPUs at most."""
    if STRATEGY in config.automatic and devices.gpu:
        return devices.count
    return world_size(config, devices)


def _builds(config: DictConfig) -> str | None:
    """Return the setting for which a kernel is compiled, if there is one."""
    if config.train.compile:
        return "train.compile=true"
    if config.strategy.launcher is Launcher.deepspeed and deepspeed_file(config).offloads:
        return f"strategy={config.strategy.name}"
    return None


def _gpus(device: Device) -> list[Finding]:
    """Look at the GPUs while the process beside this one has them work."""
    seen = gpus.see()
    if not seen.gpus:
        return []
    seen = gpus.Seen(gpus.slowed_down(seen.gpus, device.done), seen.driver, seen.cuda)
    device.known.wait(gpus.WATCH_SECONDS)
    facts = device.facts
    found = gpus.judge_driver(seen, **facts) if facts else []
    return [*found, *gpus.judge(seen, gpus.visible(seen))]


class Device:
    """The process that tries what the devices can compute; it imports torch meanwhile."""

    def __init__(self, cache: Path) -> None:
        self.done, self.known = threading.Event(), threading.Event()
        self.facts: dict[str, Any] = {}
        self._found: list[Finding] = []
        self._doing = "begin"
        self._began = time.monotonic()
        command = [sys.executable, "-m", MODULE, str(cache)]
        self._process = start(
            command, waiting(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._said: list[str] = []
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Take in what it finds."""
        for line in self._process.stdout or ():
            told = json.loads(line)
            self._doing = told.get("doing", self._doing)
            if "facts" in told:
                self.facts = told["facts"]
                self.known.set()
            if "finding" in told:
                self._found.append(Finding(**told["finding"]))
        self._process.wait()
        self._hearing.join(LAST_WORDS)  # a process that it left behind may hold the pipe
        self.done.set()
        self.known.set()

    def _hear(self) -> None:
        """Keep what libraries say aside, so that the pipe does not fill."""
        self._said += self._process.stderr or ()

    def findings(self) -> list[Finding]:
        """Wait for the rest, and say so where it was ended or hangs."""
        ended = self.done.wait(max(self._began + DEVICE_PATIENCE - time.monotonic(), 0.1))
        code = self._process.poll() if ended else None
        if not ended:
            told = f"torch's process hangs: it does not come back from: {self._doing}."
            self._found.append(fix("device", told, "A driver that hangs: see dmesg, reset the GPU or reboot."))
        elif code:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            hint = OUT_OF_MEMORY if -code == signal.SIGKILL else ""
            last = next((line.strip() for line in reversed(self._said) if line.strip()), "")
            told = f"torch's process was {how}{hint} at: {self._doing}.{f' It said: {last}' if last else ''}"
            self._found.append(fix("device", told, "Install anew what it names; other commands will end there too."))
        return self._found

    def end(self) -> None:
        if self._process.poll() is None:
            kill(self._process)
            self._process.wait()


def _side_by_side(checks: dict[str, Check], seconds: float) -> list[Finding]:
    """Run checks in threads; one that fails or does not come back is a finding like others.

    Threads that nobody waits for at this process's end: asking a name server has no time limit, nor has a network disk.
    """
    answers: queue.SimpleQueue[tuple[str, list[Finding]]] = queue.SimpleQueue()

    def check(name: str, look: Check) -> None:
        group = name.partition(" ")[0]
        try:
            answers.put((name, look()))
        except Exception as error:  # whatever it is about, the rest is to be told
            told = f"This could not be looked at: {type(error).__name__}: {first_line(error)}"
            answers.put((name, [fix(group, told, "Please report it, with what `tunewright doctor --json` prints.")]))

    for name, look in checks.items():
        threading.Thread(target=check, args=(name, look), daemon=True).start()
    found: dict[str, list[Finding]] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(checks) and (left := deadline - time.monotonic()) > 0:
        try:
            name, some = answers.get(timeout=left)
        except queue.Empty:
            break
        found[name] = some
    for name in checks.keys() - found.keys():
        group, told = name.partition(" ")[0], f"{name}: no answer within {seconds:.0f} s."
        do = "Something hangs there, a network disk, a name server or a driver: see dmesg."
        found[name] = [fix(group, told, do)]
    return [finding for name in checks for finding in found[name]]


def screen(found: list[Finding], seconds: float) -> str:
    """Return the findings as one table, and how many must be fixed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, emoji=False)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("group", "mark"):
        table.add_column(name, no_wrap=True)
    table.add_column("found", overflow="fold")
    group = ""
    for finding in found:
        mark, style = MARKS[finding.state]
        told = Text(redact(finding.found), style="" if finding.state == OK else style)
        if finding.do:
            told.append(f"\n→ {redact(finding.do)}", style="default not bold")
        table.add_row(Text(finding.group if finding.group != group else ""), Text(mark, style=style), told)
        group = finding.group
    todo = sum(finding.state == FIX for finding in found)
    what = f"{todo} thing{'' if todo == 1 else 's'} must be fixed" if todo else "Nothing must be fixed"
    notes = sum(finding.state == NOTE for finding in found)
    end = f"{what}; {notes} to know of, {len(found)} looked at in {seconds:.1f} s."
    with console.capture() as captured:
        console.print(table)
        console.print(Text(end, style="bold red" if todo else "bold green"))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
