"""Preparing a run, in a process of its own: `python -m tunewright.launch.prepare make < config.yaml`.

It knows nothing of ranks: in a rank, transformers would save only from the first one, and threads are few.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

from omegaconf import DictConfig

from tunewright.config.compose import load_config
from tunewright.errors import TunewrightError
from tunewright.importing import uncollected
from tunewright.launch.children import ask, report
from tunewright.launch.data.measure import make_report
from tunewright.launch.data.report_text import report_text
from tunewright.launch.remarks import keep_remarks, known_figures
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import world_size
from tunewright.ranks import leave
from tunewright.redaction import redact
from tunewright.terminal import tell
from tunewright.trainer.model.model_folder import caching
from tunewright.trainer.model.tokenizer import load_tokenizer
from tunewright.trainer.prepared import Prepared, check_vocabulary, find_prepared, prepare


def ensure_prepared(config: DictConfig, *, quiet: bool = False) -> Prepared:
    """Make what is missing in a process of its own; several ranks may call it at once, one of them does the work.

    Raises:
        TunewrightError: see `prepare_and_report`.
    """
    found = find_prepared(config)
    if found and quiet:
        return found
    known = known_figures(config, found.cache) if found else None
    if found and known is not None:
        tell(redact("\n".join(known)))
        return found
    ask("tunewright.launch.prepare", "make", config, subprocess.DEVNULL if quiet else None)
    return find_prepared(config) or prepare(config, lambda line: None)


def prepare_and_report(config: DictConfig, say: Callable[[str], None]) -> Prepared:
    """Make what is missing in this process, and say of the data what `tunewright data check` does.

    Raises:
        ConfigError, DataError, StorageError: model or data cannot be used.
    """
    prepared = prepare(config, say)
    known = known_figures(config, prepared.cache)
    if known is None:
        tokenizer = load_tokenizer(prepared.model_path, config.model)
        check_vocabulary(config, prepared, tokenizer)
        ranks = world_size(config, find_devices())
        plan = batch_plan(config.train, ranks, cutoff_len=config.data.cutoff_len, packing=config.data.packing)
        found = make_report(prepared.cache, config, plan, tokenizer)
        with caching(config.data.cache_dir):
            keep_remarks(config, prepared.cache, found)
        known = [report_text(found)]
    say("\n".join(known))
    return prepared


def main() -> int:
    """Prepare for the configuration on standard input, and report on the data as `tunewright data check` does."""
    for library in ("DATASETS", "TRANSFORMERS"):  # our own lines tell how far it is
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each of our threads tokenises on a core of its own
    with uncollected():
        import_module("transformers.models.auto.tokenization_auto")  # and torch with it
    try:
        config = load_config(sys.stdin)
        prepare_and_report(config, lambda line: tell(redact(line)))
    except TunewrightError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    leave(main())  # the launcher waits, and torch would take half a second to go
