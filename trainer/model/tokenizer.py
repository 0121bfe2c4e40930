"""The tokenizer with its chat template, a named one where it comes without, and what ends an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from tunewright.config.chat_templates import template_names, template_text
from tunewright.config.schema import ModelConfig
from tunewright.errors import ConfigError, StorageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Markers that a template relies on being one token, written out in its text.
MARKER = re.compile(r"<\|[a-z_]+\|>|<｜\w+｜>|<(?:start|end)_of_turn>")


def load_tokenizer(path: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the chosen chat template, ready to pad and to end a turn.

    A missing pad token becomes the end token, which padding masks anyway.
    """
    from transformers import AutoTokenizer

    tokenizer = from_folder(AutoTokenizer.from_pretrained, path, model)
    if model.template:
        install_template(tokenizer, model.template)
    if tokenizer.chat_template:
        set_end_of_turn(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def install_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give the tokenizer a named template; it is saved with the model, so that serving uses the same.

    Raises:
        ConfigError: the template's markers are not tokens of this model.
    """
    text = template_text(template)
    known = tokenizer.get_vocab()
    missing = sorted({marker for marker in MARKER.findall(text) if marker not in known})
    # Markers of a role alone may be plain text, as Zephyr's are; the one that ends a turn must be a token.
    if missing and "eos_token" not in text:
        usable = [name for name in template_names() if _fits(name, known)]
        raise ConfigError(
            f"`model.template` is '{template}', whose {', '.join(missing)} are not tokens of this model. Templates "
            f"that fit it: {', '.join(usable)}."
        )
    # Llama and its kin begin every text with a token that a template for all models cannot count on.
    begins = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]
    tokenizer.chat_template = "{{- bos_token }}" + text if begins and "bos_token" not in text else text


def _fits(name: str, known: dict[str, int]) -> bool:
    text = template_text(name)
    return "eos_token" in text or all(marker in known for marker in MARKER.findall(text))


def set_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the token with which the template ends an answer the tokenizer's end token, and so what stops generation.

    Base models often end a text with one token and their template a turn with another, and never stop in a chat.
    """
    before, ends = _probe(tokenizer)
    if ends and tokenizer.eos_token_id not in ends:
        known = tokenizer.eos_token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[-1])
        if _probe(tokenizer)[0] != before:  # the template writes the end token elsewhere
            tokenizer.eos_token = known


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end an answer: the end token, and the last special token of a turn of the template."""
    ends = _probe(tokenizer)[1] if tokenizer.chat_template else []
    return {tokenizer.eos_token_id, *([] if tokenizer.eos_token_id in ends else ends[-1:])}


def _probe(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Return a conversation's text, and the special tokens after its answer."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "ANSWER"}
    try:
        text = str(tokenizer.apply_chat_template([question, answer], tokenize=False))
    except TemplateError:
        return "", []  # it wants more than a question and an answer
    tail = text.rpartition("ANSWER")[2] if "ANSWER" in text else ""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return text, [token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in special]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the model's own and the one with which the chat template ends a turn."""
    known = model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [known] if known is not None else []
    return sorted({*ids, *stop_ids(tokenizer)})


def from_folder(load: Callable[..., Any], path: Path, model: ModelConfig, **options: Any) -> Any:
    """Return what a `from_pretrained` of transformers loads from a model's folder.

    Raises:
        StorageError: it cannot be loaded.
    """
    try:
        return load(str(path), trust_remote_code=model.trust_remote_code, **options)
    except OSError as error:
        reason = first_line(error)
        raise StorageError(f"`model.path` is '{model.path}' and could not be loaded from {path}: {reason}") from error
