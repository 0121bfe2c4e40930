"""A DeepSpeed JSON of the user's own: each of its keys is used, agrees, is decided elsewhere aloud, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import manifest, read_metrics
from tunewright.config.compose import compose_config
from tunewright.config.deepspeed_file import DEEPSPEED_DIR, read
from tunewright.errors import ConfigError
from tunewright.launch.ask_torch import ensure_accepted
from tunewright.launch.deepspeed_check import unknown_keys
from tunewright.launch.rank import _strategy_of_environment, overruled
from tunewright.plan.deepspeed_rules import account
from tunewright.plan.devices import Devices
from tunewright.plan.rules import check
from tunewright.plan.substitutes import substitute
from tunewright.plan.support import STRATEGIES
from tunewright.trainer.deepspeed_settings import fill_bucket_size, for_trainer

CPU, GPU = Devices("cpu", 0, 2), Devices("cuda", 2, 8)
ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
AUTO_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
AUTO_WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(settings: Any) -> Path:
        file = tmp_path / "own.json"
        file.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
        return file

    return write


def checked(file: Path, *overrides: str, devices: Devices = CPU) -> Any:
    config = compose_config(["strategy=zero2", f"strategy.deepspeed={file}", *overrides])
    check(config, devices)
    return config


def refusal(file: Path, *overrides: str, devices: Devices = CPU) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(file, *overrides, devices=devices)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n // my notes\n "zero_optimization": {"stage": 2}\n}', "line 2, column 2: JSON has no comments."),
        ('{"zero_optimization": {"stage": 2}, # two\n "bf16": {}}', "line 1, column 37: JSON has no comments."),
        ('{"zero_optimization": {"stage": 2,},}', "line 1, column 34: nothing follows this comma."),
        ('{"a": [1,\n 2, ]}', "line 2, column 3: nothing follows this comma."),
        ('{"zero_optimization": {"stage": 2}', "line 1, column 35: no JSON."),
        ("", "line 1, column 1: no JSON."),
        ('{"bf16": {}, "bf16": {}}', "has `bf16` twice"),
        ("[2]", "a DeepSpeed configuration is a mapping"),
        ('{"zero_optimization": 2}', "`zero_optimization` is 2: write a mapping"),
        ('{"bf16": {"enabled": true}}', "there is no ZeRO stage."),
        ('{"zero_optimization": {"stage": 0}}', "`zero_optimization.stage` is 0."),
        ('{"zero_optimization": {"stage": "auto"}}', '`zero_optimization.stage` is "auto".'),
        ('{"zero_optimization": {"stage": true}}', "`zero_optimization.stage` is true."),
    ],
)
def test_what_is_no_deepspeed_file_is_refused_with_its_place(text: str, said: str, write: Callable[..., Path]) -> None:
    assert said in refusal(write(text))
    assert str(write(text)) in refusal(write(text))


def test_the_strategy_is_the_one_that_its_file_makes(write: Callable[..., Path]) -> None:
    def strategy(zero: dict[str, Any]) -> str:
        config = compose_config(["strategy=zero2", f"strategy.deepspeed={write({'zero_optimization': zero})}"])
        assert config.name == f"tiny-demo-lora-{config.strategy.name}"
        return str(config.strategy.name)

    cpu = {"device": "cpu"}
    assert strategy({"stage": 1}) == "zero1"
    assert strategy({"stage": 2, "offload_optimizer": {"device": "none"}}) == "zero2"
    assert strategy({"stage": 2, "offload_optimizer": cpu}) == "zero2_offload"
    assert strategy({"stage": 3}) == "zero3"
    assert strategy({"stage": 3, "offload_param": cpu}) == "zero3_offload"
    assert strategy({"stage": 3, "zero_quantized_weights": True}) == "zeropp"
    for file in DEEPSPEED_DIR.glob("*.json"):
        assert read(file).strategy == file.stem
        assert file.stem in STRATEGIES


def test_rules_and_substitutes_follow_the_file(write: Callable[..., Path]) -> None:
    stage3 = write({"zero_optimization": {"stage": 3}})
    assert "ZeRO-3 splits weights over the ranks" in refusal(stage3, "method=qlora")
    assert f"({stage3} makes it zero3.)" in refusal(stage3, "method=qlora")
    assert "`strategy=zero3`" in refusal(stage3, "train.compile=true")
    offloads = write({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}})
    config = checked(offloads, "train.optimizer=paged_adamw_8bit", devices=GPU)
    assert "in host memory already" in "".join(substitute(config, _plain(), GPU))


def _plain() -> Any:
    from tunewright.plan.architecture import Architecture

    return Architecture(
        "llama",
        {},
        {},
        "lm_head",
        "embed_tokens",
        512,
        "model.layers",
        2,
        False,
        None,
        None,
        None,
        True,
        ["trl"],
        None,
        0,
    )


def test_a_file_without_deepspeed_and_a_name_without_its_launcher_are_refused(write: Callable[..., Path]) -> None:
    for overrides, said in (
        (["strategy=ddp", f"strategy.deepspeed={write(ZERO2)}"], "starts no DeepSpeed"),
        (["strategy=zero2", "strategy.launcher=ddp", "strategy.deepspeed=null"], "write strategy=ddp"),
        (["strategy=single", "strategy.name=zero2"], "write strategy=single"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(compose_config(overrides), CPU)


@pytest.mark.parametrize(
    ("key", "value", "right", "advice"),
    [
        ("train_batch_size", 32, "train.global_batch_size=32", "train.global_batch_size=32"),
        ("train_micro_batch_size_per_gpu", 2, "train.micro_batch_size=2", "train.micro_batch_size=2"),
        ("gradient_accumulation_steps", 2, "", ""),
        (
            "gradient_accumulation_steps",
            8,
            "train.gradient_accumulation_steps=8 train.global_batch_size=null",
            "train.gradient_accumulation_steps=8 train.global_batch_size=null",
        ),
        ("gradient_clipping", 0.3, "train.max_grad_norm=0.3", "train.max_grad_norm=0.3"),
        ("bf16", {"enabled": True}, "model.dtype=bfloat16", "model.dtype=bfloat16"),
        ("optimizer", {"type": "AdamW", "params": {"lr": 5e-5}}, "train.learning_rate=5e-5", "learning_rate=5e-05"),
        ("optimizer", {"type": "Adam", "params": {"weight_decay": 0.1}}, "train.weight_decay=0.1", "weight_decay=0.1"),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}, "train.learning_rate=1e-3", "=0.001"),
    ],
)
def test_a_number_agrees_with_the_setting_that_decides_or_is_refused_with_what_to_write(
    key: str, value: Any, right: str, advice: str, write: Callable[..., Path]
) -> None:
    file = write({**ZERO2, key: value})
    checked(file, *right.split())
    if right:
        said = refusal(file)
        assert f"`{key}" in said
        assert f"Write {advice}" in said or f"{advice}" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp16": {"enabled": True}}, "`fp16.enabled` is true: computation is in bfloat16 or float32"),
        ({"amp": {"enabled": True}}, "`amp.enabled`"),
        ({"optimizer": {"type": "Lamb"}}, '`optimizer.type` is "Lamb", and `train.optimizer` decides'),
        ({"scheduler": {"type": "OneCycle"}}, '`scheduler.type` is "OneCycle"'),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}, "here it is always [0.9, 0.999]"),
        ({"optimizer": {"type": "AdamW", "params": {"max_coeff": 3}}}, "`optimizer.params.max_coeff` is 3, which no"),
        ({"scheduler": {"params": {"warmup_num_steps": 2}}}, "`train.warmup_ratio` decides"),
        ({"tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel.autotp_size` is 2"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "`zero_optimization.zenflow`"),
        ({"gradient_allreduce_op": "sum"}, "divided for a mean"),
        ({"steps_per_print": "often"}, '`steps_per_print` is "often": write a whole number'),
        ({"flops_profiler": {"enabled": "auto"}}, 'nobody puts a value in place of "auto"'),
    ],
)
def test_what_cannot_go_with_tunewright_is_refused(
    settings: dict[str, Any], said: str, write: Callable[..., Path]
) -> None:
    assert said in refusal(write({**ZERO2, **settings}))


def test_all_that_differs_is_told_at_once(write: Callable[..., Path]) -> None:
    numbers = {"train_batch_size": 32, "gradient_clipping": 0.3, "fp16": {"enabled": True}}
    assert refusal(write({**ZERO2, **numbers})).count("\n  `") == 3


def test_of_every_key_it_is_said_what_becomes_of_it(write: Callable[..., Path]) -> None:
    settings = {
        **ZERO2,
        "optimizer": AUTO_ADAMW,
        "scheduler": AUTO_WARMUP,
        "fp16": {"enabled": "auto"},
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": True,
        "my_notes": "x",
    }
    file = write(settings)
    config = checked(file)
    text = account(read(file), config, unknown_keys(read(file)))
    assert f"{file}: ZeRO stage 2, strategy zero2. Used: zero_optimization, wall_clock_breakdown." in text
    assert "optimizer by train.optimizer=adamw_torch_fused, train.learning_rate=0.0002" in text
    assert "scheduler by train.scheduler=cosine, train.warmup_ratio=0.03" in text
    assert "fp16 by model.dtype=auto" in text
    assert "gradient_clipping by train.max_grad_norm=1.0" in text
    assert text.endswith("as DeepSpeed knows no such key: my_notes.")
    assert all(key in text for key in settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket": 5}}, "`zero_optimization.reduce_bucket` is 5: Extra"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "offload_optimizer.device` is"),
        ({"tensorboard": {"enabled": 3}}, "`tensorboard.enabled` is 3"),
        ({"curriculum_learning": {}}, "has been removed"),
        ({"data_types": {"keep_in_fp32_modules": 3}}, "keep_in_fp32_modules"),
        ({"gradient_clippin": 1.0}, "Did you mean 'gradient_clipping'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/no/such"}}},
            '`zero_optimization.offload_param.nvme_path` is "/no/such"',
        ),
    ],
)
def test_what_deepspeed_refuses_is_refused_before_it_starts(
    settings: dict[str, Any], said: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        unknown_keys(read(write({**ZERO2, **settings})))
    assert said in str(caught.value)


def test_deepspeed_is_asked_once_about_a_file_and_never_about_a_shipped_one(
    write: Callable[..., Path], tmp_path: Path, tunewright: Any
) -> None:
    assert ensure_accepted(compose_config(["strategy=zero2", f"data.cache_dir={tmp_path}"])) == []
    assert not (tmp_path / "deepspeed").exists()
    file = write({**ZERO2, "my_notes": "x"})
    overrides = ["strategy=zero2", f"strategy.deepspeed={file}", f"data.cache_dir={tmp_path}"]
    assert ensure_accepted(compose_config(overrides)) == ["my_notes"]
    (kept,) = (tmp_path / "deepspeed").iterdir()
    kept.write_text('["kept"]')
    assert ensure_accepted(compose_config(overrides)) == ["kept"]
    write({**ZERO2, "zero_optimization": {"stage": 2, "reduce_bucket": 5}})
    done = tunewright("train", *overrides, f"output_root={tmp_path / 'runs'}", "--dry-run")
    assert done.returncode == 2
    assert "`zero_optimization.reduce_bucket` is 5: Extra inputs are not permitted" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_trainer_gets_what_was_said() -> None:
    own = {**ZERO2, "optimizer": AUTO_ADAMW, "scheduler": AUTO_WARMUP, "bf16": {"check_grad_overflow": True}}
    given = for_trainer(own)
    assert "optimizer" not in given
    assert "scheduler" not in given
    assert given["bf16"] == {"check_grad_overflow": True, "enabled": "auto"}
    assert for_trainer({"zero_optimization": {"stage": 3}})["zero_optimization"] == {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert own["bf16"] == {"check_grad_overflow": True}


def test_buckets_are_no_larger_than_what_is_trained() -> None:
    def size(trained: int, **zero: Any) -> Any:
        settings = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", **zero}}
        fill_bucket_size(settings, trained)
        return settings["zero_optimization"]["reduce_bucket_size"]

    assert size(5000) == 5000
    assert size(8_000_000_000) == 20_000_000
    assert size(5000, reduce_bucket_size=7) == 7
    assert size(5000, stage=3) == "auto"
    for stage in (1, 2):  # the shipped ones leave it to this
        assert read(DEEPSPEED_DIR / f"zero{stage}.json").get("zero_optimization.reduce_bucket_size") == "auto"


def test_under_accelerate_a_file_is_judged_by_what_it_says_and_not_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "it's zero2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    config = compose_config(_strategy_of_environment([]))
    assert (config.strategy.name, config.strategy.deepspeed) == ("zero3", str(file))
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(ConfigError, match="write 1, 2 or 3"):
        _strategy_of_environment([])


def test_what_an_accelerate_configuration_says_in_vain_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config(["train.micro_batch_size=4", "train.global_batch_size=16", "train.max_grad_norm=0.5"])
    plan = check(config, CPU)
    for name, value in (
        ("MIXED_PRECISION", "fp16"),
        ("GRADIENT_ACCUMULATION_STEPS", "8"),
        ("GRADIENT_CLIPPING", "0.5"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert overruled(config, plan) == [
        "accelerate's mixed_precision=fp16 does not count: model.dtype decides.",
        "accelerate's gradient_accumulation_steps=8 does not count: train.gradient_accumulation_steps decides.",
    ]


def test_a_run_is_what_its_file_makes_and_follows_the_schedule_of_its_settings(
    write: Callable[..., Path], train: Callable[..., Path]
) -> None:
    """Stage 3 asked for as zero2, with an optimiser and a schedule of DeepSpeed's left to be filled in."""
    file = write({"zero_optimization": {"stage": 3}, "optimizer": AUTO_ADAMW, "scheduler": AUTO_WARMUP})
    short = ["train.max_steps=5", "train.logging_steps=1", "data.max_samples=16", "data.eval_names=[]"]
    schedule = ["train.scheduler=linear", "train.warmup_ratio=0.4", "train.global_batch_size=2"]
    run = train("own-deepspeed", "strategy=zero2", f"strategy.deepspeed={file}", *short, *schedule)
    found = manifest(run)
    assert (found["strategy"], found["distributed"]["zero_stage"]) == ("zero3", 3)
    assert found["distributed"]["parameters_partitioned"] > 0
    rates = [line["learning_rate"] for line in read_metrics(run) if "learning_rate" in line]
    assert rates == pytest.approx([0, 1e-4, 2e-4, 2e-4 * 2 / 3, 2e-4 / 3], rel=1e-6)
    assert (run / "final" / "adapter_model.safetensors").is_file()
