"""What a file of settings must not bring: code that would be run, and secrets that would be written down."""

from __future__ import annotations

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from tunewright.config.mistakes import origin_of
from tunewright.errors import ConfigError
from tunewright.redaction import hide_credentials, name_variables, redact
from tunewright.trees import flatten, texts_in


def typed_imports(overrides: list[Override]) -> list[str]:
    """Return the modules to load before anything is composed, for a plug-in's names are choices of groups."""
    value = next((item.value() for item in reversed(overrides) if item.key_or_group == "imports"), None)
    return [str(name) for name in value] if isinstance(value, list) else []


def check_trust(config: DictConfig, overrides: list[Override]) -> None:
    """What runs code of others is typed each time: a file of settings may come from anywhere."""
    if list(config.imports) != typed_imports(overrides):
        origin, _ = origin_of("imports", overrides, None)
        raise ConfigError(
            f"`imports` is {list(config.imports)} ({origin}): Python code that would be run. Write imports=[...] on "
            f"the command line; in a file of settings it does not count."
        )
    typed = {item.key_or_group for item in overrides}
    for item in overrides:
        if isinstance(value := item.value(), dict):
            typed |= {f"{item.key_or_group}.{key}" for key in value}
    for key, on in (("model.trust_remote_code", config.model.trust_remote_code), ("trust", config.trust)):
        if on and key not in typed:
            origin, _ = origin_of(key, overrides, None)
            raise ConfigError(
                f"`{key}` is true ({origin}): code that comes with a model or checkpoint would be run here. Write "
                f"{key}=true on the command line if that is what you want; in a file of settings it does not count."
            )


def refuse_secrets(config: DictConfig) -> None:
    """Refuse a secret as such in a setting: config.yaml could not both be read by the ranks and be shown to others."""
    for key, value in flatten(OmegaConf.to_container(config)):
        for text in map(name_variables, texts_in(value)):
            if hide_credentials(text) != text:
                raise ConfigError(
                    f"`{key}` holds a password or key, {hide_credentials(text)!r}, and settings are written down. Put "
                    f"it into an environment variable, for example MY_TOKEN, and write ${{oc.env:MY_TOKEN}} in its "
                    f"place."
                )
    if redact(config.name) != config.name:
        raise ConfigError("`name` holds the value of a secret variable, and a folder's name is seen by everyone.")
