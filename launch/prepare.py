"""What is done once, before ranks join: the embedded model, the token cache.

It happens in a process of its own, `python -m tunewright.launch.prepare < config.yaml`, that knows nothing of ranks: in
a rank, transformers would save only from the first one, and threads are few.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from tunewright.config.compose import load_config
from tunewright.config.schema import Source
from tunewright.errors import ConfigError, TunewrightError, code_of
from tunewright.files import write_json
from tunewright.launch.data.report import Report, known_positions, make_report
from tunewright.launch.data.report_text import remarks, report_text
from tunewright.launch.preparation import Preparation
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import needs_held_out, world_size
from tunewright.ranks import imports_that_stay, interrupt_may_come, leave
from tunewright.redaction import redact
from tunewright.safetensors_header import shapes
from tunewright.terminal import Progress
from tunewright.trainer.data.build_cache import build_cache, find_cache, open_rows, thread_count, wants_processes
from tunewright.trainer.data.process_pool import started_workers
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.token_cache import TokenCache, describe
from tunewright.trainer.data.tokenization import warm_up
from tunewright.trainer.model import tiny
from tunewright.trainer.model.load import cache_folder, fetch_model, find_model, load_tokenizer
from tunewright.trainer.model.meta_model import ensure_architecture, find_architecture, model_numbers

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
    rows = ensure_architecture(config).vocabulary
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
    """
    model_path = fetch(config, say, weights=weights)
    cache = find_cache(config, model_path)
    if cache is None:
        say(f"Tokenising {', '.join([*config.data.names, *config.data.eval_names])}")
        with started_workers(thread_count(config), warm_up) if wants_processes(config) else nullcontext() as processes:
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


def ensure_prepared(config: DictConfig, *, quiet: bool = False, preparation: Preparation | None = None) -> Prepared:
    """Make what is missing in a process of its own; several ranks may call it at once, one of them does the work.

    Raises:
        PrepareFailed: the process said why on standard error.
    """
    found = find_prepared(config)
    if found and (quiet or _remarks_file(config, found.cache).is_file()):
        if not quiet:
            print(redact("\n".join(_known(config, found.cache))), flush=True)
        return found
    exit_code = (preparation or Preparation()).finish(config, quiet=quiet)
    if exit_code:
        raise PrepareFailed(exit_code)
    found = find_prepared(config)
    return found or prepare(config, lambda line: None)


def _remarks_file(config: DictConfig, cache: TokenCache) -> Path:
    # Another model may have the same tokenizer, an embedding that is too small for it, and fewer positions.
    architecture = find_architecture(config)
    rows, positions = architecture.vocabulary if architecture else None, known_positions(model_numbers(config))
    return cache_folder(config.data.cache_dir) / "remarks" / f"{cache.fingerprint}-{rows}-{positions}.json"


def keep_remarks(config: DictConfig, cache: TokenCache, report: Report) -> None:
    """Write down what a report remarks, for launches that find everything made already."""
    file = _remarks_file(config, cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, [[remark.text, *remark.details] for remark in remarks(report)])


def _known(config: DictConfig, cache: TokenCache) -> list[str]:
    """Return what a launch says of data that was made ready before: its figures, and what was remarked then."""
    found = json.loads(_remarks_file(config, cache).read_text(encoding="utf-8"))
    return [*describe(cache), *(f"  ! {text}" + (f" ({details[0]})" if details else "") for text, *details in found)]


def _report(config: DictConfig, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Report:
    """Report on data that was just made ready, as `tunewright data check` does."""
    ranks = world_size(config, find_devices())
    plan = batch_plan(config.train, ranks, cutoff_len=config.data.cutoff_len, packing=config.data.packing)
    return make_report(prepared.cache, config, plan, tokenizer)


class PrepareFailed(TunewrightError):
    """The preparing process ended with this exit code, after it had shown the reason."""

    shown = True

    def __init__(self, exit_code: int) -> None:
        super().__init__("the data or the model could not be prepared, see above")
        self.exit_code = code_of(exit_code)


def main() -> int:
    """Prepare for the configuration on standard input."""
    for library in ("DATASETS", "TRANSFORMERS"):  # our own lines tell how far it is
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each of our threads tokenises on a core of its own
    try:
        interrupt_may_come()
        with imports_that_stay():  # whoever began this may still find out what to prepare
            from transformers import AutoTokenizer  # noqa: F401 - the greatest part, and always needed

        told = sys.stdin.read()
        if not told:
            return 0  # whoever began this ended without an order
        config = load_config(io.StringIO(told))
        prepared = prepare(config, lambda line: print(redact(line), flush=True))
        tokenizer = load_tokenizer(prepared.model_path, config.model)
        check_vocabulary(config, prepared, tokenizer)
        report = _report(config, prepared, tokenizer)
        keep_remarks(config, prepared.cache, report)
        print(redact(report_text(report)), flush=True)
    except TunewrightError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130  # nothing is half made: everything is written aside and renamed
    return 0


if __name__ == "__main__":
    leave(main())  # the launcher waits, and torch would take half a second to go
