"""Files are replaced whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tunewright.files import write_json, write_text, written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert names(tmp_path) == ["a.json"]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "before")

    def fail(path: Path) -> None:
        with written_aside(path) as staging:
            staging.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with written_aside(tmp_path / "model") as staging:
        staging.mkdir()
        (staging / "weights").write_bytes(b"1")
        assert not (tmp_path / "model").exists()
    assert names(tmp_path) == ["model"]

    def stop(path: Path) -> None:
        with written_aside(path) as staging:
            staging.mkdir()
            (staging / "weights").write_bytes(b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path / "other")
    assert names(tmp_path) == ["model"]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "page.html", "half of a pair: \ud83d")
    assert (tmp_path / "page.html").read_text() == "half of a pair: ?"
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert len(modes) == 1
