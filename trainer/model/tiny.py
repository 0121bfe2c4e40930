"""The embedded model `tiny`: a 5 M-parameter Qwen2 with its own tokenizer, built here from text that ships in data/.

It speaks the chat format and knows the vocabulary of the shipped text, nothing more: enough for a demo, a test or a
dry run on a machine without a GPU or a model hub. Built once and kept under a key of everything that made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tunewright.errors import DataError, StorageError
from tunewright.files import written_aside
from tunewright.shipped import shipped

if TYPE_CHECKING:
    import torch

CORPUS = shipped("data") / "tiny_corpus.jsonl"
VOCAB_SIZE = 4096
# What its config.json says of its shape.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
NUMBERS = {"model_type": "qwen2", **SHAPE}
SEQUENCE = 128  # tokens of a training sequence
BATCH = 8  # sequences of a step
STEPS = 220
LEARNING_RATE = 3e-3  # of embeddings, head and norms, by AdamW
MATRIX_LEARNING_RATE = 0.02  # of the matrices in the layers, by Muon
WARMUP_STEPS = 20
SEED = 0
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Progress = Callable[[int, int, float], None]  # (step, steps, loss)


def tiny_key() -> str:
    """Return a digest of everything that makes the model: this file, the text, the libraries."""
    digest = hashlib.sha256()
    digest.update(Path(__file__).read_bytes())
    try:
        digest.update(CORPUS.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"The text that the embedded model is built from is missing: {CORPUS}.") from error
    for package in ("torch", "transformers", "tokenizers"):
        digest.update(f"{package}={version(package)}".encode())
    return digest.hexdigest()[:16]


def tiny_folder(cache_dir: Path) -> Path:
    """Return where the embedded model is, or will be once built."""
    return cache_dir / "models" / f"tiny-{tiny_key()}"


def is_built(cache_dir: Path) -> bool:
    return (tiny_folder(cache_dir) / "config.json").is_file()


def build_tiny(cache_dir: Path, progress: Progress = lambda step, steps, loss: None) -> Path:
    """Build the embedded model unless it is there, and return its folder. Safe to call from several processes."""
    folder = tiny_folder(cache_dir)
    if is_built(cache_dir):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_built(cache_dir):
            with written_aside(folder) as staging:
                _build(staging, progress)
                if not (staging / "model.safetensors").is_file():
                    # transformers saves nothing from a rank other than the first.
                    raise StorageError(f"The embedded model was not saved to {staging}.")
    return folder


def _build(folder: Path, progress: Progress) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours tells how far it is
    tokenizer = train_tokenizer()
    # No device and no global seed is touched: the same weights come out wherever this runs.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **SHAPE,
                bos_token_id=None,
                eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
                pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            )
        )
        stream = torch.tensor(
            [token for text in _texts(tokenizer) for token in tokenizer(text)["input_ids"]], dtype=torch.long
        )
        _pretrain(model, stream, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pretrain(model: Any, stream: torch.Tensor, progress: Progress) -> None:
    """Next-token prediction on windows of `stream` (tokens,), each epoch cut at another offset.

    Muon (https://kellerjordan.github.io/posts/muon/) gets in a minute where AdamW alone needs several: loss 1.6 instead
    of 3.4 after the same 220 steps.
    """
    import torch

    layers = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    optimizers = [
        torch.optim.Muon(layers, lr=MATRIX_LEARNING_RATE, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate) for optimizer in optimizers]
    model.train()
    batches = _batches(stream)
    for step in range(1, STEPS + 1):
        ids = next(batches)  # (BATCH, SEQUENCE)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        progress(step, STEPS, float(loss.detach()))
    model.eval()


def _rate(step: int) -> float:
    """Share of the peak learning rate at `step`: a short warm-up, a plateau, and a fall over the last 40 %."""
    return min((step + 1) / WARMUP_STEPS, 1.0, (STEPS - step) / (0.4 * STEPS))


def _batches(stream: torch.Tensor) -> Iterator[torch.Tensor]:
    import torch

    while True:
        offset = int(torch.randint(SEQUENCE, (1,)))
        count = (len(stream) - offset) // SEQUENCE
        windows = stream[offset : offset + count * SEQUENCE].view(count, SEQUENCE)
        for rows in torch.randperm(count).split(BATCH):
            if len(rows) == BATCH:
                yield windows[rows]


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines() if line]


def train_tokenizer() -> Any:
    """Train a vocabulary for Qwen2's own tokenizer, which is what transformers loads for a Qwen2 model."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    texts = [line.get("text") or _spoken(line["messages"]) for line in _lines()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _spoken(messages: list[dict[str, str]]) -> str:
    """A conversation with its roles, so that these are single tokens."""
    return "".join(f"{turn['role']}\n{turn['content']}\n" for turn in messages)


def _texts(tokenizer: Any) -> Iterator[str]:
    for line in _lines():
        if "messages" in line:
            yield tokenizer.apply_chat_template(line["messages"], tokenize=False)
        else:
            yield line["text"] + "<|endoftext|>"
