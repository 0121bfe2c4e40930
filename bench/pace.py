"""Steps/s as planned before any run, as planned after `tunewright plan --measure`, and as a run then has them.

    python bench/pace.py [--only lora,zero3] [--steps 14] [--docs]    # `make bench-pace`

Each cell starts with an empty cache, so that nothing is known but what its own measuring saw: some steps of the largest
micro-batch, and some of rows of average length. The run trains on other rows, of many lengths. `--docs` writes the
table into docs/planning.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from contenders import settings
from measure import machine, versions
from report import BENCH
from train import LEARNING_RATES, git_commit
from workload import QWEN_HALF_B, SHAPE, build_model, write_rows

from tunewright.config.compose import compose_config
from tunewright.launch.ask_torch import ensure_footprints
from tunewright.launch.trial import measure, train_quietly
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import find_devices
from tunewright.plan.footprint import Batch
from tunewright.plan.machine import machine_here
from tunewright.plan.memory import memory_of
from tunewright.plan.pace import pace_of
from tunewright.plan.reached import with_ratio
from tunewright.trainer.peak import certain

PAGE, RESULT = BENCH.parent / "docs" / "planning.md", BENCH / "results" / "pace.json"
BEGIN, END = "<!-- made by bench/pace.py: begin -->", "<!-- made by bench/pace.py: end -->"
SHAPES = {"39m": SHAPE, "0.5b": QWEN_HALF_B}
# model, method, strategy, further settings
CELLS: list[tuple[str, str, str, list[str]]] = [
    ("39m", "lora", "single", []),
    ("39m", "lora", "single", ["train.gradient_checkpointing=true"]),
    ("39m", "lora", "ddp", []),
    ("39m", "lora", "zero2", []),
    ("39m", "lora", "zero3", []),
    ("39m", "qlora", "single", []),
    ("39m", "full", "single", []),
    ("39m", "prompt_tuning", "single", []),
    ("0.5b", "lora", "single", []),
]
WARMUP = 2  # steps of the run that do not count
BATCH = 8
MICRO = 4  # rows of a micro-batch


def name_of(cell: tuple[str, str, str, list[str]]) -> str:
    model, method, strategy, more = cell
    return ", ".join([model, method, strategy, *("recomputing" for one in more if one.endswith("checkpointing=true"))])


def run_cell(cell: tuple[str, str, str, list[str]], cache: Path, steps: int) -> dict[str, Any]:
    model, method, strategy, more = cell
    with tempfile.TemporaryDirectory(prefix="tunewright-pace-") as scratch:
        folder = build_model(cache, SHAPES[model])
        load = write_rows(Path(scratch) / "rows", folder, "short", steps, 42, BATCH)
        job = load.job(
            folder,
            Path(scratch) / "out",
            method=method,
            strategy=strategy,
            ranks=1 if strategy == "single" else 2,
            steps=steps,
            batch=BATCH,
            pack=0,
            learning_rate=LEARNING_RATES[method],
            seed=42,
            micro=MICRO,
            cutoff=load.longest,
        )
        plain = ["train.gradient_checkpointing=false"]
        config, devices = compose_config([*settings(job), *plain, *more], None), find_devices()
        config.train.padding_free = method != "prompt_tuning"
        plan = batch_plan(config.train, job.ranks, cutoff_len=job.cutoff)
        recompute = bool(config.train.gradient_checkpointing)
        batch = Batch(plan.micro_batch, job.cutoff, not config.train.padding_free, recompute)
        footprint = ensure_footprints([config], "cpu", [batch])[0]
        found, here = footprint.of(batch), machine_here(devices, config)
        known_rows: dict[str, int] = {"rows": steps * BATCH, "tokens": sum(load.tokens)}
        planned = memory_of(config, footprint, found, plan, here)
        listed = pace_of(config, footprint, found, plan, here, **known_rows)  # the cache is new: no run is known
        record = measure(
            config, footprint, found, planned, here, devices, mean=known_rows["tokens"] / known_rows["rows"]
        )
        after = pace_of(config, footprint, found, plan, here, **known_rows)
        manifest, lines = train_quietly(config, devices)
        seen = [line for line in lines if "step_seconds" in line][WARMUP:]
        rate = sum(line["step_tokens"] for line in seen) / sum(line["step_seconds"] for line in seen)
        return {
            "cell": name_of(cell),
            "listed": listed.tokens_per_second,
            "planned": after.tokens_per_second,
            "seen": rate,
            "spread": [min(map(_rate, seen)), median(map(_rate, seen)), max(map(_rate, seen))],
            "memory_planned": planned.needed,
            "memory_after": with_ratio(planned, record.memory).needed,
            "memory_seen": manifest["peak_memory_bytes"],
            "points": [[point.tokens, point.seconds] for point in record.points],
            "quiet": certain(manifest["peak_flops_per_second"]) is not None,
            "when": datetime.date.today().isoformat(),
            "commit": git_commit(),
        }


def _rate(line: dict[str, Any]) -> float:
    return float(line["step_tokens"] / line["step_seconds"])


def section(result: dict[str, Any]) -> str:
    """The text between the markers of docs/planning.md."""
    machine, found = result["machine"], result["cells"]
    numbers = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, no GPU; {numbers}; "
        f"{found[0]['when']}, `make bench-pace ARGS=--docs`.",
        "",
        "| tokens/s | planned before any run | planned after `--measure` | a run | after `--measure` / run |",
        "|---|---:|---:|---:|---:|",
    ]
    for cell in found:
        shown = [f"{cell[key]:,.0f}" for key in ("listed", "planned", "seen")]
        lines.append(f"| {cell['cell']} | {' | '.join(shown)} | {cell['planned'] / cell['seen']:.0%} |")
    return "\n".join(lines)


def page_with(result: dict[str, Any]) -> str:
    """Return docs/planning.md with the result in it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section(result)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name has one of these in it, comma-separated")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--docs", action="store_true", help="write docs/planning.md too")
    args = parser.parse_args()
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
    result: dict[str, Any] = {"machine": machine(), "versions": versions(sys.executable, ("torch", "transformers"))}
    earlier = json.loads(args.out.read_text(encoding="utf-8"))["cells"] if args.out.is_file() else []
    cells = {cell["cell"]: cell for cell in earlier}
    for cell in CELLS:
        if any(part in name_of(cell) for part in args.only.split(",")):
            cells[name_of(cell)] = found = run_cell(cell, cache, args.steps)
            rates = ", ".join(f"{found[key]:,.0f} {key}" for key in ("listed", "planned", "seen"))
            busy = "" if found["quiet"] else ", not quiet"
            print(f"  {found['cell']}: {rates} ({found['planned'] / found['seen']:.0%}{busy})", flush=True)
            result["cells"] = [cells[name_of(one)] for one in CELLS if name_of(one) in cells]
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.docs:
        PAGE.write_text(page_with(result), encoding="utf-8")


if __name__ == "__main__":
    main()
