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
          .lock            held by the process that trains
runs/.trash/DATE-NAME/     what was replaced
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import Timeout
from omegaconf import DictConfig, OmegaConf

from tunewright.config.compose import load_config
from tunewright.config.schema import Resume, Source
from tunewright.errors import ConfigError, StorageError
from tunewright.files import write_json
from tunewright.folders import LOCK, check_name, is_locked, locked, set_aside
from tunewright.identity import differing_settings, identity, table
from tunewright.redaction import redact_tree
from tunewright.trees import digest
from tunewright.trust import check_ours, is_ours, sign

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
        """Return the newest checkpoint that was written to its end as far as can be seen, or None."""
        numbered = []
        for path in self.checkpoints.glob("checkpoint-*"):
            step = path.name.rpartition("-")[2]
            if step.isdigit() and (path / "trainer_state.json").is_file():
                numbered.append((int(step), path))
        return max(numbered)[1] if numbered else None


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


@dataclass(frozen=True)
class Claim:
    """What may be done in a run folder: start, continue from `checkpoint`, or nothing because the run is `finished`."""

    run: RunDir
    checkpoint: Path | None = None
    finished: bool = False
    remarks: tuple[str, ...] = ()  # what the user should know of a run that continues


def run_dir(config: DictConfig) -> RunDir:
    """Return the folder of a run, which lies directly in `output_root`.

    Raises:
        ConfigError: `name` is not one plain name, or `output_root` is empty.
    """
    check_name(config.name, "name")
    if not config.output_root.strip():
        raise ConfigError("`output_root` is empty (an unset variable?): write a folder, for example output_root=runs.")
    return RunDir(Path(config.output_root) / config.name)


def claim(config: DictConfig, *, held: bool = False) -> Claim:
    """Decide what happens to the run folder, and say no before anything is mixed up.

    `held` says that this process has the folder's lock already.

    Raises:
        ConfigError: the folder holds something else than a run, or a run and neither `resume` nor `overwrite` says what
            to do with it, or a different run, or one that another process is training; or `resume=must` finds none.
    """
    run = run_dir(config)
    if config.overwrite and config.resume is not Resume.never:
        raise ConfigError(
            f"`overwrite=true` and `resume={config.resume.name}` contradict each other: write one of the two."
        )
    manifest = run.read_manifest()
    if not held and is_locked(run.path):
        raise ConfigError(_in_use(run, manifest))
    if "identity" not in manifest:
        if run.path.is_dir() and any(path.name != LOCK for path in run.path.iterdir()):
            raise ConfigError(
                f"The run folder {run.path} is not empty and holds no tunewright run (no {run.manifest.name} of one), "
                f"so it is neither continued nor replaced. Choose another `name` or `output_root`."
            )
        if config.resume is Resume.must:
            raise ConfigError(f"`resume=must`, but there is no run in {run.path}. Write resume=auto to start one.")
        return Claim(run)
    if config.overwrite:
        return Claim(run)
    differing = differing_settings(manifest, config)
    if differing:
        raise ConfigError(
            f"The run folder {run.path} holds another run. Its checkpoints and adapter do not fit this one:\n"
            f"{table(differing)}\n{_OTHER}"
        )
    if config.resume is Resume.never:
        raise ConfigError(
            f"The run folder {run.path} holds this run already (status: {manifest.get('status')}). Write resume=auto "
            f"to continue it, overwrite=true to start anew, or choose another `name`."
        )
    if manifest.get("status") == "done" and not _asks_for_more(config, manifest):
        return Claim(run, finished=True)
    return _continued(config, run, manifest)


_OTHER = "Choose another `name`, or write overwrite=true to start anew (what is there moves to .trash)."


def _asks_for_more(config: DictConfig, manifest: Mapping[str, Any]) -> bool:
    """Tell whether a finished run is to be longer than it was."""
    before, train = manifest["identity"], config.train
    if all(before.get(f"train.{key}") == train[key] for key in ("epochs", "max_steps")):
        return False
    if train.max_steps is not None:
        return bool(train.max_steps > (manifest.get("steps") or 0))
    return bool(train.epochs > (manifest.get("epochs") or 0))


