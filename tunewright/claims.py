"""Whether a run folder may be used, and from where a run goes on: the one place that decides it.

It decides from what is written down, before any weight is loaded: the run's manifest, the records of its checkpoints
(`checkpoints.py`), and the digests of what the run was made from. What it decided and why are the claim's remarks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.checkpoints import Damage, newest_whole, read_record
from tunewright.config.schema import Resume
from tunewright.errors import ConfigError, StorageError, did_you_mean
from tunewright.files import write_json, write_text
from tunewright.folders import check_name, set_aside
from tunewright.identity import differing_settings, identity, table
from tunewright.locks import LOCK, InUse, holder, is_locked, locked
from tunewright.mirror import mirror_of
from tunewright.run_folder import FILES, LOGS, RECORDS, RESULTS, RunDir, git_state, redacted_yaml
from tunewright.trees import digest
from tunewright.trust import is_signed, not_ours, sign

# What `resume_allow` may name beside settings, and which of the manifest's `inputs` it stands for.
INPUTS = {
    "data": ("training data", "held-out data"),
    "model": ("model",),
    "adapter": ("adapter",),
    "batch": ("batch",),
}
OTHER = "Choose another `name`, or write overwrite=true to start anew (what is there moves to .trash)."


@dataclass(frozen=True)
class Claim:
    """What may be done in a run folder: start, continue from `checkpoint`, or nothing because the run is `finished`."""

    run: RunDir
    checkpoint: Path | None = None
    finished: bool = False
    remarks: tuple[str, ...] = ()  # what was decided of a run that continues, and why
    damaged: tuple[Damage, ...] = ()  # checkpoints that are newer, and not whole


@dataclass(frozen=True)
class Known:
    """What is known of a run folder's past, also where its manifest or configuration is lost."""

    manifest: Mapping[str, Any]
    config: bytes | None  # the run's config.yaml
    rebuilt: str | None = None  # what was lost, and from where it is known


def run_dir(config: DictConfig) -> RunDir:
    """Return the folder of a run, which lies directly in `output_root`.

    Raises:
        ConfigError: `name` is not one plain name, or `output_root` is empty.
    """
    check_name(config.name, "name")
    if not config.output_root.strip():
        raise ConfigError("`output_root` is empty (an unset variable?): write a folder, for example output_root=runs.")
    return RunDir(Path(config.output_root) / config.name)


def known_of(run: RunDir) -> Known:
    """Return what is known of a run's past: from its manifest, or from a whole checkpoint that has a copy of it.

    Raises:
        StorageError: the manifest is damaged, and no checkpoint has a copy.
    """
    lost = []
    damage: StorageError | None = None
    try:
        manifest = run.read_manifest()
    except StorageError as error:
        damage, manifest = error, {}
        lost.append(f"{run.manifest.name} was damaged")
    config = run.config.read_bytes() if run.config.is_file() else None
    if "identity" in manifest and config is not None:
        return Known(manifest, config)
    if not manifest and not damage:
        lost.append(f"{run.manifest.name} was missing")
    if manifest and "identity" not in manifest:  # of something else
        return Known(manifest, config)
    if config is None:
        lost.append(f"{run.config.name} was missing")
    checkpoint = newest_whole(run.checkpoints, hashed=False)[0]
    if checkpoint is None:
        if damage:
            raise StorageError(
                f"{damage} It is rebuilt from a checkpoint, and none in {run.checkpoints} is whole. Move {run.path} "
                f"away, or choose another `name`."
            ) from damage
        return Known(manifest, config)
    copy = read_record(checkpoint)["run"]
    return Known(
        manifest or {**copy["manifest"], "status": "failed"},
        copy["config"].encode() if config is None else config,
        f"{' and '.join(lost)}: rebuilt from {checkpoint.name}.",
    )


