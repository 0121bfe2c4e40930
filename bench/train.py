"""Training speed: tunewright beside TRL, plain transformers Trainer and LLaMA-Factory, on the same rows and model.

    python bench/train.py                                   # LoRA, short rows, one device: ten minutes on two cores
    python bench/train.py --methods lora,full --rows short,long --strategies single,zero2
    PEER_PYTHON=~/peer-lf/bin/python python bench/train.py        # LLaMA-Factory too

Repetitions are interleaved. Times are of the lines that report a step, taken by this process for all contenders alike.
A row whose losses are not those of the others, or with a gradient of zero, is void. A run beside which something else
ran is disturbed and made again; a row that has only such runs is marked, and does not go into the docs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders import Contender, Step, compiled, environment, llamafactory, recomputing, scripts, tunewright
from gemm import gemm_rates
from judge import PARITY, fall, speed, summary, void_reason
from measure import CORES, Watched, machine, versions, watch
from report import RESULT, marked, table, title, write_docs
from workload import DRAWN, KINDS, MODELS, RANK, Job, Workload, build_model, credited_flops, write_rows

METHODS, STRATEGIES = ("lora", "qlora", "full", "prompt_tuning"), ("single", "ddp", "zero2", "zero3")
# High enough that the loss of a random model falls within a few steps: parity means nothing while nothing is learnt.
LEARNING_RATES = {"lora": 3e-3, "qlora": 3e-3, "full": 1e-3, "prompt_tuning": 0.1}
REFERENCES = ("TRL, defaults", "Trainer, padding", "LLaMA-Factory, defaults")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets")
DISTURBED = 0.1  # of the machine for others, or of a matrix product's rate: such a time says nothing
STOLEN = 0.02
IDLE = 0.25  # processes that want to run, on an average, for each core: with more the docs are not written
GRID = (METHODS, tuple(KINDS), STRATEGIES)
FOR_ALL = ("deepspeed", "bitsandbytes")


@dataclass
class Runs:
    """What one contender did in one cell of the grid."""

    contender: Contender
    watched: list[Watched] = field(default_factory=list)
    steps: list[list[Step]] = field(default_factory=list)
    yard_sticks: list[float] = field(default_factory=list)  # of each run: FLOP/s before or after it, the lower
    cannot: str | None = None

    def disturbances(self, best: float) -> list[str | None]:
        """Say of each run what disturbed it, if anything did."""
        return [disturbance(*run, best) for run in zip(self.watched, self.yard_sticks, strict=True)]


def run_once(contender: Contender, job: Job) -> tuple[Watched, list[Step]]:
    watched = watch(contender.argv(job), Path(job.out), environment(job), contender.is_step)
    return watched, contender.steps(job, watched.log)


def judge(all_runs: list[Runs], load: Workload, wanted: int) -> dict[str, str | None]:
    """Return {contender: why its row is void}, judged against the first reference that is sound in itself."""
    tokens = sum(load.tokens)
    reference: list[Step] | None = None
    for name in (*REFERENCES, "tunewright"):
        for runs in all_runs:
            if runs.contender.name == name and runs.steps and reference is None:
                steps, code = runs.steps[0], runs.watched[0].exit_code
                if void_reason(steps, steps, wanted, tokens, same_rows=True, exit_code=code) is None:
                    reference = steps
    verdicts: dict[str, str | None] = {}
    for runs in all_runs:
        reasons = []
        for watched, steps in zip(runs.watched, runs.steps, strict=True):
            reason = void_reason(
                steps,
                reference or steps,
                wanted,
                tokens,
                same_rows=runs.contender.same_rows,
                exit_code=watched.exit_code,
            )
            reasons += [reason] if reason else []
        verdicts[runs.contender.name] = reasons[0] if reasons else None
    return verdicts


def describe(
    runs: Runs, load: Workload, method: str, shape: dict[str, Any], gemm: float, quiet: float, args: Any
) -> dict[str, Any]:
    """Return a contender's figures, or nothing but its name where no run got through two steps.

    Args:
        gemm: the best matrix product, FLOP/s.
        quiet: the best yard-stick of the cell, FLOP/s.
    """
    ended = [
        run
        for run in zip(runs.watched, runs.steps, runs.yard_sticks, runs.disturbances(quiet), strict=True)
        if len(run[0].marks) > 1 and len(run[0].marks) == len(run[1])
    ]
    undisturbed = [run for run in ended if not run[3]]
    good = [run[:2] for run in undisturbed or ended]
    found: dict[str, Any] = {"name": runs.contender.name, "same_rows_each_step": runs.contender.same_rows}
    found["cannot"] = runs.cannot
    if not good:
        return found
    rates = [
        speed(watched.marks, tokens_of(steps, load, same_rows=runs.contender.same_rows), args.warmup)
        for watched, steps in good
    ]
    scored = sum(load.scored) / sum(load.tokens)  # a token in so many reaches the head
    flops = credited_flops(shape, method, 10**6, round(scored * 10**6), args.rank) / 10**6 * statistics.median(rates)
    return found | {
        "tokens_per_second": summary(rates),
        "first_step_s": summary([watched.marks[0] for watched, _ in good]),
        "peak_private_mib": summary([watched.peak_private_mib for watched, _ in good]),
        "peak_rss_mib": summary([watched.peak_rss_mib for watched, _ in good]),
        "disturbed": None if undisturbed else ended[0][3],
        "disturbed_runs_left_out": len(ended) - len(good),
        "others_cpu_s": summary([watched.others_cpu_s for watched, _ in good]),
        "steal_s": summary([watched.steal_s for watched, _ in good]),
        "yard_stick_gflops": summary([run[2] / 1e9 for run in undisturbed or ended]),
        "gflops": flops / 1e9,
        "of_gemm": flops / gemm,
        "mfu": flops / args.peak_flops if args.peak_flops else None,
        "loss_fell_by": fall(good[0][1]),
        "losses": [[step.loss for step in steps] for _, steps in good],
        "grad_norms": [[step.grad_norm for step in steps] for _, steps in good],
    }


def disturbance(watched: Watched, yard_stick: float, best: float) -> str | None:
    """Say what disturbed a run, where its time says nothing.

    Args:
        yard_stick: a matrix product's rate before or after it, the lower, FLOP/s.
        best: that of the quietest moment in the cell.
    """
    machine_s = watched.wall_s * CORES
    if watched.others_cpu_s > DISTURBED * machine_s:
        return f"other processes took {watched.others_cpu_s / machine_s:.0%} of the machine"
    if watched.steal_s > STOLEN * machine_s:
        return f"the host took {watched.steal_s / machine_s:.0%} of the machine"
    if yard_stick < (1 - DISTURBED) * best:
        return f"a matrix product beside it ran at {yard_stick / best:.0%} of its best rate"
    return None


def tokens_of(steps: list[Step], load: Workload, *, same_rows: bool) -> list[int]:
    """Non-padding tokens of each step: those of its rows, or where it packs its own count, else the mean."""
    if same_rows:
        return load.tokens
    if steps[-1].tokens is not None:
        seen = [0.0, *(step.tokens or 0.0 for step in steps)]
        return [round(after - before) for before, after in itertools.pairwise(seen)]
    return [round(sum(load.tokens) / len(steps))] * len(steps)


def measure_cell(method: str, kind: str, strategy: str, model: Path, args: Any, rates: dict[str, float]) -> Any:
    """Run every contender `repeats` times, in turn, on fresh folders, and judge them; a disturbed run is made again."""
    dtype = "bfloat16"  # also where a contender computes in float32: the share is of what the machine could do
    batch, ranks = args.batch or KINDS[kind].batch, 1 if strategy == "single" else 2
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as scratch:
        load = write_rows(Path(scratch) / "rows", model, kind, args.steps, args.seed, batch)
        learning_rate = args.learning_rate or LEARNING_RATES[method]
        pack = pack_size(load, args.steps, (args.micro or batch // ranks) / batch)
        all_runs = [Runs(contender, cannot=contender.cannot(method, strategy)) for contender in args.contenders]
        best, yard_stick = gemm_rates(dtype)
        rates[dtype], quiet = max(rates.get(dtype, 0.0), best), yard_stick
        for repeat in range(args.repeats + args.again):
            for runs in all_runs:
                if runs.cannot or runs.disturbances(quiet).count(None) >= args.repeats:
                    continue
                out = Path(scratch) / f"{repeat}-{all_runs.index(runs)}"
                out.mkdir()
                job = load.job(
                    model,
                    out,
                    method=method,
                    strategy=strategy,
                    ranks=ranks,
                    steps=args.steps,
                    batch=batch,
                    pack=pack,
                    learning_rate=learning_rate,
                    seed=args.seed,
                    rank=args.rank,
                    micro=args.micro,
                    drawn=args.model in DRAWN,
                )
                watched, steps = run_once(runs.contender, job)
                before, (best, yard_stick) = yard_stick, gemm_rates(dtype)
                rates[dtype], quiet = max(rates[dtype], best), max(quiet, yard_stick)
                runs.watched.append(watched)
                runs.steps.append(steps)
                runs.yard_sticks.append(min(before, yard_stick))
                found = runs.disturbances(quiet)[-1]
                took = f"{len(steps)} steps in {watched.wall_s:.0f} s{f'; {found}' if found else ''}"
                say(f"  {runs.contender.name} {repeat + 1}/{args.repeats}: {took}")
                if watched.exit_code:
                    say(watched.log[-2500:])
        verdicts = judge(all_runs, load, args.steps)
        rows = [describe(runs, load, method, args.shape, rates[dtype], quiet, args) for runs in all_runs]
        for row in rows:
            row["void"] = verdicts[row["name"]]
        return {
            "method": method,
            "rows": kind,
            "strategy": strategy,
            "workload": load.facts(),
            "settings": {"batch": batch, "steps": args.steps, "learning_rate": learning_rate, "pack": pack},
            "gemm_dtype": dtype,
            "gemm": rates[dtype],
            "yard_stick_gflops": quiet / 1e9,
            "contenders": rows,
        }


def pack_size(load: Workload, steps: int, share: float) -> int:
    """Tokens of a pack that takes the place of a micro-batch, which is a share of a step."""
    return -(-max(load.longest, round(sum(load.tokens) / steps * share * 1.02)) // 8) * 8


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def choices(text: str, known: tuple[str, ...]) -> list[str]:
    """Return what a comma-separated option names; argparse shows the error."""
    picked = text.split(",")
    wrong = [item for item in picked if item not in known]
    if wrong:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {', '.join(known)}")
    return picked


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--methods", type=lambda text: choices(text, METHODS), default=["lora"], help=",".join(METHODS))
    top.add_argument("--rows", type=lambda text: choices(text, tuple(KINDS)), default=["short"], help=",".join(KINDS))
    top.add_argument(
        "--strategies", type=lambda text: choices(text, STRATEGIES), default=["single"], help=",".join(STRATEGIES)
    )
    top.add_argument("--all", action="store_true", help="the whole grid: hours on two cores")
    top.add_argument("--only", default="", help="contenders whose name has one of these in it, comma-separated")
    top.add_argument("--compiled", action="store_true", help="tunewright with train.compile=true too")
    top.add_argument("--recomputing", action="store_true", help="tunewright with train.gradient_checkpointing=true too")
    top.add_argument("--repeats", type=int, default=3)
    top.add_argument("--again", type=int, default=2, help="at most so many more, in place of disturbed ones")
    top.add_argument("--steps", type=int, default=8, help="optimiser steps of a run")
    top.add_argument("--warmup", type=int, default=2, help="of them not measured")
    top.add_argument("--batch", type=int, help="rows of a step; otherwise 8 short, 2 long or 4 of 4k tokens")
    top.add_argument("--micro", type=int, help="of them at once on a device; otherwise all")
    top.add_argument("--learning-rate", type=float)
    top.add_argument("--seed", type=int, default=42)
    top.add_argument("--model", choices=MODELS, default="39m", help="small, to try the bench; 8b and 7b are for a GPU")
    top.add_argument("--rank", type=int, default=RANK, help="of LoRA")
    top.add_argument("--out", type=Path, help="JSON, otherwise bench/results/train.json, or train-MODEL.json")
    top.add_argument("--docs", action="store_true", help="write docs/benchmarks.md and the README's table too")
    top.add_argument("--anyway", action="store_true", help="write them although something disturbed the runs")
    return top


def main() -> int:
    args = parser().parse_args()
    if args.all:
        args.methods, args.rows, args.strategies = list(METHODS), ["short", "long"], list(STRATEGIES)
    if args.docs and args.model != "39m":
        parser().error("--docs writes the page about the 39m model: leave it out")
    load = os.getloadavg()[0]
    if load > IDLE * CORES:
        busy = f"{load:.1f} processes have wanted one of {CORES} cores in the last minute"
        if args.docs and not args.anyway:
            parser().error(f"{busy}: wait until the machine is quiet, or add --anyway")
        say(f"{busy}: what disturbs a run is said beside it.")
    args.shape = MODELS[args.model]
    args.out = args.out or (RESULT if args.model == "39m" else RESULT.with_name(f"train-{args.model}.json"))
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
    model = build_model(cache, args.shape, weights=args.model not in DRAWN)
    peer = os.environ.get("PEER_PYTHON")
    known = [tunewright()]
    known += [compiled()] if args.compiled else []
    known += [recomputing()] if args.recomputing else []
    known += scripts()
    known += (
        [llamafactory(peer), llamafactory(peer, best=True), llamafactory(peer, best=True, packing=True)] if peer else []
    )
    args.contenders = [one for one in known if any(part in one.name for part in args.only.split(","))]
    facts = machine()
    args.peak_flops = peak_of_gpu(facts)
    rates = {"float32": gemm_rates("float32")[0]}
    cells = []
    for method, kind, strategy in itertools.product(args.methods, args.rows, args.strategies):
        say(f"{method}, {kind} rows, {strategy}")
        cell = measure_cell(method, kind, strategy, model, args, rates)
        cell["run"] = {
            "when": datetime.date.today().isoformat(),
            "commit": git_commit(),
            "command": shlex.join(["python", "bench/train.py", *sys.argv[1:]]),
            "steps": args.steps,
            "warmup": args.warmup,
            "repeats": args.repeats,
            "seed": args.seed,
            "load_before": round(load, 2),
        }
        cells.append(cell)
        print(f"\n{title(cell)}\n\n{table(cell)}\n", flush=True)
        result = {
            "machine": facts,
            "versions": {
                "tunewright, TRL, Trainer": versions(sys.executable, (*PACKAGES, *FOR_ALL)),
                **({"LLaMA-Factory": versions(peer, ("llamafactory", *PACKAGES))} if peer else {}),
            },
            "model": f"A random Qwen2 in bfloat16: {', '.join(f'{k} {v}' for k, v in args.shape.items())}",
            "parity": PARITY,
            "gemm": rates,
            "cells": cells,
        }
        result = joined(result, args.out)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(PARITY)
    for line in marked(result):
        say(f"DISTURBED {line}")
    if args.docs and not write_docs(result, anyway=args.anyway):
        say("The docs are as they were: measure these again on a quiet machine, or add --anyway.")
        return 1
    ours = [row for cell in cells for row in cell["contenders"] if row["name"] == "tunewright"]
    return 1 if any(row["void"] for row in ours) else 0


def joined(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the result with the cells that were measured before on the same machine, model and packages.

    A file of another machine, or of other packages, is begun anew: its figures do not go beside these.
    """
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}

    def place(facts: dict[str, Any]) -> Any:
        return facts["machine"]["cpu"], facts["machine"]["cores"], facts["machine"].get("gpu"), facts.get("model")

    if not before or before.get("parity") != result["parity"] or place(before) != place(result):
        return result
    theirs = before["versions"]
    if any(theirs.get(where, found) != found for where, found in result["versions"].items()):
        return result
    measured = {key(cell) for cell in result["cells"]}
    kept = [cell for cell in before["cells"] if key(cell) not in measured]
    cells = sorted(
        [*kept, *result["cells"]],
        key=lambda cell: [order.index(part) for order, part in zip(GRID, key(cell), strict=True)],
    )
    rates = {dtype: max(rate, before["gemm"].get(dtype, 0.0)) for dtype, rate in result["gemm"].items()}
    return {**result, "versions": {**theirs, **result["versions"]}, "gemm": rates, "cells": cells}


def key(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell["method"], cell["rows"], cell["strategy"]


def peak_of_gpu(facts: dict[str, Any]) -> float | None:
    """The data sheet's figure for a GPU; a CPU has none that we know."""
    import torch

    if not torch.cuda.is_available():
        return None
    from trl.trainer.utils import get_peak_flops

    facts["gpu"] = torch.cuda.get_device_name()
    return get_peak_flops(facts["gpu"], "bfloat16")


def git_commit() -> str:
    """The commit that is measured, marked where files other than the results of measuring differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs/benchmarks.md")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