def _continued(config: DictConfig, run: RunDir, manifest: Mapping[str, Any]) -> Claim:
    """Return the claim of a run that is not at its end: from its last checkpoint, or from the start where none is."""
    checkpoint, train = run.last_checkpoint(), config.train
    if checkpoint is None:
        if manifest.get("status") == "done":
            raise ConfigError(
                f"{run.path} is finished after {manifest.get('steps')} steps and has no checkpoint to go on from "
                f"(`train.save_steps` makes them). Choose another `name`, or write overwrite=true to start anew."
            )
        return Claim(run)
    check_ours(run.config, manifest, trusted=config.trust, how="trust=true")
    reached = _read_state(checkpoint)
    asked, done = ("max_steps", "global_step") if train.max_steps is not None else ("epochs", "epoch")
    if reached.get(done, 0) > train[asked]:
        raise ConfigError(
            f"`train.{asked}` is {train[asked]:g}, and {checkpoint} has {reached[done]:.4g} behind it: write more."
        )
    remarks = []
    before = {key: manifest["identity"].get(f"train.{key}") for key in ("epochs", "max_steps")}
    changed = [key for key, value in before.items() if value != train[key]]
    if changed and not train.scheduler.startswith("constant"):
        told = ", ".join(f"`train.{key}` was {before[key]} and is {train[key]}" for key in changed)
        remarks.append(f"{told}: the learning rate goes on where a run of the new length would be, not where it was.")
    if "inputs" not in manifest:
        remarks.append(
            f"{run.path} was begun by a version that wrote down no digest of model and data: that they are the same "
            f"is not checked."
        )
    return Claim(run, checkpoint, remarks=tuple(remarks))


def _read_state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / "trainer_state.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{file} is damaged: {error}. Move {checkpoint} away to go on from an earlier one."
        ) from error


def check_inputs(claimed: Claim, inputs: Mapping[str, str]) -> None:
    """Compare what a run was made from with what it would go on with.

    Raises:
        ConfigError: they are not the same.
    """
    if claimed.checkpoint is None and not claimed.finished:
        return
    before = claimed.run.read_manifest().get("inputs", {})
    differing = [(key, before[key], now) for key, now in inputs.items() if key in before and before[key] != now]
    if differing:
        raise ConfigError(
            f"{claimed.run.path} was made from something else, so it would become another run:\n{table(differing)}\n"
            f"{_OTHER}"
        )


@contextmanager
def sole_user(config: DictConfig, claimed: Claim) -> Iterator[None]:
    """Hold the run folder's lock while this process or its ranks write there.

    Raises:
        ConfigError: another process holds it, or has used the folder since it was claimed.
        StorageError: the folder cannot be written.
    """
    run = claimed.run
    with ExitStack() as held:
        try:
            held.enter_context(locked(run.path))
        except Timeout as error:
            raise ConfigError(_in_use(run, run.read_manifest())) from error
        if claim(config, held=True) != claimed:
            raise ConfigError(f"Another process has used the run folder {run.path} meanwhile. Start once more.")
        yield


def _in_use(run: RunDir, manifest: Mapping[str, Any]) -> str:
    who = manifest.get("process")
    known = f"process {who['pid']} on {who['host']} since {who['since']}" if who else "another process"
    return f"The run folder {run.path} is in use: {known}. Wait for it or stop it, or choose another `name`."


def prepare_folder(config: DictConfig, claimed: Claim, inputs: Mapping[str, str] | None = None) -> Path | None:
    """Write the configuration and the first manifest into the run folder; return where went what made room for them.

    Raises:
        StorageError: the folder cannot be written.
    """
    run = claimed.run
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        aside = _make_room(config, claimed)
        known = {} if claimed.checkpoint is None else run.read_manifest()
        # First of all: from now on the folder is a run's, whatever happens.
        write_json(
            run.manifest,
            {
                **known,
                "name": config.name,
                "status": "running",
                "process": {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "since": datetime.now().astimezone().isoformat(timespec="seconds"),
                },
                "folder": os.getcwd(),
                "identity": identity(config),
                "config_digest": digest(identity(config)),
                # A run of an older version stays known as one whose beginning nobody has written down.
                **({"inputs": dict(inputs)} if inputs and (not known or "inputs" in known) else {}),
                "files": list(FILES),
                "git": git_state(),
            },
        )
        run.logs.mkdir(exist_ok=True)
        run.config.write_text(redacted_yaml(config), encoding="utf-8")
        run.update_manifest(signature=sign(run.config, os.getcwd()))
    except OSError as error:
        raise StorageError(f"Cannot write to the run folder {run.path}: {error.strerror}.") from error
    return aside


def _make_room(config: DictConfig, claimed: Claim) -> Path | None:
    """Move away what the run made before and what would be mixed up with what it is about to make."""
    run = claimed.run
    manifest = run.read_manifest()
    if "identity" not in manifest:
        return None

    def made(patterns: tuple[str, ...]) -> list[Path]:
        return [path for path in sorted(run.path.iterdir()) if any(fnmatchcase(path.name, one) for one in patterns)]

    files = tuple(manifest.get("files", FILES))
    if claimed.checkpoint is not None:
        moved = made(RESULTS)
    elif config.resume is Resume.never:
        moved = made(files)
    else:  # the same run from its start: its logs go on, and with nothing but them there is nothing to keep apart
        moved = made(tuple(pattern for pattern in files if pattern != LOGS)) if made(RECORDS) else []
    # The manifest last: until then the folder is a run's.
    return set_aside(sorted(moved, key=lambda path: path == run.manifest), run.path.parent, run.path.name)


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
