"""In which languages the answers are, guessed on a sample of them."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from tunewright.launch.data.report import Languages
from tunewright.trainer.data.token_cache import CachedDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANGUAGE_ROWS = 200  # examples whose language is guessed
LANGUAGE_TOKENS = 1000  # of each of them, from the beginning
LEAST_TEXT = 20  # characters: what is shorter is guessed wrongly too often


def languages_of(cached: CachedDataset, tokenizer: PreTrainedTokenizerBase) -> Languages:
    """Guess the language of what is learnt in an evenly spaced sample of the examples."""
    import py3langid

    from tunewright.trainer.data.render import IGNORED

    count = len(cached.part.rows)
    chosen = np.unique(np.linspace(0, count - 1, min(count, LANGUAGE_ROWS)).astype(int))
    found: Counter[str] = Counter()
    for labels in cached.examples().with_format("numpy")[chosen]["labels"] if count else []:
        learnt = labels[labels != IGNORED][:LANGUAGE_TOKENS]
        text = str(tokenizer.decode(learnt.tolist(), skip_special_tokens=True)).strip()
        if len(text) >= LEAST_TEXT:
            found["JSON" if _is_json(text) else py3langid.classify(text)[0]] += 1
    shares = {code: times / found.total() for code, times in found.most_common()}
    return Languages(len(chosen), found.total(), shares)


def _is_json(text: str) -> bool:
    """Tell whether a text is a JSON object or list: its marks would be taken for Latin."""
    if text[0] not in "{[":
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
