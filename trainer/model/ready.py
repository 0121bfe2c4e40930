"""What training changes in a model that a method has adapted, before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from tunewright.trainer.loss import OWN, choose_head
from tunewright.trainer.model.cpu_norms import fuse_norms
from tunewright.trainer.model.neftune import EmbeddingNoise
from tunewright.trainer.model.router_loss import RouterLoss, own_coefficient


@dataclass(frozen=True)
class Ready:
    """What a step computes its loss with."""

    head: str  # of `choose_head`
    router_loss: RouterLoss | None
    neftune: EmbeddingNoise | None


def make_ready(model: Any, config: DictConfig, dtype: torch.dtype, *, gpu: bool, own_loss: bool = False) -> Ready:
    """Have a model compute as the settings say; with `own_loss` its logits go to a loss of the user's.

    Raises:
        ConfigError: see `choose_head`.
    """
    cast_trained(model, dtype)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    padded = not config.train.padding_free
    head = OWN if own_loss else choose_head(base, config.train.cross_entropy, gpu=gpu, padded=padded)
    wanted, own = config.train.router_aux_loss, own_coefficient(base)
    coefficient = (own if wanted is None else wanted) if own is not None else 0.0
    if not gpu:
        fuse_norms(base)
    alpha = config.train.neftune_alpha
    return Ready(
        head, RouterLoss(coefficient) if coefficient else None, EmbeddingNoise(model, alpha) if alpha else None
    )


def cast_trained(model: Any, dtype: torch.dtype) -> None:
    """Turn the trained parameters to `dtype`, each in memory of its own, row by row.

    TRL turns the adapters of a quantised base to bfloat16, also where everything else computes in float32, and PEFT
    those that it reads to float32, also where everything else computes in bfloat16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and (parameter.dtype != dtype or not parameter.is_contiguous()):
            # Fused AdamW on a CPU, and what DDP sends, know no strides (torch 2.15).
            parameter.data = parameter.data.to(dtype).contiguous()
