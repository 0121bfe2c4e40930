"""A checkpoint is brought back from the mirror, where what is here is gone or damaged: before anything is decided.

What `claims` then decides from is in the run's folder again, as if it had always been there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from omegaconf import DictConfig

from tunewright.checkpoints import PREFIX, newest_whole, problems_of, read_record, step_of
from tunewright.claims import OTHER, in_use, run_dir
from tunewright.config.schema import Resume
from tunewright.errors import ConfigError, StorageError
from tunewright.files import write_json, write_text
from tunewright.identity import differing_settings, table
from tunewright.locks import InUse, is_locked, locked
from tunewright.mirror import Mirror, mirror_of
from tunewright.run_folder import RunDir
from tunewright.trust import sign

STATE = "trainer_state.json"


def bring_back(config: DictConfig, *, dry_run: bool = False) -> list[str]:
    """Fetch the newest checkpoint of the mirror that is newer than what is whole here, and return what to say of it.

    Args:
        dry_run: only say what would be fetched.

    Raises:
        ConfigError: the mirror holds a run that is not to be continued, or another one.
        StorageError: nothing is whole here, and the mirror cannot be reached or has nothing whole either.
    """
    mirror, run = mirror_of(config), run_dir(config)
    if mirror is None or config.overwrite or is_locked(run.path) or _finished(run):
        return []
    here = newest_whole(run.checkpoints, hashed=True)[0]
    step = -1 if here is None else step_of(here) or 0
    try:
        newer = [record for record in mirror.records() if record["step"] > step]
    except StorageError as error:
        if here is None:
            raise StorageError(
                f"{error}. Nothing in {run.path} can be continued, and whether there is something at the mirror is not "
                f"known. Start again when it can be reached, or with train.mirror=null to do without it."
            ) from error
        return [f"{error}. The run goes on from {here.name}, which is here; copies are tried again."]
    if not newer:
        return []
    if config.resume is Resume.never:
        raise ConfigError(
            f"The mirror {mirror.location} holds a run already, up to checkpoint-{newer[0]['step']}. Write resume=auto "
            f"to continue it. {OTHER}"
        )
    differing = differing_settings(newer[0]["run"]["manifest"], config)
    differing = [one for one in differing if one[0] not in config.resume_allow]
    if differing:
        raise ConfigError(f"The mirror {mirror.location} holds another run:\n{table(differing)}\n{OTHER}")
    known = f"the newest whole one in {run.path} is {here.name}" if here else f"{run.path} has no whole one"
    if dry_run:
        return [f"checkpoint-{newer[0]['step']} would be fetched from {mirror.location}: {known}."]
    try:
        with locked(run.path):
            told, fetched = _fetch(mirror, run, [record["step"] for record in newer], known, needed=here is None)
            return [*told, *(_fetch_best(mirror, run, fetched) if fetched and config.train.keep_best else [])]
    except InUse as error:
        raise ConfigError(in_use(run, str(error))) from error


def _fetch(mirror: Mirror, run: RunDir, steps: list[int], known: str, *, needed: bool) -> tuple[list[str], Path | None]:
    """Fetch the first of these checkpoints that is whole; return what to say, and where it is."""
    told = []
    for step in steps:
        try:
            fetched = mirror.fetch(step, run.path)
        except StorageError as error:
            told.append(str(error))
            continue
        if not run.manifest.exists():
            # As whoever made the run here: the mirror is the user's word, and what is fetched is read as plain data.
            copy = read_record(fetched)["run"]
            write_text(run.config, copy["config"])
            signature = sign(copy["config"].encode(), os.getcwd())
            manifest = {**copy["manifest"], "status": "failed", "folder": os.getcwd(), "signature": signature}
            write_json(run.manifest, manifest)
        return [*told, f"{fetched.name} was fetched from {mirror.location}: {known}."], fetched
    if needed:
        raise StorageError("\n".join([f"Nothing in {run.path} can be continued, and nothing at the mirror:", *told]))
    return told, None


def _fetch_best(mirror: Mirror, run: RunDir, checkpoint: Path) -> list[str]:
    """Fetch the best checkpoint so far as well, which the result may be."""
    best = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best_global_step")
    place = run.checkpoints / f"{PREFIX}{best}"
    if not best or not problems_of(place, hashed=True):
        return []
    try:
        mirror.fetch(best, run.path)
    except StorageError as error:
        return [f"{place.name} had the lowest eval loss and is lost: {error} The result will be from later ones."]
    return [f"{place.name}, with the lowest eval loss so far, was fetched as well."]


def _finished(run: RunDir) -> bool:
    try:
        return run.read_manifest().get("status") == "done"
    except StorageError:  # rebuilt from a checkpoint
        return False
