"""Whose run folder is this? One made by this user with this installation opens by itself, another's has to be trusted.

A run's config.yaml says which model and data are opened and whether Python code that comes with them is run. So each
run signs it: the manifest's `signature` is an HMAC of the file, and of the manifest's `folder`, under a key that lies
in tunewright's cache and that only its user can read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunewright.errors import ConfigError

LENGTH = 32  # bytes


def key_file() -> Path:
    """Return where the key is kept: decided by the environment, never by the configuration of a folder in question."""
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE") or "~/.cache/tunewright").expanduser()
    return cache / f"installation-{os.getuid()}.key"  # a team may share the cache


def installation_key() -> bytes | None:
    """Return the key, made on first use, or None where none can be kept: then no folder counts as one's own."""
    file = key_file()
    try:
        if not file.exists():
            _make_key(file)
        found = file.stat()
        private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        key = file.read_bytes() if private else b""
    except OSError:  # a cache that cannot be written stops no training
        return None
    return key if len(key) == LENGTH else None


def _make_key(file: Path) -> None:
    """Make the key, whole from the first moment; where another process was first, its key is the key."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
            written.write(secrets.token_bytes(LENGTH))
        try:
            os.link(staging, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(staging, file)
    finally:
        staging.unlink(missing_ok=True)


def sign(config: bytes, folder: str) -> str | None:
    """Return the signature of a run's config.yaml and of the folder its paths are relative to; None without a key."""
    key = installation_key()
    told = b"\0".join((os.fsencode(folder), config))
    return hmac.new(key, told, hashlib.sha256).hexdigest() if key else None


def is_ours(config_file: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether this installation wrote the configuration, and nobody has changed it since."""
    return config_file.is_file() and is_signed(config_file.read_bytes(), manifest)


def is_signed(config: bytes, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest's signature is that of this config.yaml, under the key of this installation."""
    expected, found = sign(config, str(manifest.get("folder"))), manifest.get("signature")
    return expected is not None and isinstance(found, str) and hmac.compare_digest(expected, found)


def check_ours(config_file: Path, manifest: Mapping[str, Any], *, trusted: bool, how: str) -> None:
    """Refuse a run folder from elsewhere unless it is `trusted`, which the user says by `how`.

    Raises:
        ConfigError: see above.
    """
    if not trusted and not is_ours(config_file, manifest):
        raise not_ours(config_file, how)


def not_ours(config_file: Path, how: str) -> ConfigError:
    """Return the refusal of a run folder from elsewhere, which the user trusts by `how`."""
    return ConfigError(
        f"{config_file.parent} was not made by you with this installation, or its {config_file.name} has been changed "
        f"since (there is no signature under the key in {key_file()}). It decides which model and files are opened. "
        f"Look at it, and write {how} if you trust whoever made it."
    )


def check_code(remote_code: bool, path: str, *, trusted: bool) -> None:
    """Refuse to run Python code that comes with a model because a run's configuration says so.

    Raises:
        ConfigError: it does, and this command was not told to trust it.
    """
    if remote_code and not trusted:
        raise ConfigError(
            f"The run's model ({path}) brings Python code, which would be run here (`model.trust_remote_code: true` in "
            f"its config.yaml). Write --trust with each command that may do so."
        )
