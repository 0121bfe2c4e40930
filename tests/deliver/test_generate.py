"""What a model says is what its ids are, special tokens of the user's own included where it learns them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tunewright.deliver.generate import said


@pytest.mark.parametrize(
    ("special_tokens", "text"), [(True, "<|name|>Ann<|/name|> went home."), (False, "Ann went home.")]
)
def test_special_tokens_that_are_learnt_are_said(tiny_tokenizer: Any, special_tokens: bool, text: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|name|>", "<|/name|>"]})
    ids = tokenizer("<|name|>Ann<|/name|> went home.<|im_end|>\n")["input_ids"] + [tokenizer.pad_token_id] * 2
    assert said(tokenizer, ids, special_tokens=special_tokens) == text
