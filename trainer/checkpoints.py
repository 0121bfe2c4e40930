"""What a checkpoint or result of an adapter needs beyond what PEFT and transformers write and read by themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tunewright.config.schema import LoraInit
from tunewright.errors import ConfigError

PROMPT_ENCODER = "prompt_encoder.safetensors"
PISSA_START = "pissa_start"
ONLY_WEIGHTS, ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def in_format(model: Any, dtype: torch.dtype) -> None:
    """Turn the trained parameters to `dtype`.

    TRL turns the adapters of a quantised base to bfloat16, also where everything else computes in float32, and PEFT
    those that it reads to float32, also where everything else computes in bfloat16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


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


@contextmanager
def plain_data_only(*, deepspeed: bool, trusted: bool) -> Iterator[None]:
    """Let no checkpoint run code while it is read: pickles may name tensors, plain values and DeepSpeed's own classes.

    DeepSpeed (0.19) reads its checkpoints with `weights_only=False`, so whatever a pickle names would be called.
    PyTorch has a variable over that, which each `torch.load` looks at, and another for the opposite.

    Raises:
        ConfigError: a checkpoint names something else, and is not `trusted`.
    """
    if trusted:
        yield
        return
    before = {name: os.environ.pop(name, None) for name in (ONLY_WEIGHTS, ANYTHING)}
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes() if deepspeed else []):
            yield
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ConfigError(
            f"The checkpoint is not plain data{f': it names {named[1]}' if named else ''}, and reading it would run "
            f"code that it brings. Write trust=true if you know that it comes from nobody else."
        ) from error
    finally:
        del os.environ[ONLY_WEIGHTS]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _deepspeed_classes() -> list[Any]:
    """Return the classes whose instances DeepSpeed puts into its checkpoints; none does anything while it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def starts_as_pissa(method: Any) -> bool:
    return method.name == "lora" and method.init in (LoraInit.pissa, LoraInit.pissa_niter_16) and not method.adapter


def keep_pissa_start(model: PeftModel, run: Path) -> None:
    """Write down the components that PiSSA moved from the base into the adapter."""
    config = model.active_peft_config
    asked, config.init_lora_weights = config.init_lora_weights, True  # as PEFT wants it for what is converted from
    model.save_pretrained(str(run / PISSA_START))
    config.init_lora_weights = asked


def save_as_plain_lora(model: PeftModel, run: Path, folder: Path) -> None:
    """Save a PiSSA adapter as one for the base as it was: of twice the rank, its start subtracted.

    PiSSA trains beside a changed base (https://arxiv.org/abs/2404.02948); nobody who loads the result has that one.
    """
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(run / PISSA_START))
