"""A run folder is never mixed up: refused, continued or moved away, as the user says, and never deleted."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.conftest import write_checkpoint
from tunewright.claims import Claim, check_inputs, claim, prepare_folder, sole_user
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, StorageError
from tunewright.files import write_json
from tunewright.launch.train import sweep_jobs
from tunewright.run_folder import RunDir, settings_of


@cache
def composed(*overrides: str) -> DictConfig:
    return compose_config(["name=run", *overrides])


def config_in(root: Path, *overrides: str) -> DictConfig:
    config = copy.deepcopy(composed(*overrides))
    config.output_root = str(root)
    return config


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


@pytest.mark.parametrize("change", ["method.r=8", "method=full", "train.learning_rate=1e-5"])
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
        folder = write_checkpoint(run, step)
        if not whole:
            (folder / "checkpoint.json").unlink()
    assert claim(config_in(tmp_path, "resume=auto")).checkpoint == run.checkpoints / "checkpoint-10"


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    begun(tmp_path).update_manifest(status="done")
    assert claim(config_in(tmp_path, "resume=auto")).finished


def test_resume_must_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume=must"):
        claim(config_in(tmp_path, "resume=must"))


def test_overwrite_moves_what_the_run_made_and_contradicts_resume(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run.path / "thesis.tex").write_text("mine")
    (run.final).mkdir()
    (run.final / "model.safetensors").write_text("weights")
    (run.logs / "rank0.log").write_text("said")
    begun(tmp_path, "overwrite=true")
    assert (run.path / "thesis.tex").read_text() == "mine"
    assert not run.final.exists()
    assert not list(run.logs.iterdir())
    (trashed,) = (tmp_path / ".trash").iterdir()
    assert trashed.name.endswith("-run")
    assert (trashed / "final" / "model.safetensors").read_text() == "weights"
    assert (trashed / "logs" / "rank0.log").read_text() == "said"
    assert RunDir(trashed).read_manifest()["status"] == "running"
    begun(tmp_path, "overwrite=true")
    assert len(list((tmp_path / ".trash").iterdir())) == 2
    with pytest.raises(ConfigError, match="contradict"):
        claim(config_in(tmp_path, "overwrite=true", "resume=auto"))


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/b", "/abs", ".hidden", "a\\b", "a\nb", "x" * 201])
@pytest.mark.parametrize("how", [[], ["overwrite=true"], ["resume=auto"]])
def test_a_name_is_one_plain_part_of_a_path(tmp_path: Path, name: str, how: list[str]) -> None:
    config = config_in(tmp_path, *how)
    config.name = name
    with pytest.raises(ConfigError, match="`name` is"):
        claim(config)


def test_runs_of_a_sweep_get_plain_names_of_their_own(tmp_path: Path) -> None:
    varied = ["train.learning_rate=0.1,1.1", "model.path=/models/a.b,/models/c", "data.names=[x/y],[z]"]
    configs = sweep_jobs(["name=run", f"output_root={tmp_path}", "data=registry", *varied], None, multirun=True)
    assert configs[0].name == "run-learning_rate=0.1-path=_models_a.b-names=_x_y_"
    assert len({claim(config).run.path for config in configs}) == 8


def test_an_empty_output_root_is_not_the_working_directory(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.output_root = ""
    with pytest.raises(ConfigError, match="`output_root` is empty"):
        claim(config)


FOREIGN = {
    "a thesis": {"thesis.tex": "mine"},
    "with a config.yaml": {"thesis.tex": "mine", "config.yaml": "a: 1"},
    "a manifest of something else": {"thesis.tex": "mine", "manifest.json": '{"name": "an extension", "version": 2}'},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("how", [[], ["overwrite=true"], ["resume=auto"], ["resume=must"]])
def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, files: dict[str, str], how: list[str]) -> None:
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ConfigError, match="holds no tunewright run"):
        claim(config_in(tmp_path, *how))
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == files


@pytest.mark.parametrize("how", [[], ["overwrite=true"], ["resume=auto"]])
def test_a_finished_run_that_lost_its_manifest_is_not_trained_anew(tmp_path: Path, how: list[str]) -> None:
    run = begun(tmp_path)
    run.final.mkdir()
    run.manifest.unlink()
    with pytest.raises(ConfigError, match=r"no manifest\.json of one"):
        claim(config_in(tmp_path, *how))


def test_resuming_without_a_checkpoint_keeps_the_logs_and_moves_the_rest(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run.logs / "rank0.log").write_text("out of memory")
    begun(tmp_path, "resume=auto")
    assert not (tmp_path / ".trash").exists(), "there is nothing but logs"
    run.metrics.write_text('{"step": 1}\n')
    half = run.checkpoints / ".part" / "checkpoint-5"
    half.mkdir(parents=True)
    begun(tmp_path, "resume=auto")
    assert (run.logs / "rank0.log").read_text() == "out of memory"
    assert not run.metrics.exists()
    (trashed,) = (tmp_path / ".trash").iterdir()
    assert (trashed / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (trashed / "checkpoints" / ".part" / "checkpoint-5").is_dir()


def test_results_of_an_earlier_end_do_not_stay_beside_a_run_that_goes_on(tmp_path: Path) -> None:
    run = begun(tmp_path, "train.max_steps=10")
    write_checkpoint(run, 10)
    run.update_manifest(status="done", steps=10, epochs=1.0)
    for name in ("final", "merged", "tensorboard"):
        (run.path / name).mkdir()
    run.evaluation.write_text("{}")
    begun(tmp_path, "train.max_steps=20", "resume=auto")
    (trashed,) = (tmp_path / ".trash").iterdir()
    assert sorted(path.name for path in trashed.iterdir()) == ["evaluation.json", "final", "merged"]
    assert run.last_checkpoint() is not None


# How long a run is may change


@pytest.mark.parametrize(
    ("before", "now", "becomes"),
    [
        ("train.max_steps=10", "train.max_steps=20", "continued"),
        ("train.max_steps=10", "train.max_steps=10", "finished"),
        ("train.max_steps=10", "train.max_steps=5", "finished"),
        ("train.epochs=1", "train.epochs=2", "continued"),
        ("train.epochs=1", "train.max_steps=20", "continued"),
        ("train.max_steps=10", "train.epochs=0.5", "finished"),
    ],
)
def test_a_finished_run_goes_on_when_it_is_asked_for_more(tmp_path: Path, before: str, now: str, becomes: str) -> None:
    run = begun(tmp_path, before)
    newest = write_checkpoint(run, 10)
    run.update_manifest(status="done", steps=10, epochs=1.0)
    claimed = claim(config_in(tmp_path, now, "resume=auto"))
    assert (claimed.finished, claimed.checkpoint) == ((True, None) if becomes == "finished" else (False, newest))
    told = [text for text in claimed.remarks if "the learning rate goes on where a run of the new length" in text]
    assert len(told) == (becomes == "continued")


def test_more_of_a_finished_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    begun(tmp_path, "train.max_steps=10").update_manifest(status="done", steps=10, epochs=1.0)
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        claim(config_in(tmp_path, "train.max_steps=20", "resume=auto"))


@pytest.mark.parametrize("shorter", ["train.max_steps=9", "train.epochs=0.9"])
def test_less_than_the_checkpoint_has_behind_it_is_refused(tmp_path: Path, shorter: str) -> None:
    write_checkpoint(begun(tmp_path), 10)
    with pytest.raises(ConfigError, match="behind it"):
        claim(config_in(tmp_path, shorter, "resume=auto"))


# What a run was made from


MADE_FROM = {"model": "1 file of 2.0 MB, abc", "training data": "64 examples, def"}


def test_another_model_or_other_data_is_another_run(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    prepare_folder(config, claim(config), MADE_FROM)
    write_checkpoint(RunDir(tmp_path / "run"), 5)
    claimed = claim(config_in(tmp_path, "resume=auto"))
    check_inputs(claimed, MADE_FROM)
    with pytest.raises(ConfigError, match="made from something else") as caught:
        check_inputs(claimed, {**MADE_FROM, "training data": "128 examples, ghi"})
    assert "  training data: there 64 examples, def, now 128 examples, ghi\n" in str(caught.value)
    assert "model: " not in str(caught.value)


def test_what_a_model_is_called_counts_only_where_its_digest_is_not_known(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    prepare_folder(config, claim(config), MADE_FROM)
    moved = ["model.name=other", "model.revision=abc", "resume=auto"]
    assert claim(config_in(tmp_path, *moved)).run
    manifest = RunDir(tmp_path / "run").read_manifest()
    del manifest["inputs"]
    write_json(RunDir(tmp_path / "run").manifest, manifest)
    with pytest.raises(ConfigError, match=r"model\.name: there 'tiny', now 'other'"):
        claim(config_in(tmp_path, *moved))


def test_a_setting_that_was_not_there_yet_had_its_default(tmp_path: Path) -> None:
    run = begun(tmp_path)
    manifest = run.read_manifest()
    for key in ("data.compat", "train.group_by_length"):
        del manifest["identity"][key]
    del manifest["files"]
    write_json(run.manifest, manifest)
    assert claim(config_in(tmp_path, "resume=auto")).run
    with pytest.raises(ConfigError, match=r"train\.group_by_length: there False, now True"):
        claim(config_in(tmp_path, "resume=auto", "train.group_by_length=true"))


# One process at a time


HOLD = """
import sys
from tunewright.config.compose import compose_config
from tunewright.claims import claim, prepare_folder, sole_user
config = compose_config(sys.argv[1:])
claimed = claim(config)
with sole_user(config, claimed):
    prepare_folder(config, claimed)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_trains_is_left_alone_until_its_process_is_gone(tmp_path: Path) -> None:
    settings = [f"output_root={tmp_path}", "name=run"]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, *settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    try:
        for how in ([], ["resume=auto"], ["overwrite=true"]):
            with pytest.raises(ConfigError, match="is in use") as caught:
                claim(config_in(tmp_path, *how))
            assert f"process {holder.pid} on {socket.gethostname()} since 20" in str(caught.value)
        begun_before = config_in(tmp_path, "resume=auto")
        with pytest.raises(ConfigError, match="is in use"), sole_user(begun_before, claim(begun_before, held=True)):
            raise AssertionError
    finally:
        holder.kill()
        holder.communicate()
    claimed = claim(begun_before)
    with sole_user(begun_before, claimed):
        pass


def test_a_folder_that_another_process_used_meanwhile_is_looked_at_anew(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    claimed = claim(config)
    begun(tmp_path)
    with pytest.raises(ConfigError, match="holds this run already"), sole_user(config, claimed):
        raise AssertionError


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


def test_a_runs_relative_paths_are_those_of_the_folder_where_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(there)
    overrides = ["data.dir=mine", "data.cache_dir=cache", "model=folder", "model.path=models/base"]
    run = begun(there / "runs", *overrides)
    assert settings_of(run).data.root is None
    monkeypatch.chdir(elsewhere)
    config = settings_of(run)
    assert (config.data.root, config.data.dir) == (str(there), "mine")
    assert config.model.path == str(there / "models" / "base")
    assert config.data.cache_dir == str(there / "cache")
    there.rename(tmp_path / "moved")  # with its runs
    assert settings_of(RunDir(tmp_path / "moved" / "runs" / "run")).model.path == "models/base"
