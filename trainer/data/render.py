"""The one renderer: conversation -> token ids and labels, through the tokenizer's own chat template.

A token carries a label when the model has to produce it itself: everything of an assistant turn after the
generation prompt, its end-of-turn token included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.errors import DataError
from trainer.data.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy skips


@dataclass(frozen=True)
class Example:
    """Token ids (length,) and labels (length,) of one conversation."""

    input_ids: list[int]
    labels: list[int]


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render a conversation; labels are the ids where the assistant speaks and IGNORED elsewhere.

    Raises:
        DataError: the tokenizer has no chat template, or its template rewrites earlier turns.
    """
    text, spans = _text_and_spans(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        for position, (token_start, token_end) in enumerate(offsets):
            if start <= token_start and token_end <= end:
                labels[position] = ids[position]
    return Example(ids, labels)


def prompt_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the model is given when it has to answer the last message."""
    _require_template(tokenizer)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _text_and_spans(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered text and the [start, end) characters of each assistant turn: the prefix difference."""
    _require_template(tokenizer)
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = prompt_text(messages[:index], tokenizer)
        through = str(tokenizer.apply_chat_template(messages[: index + 1], tokenize=False))
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"The chat template of {tokenizer.name_or_path} renders turn {index} differently once later turns "
                f"follow, so the assistant's tokens cannot be told apart by position."
            )
        spans.append((len(before), len(through)))
    return text, spans


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(f"The tokenizer of {tokenizer.name_or_path} has no chat template.")
