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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.conftest import losses
from tunewright.checkpoints import commit, files_in, seal
from tunewright.config.compose import compose_config
from tunewright.deliver.merge_folder import new_folder
from tunewright.errors import StorageError
from tunewright.launch.prepare import ensure_prepared
from tunewright.launch.train import plan_job
from tunewright.mirror import Mirror
from tunewright.plan.devices import find_devices
from tunewright.space import storing
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


# Each library in its own words


def through_a_tokenizer(folder: Path) -> None:
    Tokenizer(WordLevel({str(number): number for number in range(200_000)}, unk_token="0")).save(
        str(folder.joinpath("file"))
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: folder.joinpath("file").write_bytes(bytes(4 * 10**6)),
        lambda folder: torch.save({"weights": torch.zeros(10**6)}, folder.joinpath("file")),
        lambda folder: save_file({"weights": torch.zeros(10**6)}, folder.joinpath("file")),
        through_a_tokenizer,
    ],
    ids=["python", "torch", "safetensors", "tokenizers"],
)
def test_whatever_fails_for_want_of_room_is_told_as_that(
    write: Callable[[Path], Any], disk: Callable[..., Path]
) -> None:
    place = disk(1)
    told = r"The file cannot be written to .*: No space left on device.* About 3.8 MiB are needed, \d.\d MiB are free."
    with pytest.raises(StorageError, match=f"{told} Go."), storing(place, "The file", needed=4 * 10**6, advice=go):
        write(place)
    (place / "file").unlink(missing_ok=True)
    with pytest.raises(AttributeError), storing(place, "The file"):  # a bug stays one
        write(None)
    read_only(place)
    with pytest.raises(StorageError, match=r"The file cannot be written to .*: Read-only"), storing(place, "The file"):
        write(place)


def go() -> str:
    return "Go."


# A run

# The callback `fault`: at the beginning of a step, FAULT="fill STEP LEFT" fills the run's disk but for LEFT bytes, and
# FAULT="limit STEP RANK BYTES" lets files of that rank have no more than so many, as a quota that nobody sees before.
FAULT = """
import os
import resource
from pathlib import Path

def make():
    from transformers import TrainerCallback

    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kind, step, *numbers = os.environ.get("FAULT", "none -1").split()
            if state.global_step != int(step):
                return
            if kind == "limit" and args.process_index == int(numbers[0]):
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(numbers[1]), resource.RLIM_INFINITY))
            elif kind == "fill" and args.process_index == 0:
                disk = Path(args.output_dir).parents[1]
                free = os.statvfs(disk)
                with (disk / "filler").open("wb", buffering=0) as file:
                    file.write(bytes(free.f_bavail * free.f_frsize - int(numbers[0])))

    return Fault()

def register(plugins):
    plugins.add_callback("fault", make)
"""


@pytest.fixture
def faulty(
    disk: Callable[..., Path], tunewright: Callable[..., Any], small_model: Path, tmp_path: Path
) -> Callable[..., Any]:
    """Train a run on a small disk, with a fault; and return what the command came to, with room made again."""
    place = disk(80)
    (tmp_path / "disk_fault.py").write_text(FAULT)
    plugin = ["imports=[disk_fault]", "train.callbacks=[fault]"]

    def start(name: str, *overrides: str, fault: str = "none -1") -> Any:
        asked = [f"output_root={place}", f"name={name}", *quick(small_model), *plugin, "resume=auto", *overrides]
        done = tunewright("train", *asked, FAULT=fault, PYTHONPATH=str(tmp_path))
        (place / "filler").unlink(missing_ok=True)
        done.run = place / name
        return done

    return start


def refused(done: Any, *told: str) -> None:
    assert done.returncode == 4, done.stdout + done.stderr
    for part in told:
        assert re.search(part, done.stdout), f"{part}\n{done.stdout}"
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((done.run / "checkpoints").glob(".part/*"))  # what was half written takes no room


