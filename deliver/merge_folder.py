"""The folder of a merged model: whether its name is free, and how it is given only to what is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunewright.errors import ConfigError, StorageError
from tunewright.files import written_aside
from tunewright.folders import set_aside
from tunewright.space import storing

RECORD = "merge.json"
OTHER_OUT = "Make room, or use --out on another disk."


def check_out(folder: Path, overwrite: bool, kept: list[Path]) -> None:
    """Refuse a folder that is taken; `--overwrite` replaces an earlier merge and nothing else."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise ConfigError(f"{folder} is there already. Write --overwrite to replace it, or --out for another folder.")
    holds_more = any(one.resolve().is_relative_to(folder.resolve()) for one in kept)
    if folder.is_symlink() or not (folder / RECORD).is_file() or holds_more:
        raise ConfigError(f"{folder} holds no merged model, so --overwrite does not replace it. Choose another --out.")


@contextmanager
def new_folder(folder: Path, trash_root: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Give a folder beside `folder` that takes its name in the end, or is gone after a failure, Ctrl-C or SIGTERM.

    An earlier merge makes room only in the end, and is put back if that fails.

    Raises:
        StorageError: the disk refuses.
    """
    aside = None
    with _stoppable() as stopped:
        try:
            with written_aside(folder) as staging:
                with storing(folder.parent, "The merged model", advice=lambda: OTHER_OUT, ask_disk=False):
                    staging.mkdir(parents=True)
                    yield staging
                if stopped:
                    raise KeyboardInterrupt
                name = f"{folder.absolute().parent.name}-{folder.name}"
                aside = set_aside([folder] if folder.exists() else [], trash_root, name)
        except BaseException as error:  # Ctrl-C as well
            if aside and not folder.exists():
                (aside / folder.name).rename(folder)
                aside.rmdir()
            if isinstance(error, OSError):
                raise StorageError(f"Cannot write to {folder.parent}: {error}.") from error
            raise
    if aside:
        say(f"The earlier merge is in {aside} now.")


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, and give the list of those that came.

    Some libraries swallow the exception when it is raised while they are imported, so look at the list too.
    """
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main one may have handlers
        return
    # Commands in the background of a script have Ctrl-C ignored, and keep it.
    wanted = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, stop) for one in wanted}
    try:
        yield stopped
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
