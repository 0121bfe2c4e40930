"""The Hub, ModelScope, and the proxy before them: whether they answer, and what the clock here is beside theirs."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener, getproxies, proxy_bypass

from omegaconf import DictConfig

from tunewright.config.schema import Source
from tunewright.errors import TunewrightError, first_line
from tunewright.findings import Finding, fix, note, ok
from tunewright.redaction import redact
from tunewright.registry import Place, load_entry
from tunewright.text import listed
from tunewright.trainer.model.model_folder import find_model

GROUP, CLOCK = "network", "clock"
SECONDS = 4.0  # that a hub has to answer
SKEW = 120.0  # seconds; signatures of cloud stores are refused from some minutes on


@dataclass(frozen=True)
class Hub:
    name: str
    url: str
    variable: str  # that names another server
    fetched: list[str]  # what this configuration may fetch there
    missing: str | None = None  # the model, where it is not on this machine


def hubs(config: DictConfig) -> list[Hub]:
    """Return the hubs, each with what the configuration takes from there."""
    wanted: dict[str, list[str]] = {"hub": [], "modelscope": []}
    source, missing = config.model.source, None
    if source in (Source.hub, Source.modelscope) and find_model(config.model, config.data.cache_dir) is None:
        wanted[source.value].append(config.model.path)
        missing = config.model.path if source is Source.hub else None  # of the other, only asking it tells
    for name in (*config.data.names, *config.data.eval_names):
        try:
            place = load_entry(name, config.data).place
        except TunewrightError:  # `tunewright data check` tells what is wrong with it
            continue
        if place in (Place.hub, Place.modelscope):
            wanted[place.value].append(name)
    huggingface = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scope = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    scope = scope if "://" in scope else f"https://{scope}"
    return [
        Hub("the Hub", huggingface, "HF_ENDPOINT", wanted["hub"], missing),
        Hub("ModelScope", scope, "MODELSCOPE_DOMAIN", wanted["modelscope"]),
    ]


def look(hub: Hub, *, offline: bool) -> list[Finding]:
    """Ask one hub for its first page, unless nothing may be fetched."""
    if offline:
        if hub.missing:
            return [
                fix(
                    GROUP,
                    f"Offline, and model.path={hub.missing} is not whole on this machine.",
                    f"Fetch it where {hub.name} can be reached, or use a folder: model=folder model.path=...",
                )
            ]
        return [ok(GROUP, f"{hub.name} is not asked: offline (HF_HUB_OFFLINE or offline=true)")]
    where = urlsplit(hub.url)
    proxy = None if proxy_bypass(where.hostname or "") else getproxies().get(where.scheme)
    through = f" through the proxy {redact(proxy)}" if proxy else ""
    begun = time.perf_counter()
    try:
        with build_opener().open(Request(hub.url, method="HEAD"), timeout=SECONDS) as answer:
            told = answer.headers.get("Date")
    except HTTPError as error:  # it answered
        told = error.headers.get("Date")
        if error.code == 407:
            return [
                fix(GROUP, f"The proxy {redact(proxy or '')} wants a password.", "Write it as http://USER:WORD@HOST.")
            ]
        if error.code >= 500:
            return [_away(hub, f"{hub.name} at {hub.url} answers with {error.code}{through}.", "Try later.")]
    except (OSError, ValueError) as error:
        return [_unreached(hub, error, through)]
    took = time.perf_counter() - begun
    return [ok(GROUP, f"{hub.name} answers in {took:.1f} s{through}"), *_clock(told, hub)]


def _unreached(hub: Hub, error: Exception, through: str) -> Finding:
    reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return fix(
            GROUP,
            f"{hub.name} at {hub.url}{through} shows a certificate that is not believed: {reason.verify_message}.",
            "A proxy that reads along has one of its own: name its file in SSL_CERT_FILE and REQUESTS_CA_BUNDLE.",
        )
    told = first_line(reason) if not isinstance(reason, TimeoutError) else f"no answer within {SECONDS:.0f} s"
    advice = f"https_proxy names a proxy, {hub.variable} a mirror; HF_HUB_OFFLINE=1 says that there is no network."
    return _away(hub, f"{hub.name} at {hub.url} is not reached{through}: {told}.", advice)


def _away(hub: Hub, found: str, do: str) -> Finding:
    """A hub that is away is a fault where something is to be fetched there."""
    if hub.fetched:
        return fix(GROUP, f"{found} {listed(hub.fetched)} would be fetched there.", do)
    return note(GROUP, f"{found} This configuration fetches nothing there.", do)


def _clock(told: str | None, hub: Hub) -> Iterator[Finding]:
    """Compare the clock here with that of a server."""
    try:
        theirs = parsedate_to_datetime(told or "").timestamp()
    except ValueError:  # it does not tell, or nothing that can be read
        return
    ahead = time.time() - theirs
    if abs(ahead) > SKEW:
        yield fix(
            CLOCK,
            f"The clock is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {hub.name}.",
            "Have it set: timedatectl set-ntp true, or chronyd. Cloud stores refuse what is signed at another time.",
        )
    else:
        yield ok(CLOCK, f"within {max(abs(ahead), 1):.0f} s of {hub.name}'s")
