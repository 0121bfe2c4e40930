"""A run that continues is made from the same model, data and batch; what decides is content, not names and places."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from tests.conftest import REPOSITORY, write_checkpoint
from tunewright.claims import claim, prepare_folder
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import check
from tunewright.run_folder import RunDir
from tunewright.trainer.inputs import check_base, planned_inputs, prepared_inputs
from tunewright.trainer.prepared import prepare

ROWS = [{"instruction": f"Say the number {n}", "input": "", "output": f"It is number {n}."} for n in range(64)]
MORE = [{"instruction": f"New {n}", "input": "", "output": f"Other {n}."} for n in range(64)]


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def inputs(config: DictConfig) -> dict[str, str]:
    return {**planned_inputs(check(config, find_devices())), **prepared_inputs(config, prepare(config))}


def config_of(model: Path, file: Path, *more: str) -> DictConfig:
    return compose_config(["model=folder", f"model.path={model}", "data=registry", f"data.names=[{file}]", *more])


def test_where_things_lie_and_how_they_are_written_is_no_difference(small_model: Path, tmp_path: Path) -> None:
    before = inputs(config_of(small_model, write(tmp_path / "rows.jsonl", ROWS), "data.eval_size=8"))
    moved = shutil.copytree(small_model, tmp_path / "moved")
    (moved / "notes.txt").write_text("mine")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=2))
    workers = ["data.workers=1", f"data.cache_dir={tmp_path / 'cache'}"]
    assert inputs(config_of(moved, tmp_path / "rows.json", "data.eval_size=8", *workers)) == before
    assert list(before) == ["batch", "model", "training data", "held-out data"]
    assert before["training data"].startswith("56 examples of ")


def test_each_of_model_data_and_batch_is_noticed(small_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)

    def differ(model: Path, *more: str) -> list[str]:
        now = inputs(config_of(model, file, "data.eval_size=8", *more))
        return [key for key in before if now[key] != before[key]]

    before = inputs(config_of(small_model, file, "data.eval_size=8"))
    other = shutil.copytree(small_model, tmp_path / "other")
    weights = {
        key: tensor + torch.randn_like(tensor) * 1e-3 for key, tensor in load_file(other / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert differ(other) == ["model"]
    accumulated = ["train.global_batch_size=null", "train.gradient_accumulation_steps=2"]
    assert differ(small_model, *accumulated) == ["batch"]
    assert differ(small_model, "model.template=chatml", "data.train_on_prompt=true") == [
        "training data",
        "held-out data",
    ]
    (small := ROWS[:]).insert(7, small.pop(3))
    write(file, small)
    assert differ(small_model) == ["training data", "held-out data"]
    write(file, [*ROWS, *MORE])
    assert differ(small_model) == ["training data", "held-out data"]


def test_ranks_and_strategy_may_change() -> None:
    """What that does to a checkpoint is the conversion's business."""

    def planned(strategy: str, ranks: int) -> dict[str, str]:
        config = compose_config([f"strategy={strategy}", f"cluster.num_processes={ranks}"])
        return planned_inputs(check(config, find_devices()))

    assert planned("ddp", 2) == planned("ddp", 4) == planned("zero2", 2) == planned("zero3", 1)


def begun(config: DictConfig, status: str) -> RunDir:
    """A run as one that trained for a while leaves it."""
    claimed = claim(config)
    prepare_folder(config, claimed, inputs(config))
    write_checkpoint(claimed.run, 6, 0.4)
    claimed.run.update_manifest(status=status)
    return claimed.run


@pytest.mark.parametrize("status", ["stopped", "done"])
def test_a_changed_data_file_is_refused_before_any_rank_starts(
    status: str, tunewright: Callable[..., subprocess.CompletedProcess[str]], small_model: Path, tmp_path: Path
) -> None:
    """The schedule would jump back and the learning rate up, or a finished run pass for one on the new data."""
    file = write(tmp_path / "rows.jsonl", ROWS)
    settings = ["model=folder", f"model.path={small_model}", "data=registry", f"data.names=[{file}]"]
    settings += [f"output_root={tmp_path}", "name=a", "train.epochs=4", "train.global_batch_size=4"]
    run = begun(compose_config(settings), status)
    write(file, [*ROWS, *MORE])
    done = tunewright("train", *settings, "resume=auto")
    assert done.returncode == 2
    assert "training data: there 64 examples of " in done.stderr
    assert ", now 128 examples of " in done.stderr
    assert "Continuing" not in done.stdout
    assert run.read_manifest()["status"] == status
    assert run.last_checkpoint()


def test_an_adapter_is_not_merged_into_another_base(small_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(small_model, tmp_path / "model")
    run = begun(config_of(model, write(tmp_path / "rows.jsonl", ROWS), f"output_root={tmp_path}", "name=a"), "done")
    check_base(run, small_model)
    (model / "config.json").write_text((model / "config.json").read_text().replace("1e-06", "1e-05"))
    with pytest.raises(ConfigError, match="was trained on another model"):
        check_base(run, model)


def test_a_finished_run_is_left_alone_by_accelerate_launch_too(tmp_path: Path) -> None:
    config = compose_config([f"output_root={tmp_path}", "name=a", "strategy=ddp", "cluster.num_processes=2"])
    run = begun(config, "done")
    run.final.mkdir()
    launch = [
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "tunewright.launch.rank",
    ]
    command = [sys.executable, "-m", *launch, f"output_root={tmp_path}", "name=a", "resume=auto"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{run.path} is finished already; nothing to do.\n")
    assert run.final.is_dir()