def test_a_run_goes_on_once_there_is_room_and_ends_in_the_same_bits(faulty: Callable[..., Any]) -> None:
    expected = faulty("expected")
    assert expected.returncode == 0, expected.stdout + expected.stderr

    # No room for the next page of metrics.jsonl, nor for the error's own file.
    long = faulty("long", "train.max_steps=60", "train.save_steps=50", fault="fill 3 0")
    refused(long, r"Rank 0 failed with StorageError: .*: No space left", r"0.0 MiB are free. There is no checkpoint")
    # Nor for the next checkpoint, by a limit that cannot be seen before.
    refused(
        faulty("a", fault="limit 3 0 100000"), r"A checkpoint cannot be written .*File too large.*checkpoint-2 stan"
    )
    # For the result.
    ended = faulty("a", "train.save_steps=5", "train.save_total_limit=3", fault="fill 5 900000")
    refused(ended, r"The result needs about 0.\d MiB in .*, where 0.\d MiB are free. checkpoint-6 stands")
    assert (ended.run / "checkpoints" / "checkpoint-5").is_dir()  # where this start's setting says, not the first one's
    shutil.rmtree(ended.run / "checkpoints" / "checkpoint-6")
    # For anything of it, before the first step.
    room = shutil.disk_usage(ended.run).free
    (ended.run.parent / "filler").write_bytes(bytes(room - 500_000))
    small = faulty("a", "train.save_steps=1")
    refused(
        small, r"What this run writes \(at a time \d checkpoint.* needs about 0.\d MiB .* or choose another `output_ro"
    )
    assert not re.search(r"step \d", small.stdout)

    done = faulty("a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(done.run) == losses(expected.run)
    for name in ("adapter_model.safetensors",):
        assert (done.run / "final" / name).read_bytes() == (expected.run / "final" / name).read_bytes()
    modes = {path.stat().st_mode & 0o777 for path in [*done.run.rglob("*.safetensors"), *done.run.rglob("*.json")]}
    assert modes == {0o666 & ~umask()}


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_one_rank_of_two_that_cannot_write_is_named(faulty: Callable[..., Any]) -> None:
    """Of a whole model, whose checkpoints are large; what they need was known before the first was written."""
    two = ["strategy=zero2", "cluster.num_processes=2", "method=full", "train.learning_rate=1e-5"]
    expected = faulty("expected", *two)
    assert expected.returncode == 0, expected.stdout + expected.stderr
    checkpoint = expected.run / "checkpoints" / "checkpoint-4"
    taken = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 2**20
    refused(
        faulty("a", *two, fault="limit 3 1 100000"),
        r"Rank 1 failed with StorageError: A checkpoint cannot be written .*: File too large.*checkpoint-2 stands",
    )
    full = faulty("a", *two, fault="fill 3 400000")
    refused(full, r"A checkpoint needs about \d+.\d MiB .* checkpoint-2 stands")
    assert float(re.search(r"needs about (\S+) MiB", full.stdout)[1]) == pytest.approx(taken, rel=0.1)
    done = faulty("a", *two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(done.run) == losses(expected.run)
    results = [(run / "final" / "model.safetensors").read_bytes() for run in (done.run, expected.run)]
    assert results[0] == results[1]


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


# The second place


def test_a_mirror_that_was_full_takes_the_next_checkpoint_once_there_is_room(
    disk: Callable[..., Path], tmp_path: Path
) -> None:
    place, mirrors = disk(1), tmp_path / "run" / "checkpoints"
    mirror = Mirror(str(place), "a")

    def committed(step: int) -> Path:
        staging = mirrors / ".part" / f"checkpoint-{step}"
        staging.mkdir(parents=True)
        for name in ("one", "two"):
            (staging / name).write_bytes(bytes(300_000))
        return commit(staging, {"step": step, "files": seal(staging, files_in(staging))})

    (place / "filler").write_bytes(bytes(600_000))
    with pytest.raises(StorageError, match=r"The mirror .*/a failed: OSError: .*No space left on device"):
        mirror.put_checkpoint(committed(2), 2)
    assert mirror.records() == []
    (place / "filler").unlink()
    mirror.put_checkpoint(committed(4), 2)  # there is none for both
    assert [record["step"] for record in mirror.records()] == [4]


# What a finished run becomes


def test_a_disk_that_fills_while_a_model_is_merged(disk: Callable[..., Path]) -> None:
    place = disk(1)
    with (
        pytest.raises(StorageError, match=r"The merged model cannot be written to .*No space left.* use --out on "),
        new_folder(place / "merged", place, print) as staging,
    ):
        save_file({"weights": torch.zeros(10**6)}, staging / "model.safetensors")
    assert list(place.iterdir()) == []
