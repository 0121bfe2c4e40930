"""What becomes of settings that are `auto`: written ones win, and a run that continues keeps what was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tunewright.claims import Claim, claim, prepare_folder
from tunewright.config.compose import compose_config
from tunewright.config.schema import Launcher
from tunewright.errors import ConfigError
from tunewright.launch.choosing import choose
from tunewright.launch.train import Job, halved, sweep_jobs
from tunewright.plan.auto import Choice, chosen_before, open_settings
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import Devices
from tunewright.run_folder import RunDir

CPU = Devices("cpu", 0, 2)
ALL = ["strategy", "train.micro_batch_size", "train.gradient_checkpointing"]
ZERO2 = Choice("zero2", micro_batch=16, recompute=True)


def values(config: DictConfig) -> tuple[str, int, bool]:
    return config.strategy.name, config.train.micro_batch_size, config.train.gradient_checkpointing


def test_without_a_gpu_one_process_trains_as_it_always_has() -> None:
    config = compose_config()
    assert values(config) == ("single", 4, False)
    assert config.strategy.launcher is Launcher.single
    assert config.name == "tiny-demo-lora-single"
    assert config.automatic == ALL
    assert choose(compose_config(choose=None), CPU) == Choice("single")


def test_more_processes_that_are_asked_for_share_the_batches() -> None:
    config = compose_config(["cluster.num_processes=2"])
    assert (config.strategy.name, config.strategy.launcher) == ("ddp", Launcher.ddp)


def test_a_run_is_called_after_what_was_chosen() -> None:
    config = compose_config(["output_root=runs/${strategy.name}"], choose=lambda _: ZERO2)
    assert values(config) == ("zero2", 16, True)
    assert (config.strategy.launcher, config.strategy.deepspeed) == (Launcher.deepspeed, "zero2")
    assert (config.name, config.output_root) == ("tiny-demo-lora-zero2", "runs/zero2")


def test_what_is_written_wins() -> None:
    typed = ["strategy=ddp", "train.micro_batch_size=2", "train.gradient_checkpointing=false"]
    assert values(compose_config(typed, choose=lambda _: ZERO2)) == ("ddp", 2, False)
    assert compose_config(typed, choose=lambda _: ZERO2).automatic == []
    one = compose_config(["train.micro_batch_size=2"], choose=lambda _: ZERO2)
    assert values(one) == ("zero2", 2, True)
    assert one.automatic == ["strategy", "train.gradient_checkpointing"]


def test_what_is_open_stays_so_where_nobody_chooses() -> None:
    config = compose_config(choose=None)
    assert open_settings(config) == ALL
    assert values(config) == ("auto", "auto", "auto")


def test_a_launcher_that_is_written_names_the_strategy() -> None:
    assert compose_config(["strategy.launcher=ddp"]).name == "tiny-demo-lora-ddp"


def test_what_is_refused_is_handed_to_nobody() -> None:
    with pytest.raises(ConfigError, match="holds a password or key"):
        compose_config(["model.path=https://me:secret@host/x"], choose=lambda _: pytest.fail("asked"))


def begun(root: Path, *overrides: str, choice: Choice = ZERO2) -> DictConfig:
    config = compose_config([f"output_root={root}", *overrides], choose=lambda _: choice)
    prepare_folder(config, Claim(RunDir(root / config.name)))
    return config


def again(root: Path, *overrides: str) -> DictConfig:
    return compose_config([f"output_root={root}", *overrides], choose=lambda config: choose(config, CPU))


def test_a_run_that_continues_keeps_what_was_chosen_on_other_devices(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for overrides in (["resume=auto"], ["resume=must", f"name={run.name}"]):
        config = again(tmp_path, *overrides)
        assert values(config) == values(run)
        assert claim(config).run.path == tmp_path / "tiny-demo-lora-zero2"
    assert values(again(tmp_path)) == ("single", 4, False)
    assert values(again(tmp_path, "resume=auto", "strategy=single")) == ("single", 4, False)
    assert values(again(tmp_path, "resume=auto", "train.micro_batch_size=8")) == ("zero2", 8, True)


def test_a_run_whose_strategy_was_written_is_continued_by_who_writes_it(tmp_path: Path) -> None:
    begun(tmp_path, "strategy=zero2")
    assert again(tmp_path, "resume=auto").name == "tiny-demo-lora-single"
    assert values(again(tmp_path, "resume=auto", "strategy=zero2")) == ("zero2", 16, True)


def test_the_newest_of_several_runs_is_continued_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    begun(tmp_path)
    begun(tmp_path, choice=Choice("ddp"))
    assert again(tmp_path, "resume=auto").strategy.name == "ddp"
    (tmp_path / "tiny-demo-lora-ddp" / "config.yaml").write_text("{", encoding="utf-8")
    assert again(tmp_path, "resume=auto").strategy.name == "zero2"
    assert chosen_before(compose_config(["resume=auto", f"name={'x' * 300}"], choose=None)) is None


def test_runs_of_a_sweep_over_auto_have_folders_of_their_own(tmp_path: Path) -> None:
    configs = sweep_jobs(["strategy=auto,single", f"output_root={tmp_path}"], None, multirun=True)
    assert [config.strategy.name for config in configs] == ["single", "single"]
    assert [config.name.rpartition("-")[2] for config in configs] == ["strategy=auto", "strategy=single"]


def test_objects_of_this_process_keep_the_training_in_it(tmp_path: Path) -> None:
    open_one = compose_config(["cluster.num_processes=2"], choose=None)
    assert choose(open_one.copy(), CPU).strategy == "ddp"
    assert choose(open_one.copy(), CPU, here=True).strategy == "single"


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ([], 2),
        (["train.global_batch_size=3"], 1),  # of which no more than 3 are in a micro-batch
        (["cluster.num_processes=2", "train.global_batch_size=4"], 1),  # of which no rank has more than 2
        (["train.global_batch_size=null", "train.tokens_per_batch=8192"], 2),
        (["train.micro_batch_size=4"], None),
        (["train.global_batch_size=1"], None),
        (["train.global_batch_size=null", "train.gradient_accumulation_steps=4"], None),
    ],
)
def test_half_the_micro_batch_leaves_the_step_as_it_is(overrides: list[str], rows: int | None) -> None:
    config = compose_config(overrides)
    ranks = config.cluster.num_processes or 1
    plan = batch_plan(config.train, ranks)
    smaller = halved(Job(config, [], plan, Claim(RunDir(Path("x"))), CPU))
    assert (smaller and smaller.train.micro_batch_size) == rows
    if smaller:
        half = batch_plan(smaller.train, ranks)
        assert (half.global_batch, half.tokens) == (plan.global_batch, plan.tokens)
        assert ranks * half.micro_batch * half.accumulation >= (plan.global_batch or 0)
        changed = {"train.micro_batch_size", "resume"}
        before, after = (dict(flat(one)) for one in (config, smaller))
        assert {key for key in before if before[key] != after[key]} == changed


def test_half_is_half_of_what_was_tried_after_the_rows_were_known() -> None:
    config = compose_config([])
    job = Job(config, [], batch_plan(config.train, 1), Claim(RunDir(Path("x"))), CPU)
    config.train.micro_batch_size = 2  # as `fit` writes it
    smaller = halved(job)
    assert smaller
    assert smaller.train.micro_batch_size == 1


def flat(config: DictConfig) -> list[tuple[str, object]]:
    from tunewright.trees import flatten

    return list(flatten(OmegaConf.to_container(config)))
