"""The one redaction: secrets are kept out of everything that is written or shown, by their value, wherever it stands.

A secret is the value of an environment variable that names one, credentials in an address, and what has the form of a
known kind of key. The names of settings decide nothing: `template_kwargs.think_token` is a word of the template.

    HF_TOKEN=hf_abcdefgh           the text "by hf_abcdefgh" is "by ${oc.env:HF_TOKEN}"
    https://me:word@host/a?sig=x   https://***@host/a?sig=***

What stands for a variable's value is how a configuration refers to it, so a run's config.yaml stays usable: the ranks
read the value from their environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from tunewright.trees import map_texts

SHORTEST = 8  # characters: the value `true` of a variable such as USE_TOKEN is no secret, and stands everywhere
WORDS = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "APIKEY"}
ENDS = ("_KEY", "_PAT", "_PWD", "PASSWORD", "CONNECTION_STRING")
HIDDEN = "***"

# (what is found, what is written for it)
PATTERNS = [
    # user:password@, but not the port of host:8000/path@1; of web addresses a name alone too, which is a token there.
    # An address that was taken for a path has lost a slash.
    (re.compile(r"(\b[a-zA-Z][\w+.-]*://?)[^\s/@:'\"<>]*:(?!\d+/)[^\s@'\"<>]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(\bhttps?://?)[^\s/@'\"<>]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (
        re.compile(
            r"([?&](?:[\w.-]*(?:token|signature|secret|password|credential|api[_-]?key)|sig|key|auth)=)[^&\s'\"#<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # Hugging Face, OpenAI and Anthropic, GitHub, GitLab, AWS, Slack, Google
    (re.compile(r"\b(hf_)[A-Za-z0-9]{20,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(sk-)(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{20,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(gh[pousr]_|github_pat_|glpat-)[\w-]{16,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(xox[abprs]-)[\w-]{10,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(AIza)[\w-]{30,}"), rf"\1{HIDDEN}"),
]
# key=value or {key: value} in what a person typed
TYPED = re.compile(r"([\w.]+)\s*[=:][\s\[]*(\"[^\"]*\"|'[^']*'|[^\s,{}\[\]]+)")


def names_secret(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret: HF_TOKEN, hub_token, AWS_SECRET_ACCESS_KEY."""
    name = name.upper()
    return not WORDS.isdisjoint(re.split(r"[^A-Z0-9]+", name)) or name.endswith(ENDS)


def environment_secrets() -> dict[str, str]:
    """Return {value: name} of the secrets in the environment, the longest first; the path of one is none."""
    found = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and names_secret(name) and not os.path.exists(value)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def redact(text: str, also: Iterable[str] = ()) -> str:
    """Return `text` without the secrets in it, and without the values in `also`."""
    for value in also:
        text = text.replace(value, HIDDEN)
    return hide_credentials(name_variables(text))


def name_variables(text: str) -> str:
    """Return `text` with each value of a secret variable replaced by a reference to it."""
    for value, name in environment_secrets().items():
        text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def hide_credentials(text: str) -> str:
    """Return `text` without what has the form of a secret, whatever the environment holds."""
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_tree(tree: Any) -> Any:
    """Return mappings and lists with every text in them redacted; keys stay."""
    return map_texts(tree, redact)


def typed_secrets(arguments: Iterable[str]) -> list[str]:
    """Return the values that a command line gives to names of secrets, such as hub_token=... or --token ...

    Markers such as `pad_token=<pad>` are none.
    """
    found, before = [], ""
    for argument in arguments:
        pairs = TYPED.findall(argument)
        if names_secret(before) and before.startswith("--") and "=" not in before:
            pairs.append((before, argument))
        found += [value.strip("\"'") for key, value in pairs if names_secret(key)]
        before = argument
    return [value for value in found if len(value) >= 4 and value[0] not in "<[$"]
