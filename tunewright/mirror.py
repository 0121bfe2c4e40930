"""A second place for checkpoints and the result, through fsspec: a folder of another disk, s3://..., gs://..., sftp://...

MIRROR/NAME/checkpoints/checkpoint-40/...              a checkpoint's files
            checkpoints/checkpoint-40/checkpoint.json   its record, written last: without it a copy was interrupted
            final/..., final/result.json                the result, with such a record
            config.yaml, manifest.json, metrics.jsonl

So it is a run's folder, and nothing half of it is taken for whole: each file's size is compared as soon as it has
arrived, on a disk its content too, and every hash when it is fetched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import DictConfig

from tunewright.checkpoints import (
    LEAST_KEPT,
    PART,
    RECORD,
    files_in,
    hash_of,
    parse_record,
    problems_of,
    read_record,
    seal,
    step_of,
)
from tunewright.errors import ConfigError, StorageError, first_line
from tunewright.folders import TRASH, set_aside
from tunewright.space import check_space, storing
from tunewright.trees import digest

RESULT_RECORD = "result.json"
METRICS = "metrics.jsonl"


def mirror_of(config: DictConfig) -> Mirror | None:
    """Return where a run is copied to, or None where nobody asked for it.

    Raises:
        ConfigError: the place cannot be used.
    """
    location = config.train.mirror
    if location is None:
        return None
    mirror = Mirror(location, config.name)
    if mirror.is_disk and Path(mirror.root).resolve() == (Path(config.output_root) / config.name).resolve():
        raise ConfigError(
            f"`train.mirror` is {location}, where the run itself lies: write a folder on another disk, or a URL."
        )
    return mirror


class Mirror:
    """The copy of one run at another place.

    Args:
        location: `train.mirror`, a folder or a URL that fsspec knows.
        name: the run's.

    Raises:
        ConfigError: nothing is known of such a place, or what talks to it is not installed.
    """

    def __init__(self, location: str, name: str) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        try:
            self.store, root = fsspec.url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"`train.mirror` is {location}, which cannot be used: {first_line(error)}. Write a folder, or a URL "
                f"whose package is installed (s3:// needs s3fs, gs:// gcsfs, az:// adlfs)."
            ) from error
        self.parent, self.name = root.rstrip("/"), name
        self.location = f"{location.rstrip('/')}/{name}"
        self.root = f"{self.parent}/{name}"
        self.is_disk = isinstance(self.store, LocalFileSystem)

    # Reading

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the checkpoints that were copied whole, newest first.

        Raises:
            StorageError: the place cannot be reached.
        """
        with _reaching(self.location):
            self._is_there()
            self.store.invalidate_cache()
            found = [self._record(step) for step in self._steps()]
        return [record for record in found if record]

    def has(self, checkpoint: Path) -> bool:
        """Tell whether a checkpoint of this name was copied whole.

        Raises:
            StorageError: the place cannot be reached.
        """
        with _reaching(self.location):
            return self._record(step_of(checkpoint) or 0) is not None

    def fetch(self, step: int, run: Path) -> Path:
        """Copy a checkpoint back into a run's folder, with the metrics up to it where that has none.

        A damaged checkpoint in its place moves to the trash.

        Raises:
            StorageError: the place cannot be reached, or what came is not what was written.
        """
        name, record = f"checkpoint-{step}", self._record(step)
        place, staging = run / "checkpoints" / name, run / "checkpoints" / PART / name
        if record is None:
            raise StorageError(f"{self.location} has no whole {name}.")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            needed = sum(told["size"] for told in record["files"].values())
            check_space(run, needed, f"{name} of {self.location}", "Make room, or choose another `output_root`.")
            with _reaching(self.location), storing(run, name, needed=needed):
                for file in (*record["files"], RECORD):
                    (staging / file).parent.mkdir(parents=True, exist_ok=True)
                    self.store.get_file(f"{self._checkpoint(step)}/{file}", str(staging / file))
                if not (run / METRICS).exists() and self.store.exists(f"{self._checkpoint(step)}/{METRICS}"):
                    self.store.get_file(f"{self._checkpoint(step)}/{METRICS}", str(run / METRICS))
            problems = problems_of(staging, hashed=True)
            if problems:
                raise StorageError(f"{self.location}: {name} is damaged: {'; '.join(problems[:3])}.")
            set_aside([place] if place.exists() else [], run.parent, run.name)
            os.rename(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return place

    # Writing

    def put_checkpoint(
        self, checkpoint: Path, keep: int, metrics: Path | None = None, spared: Path | None = None
    ) -> None:
        """Remove what was copied half, copy a committed checkpoint, then remove all but the newest `keep` and `spared`.

        Raises:
            StorageError: it has not arrived as it is here.
        """
        there, step = f"{self.root}/checkpoints/{checkpoint.name}", step_of(checkpoint)
        with _reaching(self.location):
            self._is_there()
            for half in self._steps():
                if not self._record(half):  # its room may be what this one needs
                    self._remove(self._checkpoint(half))
            self._put(checkpoint, there, read_record(checkpoint)["files"])
            if metrics and metrics.is_file():
                self.store.put_file(str(metrics), f"{there}/{METRICS}")
            self.store.pipe_file(f"{there}/{RECORD}", (checkpoint / RECORD).read_bytes())
            self.store.invalidate_cache()
            whole = self._steps()
            # Those of later steps are of a past that this run does not have any more.
            kept = [one for one in whole if one <= (step or 0)][: max(keep, LEAST_KEPT)]
            for other in {*whole} - {*kept, step_of(spared) if spared else None}:
                self._remove(self._checkpoint(other))

    def put_result(self, run: Path, files: Iterable[str]) -> None:
        """Copy `final/` with a record of it, and `files` of the run's folder.

        Raises:
            StorageError: it has not arrived as it is here.
        """
        folder, there = run / "final", f"{self.root}/final"
        with _reaching(self.location):
            record = {"files": seal(folder, files_in(folder))}
            self._put(folder, there, record["files"])
            for file in files:
                self.store.put_file(str(run / file), f"{self.root}/{file}")
            self.store.pipe_file(f"{there}/{RESULT_RECORD}", json.dumps({**record, "digest": digest(record)}).encode())

    def set_aside(self, date: str) -> None:
        """Move what lies there to MIRROR/.trash/DATE-NAME.

        Raises:
            StorageError: the place cannot be reached.
        """
        with _reaching(self.location):
            if self.store.exists(self.root):
                self._make_folder(f"{self.parent}/{TRASH}")
                self.store.mv(self.root, f"{self.parent}/{TRASH}/{date}-{self.name}", recursive=True)

    def _put(self, folder: Path, there: str, files: Mapping[str, Mapping[str, Any]]) -> None:
        self._is_there()
        self._remove(there)  # of an interrupted copy
        for file, told in files.items():
            target = f"{there}/{file}"
            self._make_folder(target.rpartition("/")[0])
            self.store.put_file(str(folder / file), target)
            size = self.store.info(target)["size"]
            if size != told["size"]:
                raise OSError(f"{file} has {size:,} bytes there, {told['size']:,} were sent")
            if self.is_disk and hash_of(Path(target)) != told["sha256"]:
                raise OSError(f"{file} has other content there than was sent")

    def _make_folder(self, folder: str) -> None:
        if not self.store.async_impl:  # object stores have none, and would make a bucket whose name is misspelt
            self.store.makedirs(folder, exist_ok=True)

    def _is_there(self) -> None:
        # A folder is the user's to make, once: where a disk is not mounted, one made here would fill another disk.
        if self.is_disk and not self.store.isdir(self.parent):
            raise FileNotFoundError(f"the folder {self.parent} is not there: mount it, or make it")

    def _checkpoint(self, step: int) -> str:
        return f"{self.root}/checkpoints/checkpoint-{step}"

    def _steps(self) -> list[int]:
        """Return the steps of everything there that is called like a checkpoint, newest first."""
        folder = f"{self.root}/checkpoints"
        names = self.store.ls(folder, detail=False) if self.store.isdir(folder) else []
        found = [step_of(Path(name.rstrip("/"))) for name in names]
        return sorted((step for step in found if step is not None), reverse=True)

    def _record(self, step: int) -> dict[str, Any] | None:
        """Return the record of a checkpoint that was copied whole, or None."""
        file = f"{self._checkpoint(step)}/{RECORD}"
        try:
            record = parse_record(self.store.cat_file(file))
        except (FileNotFoundError, ValueError):
            return None
        fits = record["step"] == step and not any(_leads_out(name) for name in record["files"])
        return record if fits else None

    def _remove(self, folder: str) -> None:
        """Remove a copy, its record first: from then on it is none."""
        for record in (RECORD, RESULT_RECORD):
            if self.store.exists(f"{folder}/{record}"):
                self.store.rm_file(f"{folder}/{record}")
        if self.store.exists(folder):
            self.store.rm(folder, recursive=True)


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


@contextmanager
def _reaching(location: str) -> Iterator[None]:
    """Tell what a store's client raises as one thing: each has exceptions of its own (botocore, gcsfs, ...)."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"The mirror {location} failed: {type(error).__name__}: {first_line(error)}") from error
