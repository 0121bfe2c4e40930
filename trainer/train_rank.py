"""One rank from its first import to its end: what it says goes to its log, what ends it into a file beside that."""

from __future__ import annotations

import faulthandler
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from omegaconf import DictConfig

from tunewright.errors import PeerError
from tunewright.importing import uncollected
from tunewright.ranks import leave
from tunewright.run_folder import RunDir
from tunewright.trainer.console import Console, end_rank, reported_errors
from tunewright.trainer.prepared import Prepared
from tunewright.trainer.process_group import join
from tunewright.trainer.pulse import Pulse
from tunewright.trainer.shortage import told_shortage
from tunewright.trainer.stopping import Stopping

if TYPE_CHECKING:
    from accelerate import PartialState


def train_rank(
    config: DictConfig,
    run: RunDir,
    checkpoint: Path | None,
    prepared: Callable[[], Prepared],
    stopping: Stopping,
    state: PartialState | None = None,
    at_end: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Train as one rank of a run, and end the process; a rank that has not joined the others, without `state`, does.

    `at_end` is called after a good end; the process takes no other notice of what is still open.
    """
    console = Console(run.logs)
    stopping.leave = partial(end_rank, trace="", logs=run.logs, console=console)
    pulse = Pulse(config.train.timeout_minutes, partial(_end, run.logs, console))
    with reported_errors(run.logs, console, pulse):
        found = prepared()
        with uncollected():
            state = state or join(config.strategy.launcher.name, config.train.timeout_minutes, console.say)
            pulse.attach()
            from tunewright.trainer.callbacks import CountSteps
            from tunewright.trainer.training import train

        with told_shortage(config):
            train(config, run, found, state, console, checkpoint, callbacks=[CountSteps(pulse)], stopping=stopping)
        pulse.stop()
        state.destroy_process_group()
        at_end()
    # At the interpreter's own end a rank over gloo aborts now and then (torch 2.13), and a finished run would count as
    # failed.
    leave(0)


def _end(logs: Path, console: Console, error: Exception) -> None:
    """End this rank from the thread that noticed, with the stacks of all."""
    faulthandler.dump_traceback()
    trace = "" if isinstance(error, PeerError) else "".join(traceback.format_exception(error))
    end_rank(error, trace, logs, console)
