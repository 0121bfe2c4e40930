"""Room on a disk: whether there is enough, and what could not be written for want of it.

Each library tells a full disk in words of its own: PyTorch by `basic_ios::clear: iostream error` or `unexpected pos 128
vs 22`, safetensors by a `SafetensorError` that names the system's number for it, others by an `OSError`. So whatever
fails while something is written is not looked up in a list of texts: the disk itself is asked, by writing to it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunewright.errors import StorageError, TunewrightError
from tunewright.text import size

# What an OSError is the storage's fault by. A missing file is not: it is named where it was expected.
STORAGE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG}
)
# How libraries written in Rust tell the system's number: safetensors' SafetensorError, tokenizers' bare Exception.
RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
OTHER_CACHE = "Make room there, or choose another folder with data.cache_dir (the variable TUNEWRIGHT_CACHE)."
PROBE_BYTES = 256 * 1024


def free_bytes(path: Path) -> int:
    """Return what is free for this user where `path` is or would be made; a quota is not seen."""
    return shutil.disk_usage(existing(path)).free


def check_space(path: Path, needed: int, what: str, advice: str) -> None:
    """Compare what will be written below `path`, in bytes, with what is free there.

    Raises:
        StorageError: it is more.
    """
    free = free_bytes(path)
    if free < needed:
        raise StorageError(f"{what} needs about {size(needed)} in {path}, where {size(free)} are free. {advice}")


def refusal(path: Path) -> str | None:
    """Try to write where `path` is or would be made; return what the system says against it, quotas included."""
    try:
        with tempfile.TemporaryFile(dir=existing(path)) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    return None


def refused(error: BaseException | None) -> str | None:
    """Return what a disk said that an error is about or followed from, or None where it is about something else."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        rust = RUST_ERRNO.search(str(error))
        if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
            return os.strerror(error.errno) + (f" ({error.filename})" if error.filename else "")
        if rust and int(rust[1]) in STORAGE_ERRNOS:
            return os.strerror(int(rust[1]))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def storing(
    path: Path,
    what: str,
    *,
    needed: int | Callable[[], int | None] | None = None,
    advice: Callable[[], str] = lambda: "",
    ask_disk: bool = True,
) -> Iterator[None]:
    """Turn whatever writing `what` below `path` fails with into what the user can act on, where the disk is the cause.

    To stand inside of what removes a half-written file: afterwards there is room again, and nothing to be seen.

    Args:
        needed: bytes that were to be written, as far as known; a function is asked once it failed.
        advice: asked for once it failed: what stands, and what to do.
        ask_disk: write a little to see whether it is the disk, where the error does not say so. Not around what does
            more than writing, whose own errors a full disk must not hide.

    Raises:
        StorageError: the disk is full, read-only or otherwise refuses.
    """
    try:
        yield
    except TunewrightError:
        raise
    except Exception as error:
        told, free = refused(error) or (refusal(path) if ask_disk else None), free_bytes(path)
        wanted = needed() if callable(needed) else needed
        if told is None and (wanted is None or free >= wanted):
            raise
        reason = told or os.strerror(errno.ENOSPC)
        raise StorageError(
            f"{what} cannot be written to {path}: {reason}. {_room(wanted, free)}{_sentence(advice())}"
        ) from error


def _room(needed: int | None, free: int) -> str:
    return f"{f'About {size(needed)} are needed, ' if needed is not None else ''}{size(free)} are free."


def _sentence(text: str) -> str:
    return f" {text}" if text else ""


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())
