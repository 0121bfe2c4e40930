"""The result of a training: saved, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tunewright.errors import StorageError
from tunewright.trainer.methods.lora import save_as_plain_lora, starts_as_pissa


def save_result(trainer: Any, method: Any, run: Path, folder: Path) -> None:
    """Save what was trained, and the tokenizer. Every rank has to call it."""
    trainer.save_model(str(folder))
    if starts_as_pissa(method) and trainer.is_world_process_zero():
        save_as_plain_lora(trainer.accelerator.unwrap_model(trainer.model), run, folder)
    trainer.accelerator.wait_for_everyone()


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
