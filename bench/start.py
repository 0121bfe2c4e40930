"""How long it takes to begin: `--help`, a configuration error, `doctor`, the first optimiser step of the tiny model.

    python bench/start.py [--repeats 3] [--strategies single,zero2]

The model is known: it was built here, or trained before. A first start tokenises, a second one finds the tokens. Where
the time goes is told from outside: from the lines that `tunewright train` prints, the moment a rank's log appears, and
`python -X importtime`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measure import machine, versions

from tunewright.trainer.model.tiny import build_tiny

BENCH = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
TUNEWRIGHT = [sys.executable, "-m", "tunewright.launch.cli"]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "datasets")
# What the phases of a start end with.
PHASES = ("command and data", "launcher", "imports, model, trainer", "first step")


def seconds(argv: list[str], wanted: int | None) -> float:
    """Return the wall time of a command, which has to end with the exit code `wanted`, if there is one."""
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=BENCH.parent, capture_output=True, text=True)
    took = time.perf_counter() - started
    if wanted is not None and done.returncode != wanted:
        raise RuntimeError(f"{argv} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return took


def start(strategy: str, cache: Path, out: Path, name: str) -> dict[str, float]:
    """Train two steps and return the seconds of each phase, and their sum, up to the end of the first step.

    `cpu` is of the whole command, all its processes: less than the others does it depend on what else runs.
    """
    run = out / name
    argv = [
        *TUNEWRIGHT,
        "train",
        f"strategy={strategy}",
        f"data.cache_dir={cache}",
        f"output_root={out}",
        f"name={name}",
    ]
    argv += ["train.max_steps=2", "train.logging_steps=1", "model.dtype=bfloat16"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    log_seen: list[float] = []
    used, started = children_seconds(), time.perf_counter()
    process = subprocess.Popen(
        argv, cwd=BENCH.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def wait_for_log() -> None:
        while not (run / "logs" / "rank0.log").exists() and process.poll() is None:
            time.sleep(0.01)
        log_seen.append(time.perf_counter() - started)

    waiting = threading.Thread(target=wait_for_log)
    waiting.start()
    marks: dict[str, float] = {}
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        for name, sign in (("launch", "accelerate launch"), ("built", "Training "), ("step", "  step 1/2")):
            if sign in line:
                marks.setdefault(name, time.perf_counter() - started)
    waiting.join()
    if process.wait() or len(marks) < 3:
        raise RuntimeError(f"{argv} exited with {process.returncode}:\n{''.join(lines)[-3000:]}")
    ends = [marks["launch"], log_seen[0], marks["built"], marks["step"]]
    parts = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    return {**dict(zip(PHASES, parts, strict=True)), "total": marks["step"], "cpu": children_seconds() - used}


def children_seconds() -> float:
    """Return seconds of CPU that processes have taken which this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imports(module: str) -> dict[str, float]:
    """Return the seconds that importing takes, and those of the packages in it that take most."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    told = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=True).stderr
    found: dict[str, float] = {}
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)", told):
        package = name.partition(".")[0]
        found[package] = found.get(package, 0.0) + int(own) / 1e6
    largest = sorted(found.items(), key=lambda item: -item[1])[:8]
    return {"total": sum(found.values()), **dict(largest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--strategies", default="single,ddp,zero2", help="comma-separated; two ranks unless single")
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "start.json")
    args = parser.parse_args()
    build_tiny(CACHE)
    seconds([*TUNEWRIGHT, "train", "--dry-run", f"data.cache_dir={CACHE}"], 0)  # works out the architecture
    report: dict[str, Any] = {"machine": machine(), "versions": versions(sys.executable, PACKAGES)}
    commands: dict[str, tuple[list[str], int | None]] = {
        "--help": ([*TUNEWRIGHT, "--help"], 0),
        "configuration error": ([*TUNEWRIGHT, "train", "train.x=1"], 2),
        "doctor": ([*TUNEWRIGHT, "doctor"], None),  # as many things as must be fixed here
    }
    print("| | median | spread |\n|---|---:|---:|")
    report["commands"] = {}
    for name, (argv, code) in commands.items():
        times = [seconds(argv, code) for _ in range(args.repeats)]
        report["commands"][name] = times
        print(f"| `tunewright {name}` | {statistics.median(times):.2f} s | {min(times):.2f} to {max(times):.2f} s |")
    columns = ["to the first optimiser step", "total", *PHASES, "CPU to the end"]
    print(f"\n| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    report["starts"] = {}
    for strategy in args.strategies.split(","):
        first, second = [], []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as scratch:
                cache = Path(scratch) / "cache"
                cache.mkdir()
                for known in ("models", "architectures"):
                    (cache / known).symlink_to(CACHE / known)
                first.append(start(strategy, cache, Path(scratch), "first"))
                second.append(start(strategy, cache, Path(scratch), "second"))
        for name, times in ((f"{strategy}, first start", first), (f"{strategy}, second start", second)):
            report["starts"][name] = times
            medians = [statistics.median(one[phase] for one in times) for phase in ("total", *PHASES, "cpu")]
            print(f"| {name} | {' | '.join(f'{value:.1f} s' for value in medians)} |", flush=True)
    report["imports"] = {
        module: imports(module) for module in ("tunewright.launch.train", "tunewright.trainer.training")
    }
    for module, parts in report["imports"].items():
        print(f"\nimport {module}: {', '.join(f'{name} {value:.2f} s' for name, value in parts.items())}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
