"""The named chat templates of `configs/templates`."""

from __future__ import annotations

from pathlib import Path

from tunewright.config.compose import TEMPLATE_DIR
from tunewright.errors import ConfigError, did_you_mean


def template_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATE_DIR.glob("*.jinja"))


def template_file(template: str) -> Path:
    """Return the file of a named template, or of a path to a .jinja file.

    Raises:
        ConfigError: there is neither.
    """
    named = TEMPLATE_DIR / f"{template}.jinja"
    for path in (named, Path(template).expanduser()):
        if path.suffix == ".jinja" and path.is_file():
            return path
    raise ConfigError(
        f"`model.template` is '{template}'.{did_you_mean(template, template_names())} It can be "
        f"{', '.join(template_names())}, or the path of a .jinja file."
    )
