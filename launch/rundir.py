"""The run directory: what a run was made from, what it did, and whether it may be used again.

runs/NAME/config.yaml      resolved configuration
          manifest.json    identity, hardware, versions, what was proven about the ranks, results
          metrics.jsonl    one line for each log step
          evaluation.json  held-out answers before and after; evaluation-N.json: of the first N rows alone
          final/           adapter or model, with tokenizer
          merged/          base and adapter in one, from `tunewright merge`
          checkpoints/     checkpoint-N
          tensorboard/     event files
          logs/            rankN.log, launch.log
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.compose import flatten
from launch.errors import ConfigError, StorageError
from launch.redaction import redact_tree
from launch.schema import Resume
from launch.trust import check_ours, sign

# Settings that say where and how to run, not what is trained: a run continues although they changed.
OPERATIONAL = {
    "name",
    "output_root",
    "resume",
    "overwrite",
    "trust",
    "data.dir",
    "data.cache_dir",
    "data.workers",
    "data.max_dropped",
    "data.allow_outside",
    "offline",
    "model.path",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.timeout_minutes",
    "cluster.num_processes",
    "cluster.threads_per_process",
}


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
        return self.path / "logs"

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest, or an empty mapping when there is none."""
        try:
            return dict(json.loads(self.manifest.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageError(f"Cannot read {self.manifest}: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise StorageError(f"{self.manifest} is damaged: {error.msg} at line {error.lineno}.") from error

    def update_manifest(self, **values: Any) -> None:
        write_json(self.manifest, {**self.read_manifest(), **redact_tree(values)})

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that was written to its end as far as can be seen, or None."""
        numbered = []
        for path in self.checkpoints.glob("checkpoint-*"):
            step = path.name.rpartition("-")[2]
            if step.isdigit() and (path / "trainer_state.json").is_file():
                numbered.append((int(step), path))
        return max(numbered)[1] if numbered else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    staging.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staging, path)


def identity(config: DictConfig) -> dict[str, Any]:
    """Return the settings that decide what a run trains, flat; two runs with the same ones are the same run."""
    tree = redact_tree(OmegaConf.to_container(config, enum_to_str=True))
    return {key: value for key, value in flatten(tree) if key not in OPERATIONAL}


def digest(config: DictConfig) -> str:
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Claim:
    """What may be done in a run folder: start, continue from `checkpoint`, or nothing because the run is `finished`."""

    run: RunDir
    checkpoint: Path | None = None
    finished: bool = False


def claim(config: DictConfig) -> Claim:
    """Decide what happens to the run folder, and say no before anything is mixed up.

    Raises:
        ConfigError: the folder holds a run and neither `resume` nor `overwrite` says what to do with it, or it holds a
            different run, or `resume=must` finds none.
    """
    run = RunDir(Path(config.output_root) / config.name)
    if config.overwrite:
        if config.resume is not Resume.never:
            raise ConfigError(
                f"`overwrite=true` and `resume={config.resume.name}` contradict each other: write one of the two."
            )
        return Claim(run)
    manifest = run.read_manifest()
    if not manifest:
        if run.path.is_dir() and any(run.path.iterdir()) and not run.config.is_file():
            raise ConfigError(
                f"The run folder {run.path} is not empty and holds no tunewright run. Choose another `name` or "
                f"`output_root`, or write overwrite=true to delete what is there."
            )
        if config.resume is Resume.must:
            raise ConfigError(f"`resume=must`, but there is no run in {run.path}. Write resume=auto to start one.")
        return Claim(run)
    differing = _differences(manifest.get("identity", {}), identity(config))
    if differing:
        table = "\n".join(f"  {key}: there {old!r}, now {new!r}" for key, old, new in differing)
        raise ConfigError(
            f"The run folder {run.path} holds another run. Its checkpoints and adapter do not fit this one:\n{table}\n"
            f"Choose another `name`, or write overwrite=true to delete what is there."
        )
    if config.resume is Resume.never:
        raise ConfigError(
            f"The run folder {run.path} holds this run already (status: {manifest.get('status')}). Write resume=auto "
            f"to continue it, overwrite=true to start anew, or choose another `name`."
        )
    if manifest.get("status") == "done":
        return Claim(run, finished=True)
    check_ours(run.config, manifest, trusted=config.trust, how="trust=true")
    return Claim(run, checkpoint=run.last_checkpoint())


def prepare_folder(config: DictConfig, claimed: Claim) -> None:
    """Create the run folder and write its configuration and the first manifest.

    Raises:
        StorageError: the folder cannot be written.
    """
    run = claimed.run
    try:
        if claimed.checkpoint is None:
            shutil.rmtree(run.path, ignore_errors=True)
        for folder in (run.path, run.logs):
            folder.mkdir(parents=True, exist_ok=True)
        run.config.write_text(redacted_yaml(config), encoding="utf-8")
        run.update_manifest(
            name=config.name, status="running", identity=identity(config), config_digest=digest(config), git=git_state()
        )
        run.update_manifest(signature=sign(run.config))
    except OSError as error:
        raise StorageError(f"Cannot write to the run folder {run.path}: {error.strerror}.") from error


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


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
