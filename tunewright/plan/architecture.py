"""What is known of a model from its configuration alone: its modules by name, and what can be done with it.

`tunewright.trainer.model.meta_model` works it out once for each model, on the meta device, and keeps it as JSON; here
it is read, without importing torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The modules of a causal language model, by the names that settings use."""

    model_type: str
    modules: dict[str, str]  # every named module -> "linear", "embedding", or "" for blocks and what holds no matrix
    sizes: dict[str, list[int]]  # linear module -> [outputs, inputs]
    head: str
    embedding: str
    vocabulary: int  # rows of the input embedding: the token ids that it takes are below
    layers: str  # the list of decoder layers, for example "model.layers"
    num_layers: int
    tied: bool  # head and input embedding are one weight
    padding_free_problem: str | None  # why rows cannot lie end to end, if so
    positions: int | None  # entries of a learnt position table: no row can be longer
    ia3: list[list[str]] | None  # (target_modules, feedforward_modules) that PEFT knows for it
    recomputes: bool  # whether it can give its activations up and compute them again
    heads: list[str]  # the values of train.cross_entropy that give its loss
    router_loss: float | None  # the weight that its configuration gives the router's loss; None: no mixture of experts
    parameters: int  # numbers in all its weights

    @classmethod
    def read(cls, path: Path) -> Architecture | None:
        with suppress(FileNotFoundError, ValueError, TypeError):  # there is none, or half of one
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        return None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def matching(self, name: str, kinds: Iterable[str] = ("linear", "embedding")) -> list[str]:
        """Return the modules that a name means, by PEFT's rule: the whole name or its end after a dot."""
        return [module for module, kind in self.modules.items() if kind in kinds and ends_with(module, name)]

    def leaves(self, kinds: Iterable[str] = ("linear",)) -> list[str]:
        """Return the last parts of module names, each once, in the model's order, without the layers' numbers."""
        leaves = [name.rpartition(".")[2] for name, kind in self.modules.items() if kind in kinds]
        return [leaf for leaf in dict.fromkeys(leaves) if not leaf.isdigit()]


def ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
