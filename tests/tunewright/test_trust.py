"""Run folders from elsewhere are opened when the user says so, and one's own open by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_checkpoint
from tunewright.claims import Claim, claim, prepare_folder
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.run_folder import RunDir
from tunewright.trust import check_code, check_ours, installation_key, is_ours, key_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, as a fresh installation has."""
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def begun(root: Path) -> RunDir:
    run = RunDir(root / "run")
    prepare_folder(compose_config([f"output_root={root}", "name=run"]), Claim(run))
    write_checkpoint(run, 1, 0.1)
    return run


def resumed(root: Path, *overrides: str) -> Claim:
    return claim(compose_config([f"output_root={root}", "name=run", "resume=auto", *overrides]))


def test_the_key_is_made_once_and_is_its_users_alone(cache: Path) -> None:
    key = installation_key()
    assert key is not None
    assert installation_key() == key
    assert key_file().stat().st_mode & 0o777 == 0o600
    assert [path.name for path in cache.iterdir()] == [key_file().name]
    key_file().chmod(0o640)
    assert installation_key() is None  # somebody else may have read it


def test_ones_own_run_is_continued(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert is_ours(run.config, run.read_manifest())
    assert resumed(tmp_path).checkpoint is not None


def test_a_run_that_moved_is_still_ones_own(tmp_path: Path) -> None:
    run = begun(tmp_path)
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    assert is_ours(moved.config, moved.read_manifest())


@pytest.mark.parametrize("change", ["config", "folder", "no signature", "other installation", "no key"])
def test_a_run_from_elsewhere_has_to_be_trusted(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path)
    if change == "config":
        text = run.config.read_text(encoding="utf-8")
        run.config.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"), encoding="utf-8")
    elif change == "folder":  # which decides what a relative path means
        run.update_manifest(folder="/somewhere/else")
    elif change == "no signature":
        run.update_manifest(signature=None)
    elif change == "other installation":
        monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "other"))
    else:
        key_file().unlink()
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"was not made by you with this installation.* trust=true if you trust"):
        resumed(tmp_path)
    assert resumed(tmp_path, "trust=true").checkpoint is not None
    with pytest.raises(ConfigError, match="--trust"):
        check_ours(run.config, run.read_manifest(), trusted=False, how="--trust")
    check_ours(run.config, run.read_manifest(), trusted=True, how="--trust")


def test_a_cache_that_cannot_be_written_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "file"))
    assert begun(tmp_path).read_manifest()["signature"] is None


def test_code_of_a_model_is_asked_for_each_time() -> None:
    check_code(False, "org/name", trusted=False)
    check_code(True, "org/name", trusted=True)
    with pytest.raises(ConfigError, match=r"\(org/name\) brings Python code.* Write --trust with each command"):
        check_code(True, "org/name", trusted=False)


@pytest.mark.parametrize(
    ("text", "key"), [("model: {trust_remote_code: true}", "model.trust_remote_code"), ("trust: true", "trust")]
)
def test_a_file_of_settings_does_not_trust_for_the_user(text: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"`{key}` is true"):
        compose_config(["experiment=theirs"], tmp_path)
    assert compose_config(["experiment=theirs", f"{key}=true"], tmp_path)
    assert compose_config(["model={trust_remote_code: true}"]).model.trust_remote_code
