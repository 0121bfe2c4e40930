"""Files and folders of cloud stores, through `fsspec`: copied here once for each version of them."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import fsspec

from tunewright.errors import DataError, StorageError
from tunewright.files import write_json, written_aside
from tunewright.registry import Entry
from tunewright.trees import digest


def fetch_cloud(entry: Entry, cache: Path, *, offline: bool) -> Path:
    """Copy what an entry names, unless it is here, and return where it is.

    Raises:
        StorageError: it cannot be reached, or the store's package is not installed.
    """
    # The folder's name is the digest of what is there, so the last copy can be found without asking.
    record = cache / f"{digest(entry.location)}.json"
    name = entry.location.rstrip("/").rpartition("/")[2]
    if offline:
        if record.is_file():
            return cache / json.loads(record.read_text(encoding="utf-8"))["version"] / name
        raise StorageError(f"{entry.where} is {entry.location}, which is not on this machine, and `offline` is true.")
    try:
        store, path = fsspec.url_to_fs(entry.location)
        listed = store.find(path, detail=True) if store.isdir(path) else {path: store.info(path)}
        if any(".." in PurePosixPath(file).parts for file in (name, *listed)):
            raise DataError(f"{entry.where}: {entry.location} has names with '..', which would lead out of the cache.")
        stamps = {
            file: {key: str(info.get(key)) for key in ("size", "ETag", "etag", "mtime", "LastModified", "updated")}
            for file, info in listed.items()
        }
        version = digest([entry.location, stamps])
        if not (cache / version).is_dir():
            with written_aside(cache / version) as staging:
                staging.mkdir(parents=True)
                store.get(path, str(staging / name), recursive=store.isdir(path))
    except DataError:
        raise
    except ImportError as error:
        raise StorageError(f"{entry.where} is {entry.location}: {error}") from error
    except Exception as error:  # each store's client has exceptions of its own (botocore, gcsfs, ...)
        raise StorageError(
            f"{entry.where}: {entry.location} cannot be read ({type(error).__name__}: {error})."
        ) from error
    write_json(record, {"version": version})
    return cache / version / name
