"""Trains cells one after the other in one process: python bench/gpu/worker.py PART OUT.jsonl [--tiny]

One process, because a minute of imports for each cell would take the time that there is. Each cell leaves two lines,
when it begins and when it has ended, so that whoever started this can go on behind a cell that took the process along.
A time is between two points at which the device had finished.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCH), str(BENCH / "gpu")]

import cells  # noqa: E402
import torch  # noqa: E402
from cells import Cell  # noqa: E402
from contenders import is_step, settings, tunewright  # noqa: E402
from judge import Step, speed  # noqa: E402
from train import LEARNING_RATES, pack_size, run_once  # noqa: E402
from workload import DRAWN, MODELS, Job, Workload, build_model, credited_flops, write_rows  # noqa: E402

STEPS, WARMUP, SEED, RANK = 6, 2, 42, 16
GIB = 2**30


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Clock:
    """When steps ended, with the device drained, and what they reported."""

    marks: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def tick(self) -> None:
        synchronise()
        self.marks.append(time.perf_counter())

    def report(self, figures: dict[str, Any]) -> None:
        self.tick()
        self.steps.append(Step(figures["loss"], figures.get("grad_norm", 0.0), figures.get("num_tokens")))


class Said:
    """What a rank says, of which the lines about steps set the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.lines = clock, [""]

    def __call__(self, text: str) -> None:
        self.lines.append(text)
        if is_step(text):
            self.clock.tick()


def train_here(job: Job, lever: tuple[str, ...], said: Said) -> None:
    """What `tunewright train` does, in this process."""
    from tunewright.claims import Claim, prepare_folder
    from tunewright.config.compose import compose_config
    from tunewright.launch.train import check_all
    from tunewright.plan.devices import find_devices
    from tunewright.run_folder import RunDir
    from tunewright.trainer.console import Printer
    from tunewright.trainer.prepared import prepare
    from tunewright.trainer.process_group import join
    from tunewright.trainer.training import train

    config = compose_config([*settings(job), *lever])
    check_all(config, find_devices())
    run = RunDir(Path(job.out) / "run")
    prepare_folder(config, Claim(run, None))
    prepared = prepare(config, lambda line: None)
    train(config, run, prepared, join(None, 10), Printer(said))


