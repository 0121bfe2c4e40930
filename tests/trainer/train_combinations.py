"""What every rank of tests/trainer/test_support_table.py runs: short trainings of one strategy, one after another.

Started with `accelerate launch`, as the product starts its ranks, so that engines and collectives are the real ones;
many trainings in one start, so that the whole support table can be trained in minutes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from omegaconf import DictConfig

import tunewright.trainer.training
from tunewright.claims import Claim, prepare_folder
from tunewright.config.compose import load_config
from tunewright.launch.train import check_all
from tunewright.plan.devices import find_devices
from tunewright.run_folder import RunDir
from tunewright.trainer.console import Printer
from tunewright.trainer.prepared import prepare
from tunewright.trainer.process_group import join


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a copy of a parameter's bytes, put together where ZeRO-3 has split it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        around: Any = deepspeed.zero.GatheredParameters([parameter])
    else:
        around = nullcontext()
    with around:
        return parameter.detach().to("cpu", copy=True)


def train_one(config: DictConfig, state: Any) -> dict[str, Any]:
    """Train, and compare every parameter with what it was before."""
    check_all(config, find_devices())
    run = RunDir(Path(config.output_root) / config.name)
    if state.is_main_process:
        prepare_folder(config, Claim(run))
    state.wait_for_everyone()
    prepared = prepare(config, lambda line: None)
    seen: dict[str, Any] = {}
    adapt = tunewright.trainer.training.adapt

    def adapt_and_look(*args: Any) -> Any:
        model = adapt(*args)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        seen.update(model=model, trained=trained, before={n: whole(p) for n, p in model.named_parameters()})
        return model

    tunewright.trainer.training.adapt = adapt_and_look
    try:
        trainer = tunewright.trainer.training.train(config, run, prepared, state, Printer(lambda line: None))
    finally:
        tunewright.trainer.training.adapt = adapt
    after = {name: whole(parameter) for name, parameter in seen["model"].named_parameters()}
    before, trained = seen["before"], seen["trained"]
    moved = {name for name in after if not torch.equal(after[name].to(before[name].dtype), before[name])}
    manifest = run.read_manifest()
    return {
        "losses": [line["loss"] for line in map(json.loads, run.metrics.read_text().splitlines()) if "loss" in line],
        "trained": sorted(trained),
        "still": sorted(trained - moved),
        "disturbed": sorted(moved - trained),
        "names_kept": sorted(after) == sorted(before),
        "facts": manifest["distributed"],
        "fused": [group["fused"] for group in trainer.optimizer.param_groups],
        "ddp": [getattr(trainer.model_wrapped, key, None) for key in ("gradient_as_bucket_view", "broadcast_buffers")],
        "padding_free": bool(config.train.padding_free),
        "parameters": manifest["parameters"],
        "sizes": {name: list(tensor.shape) for name, tensor in before.items()},
        "status": manifest["status"],
    }


def main(folder: Path) -> None:
    names = sorted(folder.glob("*.yaml"))
    state = join(load_config(names[0]).strategy.launcher.name, 5)
    for file in names:
        config = load_config(file)
        try:
            result = train_one(config, state)
        except Exception:
            # The other ranks may wait for this one in a collective: nothing after it could be trusted.
            file.with_suffix(".json").write_text(json.dumps({"error": traceback.format_exc()}), encoding="utf-8")
            os._exit(1)
        if state.is_main_process:
            file.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")
        # The next training makes an accelerator of its own; the process group stays.
        AcceleratorState._reset_state(False)
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
