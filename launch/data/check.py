"""`tunewright data check`: the tokens of a configuration, and the report on them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from tunewright.launch.data.report import Report
    from tunewright.trainer.data.token_cache import TokenCache


def run(args: argparse.Namespace) -> int:
    """Run `tunewright data check` and return its exit code.

    Raises:
        ConfigError: a setting cannot work.
        DataError: the data cannot be read, or training would refuse it: then the report is printed before.
        StorageError: the page cannot be written, or its file is somebody's own.
    """
    from tunewright.launch.data.report_text import report_json, report_text
    from tunewright.pages import check_replaceable

    if args.html:
        check_replaceable(args.html, args.html, "name another file with --html")
    names = [item for item in args.overrides if _is_name(item)]
    config = compose(names, [item for item in args.overrides if not _is_name(item)], args.config_dir, args.dir)
    report, refusal = report_of(config)
    if args.html:  # before anything is printed: who reads that may go away
        from tunewright.launch.data.page import write_page

        write_page(report, args.html)
    print(json.dumps(report_json(report), ensure_ascii=False, indent=2) if args.json else report_text(report))
    if args.html:
        print(f"\nThe same as a page: {args.html}", file=sys.stderr if args.json else sys.stdout)
    sys.stdout.flush()  # what follows goes to standard error
    if refusal:
        raise refusal
    return 0


def report_of(config: DictConfig) -> tuple[Report, DataError | None]:
    """Return the report on a configuration's data, and why training would refuse them.

    Raises:
        ConfigError: a setting cannot work.
        DataError: the data cannot be read.
    """
    from tunewright.launch.data.measure import make_report
    from tunewright.launch.remarks import keep_remarks
    from tunewright.plan.devices import find_devices
    from tunewright.plan.rules import check

    plan = check(config, find_devices())
    set_environment(config)
    tokens = make_tokens(config)
    report = make_report(tokens.cache, config, plan, tokens.tokenizer)
    keep_remarks(config, tokens.cache, report)
    return report, tokens.refusal


def _is_name(item: str) -> bool:
    """A path may hold "=", which otherwise makes an override."""
    return "=" not in item or Path(item).expanduser().exists()


def compose(
    names: Sequence[str], overrides: Sequence[str], extra_dir: Path | None, data_dir: Path | None = None
) -> DictConfig:
    """Compose a configuration whose data are these names, or without names what the overrides say.

    Raises:
        ConfigError: see `compose_config`; or the overrides say what the names or `data_dir` say as well.
    """
    keys = [item.lstrip("+~").partition("=")[0] for item in overrides]
    if data_dir and "data.dir" in keys:
        raise ConfigError(f"--dir {data_dir} and `data.dir` both say where the registry is: keep one of them.")
    config = _named(names, overrides, keys, extra_dir)
    if data_dir:
        config.data.dir = str(data_dir)
    return config


def _named(names: Sequence[str], overrides: Sequence[str], keys: Sequence[str], extra_dir: Path | None) -> DictConfig:
    if not names:
        return compose_config(overrides, extra_dir)
    if "data.names" in keys:
        raise ConfigError(f"`data.names` and {', '.join(names)} both say which data: keep one of them.")
    group = [] if "data" in keys else ["data=registry"]
    config = compose_config([*group, *overrides, "data.names=[set_below]"], extra_dir)
    # Not as an override: a path may hold what is syntax there.
    config.data.names = list(names)
    return config


@dataclass(frozen=True)
class Tokens:
    """The tokens of a configuration, and why training would refuse them."""

    cache: TokenCache
    tokenizer: PreTrainedTokenizerBase
    refusal: DataError | None


def make_tokens(config: DictConfig) -> Tokens:
    """Make the tokens of a configuration, with progress on standard error.

    Raises:
        DataError: the data cannot be read; data that can be read and not be trained on is returned with the refusal.
    """
    from tunewright.trainer.model.tokenizer import load_tokenizer
    from tunewright.trainer.prepared import find_prepared, prepare

    with redirect_stdout(sys.stderr):  # libraries say things there, and the report may be read by a program
        try:
            prepared = find_prepared(config) or prepare(config, _progress, weights=False)
            model_path, cache, refusal = prepared.model_path, prepared.cache, None
        except DataError as error:
            model_path, cache = _refused(config, error)
            refusal = error
        return Tokens(cache, load_tokenizer(model_path, config.model), refusal)


def _refused(config: DictConfig, error: DataError) -> tuple[Path, TokenCache]:
    """Return what was made before the error, or raise it again when it came before all was made."""
    from tunewright.trainer.data.build_cache import find_unchecked, open_rows
    from tunewright.trainer.prepared import fetch

    open_rows(config)  # raises for what cannot be read, before a model is built for it
    model_path = fetch(config, _progress, weights=False)
    cache = find_unchecked(config, model_path)
    if cache is None:
        raise error
    return model_path, cache


def set_environment(config: DictConfig) -> None:
    """Tell libraries, before they are imported, what `tunewright.launch.prepare` tells them."""
    for library in ("DATASETS", "TRANSFORMERS"):  # our own lines tell how far it is
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here needs a GPU, and DeepSpeed need not look for one


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
