"""Shared by the trainer's tests: tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# What the shipped chat templates write around turns.
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """A byte-level tokenizer that knows every shipped template's markers, without a template of its own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["A user asks.", "An assistant answers."], 400, special_tokens=["<s>", "</s>", *SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL
    )
