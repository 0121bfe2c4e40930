"""What decides a dataset's tokens, as one digest: the name of their folder."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.chat_templates import template_text
from tunewright.plan.method_rules import longest_row
from tunewright.trainer.data.sources import Rows
from tunewright.trees import digest, plain

FORMAT = 5  # raise it when the meaning of the cached columns changes


def cache_key(rows: Rows, config: DictConfig, model_path: Path | None, limit: int | None = None) -> str:
    """Return the digest of everything that decides a dataset's tokens, without importing torch or transformers."""
    data, model = config.data, config.model
    settings = {
        "format": FORMAT,
        "rows": [rows.identity, rows.entry.meaning(), limit],
        "render": [
            longest_row(config),
            *(plain(data[key]) for key in ("overlong", "train_on_prompt", "mask_history", "special_tokens_in_answers")),
        ],
        "template": [
            model.template,
            model.template and template_text(model.template),
            dict(model.template_kwargs or {}),
        ],
        "versions": [version("transformers"), version("tokenizers")],
        "tokenizer": _tokenizer_files(model_path) if model_path else None,
    }
    return digest(settings)


def _tokenizer_files(model_path: Path) -> list[str]:
    digests = []
    for pattern in (
        "*token*",
        "*vocab*",
        "merges.txt",
        "*template*",
        "special_tokens_map.json",
        "*.model",
        "*.tiktoken",
    ):
        for file in sorted(model_path.glob(pattern)):
            if file.is_file():
                digests.append(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}")
    return digests
