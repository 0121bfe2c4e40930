"""Which process may write into a folder: one at a time, on this machine and on others that see the same disk.

.lock        locked by the system (flock), so that it ends with the process, however that ends
.lock.lease  for file systems where that lock is not known on other machines (NFS with local_lock, Lustre without
             -o flock) or not at all: which machine, which process and when that began; touched while it lives
.lock.json   the same for people, and since when
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, SoftFileLease, Timeout

from tunewright.errors import StorageError
from tunewright.files import write_json

if TYPE_CHECKING:
    from filelock._soft import LeaseCompromise

LOCK, LEASE, HOLDER = ".lock", ".lock.lease", ".lock.json"
PROBE_SECONDS = 1.0  # whoever only looks whether a lock is held, as each rank does, holds it for a moment
LEASE_SECONDS = 60.0  # a process on another machine that has not touched its lease for so long is gone
TOUCH_SECONDS = 5.0
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # a file system without such locks


class InUse(Exception):
    """Another process holds a folder's lock; the text says which."""


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made when there is none.

    A lock that a process of this machine left behind is free at once. For one of another machine this waits until that
    gives a sign of life, or has given none for `LEASE_SECONDS`.

    Raises:
        InUse: another process holds it.
        StorageError: the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_system_lock(folder))
            held.enter_context(_leased(folder, say))
            me = {"host": socket.gethostname(), "pid": os.getpid()}
            write_json(folder / HOLDER, {**me, "since": datetime.now().astimezone().isoformat(timespec="seconds")})
            held.callback((folder / HOLDER).unlink, missing_ok=True)
        except Timeout as error:
            raise InUse(holder(folder)) from error
        except OSError as error:
            raise StorageError(f"Cannot write to {folder}: {error.strerror}.") from error
        yield


def is_locked(folder: Path) -> bool:
    """Tell whether another process holds the lock of a folder, as far as is seen at once; nothing is made.

    Raises:
        StorageError: the lock cannot be opened.
    """
    try:
        if (folder / LOCK).exists():
            with _system_lock(folder):
                pass
        if (folder / LEASE).exists():
            with _lease(folder, timeout=0.0):
                pass
    except Timeout:
        return True
    except OSError as error:
        raise StorageError(f"Cannot open {folder / LOCK}: {error.strerror}.") from error
    return False


def holder(folder: Path) -> str:
    """Return who holds a folder's lock, as far as it is written down."""
    with suppress(OSError, ValueError, KeyError):
        who = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    owner = _lease(folder).owner
    return f"process {owner.pid} on {owner.hostname}" if owner else "another process"


@contextmanager
def _system_lock(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK, timeout=PROBE_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_FLOCK:
            raise
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _leased(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    lease = _lease(folder)
    try:
        lease.acquire(timeout=0)
    except Timeout:
        say(f"{folder} was in use by {holder(folder)}: waiting up to {LEASE_SECONDS:.0f} seconds for a sign of life.")
        before = _touched(folder)
        lease.acquire(
            timeout=LEASE_SECONDS + TOUCH_SECONDS, poll_interval=0.5, cancel_check=lambda: _touched(folder) > before
        )
    try:
        yield
    finally:
        lease.release()


def _lease(folder: Path, timeout: float = -1.0) -> SoftFileLease:
    return SoftFileLease(
        folder / LEASE,
        timeout=timeout,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=TOUCH_SECONDS,
        on_compromise=_on_loss,
    )


def _touched(folder: Path) -> float:
    """Return when the lease was touched last, by the clock of its file system; 0 where there is none any more."""
    with suppress(FileNotFoundError):
        return (folder / LEASE).stat().st_mtime
    return 0.0


def _on_loss(loss: LeaseCompromise) -> None:
    """Stop at once when another process has taken a lease that was not touched for too long.

    A lease that somebody removed, or a disk that did not answer for a while, ends nothing: nobody else writes there.
    """
    print(f"{loss.lock_file}: {loss.reason}.", file=sys.stderr, flush=True)
    if loss.reason == "owner-changed":
        for _ in range(2):  # the first asks for an end, the second does not wait for it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(1.0)
