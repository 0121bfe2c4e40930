"""What the GPU kit measures, most valuable first: a table to read, and to add a lever to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OURS, LOOP, TRL, TRL_TUNED = "tunewright", "loop by hand", "TRL, defaults", "TRL, tuned"


@dataclass(frozen=True)
class Cell:
    """One training. Cells of one `group` have the same rows and are judged by each other's losses."""

    group: str
    contender: str
    model: str
    method: str
    rows: str
    batch: int
    micro: int
    lever: tuple[str, ...] = ()  # overrides of `tunewright train`
    strategy: str = "single"  # another one is started by `tunewright train`, as a user starts it

    @property
    def name(self) -> str:
        special = [self.strategy] if self.strategy != "single" else []
        special += [self.method] if self.method not in self.group.lower() else []
        return ", ".join([self.contender, *special, *self.lever])

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name}


# A step is 16k tokens in micro-batches of 4k: what an 8B model's activations allow on 80 GB without recomputation.
LONG = {"rows": "4k", "batch": 4, "micro": 1}
SHORT = {"rows": "short", "batch": 64, "micro": 16}
# Tried one by one on top of the defaults. "Honest about speed" means to run all of them, not to choose.
LEVERS = (
    ("train.optimizer=adamw_torch_fused",),
    ("train.compile=true",),
    ("train.gradient_checkpointing=auto",),
    ("train.gradient_checkpointing=true",),
)


def _lora_8b(rows: dict[str, Any], contender: str, lever: tuple[str, ...] = ()) -> Cell:
    return Cell(f"8b LoRA, {rows['rows']}", contender, "8b", "lora", lever=lever, **rows)


SPEED = [
    *(_lora_8b(LONG, contender) for contender in (OURS, TRL_TUNED, LOOP)),
    *(_lora_8b(SHORT, contender) for contender in (OURS, TRL_TUNED, LOOP)),
    *(_lora_8b(LONG, OURS, lever) for lever in LEVERS),
    *(_lora_8b(rows, TRL) for rows in (LONG, SHORT)),
]
OTHERS = [
    *(Cell("7b LoRA, 4k", OURS, "7b", method, **LONG) for method in ("lora", "qlora")),
    *(Cell("1b full, 4k", contender, "1b", "full", **LONG) for contender in (OURS, TRL_TUNED)),
    *(Cell("1b LoRA on one rank, 4k", OURS, "1b", "lora", strategy=name, **LONG) for name in ("zero2", "zero3")),
]
PARTS = {"speed": SPEED, "others": OTHERS}


def tiny(cell: Cell) -> Cell:
    """The same cell for a rehearsal on a CPU."""
    return Cell(**{**asdict(cell), "model": "small", "rows": "short", "batch": 4, "micro": 2})
