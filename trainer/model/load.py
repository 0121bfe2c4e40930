"""From the `model` group to a folder, and from the folder to a tokenizer and weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.config.schema import Dtype, ModelConfig, Source
from tunewright.errors import ConfigError, StorageError
from tunewright.trainer.model import download, tiny
from tunewright.trainer.model.tokenizer import install_template, set_end_of_turn, stop_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def cache_folder(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser()


def find_model(model: ModelConfig, cache_dir: str) -> Path | None:
    """Return the folder of a model that is on this machine already, without using the network or torch.

    Raises:
        ConfigError: `model.source=folder` and there is no such folder, or no weights in it.
    """
    if model.source is Source.embedded:
        return tiny.tiny_folder(cache_folder(cache_dir)) if tiny.is_built(cache_folder(cache_dir)) else None
    if model.source is Source.folder:
        folder = Path(model.path).expanduser()
        if not (download.has_weights(folder) or (model.random_weights and (folder / "config.json").is_file())):
            problem = "holds no model weights" if folder.is_dir() else "does not exist"
            raise ConfigError(f"`model.path` is '{model.path}', a folder that {problem}.")
        return folder
    if model.random_weights:
        config = download.find_config(model)
        return config.parent if config else None
    return download.find_hub(model) if model.source is Source.hub else None


def fetch_model(
    model: ModelConfig, cache_dir: str, progress: tiny.Progress, *, offline: bool = False, weights: bool = True
) -> Path:
    """Return the folder of a model, built or downloaded first where it is not there yet.

    Without `weights`, or where they are drawn, the files of the tokenizer are enough.
    """
    found = find_model(model, cache_dir)
    if found:
        return found
    if model.source is Source.embedded:
        return tiny.build_tiny(cache_folder(cache_dir), progress)
    fetch = download.fetch_modelscope if model.source is Source.modelscope else download.fetch_hub
    return fetch(model, offline=offline, weights=weights and not model.random_weights)


def load_tokenizer(path: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the chosen chat template, ready to pad and to end a turn.

    A missing pad token becomes the end token, which padding masks anyway.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, path, model)
    if model.template:
        install_template(tokenizer, model.template)
    if tokenizer.chat_template:
        set_end_of_turn(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def torch_dtype(dtype: Dtype, device_type: str) -> torch.dtype:
    """Return the torch dtype of `model.dtype` on this kind of device."""
    import torch

    if dtype is Dtype.auto:
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return torch.bfloat16 if dtype is Dtype.bfloat16 else torch.float32


def load_model(
    path: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    attention: str | None = None,
    method: Any = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load weights in `dtype`, quantised where `method` is QLoRA.

    `attention` is what flat rows need; without it the model is for padded batches and generation.
    Under ZeRO-3 the weights are partitioned while they load, provided that `TrainingArguments` exist already.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention or _padded_attention(path, model)}
    if method is not None and method.name == "qlora":
        from tunewright.trainer.model.quantization import quantization_config

        options["quantization_config"] = quantization_config(method, dtype)
        # Quantisation happens on the device that trains: each rank loads onto its own.
        options["device_map"] = {"": device if device is not None else "cpu"}
    if model.random_weights:
        return _draw(path, model, device, options)
    return _load(AutoModelForCausalLM.from_pretrained, path, model, **options)  # type: ignore[no-any-return]


def _draw(path: Path, model: ModelConfig, device: torch.device | None, options: dict[str, Any]) -> PreTrainedModel:
    """Make a model whose weights are drawn on the device that trains, the same ones each time on the same device.

    Quantised ones are drawn first and then take the way that weights from a file take.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(AutoConfig.from_pretrained, path, model)
    device = device or torch.device("cpu")
    gpus = [device] if device.type == "cuda" else []
    drawn = {key: options[key] for key in ("dtype", "attn_implementation")}
    with torch.random.fork_rng(devices=gpus), device:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code, **drawn)
    if "quantization_config" not in options:
        return made  # type: ignore[no-any-return]
    return type(made).from_pretrained(None, config=config, state_dict=made.state_dict(), **options)  # type: ignore[no-any-return]


def _padded_attention(path: Path, model: ModelConfig) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunewright.trainer.model.attention import padded_implementation

    config = _load(AutoConfig.from_pretrained, path, model)
    known = AutoModelForCausalLM._model_mapping
    return padded_implementation(config, known[type(config)]) if type(config) in known else "sdpa"


def quiet_libraries() -> None:
    """Keep progress bars and notices of libraries out of what is said to the user."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the model's own and the one with which the chat template ends a turn."""
    known = model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [known] if known is not None else []
    return sorted({*ids, *stop_ids(tokenizer)})


def _load(load: Callable[..., Any], path: Path, model: ModelConfig, **options: Any) -> Any:
    try:
        return load(str(path), trust_remote_code=model.trust_remote_code, **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(f"`model.path` is '{model.path}' and could not be loaded from {path}: {reason}") from error
