"""The loss of a batch: summed over its scored positions, the trainer divides by those of the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from tunewright.config.schema import CrossEntropy
from tunewright.errors import ConfigError
from tunewright.plan.module_rules import does_not_fit
from tunewright.trainer.data.batches import Batch
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.model.linear_cross_entropy import add_linear_cross_entropy, cut_cross_entropy, fitting

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`loss(logits (S, vocabulary), labels (S,))` returns a scalar: the sum, not the mean, over S scored positions.

logits[i] in float32 predicts the token labels[i]; neither prompt nor padding is among the positions, and S is not 0.
`functools.partial(cross_entropy, reduction="sum")` is the built-in loss. It is called for each micro-batch of each
rank, and the trainer divides the sum of all calls of an optimiser step by the scored tokens of the global batch, so
that the loss does not depend on how rows fall into ranks and micro-batches. The logits exist as a whole, which the
built-in loss avoids: a smaller `train.micro_batch_size` makes up for their memory.
"""

OWN = "own"  # the model's own forward pass makes the logits of the scored positions, as a whole


class Sums(NamedTuple):
    """Of a batch: the loss summed over its scored positions, and the router's loss where it was asked for."""

    loss: torch.Tensor
    router: torch.Tensor | None = None


def choose_head(model: Any, wanted: CrossEntropy, *, gpu: bool, padded: bool) -> str:
    """Return what computes head and cross-entropy of a model, and have the model do so: "own" is its own forward pass.

    `auto` is ours, the cheapest that there is without a compiler of kernels, and what fits where ours does not.

    Raises:
        ConfigError: the one that is wanted does not fit.
    """
    fits = fitting(model)
    if wanted is CrossEntropy.auto:
        # On a CPU TRL's scores every position. So does a model's own forward pass of padded rows, and keeps the logits.
        usable = [name for name in ("tunewright", *(["trl"] if gpu or padded else [])) if name in fits]
        chosen = usable[0] if usable else OWN
    elif wanted.value in fits:
        chosen = wanted.value
    else:
        raise ConfigError(does_not_fit(wanted.value, fits))
    if chosen == "tunewright":
        add_linear_cross_entropy(model)
    elif chosen in ("cut", "cut_exact"):
        add_linear_cross_entropy(model, cut_cross_entropy(exact=chosen == "cut_exact"))
    return chosen


def loss_sums(model: Any, batch: Batch, head: str = OWN, *, loss: Loss | None = None, router: bool = False) -> Sums:
    """Return the loss of a batch, flat or padded: by `loss`, or the cross-entropy by a `head` of `choose_head`.

    With `router`, of a mixture of experts, the router's loss too.

    Raises:
        ConfigError: `loss` returned no scalar.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "scored", "targets")}
    inputs |= {"use_cache": False, **({"output_router_logits": True} if router else {})}
    if loss is None and head == "trl":
        outputs = model(**inputs, labels=batch["labels"], fused_lm_head=True)
        return Sums(-outputs.log_probs.sum(), outputs.aux_loss)
    if loss is None and head != OWN:
        names = ("scored", "targets") if "scored" in batch else ("labels",)
        outputs = model(**inputs, **{name: batch[name] for name in names}, loss_sum=True)
        return Sums(outputs.loss_sum, outputs.aux_loss)
    logits, labels, outputs = _scored_logits(model, batch, inputs)
    aux = outputs.aux_loss if router else None
    return Sums(cross_entropy(logits, labels, reduction="sum") if loss is None else _checked(loss, logits, labels), aux)


def _checked(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if not len(labels):  # a rank without rows in this step takes part all the same
        return logits.sum()
    total = loss(logits, labels)
    if not isinstance(total, torch.Tensor) or total.numel() != 1:
        shape = tuple(total.shape) if isinstance(total, torch.Tensor) else type(total).__name__
        raise ConfigError(f"The loss returned {shape}: it has to return a scalar tensor, the sum over all positions.")
    return total.squeeze()


def _scored_logits(model: Any, batch: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the logits (S, vocabulary) in float32 that predict a label, these labels (S,), and the model's output."""
    if "scored" in batch:
        outputs = model(**inputs, logits_to_keep=batch["scored"])
        return outputs.logits[0].float(), batch["targets"], outputs
    labels = batch["labels"][:, 1:]
    outputs = model(**inputs)
    # A prompt that is learnt comes before the row.
    logits = outputs.logits[:, -batch["labels"].size(1) : -1]
    return logits[labels != IGNORED].float(), labels[labels != IGNORED], outputs
