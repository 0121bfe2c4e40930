"""The loss of a batch: summed over its scored positions, the trainer divides by those of the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tunewright.errors import ConfigError
from tunewright.trainer.data.batches import Batch
from tunewright.trainer.data.render import IGNORED

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`loss(logits (S, vocabulary), labels (S,))` returns a scalar: the sum, not the mean, over S scored positions.

logits[i] in float32 predicts the token labels[i]; neither prompt nor padding is among the positions, and S is not 0.
`functools.partial(cross_entropy, reduction="sum")` is the built-in loss. It is called for each micro-batch of each
rank, and the trainer divides the sum of all calls of an optimiser step by the scored tokens of the global batch, so
that the loss does not depend on how rows fall into ranks and micro-batches. The logits exist as a whole, which the
built-in loss avoids: a smaller `train.micro_batch_size` makes up for their memory.
"""


def cross_entropy_sum(model: Any, batch: Batch, *, linear_cross_entropy: bool = False) -> torch.Tensor:
    """Return the cross-entropy summed over the scored positions of a batch, flat, or padded with ours.

    On a GPU through TRL's fused head, on a CPU through ours: neither makes the (S, vocabulary) logits. For heads that
    ours does not take, the model's own `logits_to_keep` picks the scored positions before its head.
    """
    if linear_cross_entropy:
        output = model(**_inputs(batch), labels=batch["labels"], loss_sum=True, use_cache=False)
        return output.loss_sum  # type: ignore[no-any-return]
    if batch["input_ids"].device.type == "cuda":
        outputs = model(**_inputs(batch), labels=batch["labels"], fused_lm_head=True, use_cache=False)
        return -outputs.log_probs.sum()
    return cross_entropy(*scored_logits(model, batch), reduction="sum")


def custom_loss_sum(model: Any, batch: Batch, loss: Loss) -> torch.Tensor:
    """Return what `loss` makes of a batch.

    Raises:
        ConfigError: no scalar.
    """
    logits, labels = scored_logits(model, batch)
    if not len(labels):  # a rank without rows in this step takes part all the same
        return logits.sum()
    total = loss(logits, labels)
    if not isinstance(total, torch.Tensor) or total.numel() != 1:
        shape = tuple(total.shape) if isinstance(total, torch.Tensor) else type(total).__name__
        raise ConfigError(f"The loss returned {shape}: it has to return a scalar tensor, the sum over all positions.")
    return total.squeeze()


def scored_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (S, vocabulary) in float32 that predict a label, and these labels (S,)."""
    if "scored" in batch:
        logits = model(**_inputs(batch), logits_to_keep=batch["scored"], use_cache=False).logits[0]
        return logits.float(), batch["targets"]
    labels = batch["labels"][:, 1:]
    # A prompt that is learnt comes before the row.
    logits = model(**_inputs(batch), use_cache=False).logits[:, -batch["labels"].size(1) : -1]
    return logits[labels != IGNORED].float(), labels[labels != IGNORED]


def _inputs(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key not in ("labels", "scored", "targets")}
