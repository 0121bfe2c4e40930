"""The result of a training: saved, and read back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tunewright.errors import StorageError
from tunewright.files import bring_to_disk, make_readable
from tunewright.folders import set_aside
from tunewright.run_folder import RunDir
from tunewright.space import storing
from tunewright.trainer.disk_room import DiskRoom
from tunewright.trainer.finiteness import check_finite
from tunewright.trainer.methods.lora import save_as_plain_lora, starts_as_pissa

PART = ".final.part"


def save_result(trainer: Any, method: Any, run: RunDir, room: DiskRoom) -> None:
    """Save what was trained, and the tokenizer, as `final/`, which is there once it is whole and was read back.

    Every rank has to call it.

    Raises:
        StorageError: the disk refuses, or what was saved is not what was trained.
        NumericError: what was trained is not finite.
    """
    check_finite(trainer)
    staging, leads = run.path / PART, trainer.is_world_process_zero()
    if leads:
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    room.check_result()
    try:
        with storing(run.path, "The result", needed=room.result, advice=room.advice):
            trainer.save_model(str(staging))
            if starts_as_pissa(method) and leads:
                save_as_plain_lora(trainer.accelerator.unwrap_model(trainer.model), run.path, staging)
            trainer.accelerator.wait_for_everyone()
            if leads:
                _finish(staging, run)
    finally:
        if leads:
            shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _finish(staging: Path, run: RunDir) -> None:
    """Give a saved result its name."""
    make_readable(staging)
    verify_saved(staging)
    for path in staging.rglob("*"):
        bring_to_disk(path)
    set_aside([run.final] if run.final.exists() else [], run.path.parent, run.path.name)
    os.rename(staging, run.final)
    bring_to_disk(run.path)


def verify_saved(folder: Path) -> None:
    """Read back what was saved: weights are there, not empty, and finite.

    Raises:
        StorageError: otherwise. Under ZeRO-3 an adapter of empty tensors has been saved silently before.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StorageError(f"{folder} holds no weights.")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names:
                tensor = tensors.get_tensor(name)
                if tensor.numel() == 0 or not torch.isfinite(tensor.float()).all():
                    problem = "is empty" if tensor.numel() == 0 else "has values that are not finite"
                    raise StorageError(f"{file}: the saved tensor {name} {problem}.")
            if not names:
                raise StorageError(f"{file} holds no tensor.")
