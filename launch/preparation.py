"""The preparing process as whoever waits for it sees it: begun, told what to prepare, waited for, ended.

Apart from what it does, so that a launch which ends with a configuration error imports none of that.
"""

from __future__ import annotations

import os
import subprocess
import sys

from omegaconf import DictConfig, OmegaConf

from tunewright.ranks import die_with_parent, interrupt_waits, without_ranks


class Preparation:
    """The preparing process, which can be begun before it is known what to prepare: its imports take seconds."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def begin(self, config: DictConfig, *, quiet: bool = False) -> None:
        """Start it, for what will most likely be prepared: all that counts now is whether that may use a network."""
        if self.process is not None:
            return
        # OMP_NUM_THREADS is a rank's share of the cores.
        env = {key: value for key, value in without_ranks(os.environ).items() if not key.startswith("OMP_")}
        env["DS_ACCELERATOR"] = "cpu"  # nothing here needs a GPU, and DeepSpeed need not look for one
        if config.offline:
            env["HF_HUB_OFFLINE"] = "1"  # the Hub's package reads it while it is imported
        with interrupt_waits():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunewright.launch.prepare"],
                stdin=subprocess.PIPE,
                encoding="utf-8",
                env=env,
                stdout=subprocess.DEVNULL if quiet else None,
                preexec_fn=die_with_parent,
            )

    def finish(self, config: DictConfig, *, quiet: bool = False) -> int:
        """Say what to prepare, wait for it, and return the exit code."""
        self.begin(config, quiet=quiet)
        assert self.process is not None
        try:
            self.process.communicate(OmegaConf.to_yaml(config))
            return self.process.returncode
        finally:  # also when this process is interrupted
            self.stop()

    def stop(self) -> None:
        """End a process that was begun and is not needed, or not any more."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