def claim(config: DictConfig, *, held: bool = False) -> Claim:
    """Decide what happens to the run folder, and say no before anything is mixed up.

    Args:
        held: this process has the folder's lock. Then every byte of the checkpoint is looked at; before, sizes are.

    Raises:
        ConfigError: the folder holds something else than a run, or a run and neither `resume` nor `overwrite` says what
            to do with it, or a different run, or one that another process is training; or `resume=must` finds none.
        StorageError: what is there is damaged, and nothing whole is left to go on from.
    """
    run = run_dir(config)
    check_allowed(config)
    if config.overwrite and config.resume is not Resume.never:
        raise ConfigError(
            f"`overwrite=true` and `resume={config.resume.name}` contradict each other: write one of the two."
        )
    if not held and is_locked(run.path):
        raise ConfigError(in_use(run, holder(run.path)))
    known = known_of(run)
    manifest = known.manifest
    if "identity" not in manifest:
        if run.path.is_dir() and any(not path.name.startswith(LOCK) for path in run.path.iterdir()):
            raise ConfigError(
                f"The run folder {run.path} is not empty and holds no tunewright run (no {run.manifest.name} of one, "
                f"and no whole checkpoint to rebuild it from), so it is neither continued nor replaced. Choose another "
                f"`name` or `output_root`, or move it away."
            )
        if config.resume is Resume.must:
            raise ConfigError(f"`resume=must`, but there is no run in {run.path}. Write resume=auto to start one.")
        return Claim(run)
    if config.overwrite:
        return Claim(run)
    allowed = [one for one in differing_settings(manifest, config) if one[0] in config.resume_allow]
    differing = [one for one in differing_settings(manifest, config) if one[0] not in config.resume_allow]
    if differing:
        raise ConfigError(
            f"The run folder {run.path} holds another run. Its checkpoints and adapter do not fit this one:\n"
            f"{table(differing)}\n{OTHER}"
        )
    if config.resume is Resume.never:
        raise ConfigError(
            f"The run folder {run.path} holds this run already (status: {manifest.get('status')}). Write resume=auto "
            f"to continue it, overwrite=true to start anew, or choose another `name`."
        )
    if manifest.get("status") == "done" and not _asks_for_more(config, manifest):
        return Claim(run, finished=True)
    claimed = _continued(config, run, known, hashed=held)
    if allowed and claimed.checkpoint:
        return _with_remark(claimed, f"Goes on with other settings, as `resume_allow` says:\n{table(allowed)}")
    return claimed


def _with_remark(claimed: Claim, text: str) -> Claim:
    return Claim(claimed.run, claimed.checkpoint, claimed.finished, (*claimed.remarks, text), claimed.damaged)


def check_allowed(config: DictConfig) -> None:
    """Refuse a `resume_allow` that names nothing which could differ.

    Raises:
        ConfigError: so it is.
    """
    choices = {*INPUTS, *identity(config)}
    for name in config.resume_allow:
        if name not in choices:
            raise ConfigError(
                f"`resume_allow` names {name!r}.{did_you_mean(name, choices)} Write {', '.join(INPUTS)}, or the key of "
                f"a setting, for example train.learning_rate."
            )


def _asks_for_more(config: DictConfig, manifest: Mapping[str, Any]) -> bool:
    """Tell whether a finished run is to be longer than it was."""
    before, train = manifest["identity"], config.train
    if all(before.get(f"train.{key}") == train[key] for key in ("epochs", "max_steps")):
        return False
    if train.max_steps is not None:
        return bool(train.max_steps > (manifest.get("steps") or 0))
    return bool(train.epochs > (manifest.get("epochs") or 0))


def _continued(config: DictConfig, run: RunDir, known: Known, *, hashed: bool) -> Claim:
    """Return the claim of a run that is not at its end: from its last whole checkpoint, or from the start."""
    manifest, train = known.manifest, config.train
    checkpoint, damaged = newest_whole(run.checkpoints, hashed=hashed)
    if checkpoint is None:
        if damaged:
            told = "\n".join(f"  {one}" for one in damaged)
            raise StorageError(
                f"{run.path} has checkpoints, and none of them is whole:\n{told}\nPut the files back, or write "
                f"overwrite=true in place of resume to start anew (what is there moves to .trash)."
            )
        if manifest.get("status") == "done":
            raise ConfigError(
                f"{run.path} is finished after {manifest.get('steps')} steps and has no checkpoint to go on from "
                f"(`train.save_steps` makes them). Choose another `name`, or write overwrite=true to start anew."
            )
        return Claim(run, remarks=(f"{run.path} has no checkpoint yet: it starts anew.",))
    if not config.trust and not (known.config and is_signed(known.config, manifest)):
        raise not_ours(run.config, "trust=true")
    reached = read_record(checkpoint)
    asked, done = ("max_steps", "step") if train.max_steps is not None else ("epochs", "epoch")
    if reached[done] > train[asked]:
        raise ConfigError(
            f"`train.{asked}` is {train[asked]:g}, and {checkpoint} has {reached[done]:.4g} behind it: write more."
        )
    remarks = [known.rebuilt] if known.rebuilt else []
    remarks += [f"{one}. {run.path} falls back to {checkpoint.name}." for one in damaged]
    before = {key: manifest["identity"].get(f"train.{key}") for key in ("epochs", "max_steps")}
    changed = [key for key, value in before.items() if value != train[key]]
    if changed and not train.scheduler.startswith("constant"):
        told = ", ".join(f"`train.{key}` was {before[key]} and is {train[key]}" for key in changed)
        remarks.append(f"{told}: the learning rate goes on where a run of the new length would be, not where it was.")
    return Claim(run, checkpoint, remarks=tuple(remarks), damaged=tuple(damaged))


