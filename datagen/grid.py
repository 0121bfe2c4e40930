"""The grid of examples: each cell an independent request, a pure function of settings, plan, sources and its number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tunewright.datagen.documents import Chunk
from tunewright.datagen.plan import Plan
from tunewright.datagen.prompts import example_prompt
from tunewright.datagen.settings import DatagenConfig
from tunewright.trees import digest

Message = dict[str, str]


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
    def place(self) -> dict[str, Any]:
        return {"topic": self.topic, "persona": self.persona, "difficulty": self.difficulty, "form": self.form}

    @property
    def where(self) -> dict[str, Any]:
        """What the log says of the cell beside the reply."""
        return {"id": self.id, "index": self.index, **self.place, **({"source": self.source} if self.source else {})}

    def request(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.messages]


def cell_count(config: DatagenConfig) -> int:
    """Return how many cells may be asked before it gives up."""
    return max(config.examples, round(config.attempts * config.examples))


def cell(config: DatagenConfig, plan: Plan, chunks: Sequence[Chunk], index: int) -> Cell:
    """Return one cell; more examples only add cells at the end.

    Each round goes through the topics in an order of its own; difficulty rises from round to round, then begins anew.
    """
    turn, place = divmod(index, len(plan.topics))
    topic = plan.topics[_order(f"{config.seed}/topics/{turn}", len(plan.topics))[place]]
    difficulty = plan.difficulties[turn % len(plan.difficulties)]
    chooser = random.Random(f"{config.seed}/cell/{index}")
    persona, form = chooser.choice(plan.personas), chooser.choice(plan.forms)
    chunk = None
    if chunks:
        again, number = divmod(index, len(chunks))
        chunk = chunks[_order(f"{config.seed}/sources/{again}", len(chunks))[number]]
    prompt = example_prompt(config, plan, index, (topic, persona, difficulty, form), chunk)
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
    prompt = example_prompt(
        config, plan, 0, (plan.topics[0], plan.personas[0], difficulty, plan.forms[0]), None, free=True
    )
    # Many servers take only turns of user and assistant that alternate; the reference sends assistants in a row.
    messages = [("user", prompt)]
    for text in shown:
        messages += [("assistant", text), ("user", f"Another one, {difficulty}.")]
    return Cell(index, "", "", difficulty, "", tuple(messages), request_id(config, tuple(messages), index))


def request_id(config: DatagenConfig, messages: tuple[tuple[str, str], ...], index: int | None = None) -> str:
    """Return the hash of a request and of everything that decides its reply."""
    return digest([config.model, config.temperature, config.max_tokens, config.seed, messages, index])
