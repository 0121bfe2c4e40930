"""Footprints of configurations: worked out once for each model, method and batch, and kept in the cache."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from tunewright.errors import ConfigError, TunewrightError, first_line
from tunewright.files import write_json
from tunewright.plan.footprint import Batch, Footprint, Pass, Weights
from tunewright.trainer.model.config_json import model_numbers
from tunewright.trainer.model.load import quiet_libraries
from tunewright.trainer.model.model_folder import cache_folder
from tunewright.trees import digest, plain

if TYPE_CHECKING:
    from torch import nn

FORMAT = 3  # of the kept files, and of what is counted in them
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def find_footprint(config: DictConfig, kind: str, batches: Sequence[Batch]) -> Footprint | None:
    """Return what was found out before, of all these batches, without importing torch.

    A `problem` is one of these batches.

    Args:
        kind: "cpu", "cuda" or "rocm".

    Raises:
        ConfigError, StorageError: see `model_numbers`.
    """
    found = _read(_file(config, kind))
    if found is None or not found.covers(batches):
        return None
    return found if {*found.failed} & {*batches} else replace(found, problem=None)


def make_footprint(config: DictConfig, kind: str, batches: Sequence[Batch]) -> Footprint:
    """Find out what batches hold and compute, which imports torch and transformers, and keep it.

    Where an architecture cannot run without values, a pass is missing, and there is a `problem`.

    Raises:
        ConfigError, StorageError: the model's config.json cannot be had or used.
    """
    file = _file(config, kind)
    found = _read(file)
    missing = [batch for batch in dict.fromkeys(batches) if found is None or not found.covers([batch])]
    if found is None or missing:
        new = work_out(config, kind, missing)
        found = _both(_read(file), new)  # others may have added to it meanwhile
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found.as_json())
    return found


def _both(before: Footprint | None, new: Footprint) -> Footprint:
    """Return a footprint with what was kept of other batches."""
    if before is None:
        return new
    known = {*(one.batch for one in new.passes), *new.failed}
    return replace(
        new,
        passes=[one for one in before.passes if one.batch not in known] + new.passes,
        failed=(*(batch for batch in before.failed if batch not in known), *new.failed),
        problem=new.problem or before.problem,
    )


def _file(config: DictConfig, kind: str) -> Path:
    train = config.train
    settings = [
        plain(config.method),
        config.model.dtype.value,
        config.model.trust_remote_code and config.model.path,
        train.cross_entropy.value,
        train.loss is not None,
        train.router_aux_loss,
        train.neftune_alpha is not None,
    ]
    key = digest([FORMAT, [_version(name) for name in LIBRARIES], model_numbers(config), settings, kind])
    return cache_folder(config.data.cache_dir) / "footprints" / f"{key}.json"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # bitsandbytes, where nothing is quantised
        return None


def _read(file: Path) -> Footprint | None:
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # there is none, or half of one
        return Footprint.from_json(json.loads(file.read_text(encoding="utf-8")))
    return None


def work_out(config: DictConfig, kind: str, batches: Sequence[Batch], *, every_layer: bool = False) -> Footprint:
    """Find it out, with all layers run or with those that stand for the others.

    Raises:
        ConfigError, StorageError: see `make_footprint`.
    """
    from tunewright.trainer.footprint.fake_model import make_fake
    from tunewright.trainer.footprint.fake_step import FakeStep
    from tunewright.trainer.footprint.repetition import keep_only, kept_layers, kind_of
    from tunewright.trainer.model.layers import decoder_layers
    from tunewright.trainer.model.planned_device import PlannedDevice

    quiet_libraries()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it tells of problems with a trace
    device = "cpu" if kind == "cpu" else "cuda"
    passes: list[Pass] = []
    failed: list[Batch] = []
    weights, problem = None, None
    for padded in sorted({batch.padded for batch in batches} or {not config.train.padding_free}):
        config = config.copy()
        config.train.padding_free = not padded
        model, ready = _built(config, device)
        layers = decoder_layers(model)
        weights = weigh(model, layers)
        kept, repeated = kept_layers([kind_of(layer, number) for number, layer in enumerate(layers)])
        if every_layer:
            kept, repeated = list(range(len(layers))), []
        keep_only(model, layers, kept)
        mode = PlannedDevice(device)
        tensors = make_fake(model, mode)
        own_loss = config.train.loss is not None
        step = FakeStep(mode, model, tensors, ready, layers, repeated, own_loss=own_loss)
        for batch in sorted((batch for batch in batches if batch.padded == padded), key=lambda one: one.recompute):
            try:
                passes.append(step.run(batch))
            except Exception as error:  # of a model's own code: whatever it does that needs values
                failed.append(batch)
                problem = f"{type(error).__name__}: {first_line(error)}"
    assert weights is not None
    return Footprint(kind, weights, passes, tuple(failed), problem)


def _built(config: DictConfig, device: str) -> Any:
    from tunewright.trainer.footprint.fake_model import meta_model

    try:
        return meta_model(config, device)
    except TunewrightError:
        raise
    except Exception as error:  # of PEFT or of a model's own code, which would end the training too
        raise ConfigError(
            f"`model.path` is '{config.model.path}', which cannot be made ready for method={config.method.name}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def weigh(model: Any, layers: nn.ModuleList) -> Weights:
    """Count the weights of an adapted model on the meta device."""
    import torch

    from tunewright.trainer.flops import shape_of

    parameters = list(model.parameters())
    sizes = {id(parameter): shape_of(parameter).numel() for parameter in parameters}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    inside = [sum(sizes[id(parameter)] for parameter in layer.parameters()) for layer in layers]
    hidden = int(model.config.get_text_config().hidden_size)
    # transformers fills in 10 x hidden for `stage3_param_persistence_threshold` of "auto".
    small = sum(size for size in sizes.values() if size <= 10 * hidden)
    head = model.get_output_embeddings()
    packed = sum(_state_bytes(parameter) for parameter in frozen) + sum(
        _int8_scales(module) for module in model.modules()
    )
    return Weights(
        trained=sum(sizes[id(parameter)] for parameter in trained),
        frozen=sum(sizes[id(parameter)] for parameter in frozen),
        frozen_bytes=sum(p.nbytes for p in frozen) + sum(b.nbytes for b in model.buffers()) + packed,
        itemsize=trained[0].element_size() if trained else torch.float32.itemsize,
        layers=inside,
        outside=sum(sizes.values()) - sum(inside),
        small=small,
        hidden=hidden,
        shapes=[(list(shape), count) for shape, count in Counter(tuple(p.shape) for p in trained).items()],
        head=0 if head is None else sum(shape_of(parameter).numel() for parameter in head.parameters()),
    )


def _state_bytes(parameter: Any) -> int:
    """Return the bytes of a 4-bit weight's scales."""
    state = getattr(parameter, "quant_state", None)
    states = [] if state is None else [state, *([state.state2] if state.state2 is not None else [])]
    tensors = [tensor for one in states for tensor in (one.absmax, one.code, one.offset) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors)


def _int8_scales(module: Any) -> int:
    scales = getattr(getattr(module, "state", None), "SCB", None)
    return 0 if scales is None else int(scales.nbytes)
