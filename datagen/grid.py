"""Cells: independent requests, each a pure function of the settings, the plan, the sources and its number."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tunewright.datagen.documents import Chunk
from tunewright.datagen.plan import Plan
from tunewright.datagen.settings import DatagenConfig

PROMPTS_VERSION = 2  # part of a log's identity: raise it with every change of wording here or in plan.py

Message = dict[str, str]

FIELDS = ("instruction", "input", "output")
LONGEST = 20_000  # characters: a bound for servers that generate by the schema
EXAMPLE_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": LONGEST} for name in FIELDS},
    "required": list(FIELDS),
    "additionalProperties": False,
}
TURN = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": LONGEST} for name in ("user", "assistant")},
    "required": ["user", "assistant"],
    "additionalProperties": False,
}
CONVERSATION_SCHEMA = {
    "type": "object",
    "properties": {"turns": {"type": "array", "items": TURN}},
    "required": ["turns"],
    "additionalProperties": False,
}
SCORE_SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer"}, "reason": {"type": "string", "maxLength": 1000}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}


def schema_of(config: DatagenConfig) -> dict[str, Any]:
    """Return the shape of an example."""
    return EXAMPLE_SCHEMA if config.turns == 1 else CONVERSATION_SCHEMA


@dataclass(frozen=True)
class Cell:
    """One request for one example."""

    index: int
    topic: str
    persona: str
    difficulty: str
    form: str
    messages: tuple[tuple[str, str], ...]  # (role, content)
    id: str
    source: str | None = None

    @property
    def where(self) -> dict[str, Any]:
        """What the log says of the cell beside the reply."""
        place = {"topic": self.topic, "persona": self.persona, "difficulty": self.difficulty, "form": self.form}
        return {"id": self.id, "index": self.index, **place, **({"source": self.source} if self.source else {})}

    def request(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.messages]


def cell_count(config: DatagenConfig) -> int:
    """Return how many cells may be asked before it gives up."""
    return max(config.examples, round(config.attempts * config.examples))


def cells(config: DatagenConfig, plan: Plan, chunks: Sequence[Chunk]) -> Iterator[Cell]:
    """Yield every cell that may be asked, in order; more examples only add cells at the end.

    Each round goes through the topics in an order of its own; difficulty rises from round to round, then begins anew.
    """
    for index in range(cell_count(config)):
        yield cell(config, plan, chunks, index)


def cell(config: DatagenConfig, plan: Plan, chunks: Sequence[Chunk], index: int) -> Cell:
    """Return one cell."""
    turn, place = divmod(index, len(plan.topics))
    topic = plan.topics[_order(f"{config.seed}/topics/{turn}", len(plan.topics))[place]]
    difficulty = plan.difficulties[turn % len(plan.difficulties)]
    chooser = random.Random(f"{config.seed}/cell/{index}")
    persona, form = chooser.choice(plan.personas), chooser.choice(plan.forms)
    chunk = None
    if chunks:
        again, number = divmod(index, len(chunks))
        chunk = chunks[_order(f"{config.seed}/sources/{again}", len(chunks))[number]]
    prompt = _prompt(config, plan, index, (topic, persona, difficulty, form), chunk)
    messages = (("user", prompt),)
    where = f"{chunk.file}#{chunk.number}" if chunk else None
    return Cell(index, topic, persona, difficulty, form, messages, request_id(config, messages), where)


@lru_cache(maxsize=16)
def _order(seed: str, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def sequential_cell(config: DatagenConfig, plan: Plan, index: int, earlier: Sequence[str]) -> Cell:
    """Return the cell of gpt-llm-trainer's loop: the request, then up to ten earlier replies, each asked for more."""
    shown = list(earlier)
    if len(shown) > 10:
        shown = random.Random(f"{config.seed}/sequential/{index}").sample(shown, 10)
    difficulty = "slightly harder than the examples before, and different from them"
    prompt = _prompt(config, plan, 0, (plan.topics[0], plan.personas[0], difficulty, plan.forms[0]), None, free=True)
    # Many servers take only turns of user and assistant that alternate; the reference sends assistants in a row.
    messages = [("user", prompt)]
    for text in shown:
        messages += [("assistant", text), ("user", f"Another one, {difficulty}.")]
    return Cell(index, "", "", difficulty, "", tuple(messages), request_id(config, tuple(messages), index))


def request_id(config: DatagenConfig, messages: tuple[tuple[str, str], ...], index: int | None = None) -> str:
    """Return the hash of a request and of everything that decides its reply."""
    return digest([config.model, config.temperature, config.max_tokens, config.seed, messages, index])


def _prompt(
    config: DatagenConfig,
    plan: Plan,
    index: int,
    place: tuple[str, str, str, str],
    chunk: Chunk | None,
    *,
    free: bool = False,
) -> str:
    topic, persona, difficulty, form = place
    # What all cells share comes first, so that a server can cache it.
    parts = [
        "Write one training example for a language model that is fine-tuned for the task below.\n\n"
        f"Task:\n{config.task}\n\nSystem message of the model:\n{plan.system}\n\n"
    ]
    if config.turns > 1:
        parts.append(
            f'Reply with one conversation of {config.turns} exchanges as one JSON object and nothing else: {{"turns": '
            '[{"user": what the user says, "assistant": the best possible answer of the model}, ...]}. Later exchanges '
            "build on earlier ones. Do not mention these rules in it.\n\n"
        )
    else:
        parts.append(
            'Reply with one JSON object and nothing else: {"instruction": what the user asks, complete in itself, '
            '"input": material that the request is about, or an empty string, "output": the best possible answer of '
            "the model}. All three are strings. Do not mention these rules in the example.\n\n"
        )
    if free:
        return "".join([*parts, f"It should be {difficulty}."])
    if chunk is not None:
        parts.append(f"Build it on this material, and on nothing that contradicts it:\n{chunk.text}\n\n")
    parts.append(
        f"This is example number {index + 1} of a varied set whose other examples are written by others: choose a "
        f"subject that they are unlikely to choose.\nTopic: {topic}.\nWho asks: {persona}.\nDifficulty: {difficulty}.\n"
        f"Form: {form}."
    )
    return "".join(parts)


def score_prompt(config: DatagenConfig, plan: Plan, row: dict[str, Any]) -> str:
    """Return the request to score an example."""
    exchanges = [*row.get("history", []), ["\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]]]
    shown = "\n\n".join(f"User:\n{user}\n\nAssistant:\n{assistant}" for user, assistant in exchanges)
    return (
        "Score one training example for a language model that is fine-tuned for the task below.\n\n"
        f"Task:\n{config.task}\n\nSystem message of the model:\n{plan.system}\n\nWhat a 5 means: {config.judge.rubric} "
        "A 3 has a flaw that a careful reader sees, a 1 is useless.\n\n"
        'Reply with a score as one JSON object and nothing else: {"score": a whole number from 1 to 5, "reason": in '
        f"one sentence}}.\n\nThe example:\n\n{shown}"
    )


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[
        :16
    ]