def check_inputs(claimed: Claim, inputs: Mapping[str, str], allow: Sequence[str] = ()) -> str | None:
    """Compare what a run was made from with what it would go on with; return a remark on what `allow` lets pass.

    Raises:
        ConfigError: they are not the same.
    """
    if claimed.checkpoint is None and not claimed.finished:
        return None
    before = known_of(claimed.run).manifest.get("inputs", {})
    passing = {key for name in allow for key in INPUTS.get(name, ())}
    changed = [(key, before[key], now) for key, now in inputs.items() if key in before and before[key] != now]
    differing = [one for one in changed if one[0] not in passing]
    if differing:
        names = sorted({name for name, keys in INPUTS.items() for key, *_ in differing if key in keys})
        insist = f" To go on nevertheless: resume_allow=[{','.join(names)}]." if names else ""
        raise ConfigError(
            f"{claimed.run.path} was made from something else, so it would become another run:\n{table(differing)}\n"
            f"{OTHER}{insist}"
        )
    return f"Goes on with something else, as `resume_allow` says:\n{table(changed)}" if changed else None


@contextmanager
def sole_user(config: DictConfig, claimed: Claim) -> Iterator[Claim]:
    """Hold the run folder's lock while this process or its ranks write there, and give the claim that counts.

    It may differ from what was claimed in the checkpoint: only now every byte of that is looked at.

    Raises:
        ConfigError: another process holds it, or has used the folder since it was claimed.
        StorageError: the folder cannot be written; or see `claim`.
    """
    run = claimed.run
    with ExitStack() as held:
        try:
            held.enter_context(locked(run.path))
        except InUse as error:
            raise ConfigError(in_use(run, str(error))) from error
        found = claim(config, held=True)
        if (found.finished, found.checkpoint is None) != (claimed.finished, claimed.checkpoint is None):
            raise ConfigError(f"Another process has used the run folder {run.path} meanwhile. Start once more.")
        yield found


def in_use(run: RunDir, who: str) -> str:
    """Return the refusal of a folder that another process is training in."""
    return f"The run folder {run.path} is in use: {who}. Wait for it or stop it, or choose another `name`."


def prepare_folder(config: DictConfig, claimed: Claim, inputs: Mapping[str, str] | None = None) -> Path | None:
    """Write the configuration and the first manifest into the run folder; return where went what made room for them.

    Raises:
        StorageError: the folder cannot be written.
    """
    run = claimed.run
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        before = known_of(run).manifest
        aside = _make_room(config, claimed, before)
        if config.overwrite and (mirror := mirror_of(config)):
            mirror.set_aside(datetime.now().strftime("%Y%m%d-%H%M%S"))
        known = {} if claimed.checkpoint is None else before
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
                **({"inputs": dict(inputs)} if inputs else {}),
                "files": list(FILES),
                "git": git_state(),
            },
        )
        run.logs.mkdir(exist_ok=True)
        write_text(run.config, redacted_yaml(config))
        run.update_manifest(signature=sign(run.config.read_bytes(), os.getcwd()))
    except OSError as error:
        raise StorageError(f"Cannot write to the run folder {run.path}: {error.strerror}.") from error
    return aside


def _make_room(config: DictConfig, claimed: Claim, manifest: Mapping[str, Any]) -> Path | None:
    """Move away what the run made before and what would be mixed up with what it is about to make."""
    run = claimed.run
    if "identity" not in manifest:
        return None

    def made(patterns: tuple[str, ...]) -> list[Path]:
        return [path for path in sorted(run.path.iterdir()) if any(fnmatchcase(path.name, one) for one in patterns)]

    files = tuple(manifest.get("files", FILES))
    if claimed.checkpoint is not None:
        moved = [*made(RESULTS), *(one.path for one in claimed.damaged)]
    elif config.resume is Resume.never:
        moved = made(files)
    else:  # the same run from its start: its logs go on, and with nothing but them there is nothing to keep apart
        moved = made(tuple(pattern for pattern in files if pattern != LOGS)) if made(RECORDS) else []
    # The manifest last: until then the folder is a run's.
    return set_aside(sorted(moved, key=lambda path: path == run.manifest), run.path.parent, run.path.name)
