"""What DeepSpeed says about a DeepSpeed JSON of the user's own, before any rank is started."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.config.deepspeed_file import DeepSpeedFile, deepspeed_file
from tunewright.errors import ConfigError, closest
from tunewright.files import write_json
from tunewright.trainer.deepspeed_settings import BATCH, for_trainer
from tunewright.trainer.model.model_folder import cache_folder
from tunewright.trees import digest

FORMAT = 1  # of the kept files
SIMILAR = 0.85  # of a key that DeepSpeed does not know to one that it does: a slip of the pen


def kept(config: DictConfig, file: DeepSpeedFile) -> Path:
    """Return where the answer about a DeepSpeed JSON is kept: its keys that DeepSpeed does not know."""
    key = digest([FORMAT, version("deepspeed"), file.settings])
    return cache_folder(config.data.cache_dir) / "deepspeed" / f"{key}.json"


def ask_deepspeed(config: DictConfig) -> None:
    """Ask DeepSpeed about the strategy's file, and keep the answer.

    Raises:
        ConfigError: see `unknown_keys`.
    """
    file = deepspeed_file(config)
    unknown, answer = unknown_keys(file), kept(config, file)
    answer.parent.mkdir(parents=True, exist_ok=True)
    write_json(answer, unknown)


class _Watched(dict[str, Any]):
    """A mapping that remembers which of its keys somebody looked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.looked_for: set[str] = set()

    def __copy__(self) -> _Watched:
        return self  # DeepSpeed reads a shallow copy, and writes nothing into it

    def __contains__(self, key: object) -> bool:
        self.looked_for.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.looked_for.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_for.add(key)
        return super().get(key, default)


def unknown_keys(file: DeepSpeedFile) -> list[str]:
    """Return the keys that this DeepSpeed does not know.

    Raises:
        ConfigError: DeepSpeed refuses the file, or a key is a slip of the pen.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    settings = _Watched(_filled(for_trainer(file.settings)))
    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        raise ConfigError("\n".join([f"DeepSpeed refuses {file.path}:", *_invalid(error, file)])) from error
    except Exception as error:  # whatever it raises, of many kinds, it would raise in every rank
        raise ConfigError(f"DeepSpeed refuses {file.path}: {error}") from error
    known = settings.looked_for | {"fp16", "amp", "optimizer", "scheduler"}
    unknown = sorted(set(file.settings) - known)
    for key in unknown:
        meant = closest(key, known, cutoff=SIMILAR)
        if meant:
            raise ConfigError(f"{file.path} has `{key}`, which DeepSpeed does not know. Did you mean '{meant}'?")
    _check_disk(file)
    return unknown


def _filled(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with something in place of what transformers fills in."""
    filled = {**settings, **dict.fromkeys(BATCH, 1), "gradient_clipping": 1.0}
    filled["bf16"] = {**filled["bf16"], "enabled": True}
    return filled


def _invalid(error: Any, file: DeepSpeedFile) -> Iterator[str]:
    for problem in error.errors():
        path = ".".join(map(str, problem["loc"]))
        sections = [name for name, value in file.settings.items() if _has(value, problem["loc"])]
        value = json.dumps(problem["input"], ensure_ascii=False, default=str)
        yield f"  `{'.'.join(filter(None, [*sections[:1], path]))}` is {value}: {problem['msg']}"


def _has(section: Any, path: Iterable[Any]) -> bool:
    for part in path:
        if not isinstance(section, dict) or part not in section:
            return False
        section = section[part]
    return True


def _check_disk(file: DeepSpeedFile) -> None:
    """Offloading to a disk needs a folder, and a library that DeepSpeed compiles its reader against."""
    for what in ("optimizer", "param"):
        key = f"zero_optimization.offload_{what}"
        if file.get(f"{key}.device") != "nvme":
            continue
        folder = file.get(f"{key}.nvme_path")
        if not folder or not Path(folder).is_dir():
            raise ConfigError(f"{file.path}: `{key}.nvme_path` is {json.dumps(folder)}: write a folder that is there.")
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                f"{file.path}: `{key}.device` is nvme, and this machine has no libaio with its header files "
                f"(libaio-dev)."
            )
