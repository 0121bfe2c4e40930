"""Killed or damaged anywhere, a run goes on from its last whole checkpoint, to the bits of an uninterrupted run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import losses, manifest, read_metrics
from tests.faults import DAMAGE, KILLED, Fault, flip
from tests.forked import Forked
from tunewright.checkpoints import listed, newest_whole, problems_of


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    started = Forked()
    yield started
    started.close()


def quick(model: Path, *overrides: str, steps: int = 6, rows: int = 24) -> list[str]:
    few = [f"train.max_steps={steps}", f"data.max_samples={rows}", "train.global_batch_size=4", "train.logging_steps=1"]
    known = ["model=folder", f"model.path={model}", "method.dropout=0.1", "train.learning_rate=1e-2"]
    return [*known, *few, "train.save_steps=2", "data.eval_names=[]", *overrides]


def results(run: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in (run / "final").glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same(found: Path, expected: Path) -> None:
    """Hold a run to the uninterrupted one: its weights' bits, its steps, and the log of each of them."""
    mine, theirs = results(found), results(expected)
    assert mine.keys() == theirs.keys() != set()
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    assert manifest(found)["steps"] == manifest(expected)["steps"]
    assert losses(found) == losses(expected)
    assert [line["step"] for line in read_metrics(found)] == [line["step"] for line in read_metrics(expected)]
    assert manifest(found)["final"] == manifest(expected)["final"]


def test_killed_at_every_boundary_of_its_files_a_run_ends_as_if_it_never_was(
    forked: Forked, small_model: Path, tmp_path: Path
) -> None:
    """One run, killed at each file of a checkpoint and of the result, one after the other."""
    settings = [*quick(small_model), f"output_root={tmp_path}"]
    whole = forked.train(*settings, "name=whole")
    assert whole.code == 0, whole.told
    reached = [re.sub(r"\d+\.part$", "*.part", phase) for phase in whole.reached]
    boundaries = list(dict.fromkeys(phase for phase in reached if phase.startswith(("save:", "final:"))))
    assert {"save:optimizer.pt", "save:rng_state.pth", "save:adapter_model.safetensors"} < set(boundaries)
    assert {"save:.checkpoint.json.*.part", "save:before_commit", "save:before_discard"} < set(boundaries)
    assert {"final:adapter_model.safetensors", "final:before_commit"} < set(boundaries)
    run = tmp_path / "broken"
    checkpoints = run / "checkpoints"
    for phase in [*boundaries, "train_end", "before_final"]:
        # The first checkpoint is whole when the second is broken off; with the third, the first is discarded.
        step = (6 if phase == "save:before_discard" else 4) if phase.startswith("save:") else None
        killed = forked.train(*settings, "name=broken", faults=(Fault("SIGKILL", phase, step=step),))
        assert killed.code == KILLED, (phase, killed.told)
        stands = listed(checkpoints)
        kept = {"save:after_commit": 2}.get(phase, 3 if step in (6, None) else 1)
        assert len(stands) == kept, (phase, stands)
        assert [problems for path in stands for problems in problems_of(path, hashed=True)] == [], phase
        assert not (run / "final").exists()
    again = forked.train(*settings, "name=broken")
    assert again.code == 0, again.told
    assert_same(run, tmp_path / "whole")


