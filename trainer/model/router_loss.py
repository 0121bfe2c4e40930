"""The loss that keeps the experts of a mixture equally busy (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

For experts e of N, over the tokens of a micro-batch in all layers: N * sum_e f_e P_e, where f_e is the share of tokens
that chose e and P_e the mean probability the router gave it. With k choices a token it is k where all are equally
busy. It is no mean over tokens: f_e P_e is worked out for each micro-batch, as transformers and TRL do.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tunewright.trainer.process_group import all_gather

PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of transformers' load_balancing_loss_func


def own_coefficient(model: Any) -> float | None:
    """Return the weight that a model's configuration gives the loss; None where it is no mixture or does not tell.

    0 where its configuration names none, as for models that balance by a bias.
    """
    text = model.config.get_text_config()
    tells = hasattr(text, "output_router_logits") and hasattr(text, "num_experts_per_tok")
    return float(getattr(text, "router_aux_loss_coef", None) or 0.0) if tells and _function(model) else None


def router_loss(model: Any, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the loss of a forward pass of the layers that was asked for `output_router_logits`, else None.

    Padding, which `attention_mask` tells, is left out.
    """
    logits = getattr(output, "router_logits", None)
    if not inputs.get("output_router_logits") or not logits:
        return None
    chosen = model.config.get_text_config().num_experts_per_tok
    loss = _function(model)(logits, logits[0].size(-1), chosen, inputs.get("attention_mask"))  # type: ignore[misc]
    return loss  # type: ignore[no-any-return]


def _function(model: Any) -> Callable[..., Any] | None:
    """Return what the model's own forward pass calls for it. Some, Doge for one, define another loss by that name."""
    found = vars(sys.modules[type(model).__module__]).get("load_balancing_loss_func")
    return found if found and list(inspect.signature(found).parameters) == PARAMETERS else None


class RouterLoss:
    """Adds the loss to a micro-batch's cross-entropy, and keeps its mean for the log, this rank's share of it.

    A micro-batch weighs as much as its cross-entropy does: by its share of the scored tokens of the global batch. One
    without rows, for a rank that has none in a step, weighs nothing.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self._total: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, router: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Return `loss` with the gradient of both, and the value of the cross-entropy alone: the two are told apart."""
        weighed = router * share
        self._total = weighed.detach() if self._total is None else self._total + weighed.detach()
        weighed = self.coefficient * weighed
        return loss + (weighed - weighed.detach())

    def take(self, steps: int, device: torch.device) -> float:
        """Return the mean of the loss over the last `steps`, without its coefficient. Every rank has to call it."""
        shares = all_gather([0.0 if self._total is None else float(self._total)], device)
        self._total = None
        return sum(share for (share,) in shares) / len(shares) / max(steps, 1)
