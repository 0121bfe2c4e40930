"""The settings of `tunewright datagen`, and the endpoint that answers; the key comes from the environment only."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional, cast, get_type_hints
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.errors import ConfigError, did_you_mean
from launch.schema import option

EXAMPLE = (
    'tunewright datagen task="Given a riddle, answer with a single word and explain it in one sentence." name=riddles'
)
OPENAI_URL = "https://api.openai.com/v1"
# Settings that say where and how fast, not what is asked: a run continues although they changed.
OPERATIONAL = {"name", "examples", "out", "concurrency", "base_url", "timeout"}


@dataclass
class DatagenConfig:
    task: str = option("", "what the model shall learn, in a sentence or a paragraph")
    name: str = option("", "name of the dataset: its files and its registry entry")
    examples: int = option(50, "accepted rows to make, held-out ones included")
    temperature: Optional[float] = option(0.4, "sampling temperature; null: the server's own")
    model: str = option("gpt-4.1", "model that writes the examples")
    out: str = option("data", "folder of the files and of dataset_info.json")
    concurrency: int = option(16, "requests in flight at once")
    base_url: Optional[str] = option(None, "OpenAI-compatible server; null: OPENAI_BASE_URL, else OpenAI")
    seed: int = option(42, "seed of the variations and of the held-out split")
    max_tokens: int = option(2048, "longest reply; a reply cut there is rejected")
    timeout: float = option(120.0, "seconds to wait for one reply")


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and the key they carry."""

    base_url: str
    key: str = field(repr=False)

    def scrub(self, text: str) -> str:
        """Remove the key from text that comes from a server; placeholders such as `EMPTY` are no secrets."""
        return text.replace(self.key, "[key]") if len(self.key) >= 8 or self.key.startswith("sk-") else text


def load_settings(overrides: Sequence[str]) -> DatagenConfig:
    """Read key=value settings. Text is taken as it stands: a task may hold commas, quotes and `${`.

    Raises:
        ConfigError: unknown key, wrong type, or a value that is missing or cannot be used.
    """
    types = get_type_hints(DatagenConfig)
    typed = OmegaConf.structured(DatagenConfig)
    text: dict[str, str | None] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"`{item}` is not key=value. Put a task into quotes, for example {EXAMPLE}")
        if key not in types:
            secret = " A key is never a setting: export OPENAI_API_KEY=..." if "key" in key.lower() else ""
            hint = secret or did_you_mean(key, types) or f" There are: {', '.join(types)}."
            raise ConfigError(f"There is no setting `{key}`.{hint}")
        if types[key] in (str, Optional[str]):
            text[key] = None if types[key] is not str and value in ("", "null") else value
            continue
        try:
            typed[key] = None if value == "null" else value
            typed[key]  # resolves
        except OmegaConfBaseException as error:
            wanted = "a whole number such as 8" if types[key] is int else "a number such as 0.4"
            raise ConfigError(f"`{key}` is {value!r} (command line: {item}): write {wanted}.") from error
    config = replace(cast(DatagenConfig, OmegaConf.to_object(typed)), **cast(dict[str, Any], text))
    _check(config)
    return config


def _check(config: DatagenConfig) -> None:
    for key in ("task", "name"):
        if not getattr(config, key).strip():
            raise ConfigError(f"No value for `{key}`. For example: {EXAMPLE}")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", config.name) or config.name.endswith("_eval"):
        raise ConfigError(f"`name` is {config.name!r}: write letters, digits, - and _ only, and not _eval at the end.")
    if config.task.encode(errors="ignore").decode() != config.task:
        raise ConfigError("`task` holds bytes that are not UTF-8.")
    for key, least in {"examples": 2, "concurrency": 1, "max_tokens": 1, "timeout": 1}.items():
        if getattr(config, key) < least:
            raise ConfigError(f"`{key}` is {getattr(config, key)}: write at least {least}.")
    if config.temperature is not None and not 0 <= config.temperature <= 2:
        raise ConfigError(f"`temperature` is {config.temperature}: write a number from 0 to 2.")


def identity(config: DatagenConfig) -> dict[str, Any]:
    """Return the settings that decide what is asked; replies for other ones must not share a log."""
    return {key: value for key, value in asdict(config).items() if key not in OPERATIONAL}


def find_endpoint(config: DatagenConfig) -> Endpoint:
    """Return where to ask and with which key.

    Raises:
        ConfigError: an address that is none, or no usable key for a server that is not on this machine.
    """
    url = config.base_url or os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username or parts.password:
        raise ConfigError(
            "`base_url` (or OPENAI_BASE_URL) must be an address without user name or query, "
            "for example base_url=http://localhost:8000/v1."
        )
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not _is_loopback(parts.hostname):
        raise ConfigError(
            f"There is no key for {url}: export OPENAI_API_KEY=... first, or use a server on this machine, "
            f"for example base_url=http://localhost:8000/v1."
        )
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError("OPENAI_API_KEY holds a blank or a character outside ASCII: copy the key again.")
    return Endpoint(url, key or "none")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
