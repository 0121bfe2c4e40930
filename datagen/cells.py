"""Cells: independent requests, each a pure function of the settings, the system message and its number.

Independent, because feeding a model its own examples makes them alike, cannot run in parallel and cannot resume.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datagen.settings import DatagenConfig, identity

REQUESTS_PER_EXAMPLE = 3  # gives up at this many cells for each row that was asked for
PROMPTS_VERSION = 1  # part of a log's identity: raise it with every change of wording below

DIFFICULTIES = (
    "an easy case that a beginner meets first",
    "an ordinary case from daily use",
    "a hard case with several conditions to keep in mind at once",
    "a rare corner case in which a careless answer would be wrong",
)
FORMS = (
    "a short, direct request",
    "a request with some background that the user adds",
    "a request about material that stands in `input`",
    "an informal message as people type it in a chat",
    "a precise request in formal wording",
)
GRID = tuple(itertools.product(DIFFICULTIES, FORMS))

FIELDS = ("instruction", "input", "output")
JSON_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in FIELDS},
    "required": list(FIELDS),
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Cell:
    """One request for one example."""

    index: int
    difficulty: str
    form: str
    prompt: str
    id: str


def cells(config: DatagenConfig, system: str) -> Iterator[Cell]:
    """Yield every cell that may be asked, in order; more examples only add cells at the end."""
    for index in range(REQUESTS_PER_EXAMPLE * config.examples):
        block, offset = divmod(index, len(GRID))
        # Each block of numbers goes once through the whole grid, in an order of its own.
        difficulty, form = random.Random(f"{config.seed}/{block}").sample(GRID, len(GRID))[offset]
        prompt = _example_prompt(config.task, system, index, difficulty, form)
        yield Cell(index, difficulty, form, prompt, _hash({**identity(config), "prompt": prompt}))


def system_prompt(task: str) -> str:
    """Return the request for the system message."""
    return (
        "A language model is going to be fine-tuned for the task below. Write the system message that it gets in use: "
        "who it is, what it is given and what it answers with, in at most five sentences. Reply with the message "
        f"alone, in the language of the task.\n\nTask:\n{task}"
    )


def _example_prompt(task: str, system: str, index: int, difficulty: str, form: str) -> str:
    # What all cells share comes first, so that a server can cache it.
    return (
        "Write one training example for a language model that is fine-tuned for the task below.\n\n"
        f"Task:\n{task}\n\nSystem message of the model:\n{system}\n\n"
        'Reply with one JSON object and nothing else: {"instruction": what the user asks, complete in itself, '
        '"input": material that the request is about, or an empty string, "output": the best possible answer of the '
        "model}. All three are strings. Do not mention these rules in the example.\n\n"
        f"This is example number {index + 1} of a varied set whose other examples are written by others: choose a "
        f"subject that they are unlikely to choose.\nDifficulty: {difficulty}.\nForm: {form}."
    )


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
