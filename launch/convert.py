"""A checkpoint cut anew for other ranks, in a process of its own: `python -m tunewright.launch.convert CHECKPOINT`."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.compose import load_config
from tunewright.config.schema import Launcher
from tunewright.errors import TunewrightError
from tunewright.launch.children import ask, report
from tunewright.plan.conversion import Start, Way
from tunewright.ranks import leave


def ensure_readable(start: Start, config: DictConfig) -> Path:
    """Return the folder that ranks go on from, converted where they could not read the checkpoint as it is.

    Raises:
        StorageError: see `universal.convert`.
    """
    if start.way is not Way.as_is:
        ask("tunewright.launch.convert", str(start.checkpoint), config)
    return start.folder


def main(checkpoint: Path) -> int:
    """Convert a checkpoint for the configuration on standard input."""
    from tunewright.trainer.model.load import quiet_libraries

    quiet_libraries()
    from tunewright.trainer.universal import convert

    try:
        config = load_config(sys.stdin)
        deepspeed = config.strategy.launcher is Launcher.deepspeed
        convert(checkpoint, Way.for_deepspeed if deepspeed else Way.for_torch, trusted=config.trust)
    except TunewrightError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
