"""The named chat templates of `configs/templates`."""

from __future__ import annotations

from pathlib import Path

from tunewright.errors import ConfigError, did_you_mean
from tunewright.plugins import PLUGINS, TEMPLATE_DIR


def template_names() -> list[str]:
    return sorted(PLUGINS.names("template"))


def template_text(template: str) -> str:
    """Return the text of a named template, or of a path to a .jinja file.

    Raises:
        ConfigError: there is neither.
    """
    if template in PLUGINS.templates:
        return PLUGINS.templates[template]
    for path in (TEMPLATE_DIR / f"{template}.jinja", Path(template).expanduser()):
        if path.suffix == ".jinja" and path.is_file():
            return path.read_text(encoding="utf-8")
    raise ConfigError(
        f"`model.template` is '{template}'.{did_you_mean(template, template_names())} It can be "
        f"{', '.join(template_names())}, or the path of a .jinja file."
    )
