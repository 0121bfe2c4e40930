"""How much a run will write, and whether its disk has room for it: before the first step, and before each save."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from tunewright.checkpoints import files_in, listed
from tunewright.errors import StorageError
from tunewright.run_folder import RunDir
from tunewright.space import free_bytes
from tunewright.text import size
from tunewright.trainer.agreement import Agreement

MASTER = 4  # bytes of a float32 copy of a trained weight
# Bytes that an optimiser keeps for each trained weight, by what its name holds; of all others, AdamW's two float32.
STATES = {"8bit": 2, "adafactor": 0.1, "adagrad": 4, "ademamix": 12, "lion": 4, "rmsprop": 4, "sgd": 0}
ADAM = 8
TOKENIZER = ("*token*", "vocab*", "merges*", "*.model", "*.jinja")


class DiskRoom(TrainerCallback):
    """Knows what a checkpoint and the result take, and refuses what has no room, in all ranks at once.

    Args:
        model_path: the folder of the base model, whose tokenizer is saved with each.
        settings: those of `train`.
    """

    def __init__(self, trainer: Any, run: RunDir, model_path: Path, agreement: Agreement, settings: Any) -> None:
        self.run, self.agreement, self.settings = run, agreement, settings
        self.result, self.checkpoint = estimate(trainer, model_path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise StorageError where the checkpoints that lie there at the same time, or the result, will not fit."""
        standing, keep = len(listed(self.run.checkpoints)), self.settings.save_total_limit
        saves = keep + 1  # the oldest goes when the newest is whole
        if self.settings.save_steps is not None:  # else as often as time allows
            left = state.max_steps - state.global_step
            saves = min(saves, math.ceil(left / self.settings.save_steps)) if self.settings.save_steps else 0
        more = max(min(saves, keep + 1 - standing), min(saves, 1))
        kept = min(more, max(keep - standing, 0))
        needed = max(more * self.checkpoint, kept * self.checkpoint + self.result)
        self._check(
            needed,
            f"What this run writes (at a time {more} checkpoint{'' if more == 1 else 's'} of about "
            f"{size(self.checkpoint)}, and a result of {size(self.result)})",
            "Make room, or choose another `output_root`.",
        )

    def check_save(self) -> None:
        """Raise StorageError where the next checkpoint will not fit."""
        self._check(self.checkpoint, "A checkpoint", self.advice())

    def check_result(self) -> None:
        """Raise StorageError where the result will not fit."""
        self._check(self.result, "The result", self.advice())

    def saved(self, checkpoint: Path) -> None:
        """Take a checkpoint's size for that of the next."""
        self.checkpoint = sum((checkpoint / name).stat().st_size for name in files_in(checkpoint))

    def advice(self) -> str:
        """Return what stands, and what to do once something could not be written."""
        standing = self.run.last_checkpoint()
        if standing is None:
            return "There is no checkpoint yet: make room, and resume=auto begins anew."
        return f"{standing.name} stands: make room, and the same command with resume=auto goes on from it."

    def _check(self, needed: int, what: str, advice: str) -> None:
        # The first rank's view: what it sees is where all write, and no two ranks look at the same moment.
        free = self.agreement.gather(free_bytes(self.run.path))[0]
        if free < needed:
            raise StorageError(
                f"{what} needs about {size(needed)} in {self.run.path}, where {size(free)} are free. {advice}"
            )


def estimate(trainer: Any, model_path: Path) -> tuple[int, int]:
    """Return the bytes of the (result, checkpoint) of all ranks together, from the weights of the live model."""
    model = trainer.model
    half = saved = 0
    trained = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves nothing in the parameter itself
        if parameter.requires_grad:
            trained += count
            half += count * (parameter.element_size() < MASTER)
        if parameter.requires_grad or not isinstance(model, PeftModel):
            saved += count * parameter.element_size()
    tokenizer = sum(file.stat().st_size for file in {file for one in TOKENIZER for file in model_path.glob(one)})
    name = trainer.args.optim.value
    states = next((kept for part, kept in STATES.items() if part in name), ADAM)
    if trainer.is_deepspeed_enabled:  # which writes the weights once more, and float32 copies of all that are trained
        return saved + tokenizer, int(2 * saved + tokenizer + trained * (states + MASTER))
    return saved + tokenizer, int(saved + tokenizer + trained * states + half * MASTER)
