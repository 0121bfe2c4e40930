"""What all contenders train: a random Qwen2 of 39 M parameters and rows made of the text that ships in data/.

The rows of a step are the same for all. tunewright shuffles by its seed; the others get the rows in the order that
comes out of it and do not shuffle.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.model.tiny import CORPUS, tiny_folder, train_tokenizer

# The tokenizer is the embedded model's, of 4,096 entries. The model's vocabulary is larger, so that the head weighs
# what it does in a real model of this size.
SHAPE: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1472,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {**SHAPE, "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
# As wide and deep as Qwen2.5 0.5B.
QWEN_HALF_B: dict[str, Any] = {**SHAPE, "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
QWEN_HALF_B |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
# For a GPU: as wide and deep as Llama 3.1 8B and Qwen2.5 7B.
LLAMA_8B: dict[str, Any] = {**SHAPE, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
LLAMA_8B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
QWEN_7B: dict[str, Any] = {**LLAMA_8B, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
QWEN_7B |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
# As Llama 3.2 1B.
LLAMA_1B: dict[str, Any] = {**LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA_1B |= {"tie_word_embeddings": True}
MODELS = {"39m": SHAPE, "small": SMALL, "0.5b": QWEN_HALF_B, "1b": LLAMA_1B, "8b": LLAMA_8B, "7b": QWEN_7B}
# Written as a shape alone: their weights are drawn on the device that trains, instead of a file of 16 GB.
DRAWN = ("1b", "8b", "7b")
RANK = 8
VIRTUAL_TOKENS = 20
CUTOFF = 4096


@dataclass(frozen=True)
class Kind:
    """Rows of one kind: how many make a step."""

    batch: int


KINDS = {"short": Kind(8), "long": Kind(2), "4k": Kind(4)}


@dataclass(frozen=True)
class Job:
    """What a contender is told, as JSON. `rows` are in the order of training."""

    model: str
    rows: str
    registry: str
    out: str
    method: str
    strategy: str
    ranks: int
    steps: int
    batch: int
    pack: int
    learning_rate: float
    seed: int
    rank: int = RANK
    virtual_tokens: int = VIRTUAL_TOKENS
    cutoff: int = CUTOFF
    micro: int | None = None  # rows at once on a device; None: all of its rows of a step
    drawn: bool = False  # the model's folder holds no weights

    @property
    def per_device(self) -> int:
        return self.micro or self.batch // self.ranks

    @property
    def accumulation(self) -> int:
        """Micro-batches of a device in a step."""
        return self.batch // self.ranks // self.per_device


@dataclass(frozen=True)
class Workload:
    """Rows on disk, with the tokens and scored tokens of each step."""

    folder: Path
    tokens: list[int]
    scored: list[int]
    longest: int
    padded: int

    def job(self, model: Path, out: Path, **settings: Any) -> Job:
        """What a contender is told: these rows, a folder of its own, and the rest of a `Job`."""
        seen, ours = self.folder / "seen" / "bench.json", self.folder / "ours"
        return Job(model=str(model), rows=str(seen), registry=str(ours), out=str(out), **settings)

    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def build_model(cache: Path, shape: dict[str, Any], *, weights: bool = True) -> Path:
    """Write the model once, in bfloat16, with the embedded model's tokenizer; return its folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    width = f"{shape['num_hidden_layers']}x{shape['hidden_size']}x{shape['intermediate_size']}x{shape['vocab_size']}"
    folder = cache / "bench" / f"{tiny_folder(cache).name}-{width}{'' if weights else '-drawn'}"
    if (folder / "config.json").is_file():
        return folder
    tokenizer = train_tokenizer()
    tokenizer.model_max_length = CUTOFF
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2Config(**shape, **ends)
    tokenizer.save_pretrained(folder)
    if not weights:
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(folder)
        return folder
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def matmul_parameters(shape: dict[str, Any], method: str, rank: int = RANK) -> tuple[int, int, int]:
    """Return (frozen, trained, head) matmul weights; the head is met by scored tokens only."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    linears = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    linears += [(hidden, inner), (hidden, inner), (inner, hidden)]
    body = layers * sum(a * b for a, b in linears)
    head = hidden * shape["vocab_size"]
    if method == "full":
        return 0, body, head
    adapters = layers * sum(rank * (a + b) for a, b in linears) if method in ("lora", "qlora") else 0
    return body, adapters, head


def credited_flops(shape: dict[str, Any], method: str, tokens: int, scored: int, rank: int = RANK) -> float:
    """As `trainer/flops.py`: 4 for a frozen weight, 6 for a trained one, the head on scored positions.

    Under LoRA nothing trained lies before what the first layer multiplies its input by, which needs no gradient there.
    """
    frozen, trained, head = matmul_parameters(shape, method, rank)
    body = 4 * frozen + 6 * trained
    if method in ("lora", "qlora"):
        hidden = shape["hidden_size"]
        kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
        body -= 2 * hidden * (hidden + 2 * kv + 3 * rank)
    return float(body * tokens + (6 if method == "full" else 4) * head * scored)


def write_rows(folder: Path, model: Path, kind: str, steps: int, seed: int, batch: int) -> Workload:
    """Write `seen/` in the order of training and `ours/` in the order that tunewright's shuffle makes the same."""
    import numpy as np
    from transformers import AutoTokenizer

    from tunewright.trainer.data.batches import MicroBatches

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng, sentences = random.Random(seed), _sentences()
    rows = [_row(rng, sentences, tokenizer, kind) for _ in range(steps * batch)]
    plan = BatchPlan(batch, 1, batch, 1)
    order = [
        index for part in MicroBatches(np.ones(len(rows), int), plan, 0, shuffle=True, seed=seed) for index in part
    ]
    ours = [rows[0]] * len(rows)
    for row, place in zip(rows, order, strict=True):
        ours[place] = row
    for name, content in (("seen", rows), ("ours", ours)):
        (folder / name).mkdir(parents=True)
        (folder / name / "bench.json").write_text(json.dumps(content, ensure_ascii=False, indent=0))
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        registry = {"bench": {"file_name": "bench.json", "columns": columns}}
        (folder / name / "dataset_info.json").write_text(json.dumps(registry))
    counts = [_count(tokenizer, row) for row in rows]
    by_step = [counts[start : start + batch] for start in range(0, len(rows), batch)]
    return Workload(
        folder,
        [sum(tokens for tokens, _ in step) for step in by_step],
        [sum(scored for _, scored in step) for step in by_step],
        max(tokens for tokens, _ in counts),
        sum(batch * max(tokens for tokens, _ in step) for step in by_step),
    )


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """What a user writes to tokenise an alpaca row: ids, and labels on the answer."""
    user = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    full = tokenizer.apply_chat_template(messages, return_dict=False)
    return {"input_ids": full, "labels": [-100] * len(prompt) + full[len(prompt) :]}


