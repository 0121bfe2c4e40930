"""The requests for an example and for its score: what is asked, and the shape of the reply."""

from __future__ import annotations

from typing import Any

from tunewright.datagen.documents import Chunk
from tunewright.datagen.plan import Plan
from tunewright.datagen.settings import DatagenConfig

PROMPTS_VERSION = 2  # part of a log's identity: raise it with every change of wording here or in plan.py

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


def example_prompt(
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