@contextmanager
def without(lever: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Take back for a cell what is no setting, and give the levers that are."""
    if cells.BLOCKING not in lever:
        yield lever
        return
    from tunewright.trainer import sft_trainer

    ahead = sft_trainer.on_device
    sft_trainer.on_device = lambda batch, device: batch  # the Trainer then copies it, when its turn comes
    try:
        yield tuple(one for one in lever if one != cells.BLOCKING)
    finally:
        sft_trainer.on_device = ahead


def run_cell(cell: Cell, job: Job) -> tuple[Clock, str]:
    """Train, and return the clock and what was said beside the steps."""
    import loop_script
    import trl_script

    clock = Clock()
    if cell.strategy != "single":
        contender = tunewright(list(cell.lever))
        watched, steps = run_once(contender, job)
        if watched.exit_code:
            raise RuntimeError(f"exit code {watched.exit_code}: {watched.log[-1500:]}")
        return Clock(watched.marks, steps), ""
    if cell.contender == cells.OURS:
        said = Said(clock)
        with without(cell.lever) as lever:
            train_here(job, lever, said)
        clock.steps = tunewright().steps(job, "")
        return clock, next((line for line in said.lines if line.startswith("Recomputing")), "")
    if cell.contender == cells.LOOP:
        loop_script.train(job, clock.report)
    else:
        make = trl_script.tuned if cell.contender == cells.TRL_TUNED else trl_script.defaults
        trl_script.train(job, make(job), clock.report)
    return clock, ""


def figures(cell: Cell, job: Job, load: Workload, clock: Clock, peak_flops: float | None) -> dict[str, Any]:
    """Return speed, memory and losses of a training that has ended."""
    packed = cell.contender == cells.TRL_TUNED
    tokens = load.tokens
    if packed:
        seen = [0.0, *(step.tokens or 0.0 for step in clock.steps)]
        tokens = [round(after - before) for before, after in itertools.pairwise(seen)]
    rate = speed(clock.marks, tokens, WARMUP)
    scored = sum(load.scored) / sum(load.tokens)
    flops = credited_flops(MODELS[cell.model], cell.method, 10**6, round(scored * 10**6), job.rank) / 10**6 * rate
    found: dict[str, Any] = {
        "tokens_per_second": rate,
        "tflops": flops / 1e12,
        "mfu": flops / peak_flops if peak_flops else None,
        "step_seconds": [after - before for before, after in itertools.pairwise(clock.marks)],
        "losses": [step.loss for step in clock.steps],
        "grad_norms": [step.grad_norm for step in clock.steps],
        "counted": clock.steps[-1].tokens if clock.steps else None,
        "tokens": load.tokens,
        "packed": packed,
    }
    if torch.cuda.is_available() and cell.strategy == "single":
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


def planned_figures(cell: Cell, job: Job, load: Workload) -> dict[str, float]:
    """What `tunewright plan` expects to be allocated at most, where a micro-batch is one row: of the longest.

    And how fast it expects a step to be where no run on the machine has told it.
    """
    if (cell.contender, cell.strategy, cell.lever) != (cells.OURS, "single", ()):
        return {}
    if job.per_device > 1 and torch.cuda.is_available():
        return {}
    from tunewright.config.compose import compose_config
    from tunewright.plan.batch_plan import batch_plan
    from tunewright.plan.devices import find_devices
    from tunewright.plan.footprint import Batch
    from tunewright.plan.machine import machine_here
    from tunewright.plan.memory import memory_of
    from tunewright.plan.pace import pace_of
    from tunewright.plan.reached import Known
    from tunewright.trainer.footprint.footprints import make_footprint

    config, devices = compose_config(settings(job)), find_devices()
    batch = Batch(job.per_device, load.longest, False, False)
    footprint = make_footprint(config, devices.kind, [batch])
    told = config, footprint, footprint.of(batch), batch_plan(config.train, 1), machine_here(devices, config).of(1)
    memory = memory_of(*told)
    pace = pace_of(*told, rows=job.steps * job.batch, tokens=sum(load.tokens), known=Known())
    gib = (memory.needed - memory.context - memory.slack) / GIB
    return {"planned_gib": gib, "planned_tokens_per_second": pace.tokens_per_second}


def forget() -> None:
    """Make the device as empty, and accelerate as new, as at the start of the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def job_of(cell: Cell, scratch: Path, loads: dict[tuple[str, int], Workload]) -> tuple[Job, Workload]:
    """Return what a cell is told; rows of a kind are written once."""
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
    model = build_model(cache, MODELS[cell.model], weights=False)
    key = cell.rows, cell.batch
    if key not in loads:
        loads[key] = write_rows(scratch / f"rows-{len(loads)}", model, cell.rows, STEPS, SEED, cell.batch)
    load = loads[key]
    out = Path(tempfile.mkdtemp(dir=scratch))
    job = load.job(
        model,
        out,
        method=cell.method,
        strategy=cell.strategy,
        ranks=1,
        steps=STEPS,
        batch=cell.batch,
        pack=pack_size(load, STEPS, cell.micro / cell.batch),
        learning_rate=LEARNING_RATES[cell.method] / (10 if cell.model in DRAWN else 1),  # wide models: smaller steps
        seed=SEED,
        rank=RANK,
        micro=cell.micro,
        drawn=True,
    )
    return job, load


def gpu_peak() -> float | None:
    """The data sheet's FLOP/s of the GPU in bfloat16, or None without one or where it is not known."""
    if not torch.cuda.is_available():
        return None
    from trl.trainer.utils import get_peak_flops

    return get_peak_flops(torch.cuda.get_device_name(), "bfloat16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(cells.PARTS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal on a CPU")
    args = parser.parse_args()
    known = args.out.read_text().splitlines() if args.out.exists() else []
    begun = {json.loads(line)["number"] for line in known}
    loads: dict[tuple[str, int], Workload] = {}
    with tempfile.TemporaryDirectory(prefix="tunewright-gpu-") as scratch, args.out.open("a") as out:
        for number, planned in enumerate(cells.PARTS[args.part]):
            if number in begun:
                continue
            cell = cells.tiny(planned) if args.tiny else planned
            line: dict[str, Any] = {"number": number, **cell.as_json()}
            reason = cells.cannot(cell.lever, gpu=torch.cuda.is_available())
            if reason:
                print(json.dumps({**line, "skipped": reason}), file=out, flush=True)
                continue
            print(json.dumps({**line, "begun": True}), file=out, flush=True)
            started = time.perf_counter()
            try:
                forget()
                job, load = job_of(cell, Path(scratch), loads)
                clock, said = run_cell(cell, job)
                line |= {"said": said, **figures(cell, job, load, clock, gpu_peak())}
                line |= planned_figures(cell, job, load)
            except Exception as error:  # one cell that cannot run must not take the others along
                traceback.print_exc()
                line["error"] = f"{type(error).__name__}: {error}"[:600]
            line["seconds"] = time.perf_counter() - started
            print(json.dumps(line), file=out, flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
