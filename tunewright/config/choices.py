"""The groups of settings and what can be chosen in each: files that come with tunewright, or a user's own."""

from __future__ import annotations

from pathlib import Path

from tunewright.config.schema import GROUPS
from tunewright.errors import ConfigError
from tunewright.shipped import shipped

CONFIG_DIR = shipped("configs") / "hydra"


def choices(group: str, config_dir: Path = CONFIG_DIR) -> list[str]:
    """Return the names that can be chosen in a group, sorted."""
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def check_extra_dir(extra_dir: Path | None) -> None:
    """Raise ConfigError where `--config-dir` is no folder, or holds a choice that Hydra would never read."""
    if extra_dir is None:
        return
    if not extra_dir.is_dir():
        found = "a file" if extra_dir.is_file() else "not there"
        raise ConfigError(
            f"`--config-dir` is {extra_dir}, which is {found}: write a folder with groups of your own, for example "
            f"{extra_dir.with_suffix('')}/train/mine.yaml, and choose from it with train=mine."
        )
    for group in GROUPS:
        for name in sorted({*choices(group, extra_dir)} & {*choices(group)}):
            raise ConfigError(
                f"{extra_dir / group / name}.yaml has the name of a shipped choice, which `{group}={name}` means: give "
                f"it another name."
            )
