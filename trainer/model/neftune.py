"""NEFTune: uniform noise on the embeddings while training (https://arxiv.org/abs/2310.05914).

The noise is in [-a, a] with a = alpha / sqrt(L * d) for a row of L tokens of d numbers. transformers takes L from the
tensor's shape, which for rows that lie end to end is the length of all of them, and for padded ones includes padding;
here each token knows the length of its own row.
"""

from __future__ import annotations

from typing import Any

import torch


class EmbeddingNoise:
    """A hook on the input embedding; `see` tells it the next batch."""

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        model.get_input_embeddings().register_forward_hook(self._add)

    def see(self, batch: dict[str, Any]) -> None:
        """Take from a batch how long the row of each token is: (1, T) for flat rows, (B, T) for padded ones."""
        if "cu_seq_lens_q" in batch:
            lengths = batch["cu_seq_lens_q"].diff().long()
            tokens = batch["input_ids"].size(1)  # told, so that nothing waits for the lengths
            self.lengths = lengths.repeat_interleave(lengths, output_size=tokens)[None]
        else:
            self.lengths = batch["attention_mask"].sum(dim=1, keepdim=True).expand_as(batch["input_ids"])

    def _add(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training or self.lengths is None:
            return output
        bound = self.alpha / torch.sqrt(self.lengths * output.size(-1))  # (B, T)
        noise = torch.empty_like(output).uniform_(-1, 1) * bound[..., None].to(output.dtype)
        return output + noise
