"""A cache that cannot be written, and lacks something: what is missing is made beside the runs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from tunewright.space import refusal

BESIDE = ".cache"  # in `output_root`


def use_writable_cache(config: DictConfig) -> list[str]:
    """Let `data.cache_dir` be a folder that can be written, and return what to say of it.

    A shared cache that others may only read is used as long as all is in it that this run needs.

    Raises:
        DataError, ConfigError, StorageError: see `find_prepared`.
    """
    folder = Path(config.data.cache_dir).expanduser()
    told = refusal(folder)
    if told is None or _holds_all(config):
        return []
    config.data.cache_dir = str(Path(config.output_root) / BESIDE)
    return [
        f"`data.cache_dir` {folder} cannot be written ({told}) and does not hold all that this run needs: what is "
        f"missing is made in {config.data.cache_dir}."
    ]


def _holds_all(config: DictConfig) -> bool:
    from tunewright.launch.remarks import known_figures
    from tunewright.trainer.model.meta_model import find_architecture
    from tunewright.trainer.prepared import find_prepared

    prepared = find_prepared(config) if find_architecture(config) else None
    return prepared is not None and known_figures(config, prepared.cache) is not None
