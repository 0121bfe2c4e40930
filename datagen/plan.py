"""The plan: what the model that is tuned is told, and the grid that its examples are spread over.

Independent cells of a grid do not drift into copies of each other, as examples do that are made in the light of earlier
ones; they can be asked for at once, and again after a crash.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.errors import ConfigError, did_you_mean
from tunewright.files import write_json

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
TOPICS, PERSONAS = 12, 6
SCHEMA = {
    "type": "object",
    "properties": {
        "system": {"type": "string", "maxLength": 2000},
        "topics": {"type": "array", "items": {"type": "string", "maxLength": 200}},
        "personas": {"type": "array", "items": {"type": "string", "maxLength": 200}},
    },
    "required": ["system", "topics", "personas"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Plan:
    """The system message of the tuned model, and what varies from example to example."""

    system: str
    topics: tuple[str, ...]
    personas: tuple[str, ...]
    difficulties: tuple[str, ...] = DIFFICULTIES
    forms: tuple[str, ...] = FORMS

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def plan_prompt(task: str) -> str:
    """Return the request for a plan."""
    return (
        "A language model is going to be fine-tuned for the task below, on examples that are written one by one. Plan "
        "them: the system message that the model gets in use (who it is, what it is given and what it answers with, in "
        f"at most five sentences), {TOPICS} topics that together cover the task and do not overlap, and {PERSONAS} "
        "kinds of people who would ask. Stay inside the task. Write in the task's language.\n\n"
        'Reply with the plan as one JSON object and nothing else: {"system": "...", "topics": ["...", ...], '
        f'"personas": ["...", ...]}}.\n\nTask:\n{task}'
    )


def as_plan(value: dict[str, Any] | None) -> Plan | None:
    """Return the plan in a reply's JSON object, or None when there is none."""
    if value is None:
        return None
    system = value.get("system")
    lists = {name: _texts(value.get(name)) for name in ("topics", "personas")}
    if not isinstance(system, str) or not system.strip() or not all(lists.values()):
        return None
    return Plan(system.strip(), **lists)


def read_plan(path: Path) -> Plan:
    """Read a plan file, written by --plan-only and perhaps edited.

    Raises:
        ConfigError: it is no plan, with the part that is wrong.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`plan` is '{path}', which cannot be read as JSON: {error}.") from error
    known = list(Plan.__dataclass_fields__)
    if not isinstance(value, dict) or not isinstance(value.get("system"), str) or not value["system"].strip():
        raise ConfigError(
            f"`plan` is '{path}', which has no text under `system`. --plan-only writes a plan to start from."
        )
    for key in value:
        if key not in known:
            raise ConfigError(f"`plan` is '{path}', which has `{key}`.{did_you_mean(key, known)} It may have {known}.")
    lists = {}
    for key in known[1:]:
        if key in value or key in ("topics", "personas"):
            lists[key] = _texts(value.get(key))
            if not lists[key]:
                raise ConfigError(f"`plan` is '{path}', whose `{key}` is not a list of texts: write at least one.")
    return Plan(value["system"].strip(), **lists)


def _texts(value: Any) -> tuple[str, ...]:
    """Return the texts of a list, each once, or nothing when it is none."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return ()
    return tuple(dict.fromkeys(item.strip() for item in value if item.strip()))
