"""Going on with other ranks: another number of them, another ZeRO stage, with ZeRO or without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, TIMEOUT, losses, manifest
from tunewright.checkpoints import files_in, hash_of
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, StorageError
from tunewright.plan.conversion import FOLDER, Layout, Way, layout_of, remark, way
from tunewright.trainer.universal import OPTIMIZER, convert, is_universal, read_universal

STEPS = 2


def quick(model: Path, steps: int = STEPS) -> list[str]:
    """Settings under which a run of any length is the beginning of a longer one, and nothing is random in a rank."""
    rows = ["data.max_samples=12", "data.eval_names=[]", "train.global_batch_size=4", "train.logging_steps=1"]
    # Weight decay tells groups of parameters apart.
    still = ["train.scheduler=constant", "train.weight_decay=0.1", "train.learning_rate=1e-3"]
    return ["model=folder", f"model.path={model}", *rows, *still, f"train.max_steps={steps}", "train.save_steps=2"]


# Which layouts fit each other


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (Layout(2, "zero2", 2), Layout(2, "zero2_offload", 2), Way.as_is),
        (Layout(2, "ddp", None), Layout(1, "single", None), Way.as_is),
        (Layout(1, "single", None), Layout(3, "ddp", None), Way.as_is),
        (Layout(2, "zero2", 2), Layout(1, "zero2", 2), Way.for_deepspeed),
        (Layout(1, "zero3", 3), Layout(2, "zero3_offload", 3), Way.for_deepspeed),
        (Layout(2, "zero1", 1), Layout(2, "zero2", 2), Way.for_deepspeed),
        (Layout(2, "ddp", None), Layout(2, "zero3", 3), Way.for_deepspeed),
        (Layout(2, "zero3", 3), Layout(2, "ddp", None), Way.for_torch),
    ],
)
def test_a_layout_fits_is_converted_or_not(before: Layout, now: Layout, expected: Way) -> None:
    assert way("checkpoint-4", before, now, compose_config()) is expected


@pytest.mark.parametrize(
    ("before", "now", "overrides", "reason"),
    [
        (Layout(2, "zero2", 2), Layout(1, "zero2", 2), ["train.optimizer=adafactor"], "not those of AdamW"),
        (Layout(8, "zeropp", 3), Layout(4, "zero3", 3), [], "second, quantised copy"),
        (Layout(2, "ddp", None), Layout(2, "zero2", 2), ["method=p_tuning"], "the network behind its tokens"),
        (Layout(2, "zero2", 2), Layout(1, "zero2", 2), ["train.keep_best=true"], "an earlier checkpoint"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_way_on(
    before: Layout, now: Layout, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        way("checkpoint-4", before, now, compose_config(overrides))
    assert str(caught.value).startswith(f"checkpoint-4 was written by {before} and cannot be converted for {now}: ")
    assert reason in str(caught.value)
    assert f"Go on with cluster.num_processes={before.ranks} strategy={before.strategy}, or" in str(caught.value)


def test_what_is_other_is_said() -> None:
    before, now = Layout(2, "zero2", 2), Layout(1, "zero2", 2)
    assert remark("checkpoint-4", before, now, Way.for_deepspeed, compose_config(["method.dropout=0.1"])) == (
        "checkpoint-4 was written by 2 ranks at ZeRO stage 2; it is converted for 1 rank at ZeRO stage 2. Dropout "
        "draws other numbers than it would have."
    )
    assert remark("checkpoint-4", before, before, Way.as_is, compose_config()) is None
    assert layout_of(compose_config(["strategy=zero3"]), 4) == Layout(4, "zero3", 3)


# States stay what they are


@pytest.mark.parametrize("overrides", [["method=full"], ["method=lora", "model.dtype=bfloat16"], ["method=freeze"]])
def test_every_state_is_converted_bit_for_bit_and_the_checkpoint_stays(
    overrides: list[str], train_here: Callable[..., Path], small_model: Path
) -> None:
    run = train_here(f"states-{'-'.join(overrides).replace('=', '-')}", *quick(small_model), *overrides)
    checkpoint = run / "checkpoints" / "checkpoint-2"
    before = {name: hash_of(checkpoint / name) for name in files_in(checkpoint)}
    folder = convert(checkpoint, Way.for_deepspeed, trusted=False)
    assert is_universal(folder)
    written = (folder / "converted.json").stat().st_mtime_ns
    saved, found = torch.load(checkpoint / OPTIMIZER), read_universal(folder)
    assert found["param_groups"] == saved["param_groups"]
    assert len(found["state"]) == len(saved["state"]) > 4
    for index, state in saved["state"].items():
        assert {key: (value.dtype, value.tolist()) for key, value in state.items()} == {
            key: (value.dtype, value.tolist()) for key, value in found["state"][index].items()
        }
    for master, weight in zip(saved.get("master_weights", []), found["master_weights"], strict=False):
        assert torch.equal(master, weight)
    assert {name: hash_of(checkpoint / name) for name in files_in(checkpoint)} == before
    convert(checkpoint, Way.for_deepspeed, trusted=False)
    assert (folder / "converted.json").stat().st_mtime_ns == written  # what is there was used again
    # The trainer goes on from it where PyTorch's optimiser reads it, and takes it away once it has its own checkpoint.
    torch.save(found, checkpoint / OPTIMIZER)
    train_here(run.name, *quick(small_model, 4), *overrides, checkpoint=checkpoint)
    assert not (checkpoint.parent / FOLDER).exists()


def test_what_deepspeed_reads_wrongly_is_mended_and_no_code_is_run(tmp_path: Path) -> None:
    """Where `loaded` is as `saved`, DeepSpeed has mended it: `after_loading` need then do nothing but its last line."""
    command = [sys.executable, "-m", "tests.trainer.universal_faults", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["saved"] == told["mended"] == {"steps": 2, "weight_decay": [0.1, 0.0]}
    assert told["loaded"] == {"steps": 1, "weight_decay": [0.1, 0.1]}
    # And DeepSpeed's converter by itself unpickles whatever lies there.
    assert "names posix.mkdir, and reading it would run code that it brings. Write trust=true" in told["refused"]
    assert not (tmp_path / "canary").exists()


def test_a_disk_that_is_too_small_for_it_is_told_before_anything_is_written(
    train_here: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    run = train_here("no-room", *quick(small_model), "method=full")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"only root may mount a disk of a few megabytes: {mounted.stderr.strip()}")
    try:
        checkpoint = shutil.copytree(run / "checkpoints" / "checkpoint-2", tmp_path / "checkpoint-2")
        with pytest.raises(StorageError, match=r"The conversion of checkpoint-2 needs about .* are free\. Make room"):
            convert(checkpoint, Way.for_deepspeed, trusted=False)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


# Whole runs


def test_a_run_goes_on_with_other_ranks_as_if_nothing_had_changed(
    tunewright: Callable[..., Any], train_here: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    """Two ranks of ZeRO-2 train all its parameters, then one, then two and one of ZeRO-3, and then one alone."""
    overrides = [*quick(small_model, 10), "method=full"]
    whole = train_here("whole-ranks", *overrides)
    run = train_in_turn(tunewright, tmp_path, overrides, [("zero2", 2), ("zero2", 1), ("zero3", 2), ("zero3", 1)])
    folder = convert(run / "checkpoints" / "checkpoint-8", Way.for_torch, trusted=False)
    alone = train_here("alone-ranks", *overrides, checkpoint=folder)
    assert losses(run) == pytest.approx(losses(whole)[:8], rel=1e-6)
    assert losses(alone) == pytest.approx(losses(whole)[8:], rel=1e-6)
    assert_same_weights(alone, whole)


@pytest.mark.slow
def test_adapters_go_on_with_other_ranks_by_whatever_launches_them(
    tunewright: Callable[..., Any], train_here: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    """The last ranks are those of an `accelerate launch` of the user's own."""
    overrides = [*quick(small_model, 16), "method=lora"]
    whole = train_here("whole-lora", *overrides)
    layouts = [("ddp", 2), ("single", 1), ("zero3", 1), ("zero3", 2), ("zero2", 1), ("zero2", 2), ("ddp", 2)]
    run = train_in_turn(tunewright, tmp_path, overrides, layouts)
    launch = ["accelerate.commands.accelerate_cli", "launch", "--use_deepspeed", "--zero_stage", "2"]
    module = ["--num_processes", "2", "-m", "tunewright.launch.rank", f"output_root={tmp_path}", "name=run"]
    command = [sys.executable, "-m", *launch, *module, *overrides, "resume=auto"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = "checkpoint-14 was written by 2 ranks without ZeRO; it is converted for 2 ranks at ZeRO stage 2."
    assert said in done.stdout
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert_same_weights(run, whole)


def train_in_turn(
    tunewright: Callable[..., Any], root: Path, overrides: list[str], layouts: list[tuple[str, int]]
) -> Path:
    """Train two steps with each of the ranks, and return the run."""
    run = root / "run"
    for number, (strategy, ranks) in enumerate(layouts, 1):
        now = [f"strategy={strategy}", f"cluster.num_processes={ranks}", f"train.max_steps={2 * number}"]
        done = tunewright("train", f"output_root={root}", "name=run", *overrides, *now, "resume=auto")
        assert done.returncode == 0, done.stdout + done.stderr
        facts = manifest(run)["distributed"]
        assert (facts["world_size"], facts["zero_stage"]) == (ranks, layout(strategy, ranks).stage)
        assert not (run / "checkpoints" / FOLDER).exists()
        if number > 1:
            before = layout(*layouts[number - 2])
            assert f"checkpoint-{2 * number - 2} was written by {before}" in done.stdout
    return run


def layout(strategy: str, ranks: int) -> Layout:
    return layout_of(compose_config([f"strategy={strategy}"]), ranks)


def assert_same_weights(run: Path, expected: Path) -> None:
    """A hundredth of one step, at most: where a gradient is next to nothing, AdamW makes much of its last bit."""
    found = weights_of(run)
    for name, weight in weights_of(expected).items():
        assert torch.allclose(found[name], weight, rtol=0, atol=1e-5), name


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in (run / "final").glob("*.safetensors") for key, value in load_file(file).items()}
