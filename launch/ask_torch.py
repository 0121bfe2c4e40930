"""What needs torch to answer, asked of a process of its own for seconds by a command that does not import it.

python -m tunewright.launch.ask_torch architecture|deepspeed < config.yaml
python -m tunewright.launch.ask_torch footprints < what-is-asked.json
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO

from omegaconf import DictConfig, OmegaConf

from tunewright.config.compose import load_config
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.errors import StorageError, TunewrightError
from tunewright.launch.children import ask, report
from tunewright.launch.deepspeed_check import ask_deepspeed, kept
from tunewright.plan.architecture import Architecture
from tunewright.plan.footprint import Batch, Footprint
from tunewright.ranks import leave
from tunewright.trainer.footprint.footprints import find_footprint, make_footprint
from tunewright.trainer.model.meta_model import find_architecture, make_architecture
from tunewright.trainer.model.model_folder import caching

MODULE = "tunewright.launch.ask_torch"


def ensure_architecture(config: DictConfig) -> Architecture:
    """Return what is known of the model, worked out where it is not kept yet.

    Raises:
        ConfigError, StorageError: the model's config.json cannot be had, or transformers cannot use it.
    """
    found = find_architecture(config)
    if found is None:
        ask(MODULE, "architecture", config)
        found = find_architecture(config)
    if found is None:
        raise StorageError(f"The configuration of '{config.model.path}' vanished while it was read.")
    return found


def ensure_accepted(config: DictConfig) -> list[str]:
    """Return the keys of the strategy's DeepSpeed JSON that DeepSpeed does not know; shipped files have none.

    Raises:
        ConfigError: DeepSpeed refuses the file.
    """
    file = deepspeed_file(config)
    if file.shipped:
        return []
    answer = kept(config, file)
    if not answer.is_file():
        ask(MODULE, "deepspeed", config)
    return list(json.loads(answer.read_text(encoding="utf-8")))


def ensure_footprints(configs: Sequence[DictConfig], kind: str, batches: Sequence[Batch]) -> list[Footprint]:
    """Return what each configuration holds and computes on a kind of device, worked out where it is not kept yet.

    Raises:
        ConfigError, StorageError: a model's config.json cannot be had, or transformers cannot use it.
    """
    for _ in range(2):  # of two that write at once one may lose
        missing = [config for config in configs if find_footprint(config, kind, batches) is None]
        if not missing:
            break
        texts = [OmegaConf.to_yaml(config) for config in missing]
        asked = {"configs": texts, "kind": kind, "batches": [asdict(batch) for batch in batches]}
        ask(MODULE, "footprints", missing[0], given=json.dumps(asked))
    found = [find_footprint(config, kind, batches) for config in configs]
    if None in found:
        raise StorageError("What was worked out of the model vanished while it was read.")
    return [one for one in found if one is not None]


def _make_footprints() -> None:
    # What libraries have to say of the model is said in the training.
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels that nobody here asked for
    asked = json.load(sys.stdin)
    for text in asked["configs"]:
        config = load_config(StringIO(text))
        with caching(config.data.cache_dir):
            make_footprint(config, asked["kind"], [Batch(**batch) for batch in asked["batches"]])
    if asked["kind"] == "cpu":  # torch is imported already, and a plan wants to know how fast it is here
        from tunewright.trainer.peak import measure_cpu

        measure_cpu(config)


def main(task: str) -> int:
    """Answer for the configuration on standard input."""
    try:
        if task == "footprints":
            _make_footprints()
            return 0
        config = load_config(sys.stdin)
        with caching(config.data.cache_dir):
            if task == "architecture":
                make_architecture(config)
            else:
                ask_deepspeed(config)
    except TunewrightError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1]))  # the asker waits, and torch would take half a second to go
