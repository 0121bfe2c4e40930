"""`tunewright resume RUN`: go on with a run by its folder alone, as it was started, from where it was started."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tunewright.claims import known_of
from tunewright.config.compose import compose_config, load_config
from tunewright.config.schema import Resume
from tunewright.errors import ConfigError, first_line
from tunewright.launch.train import train_each
from tunewright.run_folder import RunDir
from tunewright.trust import is_signed, not_ours

CHOICES = ("strategy", "cluster")  # groups whose choice says where a run trains, not what


def resume(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    trusted: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Continue the run in a folder, and return the exit code.

    Args:
        overrides: what is to be otherwise now, for example train.max_steps=200 or strategy=zero3.
        trusted: also a run that somebody else made.

    Raises:
        ConfigError: it holds no run, or a setting cannot be changed.
        StorageError: see `claims.known_of`.
    """
    run = RunDir(folder.expanduser().resolve())
    known = known_of(run)
    if "identity" not in known.manifest or known.config is None:
        raise ConfigError(f"{folder} holds no run that could go on (no manifest.json and config.yaml of one).")
    if not trusted and not is_signed(known.config, known.manifest):
        raise not_ours(run.config, "--trust")
    there = Path(known.manifest.get("folder", ""))
    if there.is_dir() and not there.samefile("."):
        say(f"In {there}, where it was started.")
        os.chdir(there)  # paths in its settings are relative to it
    config = load_config(io.StringIO(known.config.decode()), trusted=trusted)
    config = _changed(config, overrides)
    if (Path(config.output_root) / config.name).resolve() != run.path:  # it was moved or renamed
        config.output_root, config.name = str(run.path.parent), run.path.name
    config.resume, config.overwrite, config.trust = Resume.must, False, config.trust or trusted
    return train_each([config], dry_run=dry_run, say=say)


def _changed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a run's configuration with other values, for keys that it has."""
    for item in overrides:
        key, _, value = item.replace("resume.allow=", "resume_allow=", 1).partition("=")
        config.automatic = [name for name in config.automatic if name not in (key, key.partition(".")[0])]
        if key in CHOICES:
            config[key] = compose_config([item], choose=None)[key]
            continue
        if OmegaConf.is_dict(OmegaConf.select(config, key, default=None)):
            raise ConfigError(
                f"`{item}`: `tunewright resume` takes values, and the choices {' and '.join(CHOICES)}. With another "
                f"{key} it is another run: `tunewright train`."
            )
        try:
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={value}"]))  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise ConfigError(f"`{item}` cannot be set: {first_line(error)}. `tunewright config --keys`.") from error
    return config
