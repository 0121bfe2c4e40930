"""Full and read-only disks: told as such, with what was needed and what stands, and gone on from once there is room.

The disks are real ones of a few megabytes, in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tunewright.config.compose import compose_config
from tunewright.deliver.merge_folder import new_folder
from tunewright.errors import StorageError
from tunewright.launch.prepare import ensure_prepared
from tunewright.launch.train import plan_job
from tunewright.plan.devices import find_devices
from tunewright.trainer.prepared import prepare

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk of a few megabytes")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a disk of so many megabytes."""
    mounted: list[Path] = []

    def mount(megabytes: float, name: str = "disk") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        options = f"size={int(megabytes * 2**20)}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def read_only(folder: Path) -> Path:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    return folder


def quick(model: Path) -> list[str]:
    few = ["train.max_steps=6", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
    return ["model=folder", f"model.path={model}", *few, "train.save_steps=2", "data.eval_names=[]"]


# The cache


def test_a_cache_that_cannot_be_written_is_used_as_far_as_it_goes(
    disk: Callable[..., Path], tunewright: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    shared, runs = disk(8), tmp_path / "runs"
    asked = [*quick(small_model), f"output_root={runs}", f"data.cache_dir={shared}"]
    read_only(shared)

    config = compose_config(asked)
    with pytest.raises(
        StorageError, match=rf"The cache cannot be written to {shared}: Read-only file system .*Make ro"
    ):
        prepare(config, lambda line: None)
    job = plan_job(config, find_devices())
    told = f"`data.cache_dir` {shared} cannot be written (Read-only file system) and does not hold all"
    assert [line[: len(told)] for line in job.decided] == [told]
    assert ensure_prepared(job.config).cache.train[0].folder.is_relative_to(runs / ".cache")

    subprocess.run(["mount", "-o", "remount,rw", shared], check=True)
    shutil.copytree(runs / ".cache", shared, dirs_exist_ok=True)
    read_only(shared)
    job = plan_job(compose_config(asked), find_devices())
    assert job.decided == []  # all is there
    assert ensure_prepared(job.config).cache.train[0].folder.is_relative_to(shared)

    done = tunewright("data", "check", *asked, "data.cutoff_len=500")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "StorageError: The cache cannot be written" in done.stderr


def test_a_disk_that_is_full_of_tokens_is_told_with_what_they_need(
    disk: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": f"Say {number} {'again ' * 50}", "output": "Yes."} for number in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = disk(2)
    config = compose_config(
        [*quick(small_model), "data=registry", f"data.names=[{tmp_path}/rows.jsonl]", f"data.cache_dir={place}"]
    )
    with pytest.raises(StorageError) as told:
        prepare(config, lambda line: None)
    assert re.search(r"The tokens of .* No space left on device\. About 2\d\.\d MiB are needed", str(told.value))
    assert not [path for path in place.rglob("*") if path.suffix == ".arrow"]  # half of them would fill it for nothing


# What a finished run becomes


def test_a_disk_that_fills_while_a_model_is_merged(disk: Callable[..., Path]) -> None:
    place = disk(1)
    with (
        pytest.raises(StorageError, match=r"The merged model cannot be written to .*No space left.* use --out on "),
        new_folder(place / "merged", place, print) as staging,
    ):
        save_file({"weights": torch.zeros(10**6)}, staging / "model.safetensors")
    assert list(place.iterdir()) == []
