"""From the numbers of a config.json to an `Architecture` and to exact parameter counts, without any weight.

The model is built on the meta device, where tensors have shapes and no memory; what comes out is kept.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from tunewright.errors import ConfigError, first_line
from tunewright.files import write_json
from tunewright.plan.architecture import Architecture
from tunewright.trainer.model.config_json import model_numbers
from tunewright.trainer.model.load import quiet_libraries
from tunewright.trainer.model.model_folder import cache_folder, find_model
from tunewright.trees import digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FORMAT = 10  # of the kept files


def find_architecture(config: DictConfig) -> Architecture | None:
    """Return what was worked out of the model's config.json before, without importing torch.

    Raises:
        StorageError: see `model_numbers`.
    """
    return Architecture.read(_file(config, model_numbers(config)))


def make_architecture(config: DictConfig) -> Architecture:
    """Work out what is known of the model, which imports torch and transformers, and keep it.

    Raises:
        StorageError, ConfigError: the model's config.json cannot be had, or transformers cannot use it.
    """
    numbers = model_numbers(config)
    found = describe(_empty(config, numbers), ia3=_wants_ia3(config))
    file = _file(config, numbers)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found.as_json())
    return found


def _empty(config: DictConfig, numbers: dict[str, Any]) -> PreTrainedModel:
    quiet_libraries()
    return empty_model(hf_config(config, numbers), trust_remote_code=config.model.trust_remote_code)


def _file(config: DictConfig, numbers: dict[str, Any]) -> Path:
    key = digest([FORMAT, version("transformers"), version("peft"), numbers, _wants_ia3(config)])
    return cache_folder(config.data.cache_dir) / "architectures" / f"{key}.json"


def _wants_ia3(config: DictConfig) -> bool:
    """Whether to look up IA3's modules: PEFT, which knows them, takes a second or two to import."""
    return bool(config.method.name == "ia3")


def hf_config(config: DictConfig, numbers: dict[str, Any]) -> PreTrainedConfig:
    """Return transformers' configuration for the numbers of a config.json.

    Raises:
        ConfigError: a model type that this transformers does not know, or a number that it cannot be.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if config.model.trust_remote_code:  # the code lies beside the file
        return AutoConfig.from_pretrained(
            find_model(config.model, config.data.cache_dir) or config.model.path, trust_remote_code=True
        )
    try:
        return AutoConfig.for_model(**numbers)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        # Which number it is, is in the first line; what is wrong with it, in the second.
        told = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        raise ConfigError(
            f"`model.path` is '{config.model.path}', whose config.json transformers {version('transformers')} cannot "
            f"use: {told}"
        ) from error


def empty_model(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a causal language model on the meta device.

    Raises:
        ConfigError: the architecture is no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ConfigError(
            f"The model is a '{config.model_type}', which transformers cannot load as a causal language model."
        ) from error


def describe(model: PreTrainedModel, *, ia3: bool = True) -> Architecture:
    """Return what settings can name in a model, and what its attention allows; without `ia3` not what IA3 trains."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from tunewright.trainer.model.layers import decoder_layers
    from tunewright.trainer.model.linear_cross_entropy import fitting
    from tunewright.trainer.model.padding_free import padding_free_problem
    from tunewright.trainer.model.router_loss import own_coefficient

    def kind(module: nn.Module) -> str:
        if isinstance(module, (nn.Linear, Conv1D)):
            return "linear"
        return "embedding" if isinstance(module, nn.Embedding) else ""

    def sizes(module: nn.Module) -> list[int]:
        rows, columns = module.weight.shape
        return [columns, rows] if isinstance(module, Conv1D) else [rows, columns]

    names = {module: name for name, module in model.named_modules()}
    embedding, head, layers = model.get_input_embeddings(), model.get_output_embeddings(), decoder_layers(model)
    model_type, tables = model.config.model_type, [m for m in model.modules() if isinstance(m, nn.Embedding)]
    learnt = [table.num_embeddings for table in tables if table is not embedding]
    return Architecture(
        model_type=model_type,
        modules={name: kind(module) for name, module in model.named_modules() if name},
        sizes={name: sizes(module) for name, module in model.named_modules() if kind(module) == "linear"},
        head=names[head],
        embedding=names[embedding],
        vocabulary=embedding.weight.shape[0],
        layers=names[layers],
        num_layers=len(layers),
        tied=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
        padding_free_problem=padding_free_problem(model.config, type(model)),
        positions=min(learnt) if learnt and _learns_positions(model.config) else None,
        ia3=_ia3_modules(model_type) if ia3 else None,
        recomputes=bool(model.supports_gradient_checkpointing),
        heads=fitting(model),
        router_loss=own_coefficient(model),
        parameters=sum(weight.numel() for weight in model.parameters()),
    )


def _ia3_modules(model_type: str) -> list[list[str]] | None:
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3

    return [list(IA3[model_type]), list(FEEDFORWARD.get(model_type, []))] if model_type in IA3 else None


def _learns_positions(config: PreTrainedConfig) -> bool:
    """Tell whether positions are looked up in a table, as in GPT-2 and OPT, rather than computed."""
    return not hasattr(config, "rope_parameters") and hasattr(config, "max_position_embeddings")


def count(config: DictConfig, model: PreTrainedModel) -> tuple[int, int]:
    """Return (trainable, total) parameters of a model on the meta device once the method has adapted it."""
    from tunewright.trainer.methods import adapt, parameter_counts

    return parameter_counts(adapt(model, config.method))
