"""The run directory: what a run was made from and what it did. Whether it may be used again, `claims.py` decides.

runs/NAME/config.yaml      resolved configuration
          manifest.json    identity, hardware, versions, what was proven about the ranks, results
          metrics.jsonl    one line for each log step
          evaluation.json  held-out answers before and after; evaluation-N.json: of the first N rows alone
          final/           adapter or model, with tokenizer
          merged/          base and adapter in one, from `tunewright merge`
          checkpoints/     checkpoint-N
          tensorboard/     event files
          logs/            rankN.log, launch.log
          .lock            held by the process that trains
runs/.trash/DATE-NAME/     what was replaced
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tunewright.checkpoints import newest_whole
from tunewright.config.compose import load_config
from tunewright.config.schema import Source
from tunewright.errors import StorageError
from tunewright.files import write_json
from tunewright.redaction import redact_tree
from tunewright.trust import is_ours

# What a run makes in its folder. Nothing else in it is ever moved.
RESULTS = ("final", "merged", "evaluation*.json")
RECORDS = ("metrics.jsonl", "checkpoints", "tensorboard", "pissa_start", "merged-checkpoint-*", *RESULTS)
LOGS = "logs"
FILES = (*RECORDS, LOGS, "config.yaml", "accelerate.yaml", "manifest.json")


@dataclass(frozen=True)
class RunDir:
    """Paths inside a run's folder."""

    path: Path
    result: Path | None = None  # a checkpoint that stands for `final`

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    def partial_evaluation(self, rows: int) -> Path:
        """Where answers to the first `rows` held-out rows alone are kept, beside those to all of them."""
        return self.path / f"evaluation-{rows}.json"

    @property
    def final(self) -> Path:
        return self.result or self.path / "final"

    @property
    def merged(self) -> Path:
        return self.path / (f"merged-{self.result.name}" if self.result else "merged")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        return self.path / LOGS

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest, or an empty mapping when there is none."""
        try:
            found = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageError(f"Cannot read {self.manifest}: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise StorageError(f"{self.manifest} is damaged: {error.msg} at line {error.lineno}.") from error
        if not isinstance(found, dict):
            raise StorageError(f"{self.manifest} is damaged: it holds no mapping.")
        return found

    def update_manifest(self, **values: Any) -> None:
        write_json(self.manifest, {**self.read_manifest(), **redact_tree(values)})

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that is whole as far as its record and the sizes of its files tell, or None."""
        return newest_whole(self.checkpoints, hashed=False)[0]


# Of a run's manifest, what its checkpoints keep a copy of: enough to go on where the manifest is lost.
KEPT = ("name", "folder", "signature", "identity", "config_digest", "inputs", "files", "git")


def copy_of(run: RunDir) -> dict[str, Any]:
    """Return what a checkpoint says of its run: the manifest's beginning, and config.yaml."""
    manifest = run.read_manifest()
    return {
        "manifest": {key: manifest[key] for key in KEPT if key in manifest},
        "config": run.config.read_text(encoding="utf-8"),
    }


def settings_of(run: RunDir, *, trusted: bool = False) -> DictConfig:
    """Return a run's configuration, whose relative paths are relative to the folder where it was trained.

    Where that folder is no more they stay what they are: a project may have moved with its runs.

    Raises:
        ConfigError: see `load_config`.
    """
    manifest = run.read_manifest()
    folder = Path(manifest.get("folder", ""))
    away = folder.is_dir() and not folder.samefile(".")
    if away and (trusted or is_ours(run.config, manifest)):
        sys.path.append(str(folder))  # for the modules of `imports`
    config = load_config(run.config, trusted=trusted)
    if not away:
        return config

    def there(path: str) -> str:
        return str(folder / Path(path).expanduser())

    config.data.root = there(config.data.root or "")
    config.data.cache_dir = there(config.data.cache_dir)
    if config.model.source is Source.folder:
        config.model.path = there(config.model.path)
    if config.model.template and Path(there(config.model.template)).is_file():
        config.model.template = there(config.model.template)
    if config.method.get("adapter"):
        config.method.adapter = there(config.method.adapter)
    return config


def redacted_yaml(config: DictConfig) -> str:
    """Return the configuration as YAML, with references to environment variables where it holds their secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(redact_tree(OmegaConf.to_container(config, enum_to_str=True))))


def git_state() -> dict[str, Any] | None:
    """Return commit and dirtiness of the working directory's repository, or None outside one."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None
