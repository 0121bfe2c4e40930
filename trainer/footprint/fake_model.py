"""The model that a configuration trains, of tensors without memory: built, quantised and adapted by the real code."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

from tunewright.config.method_schema import LoraInit
from tunewright.config.schema import CrossEntropy
from tunewright.trainer.methods import adapt
from tunewright.trainer.model import attention
from tunewright.trainer.model.config_json import model_numbers
from tunewright.trainer.model.linear_cross_entropy import add_linear_cross_entropy
from tunewright.trainer.model.load import torch_dtype
from tunewright.trainer.model.meta_model import hf_config
from tunewright.trainer.model.padding_free import padded_implementation
from tunewright.trainer.model.planned_device import PlannedDevice
from tunewright.trainer.model.ready import Ready, make_ready


def meta_model(config: DictConfig, device: str) -> tuple[Any, Ready]:
    """Return the adapted model on the meta device, and what the trainer has it compute its loss with.

    Args:
        device: "cpu" or "cuda", the kind that it is to train on.

    Raises:
        ConfigError, StorageError: the model's config.json cannot be had or used.
    """
    method, dtype = config.method, torch_dtype(config.model.dtype, device)
    if config.train.cross_entropy in (
        CrossEntropy.cut,
        CrossEntropy.cut_exact,
    ):  # a kernel that ours fits where it does
        config = config.copy()
        config.train.cross_entropy = CrossEntropy.tunewright
    numbers = hf_config(config, model_numbers(config))
    known = AutoModelForCausalLM._model_mapping
    if config.train.padding_free:
        implementation = attention.register()
    else:
        implementation = padded_implementation(numbers, known[type(numbers)]) if type(numbers) in known else "sdpa"
    options = {"dtype": dtype, "attn_implementation": implementation}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(numbers, trust_remote_code=config.model.trust_remote_code, **options)
        if method.name == "qlora":
            from tunewright.trainer.footprint.fake_quantization import quantise

            quantise(model, method, dtype)
        model = adapt(model, _drawn(method))
    ready = make_ready(model, config, dtype, gpu=device != "cpu", own_loss=config.train.loss is not None)
    if ready.head == "trl":
        _add_trl_head(model, device)
    return model.train(), ready


def _add_trl_head(model: Any, device: str) -> None:
    """Do what TRL's trainer does. On a GPU its head is a kernel of Triton, which takes chunks as ours does."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if device == "cpu":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        return
    add_linear_cross_entropy(base)
    plain_forward = base.forward

    def forward(*args: Any, fused_lm_head: bool, **kwargs: Any) -> SimpleNamespace:
        output = plain_forward(*args, loss_sum=True, **kwargs)
        return SimpleNamespace(log_probs=-output.loss_sum, aux_loss=output.aux_loss)

    base.forward = forward


def _drawn(method: Any) -> Any:
    """Return a method whose adapters start as drawn: what they start from takes no memory later, but values now."""
    if "init" not in method:
        return method
    drawn = method.copy()
    drawn.init = LoraInit.default
    return drawn


def make_fake(model: nn.Module, mode: PlannedDevice) -> list[torch.Tensor]:
    """Put fake tensors in the place of a model's meta tensors, and return them."""
    made: dict[int, torch.Tensor] = {}
    kept = []  # so that no two of them have one id

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made:
            kept.append(tensor)
            made[id(tensor)] = new = _fake(tensor, mode)
            for key, value in vars(tensor).items():
                setattr(new, key, _mapped(value, fake))
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})  # type: ignore[arg-type]
        for key, value in vars(module).items():
            if not key.startswith("_"):
                vars(module)[key] = _mapped(value, fake)
    return list(made.values())


def _fake(tensor: torch.Tensor, mode: PlannedDevice) -> torch.Tensor:
    with mode:
        new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        if not isinstance(tensor, nn.Parameter):
            return new
        parameter = nn.Parameter(new, tensor.requires_grad)
    if type(tensor) is not nn.Parameter:  # PEFT knows bitsandbytes' by the name of their class
        parameter.__class__ = type(type(tensor).__name__, (FakeTensor,), {})
    return parameter


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a value with its tensors changed: itself, those of a mapping, or of an object of bitsandbytes."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict and any(isinstance(item, torch.Tensor) for item in value.values()):
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value).__module__.startswith("bitsandbytes.") and not isinstance(value, nn.Module):
        for key, item in vars(value).items():
            vars(value)[key] = _mapped(item, change)
    return value
