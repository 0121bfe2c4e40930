"""Fused kernels for what a layer does between its matrix products: `train.fused_layers`.

In eager mode RMSNorm, rotary embeddings and SwiGLU are a dozen kernels a layer, each of which reads and writes all
activations. Liger (Hsu et al. 2024, arXiv 2410.10989) has one kernel for each of them. Its fused loss is not used: the
head has its own (`loss.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunewright.config.schema import FusedLayers
from tunewright.errors import ConfigError

# The repository and version that transformers itself names for RMSNorm, for both ends of its window (5.17 to 5.23).
RMS_NORM = ("kernels-community/liger-kernels:LigerRMSNorm", {"version": 3})


@contextmanager
def fused_layers(model: Any, choice: FusedLayers) -> Iterator[None]:
    """Let the layers of a model, with its adapters, run on fused kernels while it trains.

    Norms and MLPs of this model keep their kernels. Rotary embeddings are a function that Liger replaces for the whole
    process, so that it is put back afterwards: another model trained here has not asked for it.

    Raises:
        ConfigError: the kernels cannot be fetched, or are not for this architecture.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if choice is FusedLayers.kernels:
        _use_hub_kernels(base)
    if choice is not FusedLayers.liger:
        yield
        return
    modules = {sys.modules[cls] for cls in {type(module).__module__ for module in base.modules()}}
    before = {module: dict(vars(module)) for module in modules if module.__name__.startswith("transformers.models.")}
    try:
        _use_liger(base)
        yield
    finally:
        for module, names in before.items():
            for name, value in names.items():
                if getattr(module, name, None) is not value:
                    setattr(module, name, value)


def _use_liger(base: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # It leaves out what an architecture has not; `cross_entropy` and its fused form are on by default.
    _apply_liger_kernel_to_instance(
        model=base,
        rope=True,
        rms_norm=True,
        swiglu=True,
        geglu=True,
        layer_norm=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )


def _use_hub_kernels(base: Any) -> None:
    """Have transformers fetch Liger's RMSNorm from the Hub (`use_kernels`); a local copy of it needs no network.

    Only that: for rotary embeddings transformers 5.17 takes a kernel whose backward is another function's, which 5.23
    says and leaves out, and the layers of current models carry no mark for SwiGLU.
    """
    from transformers import KernelConfig

    training = base.training
    base.train()  # which kernels are taken depends on it
    try:
        base.set_use_kernels(True, KernelConfig({"RMSNorm": RMS_NORM}, inherit_mapping=False))
    except Exception as error:  # of the Hub, the network, the package or the kernel's own build
        raise ConfigError(
            f"`train.fused_layers=kernels`: {type(error).__name__}: {error}. Kernels are fetched from the Hub once, "
            f"into its cache, for this torch and GPU. Use train.fused_layers=liger, or leave it out."
        ) from error
    finally:
        base.train(training)
    norms = [module for module in base.modules() if getattr(module, "kernel_layer_name", None) == "RMSNorm"]
    # Where no kernel can be loaded, transformers goes on with the forward pass of each norm's own class.
    if all(module.forward.__func__ is type(module).forward for module in norms):
        raise ConfigError(
            f"`train.fused_layers=kernels` found no kernel for the {len(norms)} norms of this model on this GPU. Use "
            f"train.fused_layers=liger, or leave it out."
        )
