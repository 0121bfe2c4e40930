"""What is made once, before ranks join, and what they only look for: the embedded model, the token cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from tunewright.config.schema import Source
from tunewright.errors import ConfigError
from tunewright.plan.data_rules import needs_held_out
from tunewright.safetensors_header import shapes
from tunewright.terminal import Progress
from tunewright.trainer.data.build_cache import build_cache, find_cache, open_rows, thread_count, wants_processes
from tunewright.trainer.data.process_pool import started_workers
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.token_cache import TokenCache
from tunewright.trainer.data.tokenization import warm_up
from tunewright.trainer.model import tiny
from tunewright.trainer.model.meta_model import find_architecture, make_architecture
from tunewright.trainer.model.model_folder import cache_folder, caching, fetch_model, find_model
from tunewright.trainer.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRESS_SECONDS = 2.0  # between lines, where there is no terminal


@dataclass(frozen=True)
class Prepared:
    """What a rank needs to begin."""

    model_path: Path
    cache: TokenCache


def find_prepared(config: DictConfig) -> Prepared | None:
    """Return what is there already, without importing torch or transformers, or None when something is to be made.

    Raises:
        DataError: the registry or a data file cannot be used.
        StorageError: a weight file is damaged.
    """
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's package, which reads it then
    model_path = find_model(config.model, config.data.cache_dir)
    if model_path is None:
        # The tokens' names depend on the tokenizer, but what is wrong with the data should be told now.
        open_rows(config)
        return None
    for file in sorted(model_path.glob("*.safetensors")):
        shapes(file)
    cache = find_cache(config, model_path)
    if cache is None:
        return None
    _check_held_out(config, cache)
    return Prepared(model_path, cache)


def _check_held_out(config: DictConfig, cache: TokenCache) -> None:
    """Raise ConfigError where something looks at held-out rows and, by their numbers, there are none after all."""
    key = needs_held_out(config)
    if key and not any(len(examples) for _, examples in cache.chosen("eval")):
        size = config.data.eval_size
        found = f"`data.eval_size={size:g}` of these rows is none" if size else "no held-out row is left"
        raise ConfigError(f"`{key}` looks at the eval loss, and {found}: hold more rows out.")


def check_vocabulary(config: DictConfig, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the tokens that training uses with the rows of the model's embedding.

    A tokenizer may know more than the model, so long as they are not used: some published ones do.

    Raises:
        ConfigError: one of them has no row.
    """
    rows = (find_architecture(config) or make_architecture(config)).vocabulary
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"The tokenizer of '{config.model.path}' has no token that ends a text, and none to pad with: name one in "
            f"its tokenizer_config.json (eos_token)."
        )
    if max(tokenizer.get_vocab().values()) < rows:
        return
    cache = prepared.cache
    used = [(f"{cached.name} has", cached.largest_id()) for cached in (*cache.train, *cache.held_out)]
    for where, token in [*used, ("padding is", tokenizer.pad_token_id)]:
        if token >= rows:
            raise ConfigError(
                f"The tokenizer of '{config.model.path}' is larger than its model, which has embeddings for {rows:,} "
                f"tokens: {where} {tokenizer.convert_ids_to_tokens(token)!r}, the id {token}. Take the model's own "
                f"tokenizer, or enlarge the model (resize_token_embeddings) and save both."
            )


def prepare(config: DictConfig, say: Callable[[str], None] = print, *, weights: bool = True) -> Prepared:
    """Make what is missing, with progress; several processes may call it at once.

    Without `weights` a model on a hub is fetched as far as its tokenizer needs.

    Raises:
        DataError, ConfigError, PeerError: data or model cannot be used.
        StorageError: the same, or the cache cannot be written.
    """
    with caching(config.data.cache_dir):
        return _prepare(config, say, weights=weights)


def _prepare(config: DictConfig, say: Callable[[str], None], *, weights: bool) -> Prepared:
    model_path = fetch(config, say, weights=weights)
    cache = find_cache(config, model_path)
    if cache is None:
        say(f"Tokenising {', '.join([*config.data.names, *config.data.eval_names])}")
        many = wants_processes(config)
        with started_workers(thread_count(config), warm_up, config.imports) if many else nullcontext() as processes:
            renderer = Renderer.of(config, load_tokenizer(model_path, config.model))
            with Progress(say, sys.stdout, every=PROGRESS_SECONDS, leave=False) as progress:
                show = partial(progress.update, unit="rows")
                cache = build_cache(config, model_path, renderer, show, processes)
    _check_held_out(config, cache)
    return Prepared(model_path, cache)


def fetch(config: DictConfig, say: Callable[[str], None], *, weights: bool) -> Path:
    """Fetch or build the model, with progress, and return its folder; without `weights` only what its tokenizer needs.

    Raises:
        ConfigError, StorageError, PeerError: see `fetch_model`.
    """
    folder = cache_folder(config.data.cache_dir)
    if config.model.source is Source.embedded and not tiny.is_built(folder):
        say(f"Building the embedded model in {tiny.tiny_folder(folder)} (once, about a minute)")
    with Progress(say, sys.stdout, every=PROGRESS_SECONDS, leave=False) as progress:

        def show(step: int, steps: int, loss: float) -> None:
            progress.update("embedded model: step", step, steps, f"loss {loss:.2f}")

        return fetch_model(config.model, config.data.cache_dir, show, offline=config.offline, weights=weights)
