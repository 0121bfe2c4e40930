"""Checkpoints are read as plain data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch

from tunewright.errors import StorageError

ONLY_WEIGHTS, ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def plain_data_only(*, deepspeed: bool, trusted: bool) -> Iterator[None]:
    """Let no checkpoint run code while it is read: pickles may name tensors, plain values and DeepSpeed's own classes.

    DeepSpeed (0.19) reads its checkpoints with `weights_only=False`, so whatever a pickle names would be called.
    PyTorch has a variable over that, which each `torch.load` looks at, and another for the opposite.

    Raises:
        StorageError: a checkpoint names something else, and is not `trusted`.
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
        raise StorageError(
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
