"""What can end a command, and the exit code that says so to a script.

0 done, 2 configuration, 3 data, 4 storage, 5 numeric, 6 peer or network, 7 memory, 70 a bug of ours, 75 stopped
and resumable.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tunewright.redaction import redact


class TunewrightError(Exception):
    """A failure that the user can act on; its text is shown without a traceback, and without secrets."""

    exit_code = 70

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(TunewrightError):
    """A setting, a choice or a combination of them cannot work."""

    exit_code = 2


class DataError(TunewrightError):
    """A registry, a file or a row cannot be used."""

    exit_code = 3


class StorageError(TunewrightError):
    """A folder is not writable, a disk is full, or a file is missing or damaged."""

    exit_code = 4


class NumericError(TunewrightError):
    """Training produced a value that is not finite."""

    exit_code = 5


class PeerError(TunewrightError):
    """Another rank, node or server failed or went silent."""

    exit_code = 6


class MemoryShortage(TunewrightError):
    """A device or a host has not the memory that was asked for; the same again would end the same way."""

    exit_code = 7


class Preempted(TunewrightError):
    """Stopped from outside at a point from which `resume=auto` continues."""

    exit_code = 75


KINDS = (ConfigError, DataError, StorageError, NumericError, PeerError, MemoryShortage, Preempted)
ERRORS = {cls.__name__: cls for cls in KINDS}
EXIT_CODES = {name: cls.exit_code for name, cls in ERRORS.items()}


def closest(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the choice most similar to `name`, or None when nothing is similar."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest choice, or an empty string."""
    match = closest(name, choices)
    return f" Did you mean '{match}'?" if match else ""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says that is not empty, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
