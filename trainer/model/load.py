"""From a model's folder to its weights in memory."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.config.schema import Dtype, ModelConfig
from tunewright.trainer.model.tokenizer import from_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
    `device`, where it is a GPU, is what the weights are read to: they never exist as a whole in the host's memory.
    Under ZeRO-3 they are partitioned while they load, provided that `TrainingArguments` exist already.

    Raises:
        StorageError: a weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    from tunewright.trainer.model.weights_check import check_weights

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention or _padded_attention(path, model)}
    if method is not None and method.name == "qlora":
        from tunewright.trainer.model.quantization import quantization_config

        options["quantization_config"] = quantization_config(method, dtype)
    if model.random_weights:
        return _draw(path, model, device, options | _placed(device, options))
    options |= _placed(device, options)
    loaded = from_folder(AutoModelForCausalLM.from_pretrained, path, model, **options)
    check_weights(loaded, path, device)
    return loaded  # type: ignore[no-any-return]


def _placed(device: torch.device | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the option that has each rank read weights straight to its own device.

    On a CPU there is nothing to say, but that quantisation happens there. ZeRO-3 places weights itself.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    if "quantization_config" in options:
        return {"device_map": {"": device if device is not None else "cpu"}}
    if device is None or device.type == "cpu" or is_deepspeed_zero3_enabled():
        return {}
    # transformers compares it with the device of the arguments, which has its number.
    numbered = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    return {"device_map": {"": numbered}}


def _draw(path: Path, model: ModelConfig, device: torch.device | None, options: dict[str, Any]) -> PreTrainedModel:
    """Make a model whose weights are drawn on the device that trains, the same ones each time on the same device.

    Quantised ones are drawn first and then take the way that weights from a file take.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_folder(AutoConfig.from_pretrained, path, model)
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

    from tunewright.trainer.model.padding_free import padded_implementation

    config = from_folder(AutoConfig.from_pretrained, path, model)
    known = AutoModelForCausalLM._model_mapping
    return padded_implementation(config, known[type(config)]) if type(config) in known else "sdpa"


def quiet_libraries() -> None:
    """Keep progress bars and notices of libraries out of what is said to the user."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
