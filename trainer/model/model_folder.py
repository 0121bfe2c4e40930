"""From the `model` group to the folder with the model's files: found on this machine, built, or downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunewright.config.schema import ModelConfig, Source
from tunewright.errors import ConfigError
from tunewright.space import OTHER_CACHE, storing
from tunewright.trainer.model import download, tiny


def cache_folder(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser()


@contextmanager
def caching(cache_dir: str) -> Iterator[None]:
    """Tell of a cache that cannot be written what can be done about it.

    Raises:
        StorageError: the disk is full, read-only or otherwise refuses.
    """
    with storing(cache_folder(cache_dir), "The cache", advice=lambda: OTHER_CACHE, ask_disk=False):
        yield


def find_model(model: ModelConfig, cache_dir: str) -> Path | None:
    """Return the folder of a model that is on this machine already, without using the network or torch.

    Raises:
        ConfigError: `model.source=folder` and there is no such folder, or no weights in it.
    """
    if model.source is Source.embedded:
        return tiny.tiny_folder(cache_folder(cache_dir)) if tiny.is_built(cache_folder(cache_dir)) else None
    if model.source is Source.folder:
        folder = Path(model.path).expanduser()
        if not (download.has_weights(folder) or (model.random_weights and (folder / "config.json").is_file())):
            problem = "holds no model weights" if folder.is_dir() else "does not exist"
            raise ConfigError(f"`model.path` is '{model.path}', a folder that {problem}.")
        return folder
    if model.random_weights:
        config = download.find_config(model)
        return config.parent if config else None
    return download.find_hub(model) if model.source is Source.hub else None


def fetch_model(
    model: ModelConfig, cache_dir: str, progress: tiny.Progress, *, offline: bool = False, weights: bool = True
) -> Path:
    """Return the folder of a model, built or downloaded first where it is not there yet.

    Without `weights`, or where they are drawn, the files of the tokenizer are enough.
    """
    found = find_model(model, cache_dir)
    if found:
        return found
    if model.source is Source.embedded:
        return tiny.build_tiny(cache_folder(cache_dir), progress)
    fetch = download.fetch_modelscope if model.source is Source.modelscope else download.fetch_hub
    return fetch(model, offline=offline, weights=weights and not model.random_weights)
