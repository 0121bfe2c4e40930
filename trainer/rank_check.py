"""One rank that does nothing but meet the others: python -m tunewright.trainer.rank_check FOLDER

Started as training's ranks are, it writes each thing that it has done as a line of JSON into FOLDER/rankN.jsonl, with
the time, so that whoever started it can tell which rank is behind, and at what.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tunewright.errors import TunewrightError, first_line
from tunewright.ranks import die_with_parent, leave, rank

STAGES = ("started", "imported", "met", "reduced", "measured")
LOADED = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}  # bytes of the all-reduce that is timed
ROUNDS = 5
SECONDS = 0.3  # that each rank multiplies, all of them at once
MINUTES = 10.0  # that a rank waits, longer than whoever started it


def main(folder: Path) -> int:
    """Meet the other ranks, sum something with them, and tell how fast it went."""
    die_with_parent()
    # Asked by the one who has waited long enough: where is it?
    faulthandler.register(signal.SIGUSR2, file=(folder / f"rank{rank()}.stack").open("w"))
    tell = Log(folder / f"rank{rank()}.jsonl")
    tell("started", pid=os.getpid(), parent=os.getppid())
    try:
        import torch

        from tunewright.trainer.hardware import drain, product_rates
        from tunewright.trainer.process_group import all_gather, join

        tell("imported")
        state = join("ddp", MINUTES, lambda line: None)
        tell("met")
        device = state.device
        all_gather([0.0], device)
        tell("reduced")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rate = max(max(rates) for rates in product_rates(device, dtype, SECONDS))
        message = torch.ones(LOADED[device.type], dtype=torch.uint8, device=device).view(torch.float32).zero_()
        seconds = []
        for _ in range(ROUNDS):
            all_gather([0.0], device)  # they begin together
            drain(device)
            begun = time.perf_counter()
            torch.distributed.all_reduce(message)
            drain(device)
            seconds.append(time.perf_counter() - begun)
        size = message.numel() * message.element_size()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        tell("measured", seconds=min(seconds), bytes=size, rate=rate, gpu=name)
        state.destroy_process_group()
    except TunewrightError as error:
        tell("failed", error=str(error))
        return error.exit_code
    except Exception as error:  # NCCL and gloo raise what they like; it is told as it is
        tell("failed", error=f"{type(error).__name__}: {first_line(error)}")
        raise
    return 0


class Log:
    """Writes what this rank has done, each at once."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, stage: str, **figures: Any) -> None:
        with self.file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"stage": stage, "time": time.time(), **figures}) + "\n")


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
