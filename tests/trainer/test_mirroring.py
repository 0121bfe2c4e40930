"""`train.mirror`: a run goes on from its copies at another place when what was here is gone, in the same bits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.conftest import losses, manifest
from tunewright.checkpoints import problems_of
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, StorageError
from tunewright.launch.train import plan_job
from tunewright.mirror import Mirror
from tunewright.plan.devices import find_devices
from tunewright.restore import bring_back
from tunewright.trainer.console import Printer


def quick(model: Path) -> list[str]:
    few = ["train.max_steps=6", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
    return ["model=folder", f"model.path={model}", *few, "train.save_steps=2", "data.eval_names=[]"]


def adapter(run: Path) -> bytes:
    return (run / "final" / "adapter_model.safetensors").read_bytes()


def test_a_run_goes_on_from_its_mirror_where_nothing_is_left_here(
    tunewright: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "mirror").mkdir()
    asked = [*quick(small_model), f"output_root={tmp_path / 'runs'}", "name=a", f"train.mirror={tmp_path / 'mirror'}"]
    run, mirror = tmp_path / "runs" / "a", Mirror(str(tmp_path / "mirror"), "a")

    def start(*overrides: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = tunewright("train", *asked, *overrides)
        return done

    whole = start()
    assert whole.returncode == 0, whole.stdout + whole.stderr
    place = str(tmp_path / "mirror" / "a")
    assert manifest(run)["mirror"] == {"place": place, "checkpoint": "checkpoint-6", "result": True, "problem": None}
    assert [record["step"] for record in mirror.records()] == [6, 4]
    expected = tmp_path / "expected"
    run.rename(expected)
    assert adapter(Path(place)) == adapter(expected)
    assert manifest(Path(place))["status"] == "done"

    with pytest.raises(ConfigError, match=f"The mirror {place} holds a run already, up to checkpoint-6"):
        plan_job(compose_config(asked), find_devices())
    other = [*asked, "resume=auto", "train.learning_rate=0.5"]
    with pytest.raises(ConfigError, match=r"holds another run:\n  train.learning_rate: there 0.0002, now 0.5"):
        plan_job(compose_config(other), find_devices())
    assert not run.exists() or not list(run.glob("*"))

    # As after the loss of the machine in the middle of the run: the newest copy there is half of one.
    shutil.rmtree(Path(place) / "final")
    (Path(place) / "checkpoints" / "checkpoint-6" / "checkpoint.json").unlink()
    done = start("resume=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"checkpoint-4 was fetched from {place}: {run} has no whole one." in done.stdout
    assert losses(run) == losses(expected)
    assert adapter(run) == adapter(expected)
    assert [record["step"] for record in mirror.records()] == [6, 4]

    # Damage here, and at the mirror the same checkpoint whole.
    shutil.rmtree(run / "final")
    (run / "manifest.json").write_text(json.dumps({**manifest(run), "status": "failed"}))
    (run / "checkpoints" / "checkpoint-6" / "optimizer.pt").write_bytes(b"damaged")
    job = plan_job(compose_config([*asked, "resume=must"]), find_devices())
    assert job.claimed.checkpoint == run / "checkpoints" / "checkpoint-6"
    assert f"checkpoint-6 was fetched from {place}: the newest whole one in {run} is checkpoint-4." in job.decided
    # Where it cannot be reached, that is an error only as long as nothing is here to go on from.
    (tmp_path / "mirror").rename(tmp_path / "unmounted")
    job = plan_job(compose_config([*asked, "resume=must"]), find_devices())
    assert job.claimed.checkpoint == run / "checkpoints" / "checkpoint-6"
    assert "is not there: mount it, or make it. The run goes on from checkpoint-6, which is here" in job.decided[-1]
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(StorageError, match=r"is not there: mount it, or make it.*Start again when it can be reached"):
        plan_job(compose_config([*asked, "resume=auto"]), find_devices())


@pytest.mark.parametrize("back_at", [5, None], ids=["returns", "stays away"])
def test_a_mirror_that_fails_stops_no_training(
    back_at: int | None, train_here: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    """It is taken away after the first step, and is there again before the end, or is not."""
    place, lines = tmp_path / "mirror", list[str]()
    place.mkdir()

    class Unmount(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                place.rename(tmp_path / "unmounted")
            if state.global_step == back_at:
                (tmp_path / "unmounted").rename(place)

    told_by = {"output": Printer(lines.append), "callbacks": [Unmount()]}
    run = train_here(f"mirror-{back_at}", *quick(small_model), f"train.mirror={place}", **told_by)
    told, there, text = manifest(run)["mirror"], f"{place}/mirror-{back_at}", "\n".join(lines)
    assert manifest(run)["status"] == "done"
    assert f"the folder {place} is not there: mount it, or make it" in text
    assert "Training goes on; it is tried again with the next checkpoint." in text
    if back_at:
        assert told == {"place": there, "checkpoint": "checkpoint-6", "result": True, "problem": None}
    else:
        assert (told["checkpoint"], told["result"]) == (None, False)
        assert "is not there" in told["problem"]
        assert f"Not everything is at the mirror {there}" in text


def test_the_best_checkpoint_stays_at_the_mirror_and_comes_back_with_the_newest(
    train_here: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    """Two are kept, and an earlier one is the best: from then on the weights go astray."""
    place = tmp_path / "mirror"
    place.mkdir()

    class Astray(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name, parameter in model.named_parameters():
                if "lora_B" in name and state.global_step >= 2:
                    parameter.data.copy_(-100 * parameter.abs() - 1)

    best = ["data.eval_names=[demo_eval]", "train.eval_steps=2", "train.keep_best=true"]
    asked = [*quick(small_model), "train.max_steps=8", *best, f"train.mirror={place}"]
    run = train_here("best-mirrored", *asked, callbacks=[Astray()])
    state = json.loads((run / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    early = state["best_global_step"]
    assert early in (2, 4)
    mirror = Mirror(str(place), "best-mirrored")
    assert [record["step"] for record in mirror.records()] == [8, 6, early]
    shutil.rmtree(run)
    config = compose_config([f"output_root={run.parent}", "name=best-mirrored", *asked, "resume=auto"])
    told = "\n".join(bring_back(config))
    assert re.search(rf"checkpoint-8 was fetched .*\ncheckpoint-{early}, with the lowest eval loss so far, was", told)
    assert problems_of(run / "checkpoints" / f"checkpoint-{early}", hashed=True) == []
