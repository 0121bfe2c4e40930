"""An adapter on a base without weights: which tensors it changes, and what PEFT makes of each layer when asked.

Tensors keep the names that they have in the base's files, which transformers may load under other ones.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunewright.deliver.base_tensors import Checkpoint
from tunewright.errors import ConfigError, StorageError

ADAPTER = "default"
# Ways to begin a LoRA that change the base too: the saved adapter does not belong to the base that is on disk.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapted:
    """A base model without weights, an adapter on it, and the names of its tensors in the base's files."""

    def __init__(self, folder: Path, base: Any, checkpoint: Checkpoint) -> None:
        """Put the adapter in `folder` on `base`, a model on the meta device.

        Raises:
            ConfigError: the adapter is of a kind that cannot be merged.
            StorageError: adapter and base do not fit each other.
        """
        self.checkpoint = checkpoint
        self._base = base
        self._buffers = {name for name, _ in base.named_buffers(remove_duplicate=False)}
        self.names = _checkpoint_names(base, checkpoint)  # the model's name of a tensor -> the file's
        self.tied: dict[str, str] = dict(base.all_tied_weights_keys or {})  # head -> embedding
        self.model = _with_adapter(folder, base)
        self.layers = _outermost(self.model.get_base_model())
        # Tensors that the adapter holds whole, such as every bias under `bias="all"`.
        self.replaced = {
            name: tensor
            for name, tensor in self.model.get_base_model().named_parameters()
            if not tensor.is_meta and self.layer_of(name) is None
        }
        if not self.layers and not self.replaced:
            raise ConfigError(f"{folder} holds no layer that can be merged into a base model.")
        self._check_found()

    def layer_of(self, name: str) -> str | None:
        """Return the path of the adapted layer in which the model's tensor lies, or None."""
        parts = name.split(".")
        return next((path for end in range(len(parts)) if (path := ".".join(parts[:end])) in self.layers), None)

    def rounded(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the model holds the tensor of this name in `dtype`, and not in the files' own format.

        Buffers, and what an architecture keeps in float32, lose what they are for when they are rounded: the biases by
        which a router balances its experts are smaller than a step of bfloat16.
        """
        kept = set(self._base._keep_in_fp32_modules_strict or ()) if dtype is not torch.float32 else set()
        if dtype is torch.float16:
            kept |= set(self._base._keep_in_fp32_modules or ())
        in_float32 = any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept)
        return name not in self._buffers and not in_float32

    def read(self, name: str) -> torch.Tensor:
        """Return the base's tensor of the model's name; a tied one may be in the files under its partner's name."""
        return self.checkpoint.get(self.names[self._stored(name) or name])

    def merged(self, name: str) -> dict[str, torch.Tensor]:
        """Return what the adapter makes of the tensor, and of all others of the same layer, by the model's names."""
        path = self.layer_of(name)
        if path is None:
            return {name: self.replaced[name].detach() if name in self.replaced else self.read(name)}
        layer = copy.deepcopy(self.layers[path])
        from peft.utils import ModulesToSaveWrapper

        try:
            if not isinstance(layer, ModulesToSaveWrapper):
                self._fill(_base_layer(layer), path)
            layer.float()
            if hasattr(layer, "unload_and_optionally_merge_module"):
                layer = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                layer.merge(safe_merge=True)
                layer = layer.get_base_layer()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise StorageError(f"The adapter of {path} cannot be merged: {error}") from error
        return {f"{path}.{key}": tensor.detach() for key, tensor in layer.state_dict().items()}

    def tied_pairs(self) -> list[tuple[str, str]]:
        """Return (embedding, head) of tied tensors of which the adapter changes one or both."""
        return [
            (source, target)
            for target, source in self.tied.items()
            if any(self.layer_of(name) is not None or name in self.replaced for name in (source, target))
        ]

    def _stored(self, name: str) -> str | None:
        partners = [name, self.tied.get(name), *(target for target, source in self.tied.items() if source == name)]
        return next((one for one in partners if one in self.names), None)

    def _fill(self, module: nn.Module, path: str) -> None:
        """Give the base's weights to a layer that has none; what the adapter holds of it itself stays."""
        for prefix, inner in module.named_modules():
            for tensors in (inner._parameters, inner._buffers):
                for key, tensor in tensors.items():
                    if tensor is None or not tensor.is_meta or key in inner._non_persistent_buffers_set:
                        continue
                    value = self.read(".".join(part for part in (path, prefix, key) if part))
                    if value.shape != tensor.shape:
                        raise ValueError(f"the base's {key} is {tuple(value.shape)}, expected {tuple(tensor.shape)}")
                    value = value.to(torch.float32) if value.is_floating_point() else value
                    tensors[key] = nn.Parameter(value, requires_grad=False) if tensors is inner._parameters else value

    def _check_found(self) -> None:
        wanted = [*self.replaced]
        for path, layer in self.layers.items():
            inner = _base_layer(layer)
            wanted += [f"{path}.{key}" for key in inner.state_dict()]
        lost = [name for name in wanted if self._stored(name) is None]
        if lost:
            raise StorageError(
                f"The adapter changes {lost[0]}, and the files in {self.checkpoint.folder} have no tensor of that name"
                f" ({len(lost)} such). Models whose weights are put together while they load cannot be merged there."
            )


def _checkpoint_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the file's name of every tensor that is loaded as it is, by the model's name, as transformers does it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    own, names = model.state_dict(), {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        ours, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if converted is None:
            names[ours] = name
    return names


def _with_adapter(folder: Path, base: Any) -> Any:
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    config = adapter_config(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which `write_merged` settles
        model = PeftModel(base, config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        try:
            if hasattr(model.base_model, "_check_merge_allowed"):
                model.base_model._check_merge_allowed()
        except ValueError as error:
            raise ConfigError(f"The adapter cannot be merged: {error}") from error
        for module in model.modules():
            # PEFT would move the adapter to where the base is: to the meta device, so away.
            if hasattr(module, "_move_adapter_to_device_of_base_layer"):
                module._move_adapter_to_device_of_base_layer = _stay
        try:
            # The tensors lie in the adapter's file until a layer copies them.
            weights = load_peft_weights(str(folder), device="cpu")
            result = set_peft_model_state_dict(model, weights, ADAPTER, low_cpu_mem_usage=True)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            reason = lines[min(1, len(lines) - 1)].strip()  # the first tensor; torch lists all of them
            raise StorageError(f"{folder} does not fit the base model: {reason}") from error
    layers = _outermost(model.get_base_model()).items()
    inner = {path: {id(tensor) for tensor in _base_layer(layer).parameters()} for path, layer in layers}
    empty = [
        f"{path}.{name}"
        for path, layer in layers
        for name, tensor in layer.named_parameters()
        if tensor.is_meta and id(tensor) not in inner[path]
    ]
    if result.unexpected_keys or empty:
        what = f"nothing of the base takes {result.unexpected_keys[0]}" if result.unexpected_keys else f"no {empty[0]}"
        raise StorageError(f"{folder} does not fit the base model: {what}.")
    return model.eval()


def _stay(*args: Any, **kwargs: Any) -> None:
    pass


def adapter_config(folder: Path) -> Any:
    """Return PEFT's configuration of an adapter that can be merged: one that changes weights, and those on disk.

    Raises:
        ConfigError: it cannot.
        StorageError: its file is damaged.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StorageError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
    if config.is_prompt_learning:
        raise ConfigError(
            f"{kind} adds virtual tokens to each input and changes no weight, so it cannot be merged. Use the run with "
            f"its adapter: `tunewright chat RUN`, or PeftModel.from_pretrained."
        )
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start.startswith(CHANGES_BASE):
        raise ConfigError(f"The adapter began with init_lora_weights={start}, which changed the base: it does not fit.")
    if getattr(config, "target_parameters", None):
        raise ConfigError("An adapter with `target_parameters` works on fused weights, which cannot be merged.")
    return config


def _outermost(model: nn.Module) -> dict[str, Any]:
    """Return the layers with an adapter, and modules that the adapter replaces, by their path in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not any(
            path.startswith(f"{outer}.") for outer in found
        ):
            found[path] = module
    return found


def _base_layer(layer: Any) -> Any:
    return layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()
