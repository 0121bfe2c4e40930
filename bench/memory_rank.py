"""One rank of bench/memory.py: trains cell after cell and writes down the most bytes that PyTorch gave out in each.

Not to be called by hand: python bench/memory_rank.py CELLS.json RESULTS.jsonl
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent


def counter() -> Any:
    """Build what counts, once on this machine, and return it."""
    from torch.utils.cpp_extension import load

    return load("tunewright_count_cpu", [str(BENCH / "count_cpu.cpp")], extra_cflags=["-O2"])


def resident() -> tuple[int, int]:
    """Return the bytes that this process has in memory now, and the most since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def callback(count: Any, seen: dict[str, list[int]]) -> Any:
    """Return a callback that notes the peak of each step, before and while the optimiser steps."""
    from transformers import TrainerCallback

    class Peaks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gc.collect()
            forget_peak()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen["rest"].append(count.held())
            count.reset()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen["pass"].append(count.most())
            count.reset()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen["step"].append(count.most())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            seen["rss"].append(resident()[1])

    return Peaks()


def run_cell(cell: dict[str, Any], state: Any, count: Any) -> dict[str, Any]:
    """Train a cell's two steps, and return this rank's figures in bytes."""
    from accelerate.state import AcceleratorState

    from tunewright.config.compose import compose_config
    from tunewright.launch.train import check_all
    from tunewright.plan.devices import find_devices
    from tunewright.run_folder import RunDir
    from tunewright.trainer.console import Printer
    from tunewright.trainer.prepared import prepare
    from tunewright.trainer.training import train

    AcceleratorState._reset_state()
    gc.collect()
    config = compose_config(cell["overrides"])
    check_all(config, find_devices())
    prepared = prepare(config, lambda line: None)
    before, (resident_before, _) = count.held(), resident()
    seen: dict[str, list[int]] = {"rest": [], "pass": [], "step": [], "rss": []}
    folder = RunDir(Path(config.output_root) / config.name)
    train(config, folder, prepared, state, Printer(lambda line: None), callbacks=[callback(count, seen)])
    figures = {key: max(values[-1:], default=0) - before for key, values in seen.items() if key != "rss"}
    return {**figures, "rss": seen["rss"][-1] - resident_before}


def main() -> None:
    cells, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    import torch

    count = counter()
    count.install()
    from tunewright.claims import Claim, prepare_folder
    from tunewright.config.compose import compose_config
    from tunewright.config.deepspeed_file import deepspeed_file
    from tunewright.run_folder import RunDir
    from tunewright.trainer.model.load import quiet_libraries
    from tunewright.trainer.process_group import join

    quiet_libraries()
    rank = int(os.environ.get("RANK", "0"))
    first = compose_config(cells[0]["overrides"])
    if first.strategy.deepspeed:  # as accelerate's launcher says it; all cells here are of one strategy
        file = str(deepspeed_file(first).path)
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
    state = join(first.strategy.launcher.name, 10)
    for cell in cells:
        if rank == 0:
            config = compose_config(cell["overrides"])
            folder = RunDir(Path(config.output_root) / config.name)
            prepare_folder(config, Claim(folder, None))
        if state.num_processes > 1:
            torch.distributed.barrier()
        started = time.perf_counter()
        try:
            figures: dict[str, Any] = run_cell(cell, state, count)
        except Exception as error:
            traceback.print_exc()
            figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
        line = {"cell": cell["id"], "rank": rank, "seconds": round(time.perf_counter() - started, 1), **figures}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if "failed" in figures and state.num_processes > 1:
            os._exit(1)  # the others may wait for this one
    os._exit(0)  # a rank over gloo aborts now and then at the interpreter's end (torch 2.13)


if __name__ == "__main__":
    main()
