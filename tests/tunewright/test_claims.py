"""From where a run goes on: decided from what is written down, and never from something damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from tests.conftest import write_checkpoint
from tunewright.checkpoints import problems_of, rotate
from tunewright.claims import check_inputs, claim, prepare_folder, sole_user
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, StorageError
from tunewright.run_folder import RunDir

INPUTS = {"model": "1 file, abc", "training data": "64 examples, def", "batch": "16 rows a step"}


def config_in(root: Path, *overrides: str) -> DictConfig:
    return compose_config([f"output_root={root}", "name=run", *overrides])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was stopped after step 20, with two checkpoints."""
    config = config_in(tmp_path)
    prepare_folder(config, claim(config), INPUTS)
    run = RunDir(tmp_path / "run")
    for step in (10, 20):
        write_checkpoint(run, step)
    run.update_manifest(status="stopped")
    return run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 3)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "trainer_state.json has other content than was written": lambda path: flip(path / "trainer_state.json"),
    "trainer_state.json has 30 bytes, 33 were written": lambda path: truncate(path / "trainer_state.json"),
    "trainer_state.json cannot be read (No such file or directory)": lambda path: (
        path / "trainer_state.json"
    ).unlink(),
    "checkpoint.json is not as it was written": lambda path: (path / "checkpoint.json").write_text('{"step": 20}'),
    "checkpoint.json cannot be read": lambda path: truncate(path / "checkpoint.json"),
    "it has no checkpoint.json, which is written last": lambda path: (path / "checkpoint.json").unlink(),
}


@pytest.mark.parametrize("told", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(told: str, run: RunDir, tmp_path: Path) -> None:
    DAMAGE[told](run.checkpoints / "checkpoint-20")
    config = config_in(tmp_path, "resume=auto")
    with sole_user(config, claim(config)) as found:
        assert found.checkpoint == run.checkpoints / "checkpoint-10"
        (remark,) = found.remarks
        assert remark.startswith(f"checkpoint-20 is damaged: {told}")
        assert remark.endswith(f"{run.path} falls back to checkpoint-10.")
        aside = prepare_folder(config, found, INPUTS)
    assert aside
    assert (aside / "checkpoint-20").is_dir(), "nothing is deleted, and nothing is in the way of step 20"
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-10"]


def test_junk_that_is_called_like_a_checkpoint_is_no_checkpoint(run: RunDir, tmp_path: Path) -> None:
    (run.checkpoints / "checkpoint-999").mkdir()
    shutil.copytree(run.checkpoints / "checkpoint-10", run.checkpoints / "checkpoint-30")
    (run.checkpoints / "checkpoint-final").mkdir()
    claimed = claim(config_in(tmp_path, "resume=auto"))
    assert claimed.checkpoint == run.checkpoints / "checkpoint-20"
    assert [one.problems for one in claimed.damaged] == [
        ("it has no checkpoint.json, which is written last",),
        ("it was written at step 10",),
    ]


def test_with_nothing_whole_left_nothing_is_wiped(run: RunDir, tmp_path: Path) -> None:
    for step in (10, 20):
        (run.checkpoints / f"checkpoint-{step}" / "trainer_state.json").unlink()
    before = sorted(run.path.rglob("*"))
    with pytest.raises(StorageError, match="none of them is whole") as caught:
        claim(config_in(tmp_path, "resume=auto"))
    assert "checkpoint-10 is damaged: trainer_state.json" in str(caught.value)
    assert sorted(run.path.rglob("*")) == before


LOST: dict[str, Callable[[RunDir], object]] = {
    "manifest.json was missing": lambda run: run.manifest.unlink(),
    "manifest.json was damaged": lambda run: truncate(run.manifest),
    "config.yaml was missing": lambda run: run.config.unlink(),
    "manifest.json was missing and config.yaml was missing": lambda run: (run.manifest.unlink(), run.config.unlink()),
}


@pytest.mark.parametrize("told", LOST)
def test_what_is_lost_of_a_run_is_rebuilt_from_its_checkpoint(told: str, run: RunDir, tmp_path: Path) -> None:
    manifest, text = run.read_manifest(), run.config.read_text()
    if "damaged" in told:
        run.manifest.write_text(run.manifest.read_text().rstrip().removesuffix("}"))
    else:
        LOST[told](run)
    with pytest.raises(ConfigError, match="holds this run already"):
        claim(config_in(tmp_path))
    with pytest.raises(ConfigError, match=r"method\.r: there 16, now 4"):
        claim(config_in(tmp_path, "method.r=4", "resume=auto"))
    config = config_in(tmp_path, "resume=auto")
    claimed = claim(config)
    assert claimed.checkpoint == run.checkpoints / "checkpoint-20"
    assert claimed.remarks == (f"{told}: rebuilt from checkpoint-20.",)
    with pytest.raises(ConfigError, match="made from something else"):
        check_inputs(claimed, {**INPUTS, "training data": "32 examples, ghi"})
    prepare_folder(config, claimed)
    assert {**manifest, "status": "running"}.keys() <= run.read_manifest().keys()
    assert run.read_manifest()["inputs"] == INPUTS
    assert run.config.read_text() == text.replace("resume: never", "resume: auto")


def test_a_damaged_manifest_with_no_checkpoint_is_refused_with_the_way_out(run: RunDir, tmp_path: Path) -> None:
    shutil.rmtree(run.checkpoints)
    truncate(run.manifest)
    run.manifest.write_text("{")
    with pytest.raises(StorageError, match=r"manifest\.json is damaged.*Move .* away, or choose another"):
        claim(config_in(tmp_path, "resume=auto"))


def test_what_differs_may_be_insisted_on_by_name(run: RunDir, tmp_path: Path) -> None:
    claimed = claim(config_in(tmp_path, "resume=auto"))
    now = {**INPUTS, "training data": "32 examples, ghi"}
    with pytest.raises(ConfigError, match=r"To go on nevertheless: resume_allow=\[data\]"):
        check_inputs(claimed, now)
    told = check_inputs(claimed, now, ["data"])
    assert told
    assert "  training data: there 64 examples, def, now 32 examples, ghi" in told
    with pytest.raises(ConfigError, match="model: there"):
        check_inputs(claimed, {**now, "model": "other"}, ["data"])
    other = claim(config_in(tmp_path, "resume=auto", "resume.allow=[train.learning_rate]", "train.learning_rate=1e-5"))
    assert "train.learning_rate: there 0.0002, now 1e-05" in other.remarks[-1]
    with pytest.raises(ConfigError, match=r"There is no setting `resume\.alow`"):
        config_in(tmp_path, "resume=auto", "resume.alow=[data]")
    with pytest.raises(ConfigError, match=r"`resume_allow` names 'dta'\. Did you mean 'data'\?"):
        claim(config_in(tmp_path, "resume_allow=[dta]"))


def test_rotation_keeps_two_the_best_and_what_is_no_checkpoint(run: RunDir) -> None:
    for step in (30, 40):
        write_checkpoint(run, step)
    (run.checkpoints / "checkpoint-5").mkdir()
    rotate(run.checkpoints, 1, ["checkpoint-10"])
    assert {path.name for path in run.checkpoints.glob("c*")} == {
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-30",
        "checkpoint-40",
    }
    assert not problems_of(run.checkpoints / "checkpoint-40", hashed=True)


def test_the_record_is_json_that_says_what_wrote_it(run: RunDir) -> None:
    record = json.loads((run.checkpoints / "checkpoint-20" / "checkpoint.json").read_text())
    assert record["files"]["trainer_state.json"]["size"] == 33
    assert record["run"]["manifest"]["inputs"] == INPUTS
