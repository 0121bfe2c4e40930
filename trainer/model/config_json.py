"""The numbers of a model's config.json, without its weights: from this machine, a hub, or the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.config.schema import Source
from tunewright.errors import ConfigError, StorageError
from tunewright.trainer.model import download, tiny
from tunewright.trainer.model.model_folder import find_model
from tunewright.trees import plain


def model_numbers(config: DictConfig) -> dict[str, Any]:
    """Return the content of the model's config.json, fetched where it is not on this machine: it is small.

    Where that fails, `model.architecture` stands in for it, if it is this model's.

    Raises:
        ConfigError: it is damaged.
        StorageError: it cannot be fetched, and the configuration brings no numbers of its own.
    """
    model = config.model
    if model.source is Source.embedded:
        return tiny.NUMBERS
    folder = find_model(model, config.data.cache_dir)
    given = _given_numbers(config)
    if folder:
        file: Path | None = folder / "config.json"
    else:
        file = download.find_config(model)
        if file is None and not (given and config.offline):
            try:
                file = download.fetch_config(model, offline=config.offline)
            except StorageError as error:
                if given is None:
                    raise _without_numbers(config, error) from error
    if file is None:
        assert given is not None
        return given
    return _read_numbers(file)


def known_positions(numbers: dict[str, Any]) -> int | None:
    """Return up to how many tokens a model was made for, from its config.json, or None where that does not say it."""
    numbers = numbers.get("text_config") or numbers
    known = numbers.get("max_position_embeddings")
    scaling = numbers.get("rope_parameters") or numbers.get("rope_scaling") or {}
    if not isinstance(known, int) or known < 1:
        return None
    original, factor = scaling.get("original_max_position_embeddings") or known, scaling.get("factor") or 1
    return max(known, int(original * factor))


def _given_numbers(config: DictConfig) -> dict[str, Any] | None:
    """Return `model.architecture`, unless it says that it is `of` other models than `model.path`."""
    given = plain(config.model.architecture) or {}
    return given or None if config.model.path in given.pop("of", [config.model.path]) else None


def _without_numbers(config: DictConfig, error: StorageError) -> StorageError:
    of = config.model.architecture and config.model.architecture.get("of")
    other = f" (The numbers of `model.architecture` are those of {', '.join(of)} alone.)" if of else ""
    return StorageError(f"{error}{other}")


def _read_numbers(file: Path) -> dict[str, Any]:
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"`model.path` is '{file.parent}', a folder without a config.json.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged: {error}.") from error
    if not isinstance(numbers, dict) or "model_type" not in numbers:
        raise ConfigError(f"{file} names no `model_type`: it is not the config.json of a model.")
    return numbers