def _count(tokenizer: Any, row: dict[str, str]) -> tuple[int, int]:
    encoded = encode(tokenizer, row)
    return len(encoded["input_ids"]), sum(label >= 0 for label in encoded["labels"])


def _sentences() -> list[str]:
    """Every text and every answer of the shipped corpus."""
    lines = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines() if line]
    return [line["text"] if "text" in line else line["messages"][-1]["content"] for line in lines]


def _row(rng: random.Random, sentences: list[str], tokenizer: Any, kind: str) -> dict[str, str]:
    """Short: as in alpaca, most rows below the mean of 200 tokens and a long tail. Long: 1k to 4k, all alike likely."""
    wanted = 3850.0
    if kind != "4k":
        wanted = min(rng.lognormvariate(4.83, 0.65), 1000) if kind == "short" else rng.uniform(950, 3900)
    return {
        "instruction": _text(rng, sentences, tokenizer, rng.uniform(12, 40)),
        "input": _text(rng, sentences, tokenizer, rng.uniform(10, 50)) if rng.random() < 0.4 else "",
        "output": _text(rng, sentences, tokenizer, wanted),
    }


def _text(rng: random.Random, sentences: list[str], tokenizer: Any, tokens: float) -> str:
    """Sentences one after the other up to about so many tokens."""
    text: list[str] = []
    while tokens > 0:
        text.append(rng.choice(sentences))
        tokens -= len(tokenizer(text[-1])["input_ids"])
    return " ".join(text)
