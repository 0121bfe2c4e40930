"""A run folder is never mixed up: refused, continued or thrown away, as the user says."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from launch.compose import compose_config
from launch.errors import ConfigError, StorageError
from launch.rundir import Claim, RunDir, claim, prepare_folder, write_json


def config_in(root: Path, *overrides: str) -> DictConfig:
    return compose_config([f"output_root={root}", "name=run", *overrides])


def begun(root: Path, *overrides: str) -> RunDir:
    config = config_in(root, *overrides)
    claimed = claim(config)
    prepare_folder(config, claimed)
    return claimed.run


def test_a_new_folder_is_claimed_and_described(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert run.read_manifest()["status"] == "running"
    assert OmegaConf.load(run.config).model.name == "tiny"


def test_a_folder_with_the_same_run_is_refused_until_told_what_to_do(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError, match=r"resume=auto to continue it, overwrite=true to start anew"):
        claim(config_in(tmp_path))


@pytest.mark.parametrize("change", ["method.r=8", "method=full", "strategy=zero2", "train.learning_rate=1e-5"])
@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_folder_with_another_run_is_refused_with_what_differs(tmp_path: Path, change: str, resume: str) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError, match="holds another run") as caught:
        claim(config_in(tmp_path, change, f"resume={resume}"))
    assert change.partition("=")[0] in str(caught.value)


def test_settings_of_operation_do_not_make_another_run(tmp_path: Path) -> None:
    begun(tmp_path)
    claimed = claim(config_in(tmp_path, "resume=auto", "train.logging_steps=1", "train.save_steps=3"))
    assert not claimed.finished


def test_resume_continues_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for step, whole in ((5, True), (10, True), (15, False)):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert claim(config_in(tmp_path, "resume=auto")).checkpoint == run.checkpoints / "checkpoint-10"


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    begun(tmp_path).update_manifest(status="done")
    assert claim(config_in(tmp_path, "resume=auto")).finished


def test_resume_must_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume=must"):
        claim(config_in(tmp_path, "resume=must"))


def test_overwrite_starts_anew_and_contradicts_resume(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run.path / "old.txt").write_text("old")
    begun(tmp_path, "overwrite=true")
    assert not (run.path / "old.txt").exists()
    with pytest.raises(ConfigError, match="contradict"):
        claim(config_in(tmp_path, "overwrite=true", "resume=auto"))


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no tunewright run"):
        claim(config_in(tmp_path))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = compose_config([f"output_root={tmp_path / 'file'}", "name=run"])
    with pytest.raises(StorageError, match="Cannot read"):
        claim(config)
    with pytest.raises(StorageError, match="Cannot write"):
        prepare_folder(config, Claim(RunDir(tmp_path / "file" / "run")))


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.manifest.write_text('{"status": ')
    with pytest.raises(StorageError, match="damaged"):
        claim(config_in(tmp_path))


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
