"""Committed checkpoints and the result are copied to a second place while training goes on (`train.mirror`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from transformers import TrainerCallback

from tunewright.checkpoints import listed
from tunewright.config.schema import TrainConfig
from tunewright.errors import StorageError
from tunewright.mirror import METRICS, Mirror
from tunewright.run_folder import RunDir
from tunewright.trainer.console import Output


class MirrorCheckpoints(TrainerCallback):
    """A thread of the first rank that copies each checkpoint; what fails is said, and tried again with the next.

    Where copying takes longer than training to the next one, those between are left out.

    Args:
        settings: `config.train`: as many checkpoints stay there as here, and the end waits `timeout_minutes` at most.
    """

    def __init__(self, mirror: Mirror, run: RunDir, settings: TrainConfig, output: Output) -> None:
        self.mirror, self.run, self.output = mirror, run, output
        self.keep, self.patience = settings.save_total_limit, settings.timeout_minutes * 60
        self.keep_best = settings.keep_best
        self.best: Path | None = None
        self.copied: str | None = None  # the last checkpoint that is whole there
        self.problem: str | None = None  # why the last one tried is not
        self.copying: str | None = None  # not to be removed here meanwhile
        self._wanted: SimpleQueue[Path | None] = SimpleQueue()
        self._told: SimpleQueue[str] = SimpleQueue()
        self._thread = threading.Thread(target=self._copy_all, name="mirror", daemon=True)
        self._thread.start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep_best and state.best_model_checkpoint:  # which the end of the training will need
            self.best = self.run.checkpoints / Path(state.best_model_checkpoint).name
        self._offer_newest()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say()

    def finish(self, *, result: bool) -> None:
        """Wait for what is being copied, try once more what failed, copy the result, and note all in the manifest."""
        if self.problem:
            self._offer_newest()
        self._wanted.put(None)
        self.output.log(f"Waiting for the mirror {self.mirror.location}")
        self._thread.join(self.patience)
        if self._thread.is_alive():
            self.problem = f"nothing more had arrived after {self.patience:.0f} s"
        outcome = {"place": self.mirror.location, "checkpoint": self.copied, "result": False, "problem": self.problem}
        if result and not self._thread.is_alive():
            self.run.update_manifest(mirror={**outcome, "result": True})  # as its copy is to have it
            try:
                self.mirror.put_result(self.run.path, [self.run.config.name, self.run.manifest.name, METRICS])
                outcome["result"] = True
            except StorageError as error:
                outcome["problem"] = str(error)
        self.run.update_manifest(mirror=outcome)
        self._say()
        if outcome["problem"]:
            self.output.say(f"Not everything is at the mirror {self.mirror.location}: {outcome['problem']}")

    def _offer_newest(self) -> None:
        self._wanted.put(next(iter(listed(self.run.checkpoints)), None))

    def _say(self) -> None:
        while not self._told.empty():
            self.output.say(self._told.get())

    def _copy_all(self) -> None:
        while checkpoint := self._newest_wanted():
            self.copying = checkpoint.name
            try:
                best = self.best
                if best and best != checkpoint and not self.mirror.has(best):
                    self.mirror.put_checkpoint(best, self.keep)
                self.mirror.put_checkpoint(checkpoint, self.keep, self.run.metrics, spared=best)
                self.copied, self.problem = checkpoint.name, None
            except StorageError as error:
                self.problem = f"{checkpoint.name}: {error}"
                self._told.put(f"{self.problem} Training goes on; it is tried again with the next checkpoint.")
            self.copying = None

    def _newest_wanted(self) -> Path | None:
        """Wait for a checkpoint and return the newest that is waiting; None at the end."""
        wanted = self._wanted.get()
        while True:
            try:
                after = self._wanted.get_nowait()
            except Empty:
                return wanted
            if after is None:
                self._wanted.put(None)  # for the next time
                return wanted
            wanted = after


@contextmanager
def finished(mirroring: MirrorCheckpoints | None) -> Iterator[None]:
    """Finish what is copied when a training ends, however it does; the result only where there is one."""
    done = False
    try:
        yield
        done = True
    finally:
        if mirroring:
            mirroring.finish(result=done)
