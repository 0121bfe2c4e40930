"""What ZeRO-3 costs beside ZeRO-2 and DDP, and which of DeepSpeed's settings lower it.

    python bench/zero.py [--repeats 3] [--only shipped,persist]

LoRA on the bench's model and short rows, two ranks, tunewright alone. Every variant is the shipped ZeRO-3 file with one
setting changed; the losses of all have to be the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from contenders import tunewright
from judge import speed
from measure import machine
from report import BENCH
from train import LEARNING_RATES, git_commit, run_once
from workload import SHAPE, build_model, write_rows

ROOT = BENCH.parent
SHIPPED = ROOT / "configs" / "deepspeed" / "zero3.json"
# The bench's adapters have at most 8 x 1,472 weights, its layers at most 753,664, its embedding 8 million.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "single, half the cores": ("single", {}),
    "ddp": ("ddp", {}),
    "zero2": ("zero2", {}),
    "zero3, as shipped": ("zero3", {}),
    "persist 5,120 (transformers' auto)": ("zero3", {"stage3_param_persistence_threshold": 5120}),
    "persist 12,000 (the adapters)": ("zero3", {"stage3_param_persistence_threshold": 12_000}),
    "persist 300,000 (and small layers)": ("zero3", {"stage3_param_persistence_threshold": 300_000}),
    "persist 10,000,000 (everything)": ("zero3", {"stage3_param_persistence_threshold": 10_000_000}),
    "prefetch 0": ("zero3", {"stage3_prefetch_bucket_size": 0}),
    "prefetch 50,000,000": ("zero3", {"stage3_prefetch_bucket_size": 50_000_000}),
    "reduce bucket 5,000,000": ("zero3", {"reduce_bucket_size": 5_000_000}),
    "no overlap": ("zero3", {"overlap_comm": False}),
}


def deepspeed_file(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    settings = json.loads(SHIPPED.read_text(encoding="utf-8"))
    settings["zero_optimization"] |= changes
    file = folder / f"{list(VARIANTS).index(name)}.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="variants whose name has one of these in it, comma-separated")
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "zero.json")
    args = parser.parse_args()
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
    model = build_model(cache, SHAPE)
    chosen = {name: variant for name, variant in VARIANTS.items() if any(part in name for part in args.only.split(","))}
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    losses: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="tunewright-zero-") as scratch:
        load = write_rows(Path(scratch) / "rows", model, "short", args.steps, 42, 8)
        for repeat in range(args.repeats):
            for name, (strategy, changes) in chosen.items():
                extra = [f"strategy.deepspeed={deepspeed_file(Path(scratch), name, changes)}"] if changes else []
                extra += ["cluster.threads_per_process=1"]
                out = Path(scratch) / f"{repeat}-{list(VARIANTS).index(name)}"
                out.mkdir()
                job = load.job(
                    model,
                    out,
                    method="lora",
                    strategy=strategy,
                    ranks=1 if strategy == "single" else 2,
                    steps=args.steps,
                    batch=8,
                    pack=0,
                    learning_rate=LEARNING_RATES["lora"],
                    seed=42,
                )
                watched, steps = run_once(tunewright(extra), job)
                if watched.exit_code or len(watched.marks) != args.steps:
                    raise RuntimeError(f"{name} ended with {watched.exit_code}:\n{watched.log[-3000:]}")
                rates[name].append(speed(watched.marks, load.tokens, warmup=2))
                losses[name] = [step.loss for step in steps]
                memory[name] = watched.peak_private_mib
                print(f"  {name} {repeat + 1}/{args.repeats}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    reference = next(iter(losses.values()))
    for name, curve in losses.items():
        worst = max(abs(mine / other - 1) for mine, other in zip(curve, reference, strict=True))
        if worst > 1e-3:
            raise RuntimeError(f"{name} trains something else: its loss is off by {worst:.2%}")
    base = statistics.median(rates.get("zero2") or next(iter(rates.values())))
    print("\n| | tokens/s | spread | of ZeRO-2 | private memory, both ranks |\n|---|---:|---:|---:|---:|")
    for name, found in rates.items():
        median = statistics.median(found)
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(f"| {name} | {median:,.0f} | {spread} | {median / base:.0%} | {memory[name]:,.0f} MiB |")
    result = {"when": datetime.date.today().isoformat(), "commit": git_commit(), "machine": machine()}
    result |= {"tokens_per_second": rates, "losses": losses, "private_mib": memory}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
