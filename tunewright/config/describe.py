"""`tunewright config`: what can be chosen and set, read from the files and classes that define it."""

from __future__ import annotations

from dataclasses import MISSING as NO_DEFAULT
from pathlib import Path

from omegaconf import MISSING

from tunewright.config import schema
from tunewright.config.choices import CONFIG_DIR, check_extra_dir, choices
from tunewright.plugins import PLUGINS, SHIPPED


def choices_text(extra_dir: Path | None = None) -> str:
    """Return the groups with their choices, and each choice's first comment line.

    Raises:
        ConfigError: see `check_extra_dir`.
    """
    check_extra_dir(extra_dir)
    lines = []
    for group in schema.GROUPS:
        lines.append(f"{group}=")
        for root in filter(None, (CONFIG_DIR, extra_dir)):
            for name in choices(group, root):
                lines.append(f"  {name:<18} {_first_comment(root / group / f'{name}.yaml')}".rstrip())
        if group == "method":
            lines += [f"  {name:<18} {one.help}".rstrip() for name, one in sorted(PLUGINS.methods.items())]
    lines += [
        f"{setting} (of plug-ins): {', '.join(added)}"
        for kind, setting in (
            ("template", "model.template"), ("loss", "train.loss"), ("callback", "train.callbacks"),
            ("format", "formatting of a dataset"), ("metric", "figures of tunewright evaluate"),
        )
        if (added := [name for name in PLUGINS.names(kind) if name not in SHIPPED[kind]])
    ]  # fmt: skip
    lines.append(
        "\n`tunewright config --keys` lists every key; `tunewright config strategy=zero2` prints a configuration."
    )
    return "\n".join(lines)


def keys_text() -> str:
    """Return every key with its type, default and help."""
    groups: list[tuple[str, type]] = [
        ("", schema.Config),
        ("model", schema.ModelConfig),
        ("data", schema.DataConfig),
        *((f"method={name}", cls) for name, cls in PLUGINS.method_settings().items()),
        ("strategy", schema.StrategyConfig),
        ("train", schema.TrainConfig),
        ("cluster", schema.ClusterConfig),
    ]
    lines = []
    for group, cls in groups:
        title, prefix = group, f"{group.partition('=')[0]}." if group else ""
        if title:
            lines.append(f"\n{title}")
        for key, (kind, text, default) in schema.help_of(cls).items():
            if not text and default == MISSING:
                continue
            shown = "required" if default in (MISSING, NO_DEFAULT) else getattr(default, "name", default)
            lines.append(f"  {prefix}{key:<28} {kind:<16} {text} [{shown}]")
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""
