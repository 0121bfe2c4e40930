"""The second place: what arrives there whole, and only that, comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tunewright.checkpoints import PART, RECORD, commit, files_in, problems_of, seal
from tunewright.errors import ConfigError, StorageError
from tunewright.mirror import RESULT_RECORD, Mirror


def checkpoint(run: Path, step: int) -> Path:
    staging = run / "checkpoints" / PART / f"checkpoint-{step}"
    (staging / "global_step").mkdir(parents=True)
    (staging / "weights").write_bytes(bytes([step]) * 10_000)
    (staging / "global_step" / "rank0.pt").write_bytes(b"state" * step)
    (run / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    return commit(staging, {"step": step, "files": seal(staging, files_in(staging))})


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, or a store that is no disk, as s3:// is none."""
    (tmp_path / "there").mkdir()
    return str(tmp_path / "there") if request.param == "folder" else f"memory://{tmp_path.name}"


def test_the_newest_checkpoints_are_there_and_come_back_as_they_were(place: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    mirror = Mirror(place, "a")
    assert mirror.records() == []
    for step in (2, 4, 6):
        mirror.put_checkpoint(checkpoint(run, step), 2, run / "metrics.jsonl")
    assert [record["step"] for record in mirror.records()] == [6, 4]
    back = tmp_path / "runs" / "b"
    fetched = mirror.fetch(6, back)
    assert fetched == back / "checkpoints" / "checkpoint-6"
    assert problems_of(fetched, hashed=True) == []
    assert files_in(fetched) == files_in(run / "checkpoints" / "checkpoint-6")
    assert (back / "metrics.jsonl").read_text() == '{"step": 6}\n'
    assert not list((back / "checkpoints" / PART).iterdir())
    (fetched / "weights").write_bytes(b"damaged")
    assert problems_of(mirror.fetch(6, back), hashed=True) == []  # in place of the damaged one
    assert len(list((tmp_path / "runs" / ".trash").iterdir())) == 1


def test_half_of_a_copy_is_none_and_makes_room_for_the_next(place: str, tmp_path: Path) -> None:
    run = tmp_path / "a"
    mirror = Mirror(place, "a")
    mirror.put_checkpoint(checkpoint(run, 2), 2)
    store, half = mirror.store, f"{mirror.root}/checkpoints/checkpoint-4"
    store.makedirs(half, exist_ok=True)
    store.pipe_file(f"{half}/weights", b"half")  # interrupted here: no record yet
    assert [record["step"] for record in mirror.records()] == [2]
    written = (run / "checkpoints" / "checkpoint-2" / RECORD).read_bytes()
    for damaged in (written[:-20], written.replace(b'"step": 2', b'"step": 4')):  # half a record, somebody else's
        store.pipe_file(f"{half}/{RECORD}", damaged)
        assert [record["step"] for record in mirror.records()] == [2]
    with pytest.raises(StorageError, match="has no whole checkpoint-4"):
        mirror.fetch(4, tmp_path / "b")
    mirror.put_checkpoint(checkpoint(run, 6), 2)
    assert [record["step"] for record in mirror.records()] == [6, 2]
    assert not store.exists(half)


def test_what_was_damaged_there_is_not_taken(place: str, tmp_path: Path) -> None:
    run = tmp_path / "a"
    mirror = Mirror(place, "a")
    mirror.put_checkpoint(checkpoint(run, 2), 2)
    mirror.store.pipe_file(f"{mirror.root}/checkpoints/checkpoint-2/weights", bytes(10_000))
    with pytest.raises(StorageError, match="checkpoint-2 is damaged: weights has other content than was written"):
        mirror.fetch(2, tmp_path / "b")
    assert not (tmp_path / "b" / "checkpoints" / "checkpoint-2").exists()


def test_the_result_has_a_record_and_an_earlier_run_moves_aside(place: str, tmp_path: Path) -> None:
    run = tmp_path / "a"
    (run / "final").mkdir(parents=True)
    (run / "final" / "adapter").write_bytes(b"weights")
    (run / "config.yaml").write_text("a: 1\n")
    mirror = Mirror(place, "a")
    mirror.put_result(run, ["config.yaml"])
    record = json.loads(mirror.store.cat_file(f"{mirror.root}/final/{RESULT_RECORD}"))
    assert record["files"]["adapter"]["size"] == 7
    assert mirror.store.cat_file(f"{mirror.root}/config.yaml") == b"a: 1\n"
    mirror.set_aside("20260101-000000")
    assert not mirror.store.exists(mirror.root)
    assert mirror.store.cat_file(f"{mirror.parent}/.trash/20260101-000000-a/final/adapter") == b"weights"


def test_a_disk_that_is_not_mounted_any_more_gets_no_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "disk" / "mirror").mkdir(parents=True)
    mirror = Mirror(str(tmp_path / "disk" / "mirror"), "a")
    (tmp_path / "disk" / "mirror").rmdir()
    with pytest.raises(StorageError, match="mirror is not there"):
        mirror.put_checkpoint(checkpoint(tmp_path / "a", 2), 2)
    with pytest.raises(StorageError, match="mirror is not there"):
        mirror.records()
    assert not (tmp_path / "disk" / "mirror").exists()


class Shortening(fsspec.AbstractFileSystem):
    """A store that loses the end of what it is sent, and says nothing."""

    protocol = "shortening"

    def exists(self, path: str, **kwargs: Any) -> bool:
        return False

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        pass

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": 9_999, "type": "file"}


def test_what_does_not_arrive_is_told(tmp_path: Path) -> None:
    fsspec.register_implementation("shortening", Shortening, clobber=True)
    with pytest.raises(StorageError, match=r"The mirror shortening://x/a failed: OSError: .* has 9,999 bytes there"):
        Mirror("shortening://x", "a").put_checkpoint(checkpoint(tmp_path, 2), 2)


@pytest.mark.parametrize(("location", "told"), [("nope://x", "Protocol not known: nope"), ("s3://x", "needs s3fs")])
def test_a_place_that_nobody_can_reach_is_refused(location: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Mirror(location, "a")
