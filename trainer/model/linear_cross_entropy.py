"""The head and the cross-entropy in one piece: only scored positions, a chunk of them at a time, on a CPU.

The (scored, vocabulary) logits never exist as a whole, and their gradient is worked out while a chunk is in the cache.
On a GPU TRL's head does the same; on a CPU it scores every position (TRL 1.16) and takes four to five times as long for
each. Beside the model's own head and PyTorch's cross-entropy it takes 0.6 times as long.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.utils import ModelOutput

from tunewright.trainer.data.render import IGNORED

# Logits of a chunk: 16 MiB in float32.
CHUNK = 2**22

# What models do to logits after their head, by the names in their configurations: these keep their own forward pass.
CAP = "final_logit_softcapping"
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass
class LossSumOutput(ModelOutput):
    """`loss_sum`: the cross-entropy summed over scored positions, a scalar in float32."""

    loss_sum: torch.Tensor | None = None


def add_linear_cross_entropy(model: Any) -> bool:
    """Let `model(**inputs, labels=labels, loss_sum=True)` return a `LossSumOutput`, if its head is a plain one.

    Without `loss_sum` the forward pass stays what it was. `labels` (batch, seq) are not shifted yet.

    Returns:
        Whether it does now. False for a head that is adapted, or whose logits are scaled or capped afterwards.
    """
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    changed = getattr(text, CAP, None) is not None or any(
        getattr(text, name, None) not in (None, 1) for name in FACTORS
    )
    if type(head) is not torch.nn.Linear or changed:
        return False
    plain_forward, plain_head = model.forward, head.forward

    def forward(self: Any, *args: Any, loss_sum: bool = False, **kwargs: Any) -> Any:
        if not loss_sum:
            return plain_forward(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        scored = labels != IGNORED
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        # The head is called as a module, so that ZeRO-3 gathers its weight.
        return LossSumOutput(loss_sum=self.get_output_embeddings()(hidden[scored], labels[scored]))

    def head_forward(self: Any, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return plain_head(hidden)
        return _CrossEntropySum.apply(hidden, self.weight, self.bias, targets)  # type: ignore[no-any-return]

    model.forward = types.MethodType(forward, model)
    head.forward = types.MethodType(head_forward, head)
    return True


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum over positions; hidden (S, width), weight (vocabulary, width), targets (S,)."""
        wants = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        # Sums over many chunks, so in float32.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants[2] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = max(CHUNK // weight.size(0), 1)
        for first in range(0, hidden.size(0), rows):
            chunk = slice(first, first + rows)
            logits = linear(hidden[chunk], weight, bias).float()
            torch.log_softmax(logits, -1, out=logits)
            target = targets[chunk, None]
            total -= logits.gather(1, target).sum()
            if not any(wants):
                continue
            # d(loss) / d(logits) = softmax - 1 at the target.
            d_logits = logits.exp_().scatter_add_(1, target, torch.full_like(target, -1.0, dtype=logits.dtype))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[chunk]
        ctx.gradients = d_hidden, d_weight, d_bias
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradients = (
            None if gradient is None else gradient.mul_(d_total).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return *gradients, None
