"""The head and the cross-entropy in one piece: only scored positions, a chunk of them at a time.

The (scored, vocabulary) logits never exist as a whole, and their gradient is worked out while a chunk is at hand: a
frozen head costs 4 x width x vocabulary FLOPs a position, where one that makes its logits again in the backward pass
(TRL's, cut-cross-entropy's) costs 6. On a CPU TRL's scores every position, too (TRL 1.16).

Memory beside the gradients: a chunk of `CHUNK` logits, 4 bytes each, and in bfloat16 2 more for its gradient: 0.75 GiB
on a GPU, 1.5 GiB where the head is trained, whose float32 gradient every chunk adds to; on a CPU in float32 16 MiB.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch.nn.functional import linear
from transformers.utils import ModelOutput

from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.model.planned_device import device_type, telling
from tunewright.trainer.model.router_loss import own_coefficient, router_loss

HeadLoss = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor], torch.Tensor]
"""`loss(hidden (S, width), weight (vocabulary, width), bias or None, targets (S,))`: the sum over S positions."""

# Elements of a chunk of logits: what a core keeps in its cache; for a GPU matrices that keep it busy, 1,024 rows by a
# vocabulary of 128k.
CHUNK = {"cpu": 2**22, "gpu": 2**27}
CHUNK_TRAINED = {"cpu": 2**22, "gpu": 2**28}

# What models do to logits after their head, by the names in their configurations, as far as TRL's head does it too,
CAP, FACTORS = "final_logit_softcapping", ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
# and what it does not know: caps, a part of the vocabulary, and a factor before the head.
UNKNOWN = ("logits_soft_cap", "output_logit_soft_cap", "unpadded_vocab_size")
UNKNOWN_FACTOR = "logits_mup_width_multiplier"


@dataclass
class LossSumOutput(ModelOutput):
    """`loss_sum`: the cross-entropy summed over scored positions; `aux_loss`: see `router_loss`; scalars in float32."""

    loss_sum: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def fitting(model: Any) -> list[str]:
    """Return the values of `train.cross_entropy` that give this model's loss, so far as its architecture decides.

    None of them where something that we do not know lies between layers and logits, or the head is adapted: there the
    model makes its logits itself.
    """
    head, text = _head(model), model.config.get_text_config()
    # Nothing beside the layers and the head, such as BERT's transformation between them.
    parts = {id(part) for part in model.children()} == {id(model.base_model), id(model.get_output_embeddings())}
    unknown = any(getattr(text, name, None) is not None for name in UNKNOWN) or _scales(text, UNKNOWN_FACTOR)
    if type(head) is not torch.nn.Linear or not parts or unknown:
        return []
    # TRL (1.16) counts a mixture's experts under this name, which GraniteMoe has not.
    trl = ["trl"] if own_coefficient(model) is None or hasattr(text, "num_experts") else []
    if getattr(text, CAP, None) is not None or any(_scales(text, name) for name in FACTORS):
        return trl
    return ["tunewright", *trl, *(["cut", "cut_exact"] if head.bias is None else [])]


def _scales(text: Any, name: str) -> bool:
    return getattr(text, name, None) not in (None, 1)


def add_linear_cross_entropy(model: Any, loss: HeadLoss | None = None) -> None:
    """Let `model(**inputs, labels=labels, loss_sum=True)` return a `LossSumOutput`, of a model that `fitting` lets.

    Without `loss_sum` the forward pass stays what it was. `labels` (batch, seq) are not shifted yet; or `scored` (S,)
    and `targets` (S,) of a flat batch in their place. `loss` is ours where None.
    """
    plain_forward, head = model.forward, _head(model)
    plain_head = head.forward
    compute = loss or linear_cross_entropy

    def forward(self: Any, *args: Any, loss_sum: bool = False, **kwargs: Any) -> Any:
        if not loss_sum:
            return plain_forward(*args, **kwargs)
        labels, scored, targets = (kwargs.pop(name, None) for name in ("labels", "scored", "targets"))
        output = self.base_model(*args, **kwargs)
        hidden = output.last_hidden_state
        if scored is None:
            targets = labels[:, 1:]
            where = targets != IGNORED
            hidden, targets = hidden[:, :-1][where], targets[where]
        else:
            hidden = hidden[0].index_select(0, scored)
        # The head is called as a module, so that ZeRO-3 gathers its weight.
        total = self.get_output_embeddings()(hidden, targets)
        return LossSumOutput(total, router_loss(self, output, kwargs))

    def head_forward(self: Any, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return plain_head(hidden)
        # Mamba's last state, for one, is float32 in a bfloat16 model, which casts it itself.
        return compute(hidden.to(self.weight.dtype), self.weight, self.bias, targets)

    model.forward = types.MethodType(forward, model)
    head.forward = types.MethodType(head_forward, head)


def _head(model: Any) -> Any:
    """Return the module that holds the head's weight, also where PEFT trains a copy of it whole."""
    head = model.get_output_embeddings()
    return head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy summed over positions; hidden (S, width), weight (vocabulary, width), targets (S,)."""
    # In an autograd function nothing tells whether gradients are wanted at all: an evaluation works out none.
    return _CrossEntropySum.apply(hidden, weight, bias, targets, torch.is_grad_enabled())  # type: ignore[no-any-return]


def cut_cross_entropy(exact: bool) -> HeadLoss:
    """Return cut-cross-entropy's head (Wijmans et al. 2024, arXiv 2411.09009), for half precision on a GPU.

    It leaves out gradients of logits below bfloat16's rounding, and adds up the rest in the head's own format. `exact`
    leaves out none, and adds up in float32 with versions that can (those on GitHub, after 25.1 of PyPI).
    """
    import inspect

    from cut_cross_entropy import linear_cross_entropy as cut

    options: dict[str, Any] = {"filter_eps": "auto"}
    if exact:
        newer = "accum_e_fp32" in inspect.signature(cut).parameters
        options = {"impl": "cce_exact"} if newer else {"filter_eps": None}
    compute = partial(cut, reduction="sum", **options)

    def loss(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        if not len(targets):  # its kernels have no grid for nothing
            return hidden.float().sum() + 0.0 * weight[:1].float().sum()
        return compute(hidden, weight, targets)  # type: ignore[no-any-return]

    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        differentiate: bool,
    ) -> torch.Tensor:
        wants = [differentiate and wanted for wanted in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        # Sums over many chunks, so in float32.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants[2] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        kind = "cpu" if device_type(hidden) == "cpu" else "gpu"
        rows = max((CHUNK_TRAINED if wants[1] else CHUNK)[kind] // weight.size(0), 1)
        for first in telling(range(0, hidden.size(0), rows), hidden):
            chunk = slice(first, first + rows)
            log_probs, target = _logits(hidden[chunk], weight, bias), targets[chunk, None]
            torch.log_softmax(log_probs, -1, out=log_probs)
            at_target = log_probs.gather(1, target)
            total -= at_target.sum()
            if not any(wants):
                continue
            # d(loss) / d(logits) = softmax - 1 at the target, rounded to the head's format after the subtraction.
            d_logits = log_probs if hidden.dtype is torch.float32 else torch.empty_like(log_probs, dtype=hidden.dtype)
            at_target = at_target.expm1_().to(d_logits.dtype)
            if kind == "cpu":  # where the other two copy the chunk in float32 (PyTorch 2.15)
                d_logits.copy_(log_probs.exp_())
                d_logits[torch.arange(len(target)), target[:, 0]] = at_target[:, 0]
            else:
                torch.exp(log_probs, out=d_logits)
                d_logits.scatter_(1, target, at_target)
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=torch.float32)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                _add_product(d_weight, d_logits.t(), hidden[chunk])
        ctx.gradients = d_hidden, d_weight, d_bias
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradients = (
            None if gradient is None else gradient.mul_(d_total).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return logits in float32. A GPU rounds none to half precision on the way; a CPU has to (PyTorch 2.15)."""
    if device_type(hidden) == "cpu" or hidden.dtype is torch.float32:
        return linear(hidden, weight, bias).float()
    logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to a total in float32, with the rounding that `_logits` speaks of."""
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    elif device_type(left) == "cpu":
        total += left @ right
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
