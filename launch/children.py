"""Processes beside this one, ours and accelerate's: what they may import, and that none outlives this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from tunewright.errors import ERRORS, PeerError, TunewrightError
from tunewright.ranks import die_with_parent, without_ranks
from tunewright.stop_signals import STOP_SIGNALS, StopAsked
from tunewright.terminal import begin_line, tell
from tunewright.threads import waiting

# The working directory may hold a datasets.py or a yaml.py of the user's own, which must not be imported. What Python
# and accelerate leave of it, `tunewright/__init__.py` takes away.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
OUT_OF_MEMORY = " (out of memory is the usual cause)"  # of what the kernel kills
REPORTED = re.compile(rf"^({'|'.join(ERRORS)}): ", re.MULTILINE)


def start(
    command: Sequence[str], env: Mapping[str, str], held_back: Collection[int] = (), **streams: Any
) -> subprocess.Popen[str]:
    """Start a process that is no rank of another launch, hears no Ctrl-C, and ends when this one does.

    Args:
        env: added to the environment.
        held_back: signals that wait, in it and in what it starts, until a process says that it hears them.
    """

    def prepare() -> None:
        die_with_parent()
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, {*before, signal.SIGINT, *held_back})

    # Until it is a process of its own, what this one does about a signal would become an error of Popen's.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(
            command,
            env={**without_ranks(os.environ), **SAFE_PATH, **env},
            encoding="utf-8",
            start_new_session=True,
            preexec_fn=prepare,
            **streams,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ask(
    module: str, task: str, config: DictConfig, stdout: int | None = subprocess.PIPE, *, given: str | None = None
) -> str:
    """Run `python -m MODULE TASK < config.yaml` and return what it prints, if that goes to no other `stdout`.

    It reads what is `given` in place of the configuration, if so.

    Raises:
        TunewrightError: the process ended with one, which is raised here as it was there.
        PeerError: it was killed.
        StopAsked: it was asked to stop.
    """
    env = {"DS_ACCELERATOR": "cpu", **waiting()}  # nothing asked like this needs a GPU: DeepSpeed need not look for one
    if config.offline:
        env["HF_HUB_OFFLINE"] = "1"  # the Hub's package reads it while it is imported
    process = start(
        [sys.executable, "-m", module, task], env, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE
    )
    try:
        printed, told = process.communicate(OmegaConf.to_yaml(config) if given is None else given)
    except BaseException:
        kill(process)
        process.wait()
        begin_line()
        raise
    # An error is what the process said last; its text may have lines of its own.
    error = next(REPORTED.finditer(told), None) if process.returncode else None
    if aside := (told[: error.start()] if error else told).rstrip():  # of libraries
        tell(aside, sys.stderr)
    if error:
        raise ERRORS[error[1]](told[error.end() :].rstrip())
    if process.returncode < 0:
        if -process.returncode in STOP_SIGNALS:  # Slurm signals every process of a step
            raise StopAsked(-process.returncode)
        name = signal.Signals(-process.returncode).name
        raise PeerError(f"{module} was ended by {name}{OUT_OF_MEMORY if name == 'SIGKILL' else ''}.")
    if process.returncode:
        raise TunewrightError(f"{module} ended with {process.returncode}, see above.")
    return printed or ""


def report(error: TunewrightError) -> int:
    """Say in a process that was asked what it cannot do, as `ask` reads it, and return the exit code."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and all below it at once.

    Ranks are sessions of their own, so a process group does not hold them.
    """
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        top.suspend()  # it starts nothing meanwhile
        for one in [*top.children(recursive=True), top]:
            with suppress(psutil.NoSuchProcess):  # it ended by itself in the meantime
                one.kill()
