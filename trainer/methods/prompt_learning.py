"""What prompt tuning, P-tuning and prefix tuning share: how what makes the virtual tokens is saved and read back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

PROMPT_ENCODER = "prompt_encoder.safetensors"


def learns_prompt(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


@contextmanager
def prompt_for_saving(model: PeftModel) -> Iterator[None]:
    """Let a prompt that ZeRO-3 has split be saved; every rank has to enter.

    PEFT (0.21) makes the virtual tokens while it saves, on the first rank alone, where the network's weights are
    gathered from the others: it would wait for them for ever. Here all ranks make them, and PEFT is given the result.
    """
    with torch.no_grad():
        prompt = model.get_prompt_embedding_to_save(model.active_adapter)
    model.get_prompt_embedding_to_save = lambda adapter_name: prompt
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save  # the class's own is there again


def save_prompt_encoder(model: Any, folder: Path) -> None:
    """Write the network that makes the virtual tokens: PEFT saves what it makes alone, which cannot be trained on."""
    if learns_prompt(model):
        save_file(model.prompt_encoder[model.active_adapter].state_dict(), folder / PROMPT_ENCODER)


def load_prompt_encoder(model: Any, folder: Path) -> bool:
    """Read back what `save_prompt_encoder` wrote; return False where it wrote nothing.

    It takes the place of PEFT's `load_adapter`, which refuses the virtual tokens of a prefix with a projection.
    """
    file = folder / PROMPT_ENCODER
    if file.is_file():
        model.prompt_encoder[model.active_adapter].load_state_dict(load_file(file))
    return file.is_file()
