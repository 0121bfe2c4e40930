"""What needs torch, asked of a process of its own by a launcher that does not import it."""

from __future__ import annotations

import os
import subprocess
import sys

from omegaconf import DictConfig, OmegaConf

from tunewright.errors import TunewrightError, code_of


class AsideFailed(TunewrightError):
    """The process ended with this exit code, after it had said why on standard error."""

    shown = True

    def __init__(self, exit_code: int) -> None:
        super().__init__("the configuration could not be used, see above")
        self.exit_code = code_of(exit_code)


def ask(module: str, task: str, config: DictConfig) -> str:
    """Return what `python -m MODULE TASK < config.yaml` prints.

    Raises:
        AsideFailed: it has said why.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, task],
        input=OmegaConf.to_yaml(config),
        encoding="utf-8",
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        raise AsideFailed(done.returncode)
    return done.stdout
