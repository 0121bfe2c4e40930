"""What is written and shown while a run trains: metrics.jsonl, and a bar or lines for the user."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tunewright.files import write_text
from tunewright.terminal import Progress
from tunewright.trainer.console import Output
from tunewright.trainer.pulse import Pulse
from tunewright.trainer.throughput import Meter


class MetricsWriter(TrainerCallback):
    """metrics.jsonl: what goes to TensorBoard, one JSON object for each log line, and the loss of each of its steps.

    Tokens and seconds go on counting where a run is continued. `started` is when this process was, on the clock of
    `time.perf_counter`.
    """

    def __init__(self, path: Path, meter: Meter, started: float) -> None:
        self.path, self.meter, self.started = path, meter, started
        self.tokens_seen = 0.0
        self.seconds_before = 0.0  # of the run before this process, up to the checkpoint that it continues

    def wall_seconds(self) -> float:
        """Return the seconds of the run until now, over all its processes."""
        return self.seconds_before + time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._drop_after(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        self.tokens_seen += logs.get("step_tokens", 0)
        counted = {"tokens_seen": int(self.tokens_seen), "wall_seconds": self.wall_seconds()}
        # JSON has no number that is not finite; only a held-out loss can be one (`finiteness`).
        figures = {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in logs.items()}
        line = {"step": state.global_step, "epoch": state.epoch, **counted, **figures}
        if "loss" in logs:
            line["step_losses"] = self.meter.step_losses
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _drop_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is about to repeat."""
        if not self.path.is_file():
            return
        # The last one may be half of a line, of a process that was killed or whose disk was full.
        found = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [json.loads(line) for line in found if line.endswith("}\n")]
        kept = [line for line in lines if line["step"] <= step]
        self.tokens_seen = max((line["tokens_seen"] for line in kept), default=0)
        self.seconds_before = max((line.get("wall_seconds", 0.0) for line in kept), default=0.0)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


class CountSteps(TrainerCallback):
    """Tells this rank's pulse in which step it is."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pulse.step = state.global_step + 1


class FirstStep(TrainerCallback):
    """Calls a function when the first step of this process begins: all that takes time before has been done."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin: Callable[[], None] | None = begin

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begin:
            self.begin()
            self.begin = None


class ProgressReport(TrainerCallback):
    """On a terminal a bar that moves with each step, elsewhere a line for each log step; both with the time left."""

    def __init__(self, output: Output) -> None:
        self.output = output
        stream = output.stream
        self.progress = Progress(self._say, stream, every=0.0, leave=stream.isatty())
        self.details: tuple[str, ...] = ()

    def _say(self, line: str) -> None:
        self.output.say(f"  {line}")

    def _update(self, state: Any) -> None:
        self.progress.update("step", state.global_step, state.max_steps, *self.details)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress.live:
            self._update(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            self.progress.say(f"step {state.global_step}/{state.max_steps}  eval loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        mfu = (f"MFU {logs['mfu']:.0%}",) if "mfu" in logs else ()
        speed = f"{logs['tokens_per_second']:,.0f} tokens/s"
        self.details = (f"loss {logs['loss']:.4f}", f"grad norm {logs['grad_norm']:.2f}", speed, *mfu)
        self._update(state)
        if self.progress.live:
            self.output.log(f"  {self.progress.line}")
