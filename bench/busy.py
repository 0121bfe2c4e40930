"""How OpenMP threads should wait, on a quiet machine and beside other work: python bench/busy.py

Threads of libgomp spin for a while before they sleep. On a quiet machine that saves the time to wake them; where others
want the cores, they burn what the others, and their own siblings, would need. Each policy trains the same rows, quiet
and beside one busy process for each core, in turn; losses have to be the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contenders import environment, tunewright
from judge import speed
from measure import CORES, machine, watch
from train import DISTURBED
from workload import MODELS, build_model, write_rows

from tunewright.trainer.model.tiny import tiny_folder

# libgomp's own default is 300,000; PASSIVE is 0.
POLICIES: dict[str, dict[str, str]] = {
    **{f"spin {count:,}": {"GOMP_SPINCOUNT": str(count)} for count in (300_000, 10_000, 3_000, 1_000)},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
STEPS, WARMUP, BATCH = {"tiny": 16, "39m": 7}, 2, 8


@contextmanager
def beside(processes: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(model: str, strategy: str, policy: str, others: int, folder: Path) -> dict[str, Any]:
    """Train once and return tokens a second and the losses."""
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
    path = build_model(cache, MODELS["39m"])  # which makes the embedded model too
    path = path if model == "39m" else tiny_folder(cache)
    steps = STEPS[model]
    load = write_rows(folder / "rows", path, "short", steps, 42, BATCH)
    out = folder / "out"
    out.mkdir()
    job = load.job(
        path,
        out,
        method="lora",
        strategy=strategy,
        ranks=1 if strategy == "single" else 2,
        steps=steps,
        batch=BATCH,
        pack=0,
        learning_rate=3e-3,
        seed=42,
    )
    contender = tunewright()
    with beside(others):
        watched = watch(contender.argv(job), out, environment(job) | POLICIES[policy], contender.is_step)
    if not others and watched.others_cpu_s > DISTURBED * watched.wall_s * CORES:
        sys.exit("Other processes took more than a tenth of the machine: wait until it is quiet.")
    reported = contender.steps(job, watched.log)
    if watched.exit_code or len(reported) != steps:
        sys.exit(watched.log[-2500:])
    return {"tokens_per_second": speed(watched.marks, load.tokens, WARMUP), "losses": [one.loss for one in reported]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--models", default="tiny,39m")
    parser.add_argument("--strategies", default="single,ddp")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "busy.json")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "policies": POLICIES, "cells": []}
    print("| | | | " + " | ".join(POLICIES) + " |\n|---|---|---|" + "---:|" * len(POLICIES))
    for model, strategy, others in itertools.product(args.models.split(","), args.strategies.split(","), (0, CORES)):
        rates: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        losses = []
        for _, policy in itertools.product(range(args.repeats), POLICIES):
            with tempfile.TemporaryDirectory(prefix="tunewright-busy-") as scratch:
                one = measure(model, strategy, policy, others, Path(scratch))
            rates[policy].append(one["tokens_per_second"])
            losses.append(one["losses"])
        if any(one != losses[0] for one in losses):
            sys.exit(f"Losses differ between policies: {losses}")
        found["cells"].append({"model": model, "strategy": strategy, "others": others, "rates": rates})
        cells = [f"{statistics.median(rate):,.0f}" for rate in rates.values()]
        print(
            f"| {model} | {strategy} | {f'beside {others}' if others else 'quiet'} | {' | '.join(cells)} |", flush=True
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
