"""Kernels of other packages: whether they are installed, and for this device, method and architecture.

Nothing of them is imported: that takes torch, and seconds.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.schema import AttentionKernel, CrossEntropy, Dtype, FusedLayers
from tunewright.errors import ConfigError
from tunewright.plan.devices import Devices
from tunewright.text import listed

FLASH3 = "flash_attn_interface"  # the module that torch.nn.attention looks for
PACKAGES = {
    FusedLayers.liger: ("liger_kernel", "pip install 'tunewright[liger]'"),
    FusedLayers.kernels: ("kernels", "pip install kernels, in the version that this transformers takes"),
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_kernels(config: DictConfig, devices: Devices) -> None:
    """Raises:
    ConfigError: a kernel is asked for that is not installed or not for this device.
    """
    _check_cross_entropy(config, devices)
    fused, attention = config.train.fused_layers, config.train.attention_kernel
    if fused is not FusedLayers.none:
        module, how = PACKAGES[fused]
        _on_gpu(f"train.fused_layers={fused.value}", "leave it out", devices)
        if not installed(module):
            raise ConfigError(
                f"`train.fused_layers={fused.value}` needs the package {module.replace('_', '-')}, which is not "
                f"installed: {how}, or leave train.fused_layers out."
            )
    if attention is AttentionKernel.flash3:
        _on_gpu("train.attention_kernel=flash3", "leave it out", devices)
        if devices.kind != "cuda" or not installed(FLASH3):
            raise ConfigError(
                f"`train.attention_kernel=flash3` needs an NVIDIA GPU of compute capability 9 (Hopper) and the module "
                f"{FLASH3} of the package flash-attn-3, built for this torch. Write train.attention_kernel=torch."
            )
        if not config.train.padding_free:
            raise ConfigError(
                "`train.attention_kernel=flash3` is for rows without padding: leave train.padding_free=false out, or "
                "write train.attention_kernel=torch."
            )


def _check_cross_entropy(config: DictConfig, devices: Devices) -> None:
    """Only auto gives way to a loss of a plug-in's; cut-cross-entropy is Triton kernels for half precision."""
    wanted = config.train.cross_entropy
    setting = f"train.cross_entropy={wanted.value}"
    if wanted is not CrossEntropy.auto and config.train.loss is not None:
        raise ConfigError(
            f"`{setting}` does not go with `train.loss={config.train.loss}`, which takes the place of the "
            f"cross-entropy: leave one of them out."
        )
    if wanted not in (CrossEntropy.cut, CrossEntropy.cut_exact):
        return
    _on_gpu(setting, "write train.cross_entropy=auto", devices)
    if config.model.dtype is Dtype.float32:
        raise ConfigError(
            f"`{setting}` has gradients in half precision only, and `model.dtype` is float32: write "
            f"train.cross_entropy=auto, or model.dtype=bfloat16."
        )
    if not installed("cut_cross_entropy"):
        raise ConfigError(
            f"`{setting}` needs the package cut-cross-entropy, which is not installed: pip install 'tunewright[cut]', "
            f"or write train.cross_entropy=auto."
        )


def _on_gpu(setting: str, instead: str, devices: Devices) -> None:
    if not devices.gpu:
        raise ConfigError(f"`{setting}` is for a GPU, and this machine has none that torch can use: {instead}.")


def check_fused(config: DictConfig, model_type: str) -> None:
    """Raises:
    ConfigError: Liger has no kernels for the architecture.
    """
    if config.train.fused_layers is FusedLayers.liger and model_type not in liger_architectures():
        raise ConfigError(
            f"`train.fused_layers=liger` has no kernels for {model_type}, the architecture of {config.model.name}. "
            f"Those that it has: {listed(sorted(liger_architectures()))}. Leave train.fused_layers out."
        )


@cache
def liger_architectures() -> frozenset[str]:
    """Read from the installed package's own table which architectures it takes."""
    spec = importlib.util.find_spec("liger_kernel")
    if spec is None or spec.origin is None:
        return frozenset()
    text = (Path(spec.origin).parent / "transformers" / "monkey_patch.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r'^    "(\w+)": apply_liger_kernel_to_\w+,$', text, flags=re.MULTILINE))
