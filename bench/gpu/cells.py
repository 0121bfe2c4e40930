"""What the GPU kit measures, most valuable first: a table to read, and to add a lever to."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Not a setting: batches are copied to the device one by one, and each copy is waited for (`worker.without`).
BLOCKING = "copies that wait"
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
    lever: tuple[str, ...] = ()  # overrides of `tunewright train`, or BLOCKING
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
# Tried one by one on top of the defaults, most promising first; the rest is a part of its own.
LEVERS = (
    ("train.fused_layers=liger",),
    ("train.compile=true",),
    ("train.cross_entropy=trl",),
)
MORE_LEVERS = (
    ("train.fused_layers=liger", "train.compile=true"),
    ("train.attention_kernel=flash3",),
    ("train.fused_layers=kernels",),
    ("train.cross_entropy=cut_exact",),
    ("train.cross_entropy=cut",),
    ("train.gradient_checkpointing=true", "automatic=[train.gradient_checkpointing]"),  # as few layers as have to
    ("train.gradient_checkpointing=true",),
    (BLOCKING,),
)
# What an optimiser and the format of gradients cost shows where all weights are trained.
FULL_LEVERS = (("train.optimizer=adamw_torch",), ("train.grad_accum_dtype=bfloat16",))
# Levers that need a package, by the module that tells it, and those that a CPU has not.
MODULES = {
    "train.fused_layers=liger": "liger_kernel",
    "train.fused_layers=kernels": "kernels",
    "train.cross_entropy=cut": "cut_cross_entropy",
    "train.cross_entropy=cut_exact": "cut_cross_entropy",
    "train.attention_kernel=flash3": "flash_attn_interface",
}
GPU_ONLY = (*MODULES, BLOCKING)


def cannot(lever: Sequence[str], *, gpu: bool) -> str | None:
    """Return why this machine has nothing to measure with these overrides."""
    for one in lever:
        if one in GPU_ONLY and not gpu:
            return "needs a GPU"
        if one in MODULES and importlib.util.find_spec(MODULES[one]) is None:
            return f"{MODULES[one]} is not installed"
    return None


def _lora_8b(rows: dict[str, Any], contender: str, lever: tuple[str, ...] = ()) -> Cell:
    return Cell(f"8b LoRA, {rows['rows']}", contender, "8b", "lora", lever=lever, **rows)


def _full_1b(contender: str, lever: tuple[str, ...] = ()) -> Cell:
    return Cell("1b full, 4k", contender, "1b", "full", lever=lever, **LONG)


SPEED = [
    *(_lora_8b(LONG, contender) for contender in (OURS, TRL_TUNED, LOOP)),
    *(_lora_8b(SHORT, contender) for contender in (OURS, TRL_TUNED, LOOP)),
    *(_lora_8b(LONG, OURS, lever) for lever in LEVERS),
    *(_lora_8b(rows, TRL) for rows in (LONG, SHORT)),
]
OTHERS = [
    *(Cell("7b LoRA, 4k", OURS, "7b", method, **LONG) for method in ("lora", "qlora")),
    *(_full_1b(contender) for contender in (OURS, TRL_TUNED)),
    *(Cell("1b LoRA on one rank, 4k", OURS, "1b", "lora", strategy=name, **LONG) for name in ("zero2", "zero3")),
]
MORE = [
    *(_lora_8b(LONG, OURS, lever) for lever in ((), *MORE_LEVERS)),
    *(_full_1b(OURS, lever) for lever in ((), *FULL_LEVERS)),
]
PARTS = {"speed": SPEED, "others": OTHERS, "levers": MORE}


def tiny(cell: Cell) -> Cell:
    """The same cell for a rehearsal on a CPU."""
    return Cell(**{**asdict(cell), "model": "small", "rows": "short", "batch": 4, "micro": 2})
