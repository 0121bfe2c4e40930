"""Checkpoints are written aside by all ranks, and count once every rank has written and the folder has its name."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from tunewright.checkpoints import PART, PREFIX, commit, discard_part, files_in, rotate, seal
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.schema import Launcher
from tunewright.errors import StorageError
from tunewright.files import make_readable
from tunewright.run_folder import RunDir
from tunewright.space import storing
from tunewright.trainer.agreement import Agreement
from tunewright.trainer.disk_room import DiskRoom
from tunewright.trainer.finiteness import check_finite
from tunewright.trainer.mirroring import MirrorCheckpoints
from tunewright.trainer.results import package_versions


class Checkpoints(TrainerCallback):
    """Writes the checkpoints of a run, and puts back what transformers forgets when a run goes on.

    Args:
        copy: the manifest and config.yaml as they were when the training began (`copy_of`), in the first rank.
    """

    def __init__(
        self, config: DictConfig, run: RunDir, agreement: Agreement, room: DiskRoom, copy: dict[str, Any] | None
    ) -> None:
        self.config, self.run, self.agreement, self.room, self.copy = config, run, agreement, room, copy
        self.seconds: float | None = None  # that the last save took, in the slowest rank
        self.saved_at = time.perf_counter()  # or, before that, when the training began
        self.mirroring: MirrorCheckpoints | None = None

    def save(self, trainer: Any, write: Callable[[], None]) -> None:
        """Write a checkpoint of the step that has just ended. Every rank has to call it.

        Args:
            write: writes this rank's part into `trainer.checkpoint_root`.

        Raises:
            NumericError: what was trained is not finite.
            StorageError: the disk does not take it.
        """
        check_finite(trainer)
        started, main = time.perf_counter(), trainer.is_world_process_zero()
        if main:
            discard_part(self.run.checkpoints)  # of an interrupted attempt
        self.room.check_save()
        try:
            with storing(self.run.path, "A checkpoint", needed=self.room.checkpoint, advice=self.room.advice):
                self._write(trainer, write, started)
        finally:
            if main:
                discard_part(self.run.checkpoints)  # of a failed one: its room is needed
        self.saved_at = time.perf_counter()

    def _write(self, trainer: Any, write: Callable[[], None], started: float) -> None:
        state, main = trainer.state, trainer.is_world_process_zero()
        place = self.run.checkpoints / f"{PREFIX}{state.global_step}"
        staging = place.parent / PART / place.name
        if main:
            staging.mkdir(parents=True)
        self.agreement.gather(None)
        trainer.checkpoint_root = staging.parent
        try:
            write()
        finally:
            trainer.checkpoint_root = None
        if state.best_model_checkpoint == str(staging):
            state.best_model_checkpoint = str(place)
            if main:
                state.save_to_json(str(staging / "trainer_state.json"))
        self.agreement.gather(None)  # all files are there
        # Each rank sees those of the first, or its own are on another disk.
        seen = self.agreement.gather((socket.gethostname(), (staging / "trainer_state.json").is_file()))
        blind = sorted({host for host, saw in seen if not saw})
        if blind:
            raise StorageError(
                f"No checkpoint can be written: {', '.join(blind)} and {seen[0][0]} do not share {self.run.path}. "
                f"Write an `output_root` on a disk that all machines see."
            )
        if main:
            make_readable(staging)
        listings = self.agreement.gather(files_in(staging))
        sealed = self.agreement.gather(seal(staging, share(listings, trainer.args.process_index)))
        self.seconds = max(self.agreement.gather(time.perf_counter() - started))
        if main:
            files = {name: told for part in sealed for name, told in part.items()}
            commit(staging, {**self._record(trainer), "seconds": self.seconds, "files": dict(sorted(files.items()))})
            rotate(place.parent, self.config.train.save_total_limit, self._spared(state))
            self.room.saved(place)
        self.agreement.gather(None)  # it has its name

    def _spared(self, state: Any) -> list[str]:
        """Return the checkpoints that stay, however old: the best one, and one that is just being copied."""
        best = Path(state.best_model_checkpoint or "").name if self.config.train.keep_best else ""
        return [name for name in (best, self.mirroring.copying if self.mirroring else None) if name]

    def _record(self, trainer: Any) -> dict[str, Any]:
        config, state = self.config, trainer.state
        deepspeed = config.strategy.launcher is Launcher.deepspeed
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "steps_planned": state.max_steps,
            "world_size": trainer.args.world_size,
            "strategy": config.strategy.name,
            "zero_stage": deepspeed_file(config).stage if deepspeed else None,
            "method": config.method.name,
            "dtype": config.model.dtype.value,
            "batches_per_step": trainer.args.gradient_accumulation_steps,
            "versions": package_versions(),
            "run": self.copy,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.perf_counter()
        # transformers 5.23 takes `logging_steps`, `eval_steps` and `save_steps` from the checkpoint's state.
        state.compute_steps(args, state.max_steps)
        if state.best_global_step:  # the folder's name in the state is the one of then: a run may have moved
            best = self.run.checkpoints / f"{PREFIX}{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None


def share(listings: Sequence[Sequence[str]], rank: int) -> list[str]:
    """Return which files a rank hashes, of those that each rank sees.

    A network file system shows what another machine has just written when it likes to; each sees what it wrote itself.
    """
    mine = []
    for number, name in enumerate(sorted({name for names in listings for name in names})):
        seers = [other for other, names in enumerate(listings) if name in names]
        if seers[number % len(seers)] == rank:
            mine.append(name)
    return mine


class KeepPatience(EarlyStoppingCallback):
    """Early stopping that knows, when a run goes on, how often the loss had not fallen, and when that was enough."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        told = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(told, dict) and state.global_step:
            self.early_stopping_patience_counter = told["attributes"]["early_stopping_patience_counter"]
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                control.should_training_stop = True
