"""What DeepSpeed makes of a universal checkpoint under ZeRO-3, before and after `after_loading`, as JSON; and whether a
checkpoint that would run code is converted.

python -m tests.trainer.universal_faults FOLDER, in a process of its own: DeepSpeed wants a process group.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch


def engine(*, universal: bool) -> Any:
    import deepspeed

    from tunewright.trainer.universal import name_parameters

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    name_parameters(optimizer, model)
    settings = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def seen(found: Any) -> dict[str, Any]:
    optimizer = found.optimizer.optimizer
    steps = {id(state["step"]) for state in optimizer.state.values()}
    return {"steps": len(steps), "weight_decay": [group["weight_decay"] for group in optimizer.param_groups]}


class Planted:
    """What a pickle holds that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def main(folder: Path) -> None:
    from tunewright.errors import StorageError
    from tunewright.plan.conversion import Way
    from tunewright.trainer.process_group import join
    from tunewright.trainer.universal import after_loading, convert

    state = join("deepspeed", 5.0)
    trained = engine(universal=False)
    trained.backward(trained(torch.ones(1, 4)).sum())
    trained.step()
    checkpoint = folder / "checkpoint-1"
    trained.save_checkpoint(str(checkpoint), tag="global_step1")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}', encoding="utf-8")
    universal = convert(checkpoint, Way.for_deepspeed, trusted=False)
    loaded = engine(universal=True)
    loaded.load_checkpoint(str(universal))
    told: dict[str, Any] = {"saved": seen(trained), "loaded": seen(loaded)}
    after_loading(loaded, universal)
    told["mended"] = seen(loaded)
    shutil.rmtree(universal)
    for file in checkpoint.glob("*/*_optim_states.pt"):
        torch.save({"optimizer_state_dict": Planted(folder / "canary")}, file)
    try:
        convert(checkpoint, Way.for_deepspeed, trusted=False)
    except StorageError as error:
        told["refused"] = str(error)
    print(json.dumps(told), flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
