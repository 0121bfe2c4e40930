"""Where requests go; the key comes from the environment only."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

from tunewright.datagen.settings import DatagenConfig
from tunewright.errors import ConfigError

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and the key they carry."""

    base_url: str
    key: str = field(repr=False)
    key_name: str = "OPENAI_API_KEY"
    azure_version: str | None = None

    def scrub(self, text: str) -> str:
        """Remove the key from text that comes from a server; placeholders such as `EMPTY` are no secrets."""
        return text.replace(self.key, "[key]") if len(self.key) >= 8 or self.key.startswith("sk-") else text


def find_endpoint(config: DatagenConfig) -> Endpoint:
    """Return where to ask and with which key.

    Raises:
        ConfigError: an address that is none, or no usable key for a server that is not on this machine.
    """
    azure = config.provider == "azure"
    prefix, address = ("AZURE_OPENAI", "AZURE_OPENAI_ENDPOINT") if azure else ("OPENAI", "OPENAI_BASE_URL")
    key_name = f"{prefix}_API_KEY"
    url = config.base_url or os.environ.get(address, "").strip() or ("" if azure else OPENAI_URL)
    if config.provider == "openai_compatible" and url == OPENAI_URL:
        url = ""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username or parts.password:
        example = "https://mine.openai.azure.com" if azure else "http://localhost:8000/v1"
        raise ConfigError(
            f"`base_url` (or {address}) must be an address without user name or query, for example base_url={example}."
        )
    key = os.environ.get(key_name, "").strip()
    if not key and not _is_loopback(parts.hostname) and config.provider != "openai_compatible":
        raise ConfigError(
            f"There is no key for {url}: export {key_name}=... first, or use a server of your own, for example "
            f"provider=openai_compatible base_url=http://localhost:8000/v1."
        )
    if key and Endpoint(url, key).scrub(said := repr(asdict(config))) != said:
        raise ConfigError(f"A setting holds the key of {key_name}, and settings are written to files: leave it out.")
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"{key_name} holds a blank or a character outside ASCII: copy the key again.")
    return Endpoint(url, key or "none", key_name, config.api_version if azure else None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
