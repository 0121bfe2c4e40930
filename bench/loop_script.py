"""A loop by hand, as an expert would write it in an afternoon: python bench/loop_script.py JOB.json

Rows end to end without padding, each attended to by itself, base and adapters in bfloat16, the head on scored positions
only, PEFT and PyTorch as they come. No checkpoints, ranks, resuming or metrics: it shows what those cost, or that they
cost nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from steps import Report, load, peft_config, print_step, read_job
from torch.nn import functional
from transformers import AttentionInterface, AutoTokenizer
from workload import Job, encode


def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **more: Any) -> Any:
    """Causal attention within each row; query (1, heads, tokens, head_dim)."""
    rows = zip(*(tensor.split(more["lengths"], 2) for tensor in (query, key, value)), strict=True)
    outs = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in rows
    ]
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


def loss_sum(causal: Any, rows: list[dict[str, list[int]]], device: torch.device) -> torch.Tensor:
    """Return the cross-entropy summed over the scored tokens of some rows."""
    lengths = [len(row["input_ids"]) for row in rows]
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]], device=device)
    # The position before a scored token predicts it; none predicts the first token of a row.
    targets = torch.tensor([label for row in rows for label in [*row["labels"][1:], -100]], device=device)
    scored = targets != -100
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    hidden = causal.model(ids, position_ids=positions, lengths=lengths, use_cache=False).last_hidden_state[0]
    return functional.cross_entropy(causal.lm_head(hidden[scored]).float(), targets[scored], reduction="sum")


def train(job: Job, report: Report) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = [encode(tokenizer, row) for row in json.loads(Path(job.rows).read_text())]
    AttentionInterface.register("by_row", attend)
    model = load(job, torch.bfloat16, attention="by_row").to(device)
    torch.manual_seed(job.seed)
    if job.method == "lora":
        model = peft.get_peft_model(model, peft_config(job), autocast_adapter_dtype=False)
    model.train()
    causal = model.get_base_model() if job.method == "lora" else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0)
    tokens = 0
    for step in range(job.steps):
        batch = rows[step * job.batch : (step + 1) * job.batch]
        scored = sum(label != -100 for row in batch for label in row["labels"][1:])
        loss = torch.zeros((), device=device)
        for first in range(0, job.batch, job.per_device):
            part = loss_sum(causal, batch[first : first + job.per_device], device) / scored
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(row["input_ids"]) for row in batch)
        report({"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), "num_tokens": tokens})


if __name__ == "__main__":
    train(read_job(), print_step)
