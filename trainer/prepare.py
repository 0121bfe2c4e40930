"""What is done once, before ranks start: the embedded model, the token cache.

`python -m trainer.prepare RUN/config.yaml` from the launcher; ranks that were started without it call `prepare`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from launch.errors import TunewrightError
from launch.schema import Source
from trainer import tiny
from trainer.data.cache import TokenCache, build_cache, cache_key, describe, open_cache
from trainer.models import cache_folder, load_tokenizer, resolve_model


@dataclass(frozen=True)
class Prepared:
    """What a rank needs to begin."""

    model_path: str
    cache: TokenCache


def find_prepared(config: DictConfig) -> Prepared | None:
    """Return what is there already, without importing torch or transformers, or None when something is to be made.

    Raises:
        DataError: the registry or a data file cannot be used.
    """
    if config.model.source is Source.modelscope:
        return None  # only its own library knows where the files are
    folder = cache_folder(config.data.cache_dir)
    if config.model.source is Source.embedded and not tiny.is_built(folder):
        # The token cache's name depends on the tokenizer, but a wrong dataset name should be told now.
        cache_key(config.data, config.train.seed, "", None)
        return None
    model_path = resolve_model(config.model, config.data.cache_dir)
    cache = open_cache(config.data, _key(config, model_path))
    return Prepared(model_path, cache) if cache else None


def prepare(config: DictConfig, say: Callable[[str], None] = print) -> Prepared:
    """Make what is missing, with progress; several processes may call it at once."""
    folder = cache_folder(config.data.cache_dir)
    if config.model.source is Source.embedded and not tiny.is_built(folder):
        say(f"Building the embedded model in {tiny.tiny_folder(folder)} (once, about a minute)")
    model_path = resolve_model(config.model, config.data.cache_dir, tiny.progress_lines(say))
    key = _key(config, model_path)
    cache = open_cache(config.data, key)
    if cache is None:
        say(f"Tokenizing {', '.join([*config.data.names, *config.data.eval_names])}")
        tokenizer = load_tokenizer(model_path, config.model)
        cache = build_cache(config.data, config.train.seed, key, tokenizer, _row_lines(say))
    for line in describe(cache):
        say(f"  {line}")
    return Prepared(model_path, cache)


def _key(config: DictConfig, model_path: str) -> str:
    return cache_key(config.data, config.train.seed, model_path, config.model.revision)


def _row_lines(say: Callable[[str], None]) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 2:
            last = now
            say(f"  {done:,} of {total:,} rows, {(now - started) / done * (total - done):.0f} s left")

    return show


def main() -> None:
    from launch.compose import load_config

    try:
        prepare(load_config(Path(sys.argv[1])), lambda line: print(line, flush=True))
    except TunewrightError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