def test_killed_or_without_room_whenever_something_is_written_about_it_a_run_goes_on(
    forked: Forked, small_model: Path, tmp_path: Path
) -> None:
    """From before the folder is a run's, to after the result has its name."""
    settings = [*quick(small_model), f"output_root={tmp_path}"]
    whole = forked.train(*settings, "name=whole")
    assert whole.code == 0, whole.told
    writes = sum(phase.startswith("run:") for phase in whole.reached)
    assert writes > 4
    for number, (kind, code) in product(range(writes), {"ENOSPC": 4, "SIGKILL": KILLED}.items()):
        ended = forked.train(*settings, "name=broken", faults=(Fault(kind, "run:*", skip=number),))
        if ended.code == 0:  # one that was at its last step writes less
            break
        assert ended.code == code, (kind, number, ended.told)
    assert number >= writes - 2
    again = forked.train(*settings, "name=broken")
    assert again.code == 0, again.told
    assert_same(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_killed_between_the_last_checkpoint_and_the_result_no_step_is_added(
    schedule: str, forked: Forked, small_model: Path, tmp_path: Path
) -> None:
    held_out = ["data.eval_size=4", "train.eval_steps=3"]
    settings = [*quick(small_model, *held_out), f"train.scheduler={schedule}", f"output_root={tmp_path}"]
    assert forked.train(*settings, "name=whole").code == 0
    killed = forked.train(*settings, "name=broken", faults=(Fault("SIGKILL", "before_final"),))
    assert killed.code == KILLED, killed.told
    again = forked.train(*settings, "name=broken")
    assert again.code == 0, again.told
    assert "before_step" not in again.reached
    assert_same(tmp_path / "broken", tmp_path / "whole")


def test_patience_survives(forked: Forked, small_model: Path, tmp_path: Path) -> None:
    """Also that it has run out already: no step is added then either."""
    stop = ["data.eval_size=4", "train.eval_steps=1", "train.early_stopping=3", "train.save_steps=1"]
    settings = [*quick(small_model, *stop, steps=12), "train.learning_rate=1e-12"]
    settings.append(f"output_root={tmp_path}")
    whole = forked.train(*settings, "name=whole")
    assert whole.code == 0, whole.told
    ended = manifest(tmp_path / "whole")["steps"]
    assert ended < 12
    for phase, step in (("after_step", ended - 1), ("before_step", ended - 1), ("before_final", None)):
        killed = forked.train(*settings, "name=broken", faults=(Fault("SIGKILL", phase, step=step),))
        assert killed.code == KILLED, killed.told
    again = forked.train(*settings, "name=broken")
    assert again.code == 0, again.told
    assert "before_step" not in again.reached
    assert_same(tmp_path / "broken", tmp_path / "whole")


def rows_in(folder: Path) -> list[str]:
    """Write two datasets of 13 and 7 rows of different lengths, and return what trains on them."""
    for name, count in (("a", 13), ("b", 7)):
        lines = [
            {"instruction": f"{name} {'more ' * (row % 5)}{row}", "output": f"{name}{row}"} for row in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ["data=registry", f"data.names=[{folder}/a.jsonl,{folder}/b.jsonl]"]


ORDERS = {
    "accumulated": ["train.micro_batch_size=1"],
    "packing": ["data.packing=true", "data.cutoff_len=64", "train.global_batch_size=2"],
    "tokens": ["train.global_batch_size=null", "train.tokens_per_batch=100", "data.cutoff_len=48"],
    "by-length": ["train.group_by_length=true"],
    "mixed": ["data.mix=interleave_under", "data.weights=[1,3]"],
    "stream": ["data.streaming=true", "data.mix=interleave_under", "data.weights=[3,1]", "train.micro_batch_size=2"],
    "stream-once": ["data.streaming=true", "data.mix=interleave_once", "data.shuffle_buffer=5"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_rows_go_on_where_they_were(order: str, forked: Forked, small_model: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, at its end, and in a later one; of a stream also after its end."""
    settings = [*quick(small_model, steps=11), *rows_in(tmp_path), *ORDERS[order], f"output_root={tmp_path}"]
    settings = [setting for setting in settings if not setting.startswith("data.max_samples")]
    whole = forked.train(*settings, "name=whole", "train.save_steps=1")
    assert whole.code == 0, whole.told
    for step in (3, 5, 8):
        faults = (Fault("SIGKILL", "before_optimizer", step=step),)
        killed = forked.train(*settings, "name=broken", "train.save_steps=1", faults=faults)
        assert killed.code == KILLED, killed.told
        assert newest_whole(tmp_path / "broken" / "checkpoints", hashed=False)[0].name == f"checkpoint-{step}"
    again = forked.train(*settings, "name=broken", "train.save_steps=1")
    assert again.code == 0, again.told
    assert_same(tmp_path / "broken", tmp_path / "whole")


# Damage


def test_each_damage_to_a_checkpoint_of_two_ranks_is_seen_and_the_one_before_continued(
    train: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    settings = [*quick(small_model, steps=4), "strategy=zero2", "cluster.num_processes=2"]
    run = train("sound", *settings)
    newest = run / "checkpoints" / "checkpoint-4"
    files = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    # Nothing may be left out: weights, state, and of both ranks what the optimiser has and what is random.
    wanted = ("adapter_model.safetensors", "*zero_pp_rank_[01]_*_optim_states.pt", "rng_state_[01].pth", "latest")
    wanted += ("scheduler.pt", "trainer_state.json", "mp_rank_00_model_states.pt", "checkpoint.json")
    for pattern in wanted:
        assert any(file.match(pattern) for file in files), (pattern, files)
    for file in files:
        for damage, apply in DAMAGE.items():
            shutil.rmtree(tmp_path / "checkpoint-4", ignore_errors=True)
            copy = Path(shutil.copytree(newest, tmp_path / "checkpoint-4"))
            apply(copy / file, 0.5)
            if (copy / file).is_file() and (copy / file).read_bytes() == (newest / file).read_bytes():
                continue  # nothing to cut off
            problems = problems_of(copy, hashed=True)
            assert len(problems) == 1, (file, damage, problems)
            assert file.name in problems[0], (file, damage, problems)
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.copytree(newest, tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "latest").write_text("global_step2")
    assert problems_of(tmp_path / "checkpoint-4", hashed=False) == []
    assert problems_of(tmp_path / "checkpoint-4", hashed=True) == ["latest has other content than was written"]

    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    shutil.rmtree(run / "final")
    (run / "manifest.json").write_text(json.dumps({**manifest(run), "status": "failed"}))
    (run / "checkpoints" / "checkpoint-999").mkdir()
    flip(next(newest.rglob("*zero_pp_rank_1_*_optim_states.pt")))
    train("sound", *settings, "resume=auto")
    assert_same(run, whole)
    assert [path.name for path in listed(run / "checkpoints")] == ["checkpoint-4", "checkpoint-2"]
    assert problems_of(newest, hashed=True) == []
