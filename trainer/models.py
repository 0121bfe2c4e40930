"""From the `model` group to a tokenizer and weights: built here, from the Hub, from ModelScope, or from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError, StorageError
from launch.schema import Dtype, ModelConfig, Source
from trainer import tiny

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def cache_folder(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser()


def resolve_model(model: ModelConfig, cache_dir: str, progress: tiny.Progress | None = None) -> str:
    """Return what `from_pretrained` takes: a folder, or a Hub id. Builds or downloads what must come first.

    Raises:
        ConfigError: the folder does not exist, or ModelScope's package is not installed.
    """
    if model.source is Source.embedded:
        return str(tiny.build_tiny(cache_folder(cache_dir), progress or (lambda step, steps, loss: None)))
    if model.source is Source.modelscope:
        try:
            from modelscope import snapshot_download
        except ImportError as error:
            raise ConfigError(
                "`model.source=modelscope` needs the modelscope package: pip install 'tunewright[modelscope]'."
            ) from error
        return str(snapshot_download(model.path, revision=model.revision))
    if model.source is Source.folder and not Path(model.path).expanduser().is_dir():
        raise ConfigError(f"`model.path` is '{model.path}', but there is no such folder.")
    return str(Path(model.path).expanduser()) if model.source is Source.folder else model.path


def load_tokenizer(path: str, model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing pad token becomes the end-of-text token, which padding masks anyway."""
    from transformers import AutoTokenizer

    tokenizer = _from_hub(AutoTokenizer.from_pretrained, path, model)
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
    path: str,
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    attention: str = "sdpa",
    method: Any = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load weights in `dtype`, quantised where `method` is QLoRA.

    Under ZeRO-3 the weights are partitioned while they load, provided that `TrainingArguments` exist already.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if method is not None and method.name == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.quant_type,
            bnb_4bit_use_double_quant=method.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        # Quantisation happens on the device that trains: each rank loads onto its own.
        options["device_map"] = {"": device if device is not None else "cpu"}
    return _from_hub(AutoModelForCausalLM.from_pretrained, path, model, **options)  # type: ignore[no-any-return]


def _from_hub(load: Callable[..., Any], path: str, model: ModelConfig, **options: Any) -> Any:
    try:
        return load(path, revision=model.revision, trust_remote_code=model.trust_remote_code, **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(
            f"`model.path` is '{model.path}' (source {model.source.name}) and could not be loaded: {reason} "
            f"Use model=tiny, a folder (model=folder model.path=...), or model.source=modelscope."
        ) from error
