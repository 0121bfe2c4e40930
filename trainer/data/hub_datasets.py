"""Datasets of the Hugging Face Hub and of ModelScope, at a known commit, read by `datasets.load_dataset`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunewright.errors import ConfigError, DataError, StorageError
from tunewright.files import write_json
from tunewright.registry import Entry, Place
from tunewright.trainer.data.columnar import BATCH, rows_of
from tunewright.trainer.data.readers import Row

TIMEOUT = 10.0  # seconds to ask a hub for the commit of a dataset


def open_hub(
    entry: Entry, records: Path, *, offline: bool, streaming: bool
) -> tuple[Callable[[], Iterator[Row]], tuple[str, ...]]:
    """Return how to read the rows of an entry on a hub, and what identifies their content.

    Raises:
        StorageError: it is not there, is gated, or cannot be reached and is not on this machine.
        ConfigError: ModelScope's package is not installed.
    """
    what = (entry.place.value, entry.location, entry.subset or "", entry.split or "train", entry.folder or "")
    if entry.place is Place.modelscope:
        if streaming:
            raise ConfigError(
                f"{entry.where} is on ModelScope, which `data.streaming` cannot read: set data.streaming=false."
            )
        folder = fetch_modelscope(entry, offline=offline)
        return (lambda: read_snapshot(entry, folder)), (*what, _stamps(folder))
    if Path(entry.location).exists():
        raise DataError(
            f"{entry.where}: `datasets` would read the folder '{entry.location}' that is here, not the Hub's dataset "
            f"of that name. Start from another folder, or name the path ./{entry.location} if it is meant."
        )
    commit = _commit(entry, records, offline=offline)
    return (lambda: read_snapshot(entry, entry.location, commit, streaming=streaming)), (*what, commit)


def _commit(entry: Entry, records: Path, *, offline: bool) -> str:
    """Return the commit to read: the newest one, or without a network the one that was read last."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    record = records / (entry.location.replace("/", "--") + ".json")
    problem = "and `offline` is true"
    if not offline:
        try:
            commit = str(HfApi().dataset_info(entry.location, timeout=TIMEOUT).sha)
            records.mkdir(parents=True, exist_ok=True)
            write_json(record, {"commit": commit})
            return commit
        except GatedRepoError as error:
            raise StorageError(
                f"{entry.where}: '{entry.location}' is gated: accept its terms on the Hub, then `hf auth login`."
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise StorageError(f"{entry.where}: the Hub has no dataset '{entry.location}'.") from error
        except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
            problem = f"and the Hub cannot be reached ({type(error).__name__})"
    if record.is_file():
        return str(json.loads(record.read_text(encoding="utf-8"))["commit"])
    raise StorageError(
        f"{entry.where} is the Hub's dataset '{entry.location}', which is not on this machine, {problem}. Use a file, "
        f"or ModelScope (`ms_hub_url`, modelscope:ORG/NAME)."
    )


def read_snapshot(
    entry: Entry, source: str | Path, revision: str | None = None, *, streaming: bool = False
) -> Iterator[Row]:
    """Yield the rows of a dataset of the Hub at a commit, or of a folder that was downloaded whole.

    Raises:
        DataError: no such subset, split or folder; or it names files that are not its own.
        StorageError: it cannot be fetched.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        builder = load_dataset_builder(str(source), name=entry.subset, data_dir=entry.folder, revision=revision)
        _check_files(entry, builder.config.data_files, source)
        if streaming:
            rows = builder.as_streaming_dataset(split=entry.split or "train")
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=entry.split or "train")
        for table in rows.with_format("arrow").iter(BATCH):
            yield from rows_of(table)
    except (DatasetsError, ValueError, FileNotFoundError) as error:  # no such subset, split or folder
        reason = " ".join(str(error).split())
        raise DataError(f"{entry.where}: '{entry.location}' cannot be loaded: {reason}") from error
    except ConnectionError as error:
        raise StorageError(f"{entry.where}: '{entry.location}' cannot be fetched: {error}") from error


def _check_files(entry: Entry, data_files: Mapping[Any, Any] | None, source: str | Path) -> None:
    """Refuse a dataset whose card names files of this machine that are not its own.

    Raises:
        DataError: it does.
    """
    own = Path(os.path.abspath(source)) if isinstance(source, Path) else None
    for file in (str(file) for files in (data_files or {}).values() for file in files):
        if "://" not in file and not (own and Path(os.path.abspath(file)).is_relative_to(own)):
            raise DataError(f"{entry.where}: the card of '{entry.location}' names {file}, which is no file of its own.")


def fetch_modelscope(entry: Entry, *, offline: bool) -> Path:
    """Download a ModelScope dataset unless it is there, and return its folder."""
    try:
        from modelscope import snapshot_download
        from modelscope_hub.errors import CacheNotFound
    except ImportError as error:
        raise ConfigError(
            f"{entry.where} is on ModelScope, whose package is not installed: pip install 'tunewright[modelscope]'."
        ) from error
    try:
        return Path(snapshot_download(entry.location, repo_type="dataset", local_files_only=offline))
    except CacheNotFound as error:
        raise StorageError(
            f"{entry.where}: '{entry.location}' is not on this machine, and `offline` is true."
        ) from error
    except OSError as error:
        raise StorageError(
            f"{entry.where}: '{entry.location}' cannot be fetched from ModelScope: {' '.join(str(error).split())}"
        ) from error


def _stamps(folder: Path) -> str:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return json.dumps([(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
