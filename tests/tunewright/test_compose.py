"""Every shipped choice composes, and every mistake is told in the user's terms before anything starts."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunewright.config import schema
from tunewright.config.choices import CONFIG_DIR, choices
from tunewright.config.compose import compose_config, expand_sweep, load_config
from tunewright.config.describe import choices_text, keys_text
from tunewright.config.method_schema import METHODS
from tunewright.errors import ConfigError
from tunewright.launch.cli import main, parser
from tunewright.plan.devices import Devices
from tunewright.plan.kernel_rules import check_fused, liger_architectures
from tunewright.plan.rules import OPTIMIZERS, SCHEDULERS, check
from tunewright.run_folder import redacted_yaml

CPU = Devices("cpu", 0, 2)
EIGHT_GPUS = Devices("cuda", 8, 64)
ALL_CHOICES = [(group, name) for group in schema.GROUPS for name in choices(group)]
NEEDS = {"data=registry": ["data.names=[demo]"], "model=folder": ["model.path=/models/mine"]}
NEEDS["experiment=gpt_llm_trainer"] = ["data.names=[demo]"]


@pytest.mark.parametrize(("group", "name"), ALL_CHOICES, ids=[f"{group}={name}" for group, name in ALL_CHOICES])
def test_every_choice_of_every_group_composes_and_validates(group: str, name: str) -> None:
    override = f"{group}={name}"
    config = compose_config([override, *NEEDS.get(override, [])])
    if group in ("method", "strategy"):
        assert config[group].name == ("single" if name == "auto" else name)
    check(config, EIGHT_GPUS)


def test_every_yaml_key_is_typed() -> None:
    """A group whose file brings a key that no data class declares would be refused; a method brings its own class."""
    for method, cls in METHODS.items():
        assert set(compose_config([f"method={method}"]).method) == set(schema.help_of(cls))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.learning_rte=1"], ["`train.learning_rte` = 1", "train.learning_rte=1", "train.learning_rate"]),
        (["learning_rate=1e-4"], ["`learning_rate`", "Did you mean 'train.learning_rate'"]),
        (["+train.learning_rat=1"], ["`train.learning_rat`", "train.learning_rate"]),
        (["train.learning_rate=fast"], ["`train.learning_rate` is 'fast'", "train.learning_rate=fast", "1e-4"]),
        (["train.max_steps=1.5"], ["`train.max_steps` is 1.5", "whole number"]),
        (["strategy=zero4"], ["`strategy` has no choice 'zero4'", "Did you mean 'zero3'", "zero2_offload"]),
        (["method=qloora"], ["`method` has no choice 'qloora'", "Did you mean 'qlora'"]),
        (["experiment=dmeo"], ["`experiment` has no choice 'dmeo'", "Did you mean 'demo'"]),
        (["method=full", "method.r=8"], ["`method.r` = 8", "method.name"]),
        (["resume=always"], ["`resume` is 'always'", "never, auto, must"]),
        (["data=registry"], ["No value for `data.names`", "data.names=[demo]"]),
        (["data.names=demo"], ["`data.names` is 'demo'", "data.names=[one,two]"]),
        (
            ["train.micro_batch_size=4.5"],
            ["`train.micro_batch_size` is 4.5", "write a whole number such as 8, or auto."],
        ),
        (["data.names=[]"], ["`data.names` is empty"]),
        (["data.names=[mine.json]"], ["`data.eval_names` is still ['demo_eval']", "data=registry"]),
        (["train.epochs=1,2"], ["--multirun"]),
        (["strategy"], ["Cannot read `strategy`", "'strategy'. Write overrides as key=value"]),
        (["name=${nothing}"], ["'nothing' not found"]),
        (["data.cache_dir='~nobody-here/cache'"], ["`data.cache_dir` is ~nobody-here/cache", "export HOME"]),
    ],
)
def test_a_mistake_names_key_value_origin_and_the_closest_valid_name(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    for part in said:
        assert part in str(caught.value)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / "mine.yaml"
    file.write_text("learning_rate: quick\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        compose_config(["train=mine"], extra_dir=tmp_path)
    assert str(file) in str(caught.value)
    assert "'quick'" in str(caught.value)


def test_a_folder_of_the_users_own_adds_choices(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.yaml").write_text("learning_rate: 5e-4\n", encoding="utf-8")
    assert compose_config(["train=mine"], extra_dir=tmp_path).train.learning_rate == 5e-4


@pytest.mark.parametrize(
    "command", [["train", "--dry-run"], ["config"], ["config", "train.epochs=1"], ["data", "check"]]
)
def test_a_folder_of_choices_that_is_none_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.yaml"
    file.touch()
    for given, said in ((tmp_path / "nowhere", "is not there"), (file, "is a file")):
        assert main([*command, "--config-dir", str(given)]) == 2
        assert f"`--config-dir` is {given}, which {said}" in capsys.readouterr().err


def test_a_choice_that_has_the_name_of_a_shipped_one_is_refused(tmp_path: Path) -> None:
    """Hydra would read the shipped one."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "default.yaml").write_text("learning_rate: 5e-4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train/default.yaml has the name of a shipped choice"):
        compose_config([], tmp_path)


def test_what_nobody_expected_is_a_bug_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(args: argparse.Namespace) -> int:
        raise KeyError("nobody expected this")

    monkeypatch.setattr("tunewright.launch.cli._config", broken)
    assert main(["config"]) == 70
    assert "nobody expected this" in capsys.readouterr().err


def test_closed_output_is_no_bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["runs", str(tmp_path)]) == 0
    sys.stdout.close()


def test_no_parser_takes_an_abbreviated_option(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def look(one: argparse.ArgumentParser) -> None:
        seen.append(one.prog)
        assert not one.allow_abbrev, one.prog
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    look(inner)

    look(parser())
    assert {"tunewright train", "tunewright data check", "tunewright datagen", "tunewright merge"} <= set(seen)
    for command in (
        ["train", "--config", "my.yaml", "--dry-run"],
        ["data", "check", "--js"],
        ["merge", "run", "--over"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
        assert "unrecognised arguments: --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "devices", "said"),
    [
        (["method=qlora", "strategy=zero3"], CPU, ["ZeRO-3 splits weights", "strategy=zero2", "method=lora"]),
        (["method=qlora", "strategy=zeropp"], EIGHT_GPUS, ["4 bits cannot be split"]),
        (["strategy=zeropp"], CPU, ["NVIDIA", "strategy=zero3"]),
        (["train.gradient_checkpointing=yes"], CPU, ["`train.gradient_checkpointing` is 'yes'", "true, false or auto"]),
        (["train.compile=true", "strategy=zero3"], CPU, ["`strategy=zero3`", "strategy=zero2", "leave train.compile"]),
        (["train.fused_layers=liger"], CPU, ["`train.fused_layers=liger` is for a GPU", "leave it out"]),
        (["train.fused_layers=liger"], EIGHT_GPUS, ["the package liger-kernel", "pip install 'tunewright[liger]'"]),
        (["train.attention_kernel=flash3"], CPU, ["is for a GPU"]),
        (["train.attention_kernel=flash3"], EIGHT_GPUS, ["flash-attn-3", "Write train.attention_kernel=torch"]),
        (["train.cross_entropy=cut"], CPU, ["`train.cross_entropy=cut` is for a GPU", "=auto"]),
        (["train.cross_entropy=cut", "model.dtype=float32"], EIGHT_GPUS, ["half precision", "model.dtype=bfloat16"]),
        (["train.cross_entropy=cut_exact"], EIGHT_GPUS, ["not installed", "pip install 'tunewright[cut]'"]),
        (["train.router_aux_loss=-1"], CPU, ["`train.router_aux_loss` is -1.0", "0 turns it off"]),
        (["strategy=single", "cluster.num_processes=2"], CPU, ["one process", "strategy=ddp"]),
        (["strategy=ddp", "cluster.num_processes=9"], EIGHT_GPUS, ["8 GPUs are visible", "CUDA_VISIBLE_DEVICES"]),
        (["strategy=ddp", "train.global_batch_size=4"], EIGHT_GPUS, ["less than the 8 ranks", "Write 8 or more"]),
        (["train.gradient_accumulation_steps=2"], CPU, ["set one and write the other as null"]),
        (["train.global_batch_size=null"], CPU, ["all are null"]),
        (["train.micro_batch_size=0"], CPU, ["`train.micro_batch_size` is 0"]),
        (["train.micro_batch_size=all"], CPU, ["`train.micro_batch_size` is 'all'", "from 1, or auto"]),
        (["train.learning_rate=-1"], CPU, ["`train.learning_rate` is -1.0"]),
        (["train.learning_rate=nan"], CPU, ["`train.learning_rate` is nan"]),
        (["train.scheduler=cosin"], CPU, ["`train.scheduler` is 'cosin'", "Did you mean 'cosine'"]),
        (["train.optimizer=adam_torch"], CPU, ["`train.optimizer` is 'adam_torch'", "Did you mean 'adamw_torch'"]),
        (["method.r=0"], CPU, ["`method.r` is 0"]),
        (["method.target_modules=q_proj"], CPU, ["all-linear or a list"]),
        (["method=qlora", "method.quant_type=nf5"], CPU, ["Did you mean 'nf4'"]),
        (["strategy=zero2", "strategy.deepspeed=zero9"], CPU, ["no such file", "Did you mean"]),
        (
            ["train.eval_steps=5", "data.eval_names=[]"],
            CPU,
            ["nothing is held out", "train.eval_steps=null"],
        ),
        (["train.keep_best=true", "data.eval_names=[]"], CPU, ["nothing is held out", "train.keep_best=false"]),
        (["train.seed=-1"], CPU, ["`train.seed` is -1", "from 0 to 4,294,967,295"]),
        (["train.learning_rate=1e300"], CPU, ["`train.learning_rate` is 1e+300", "above 0 to 1e+30"]),
        (["train.weight_decay=inf"], CPU, ["`train.weight_decay` is inf", "from 0"]),
        (["train.max_grad_norm=nan"], CPU, ["`train.max_grad_norm` is nan", "0 turns clipping off"]),
        (["train.scheduler=polynomial", "train.learning_rate=1e-8"], CPU, ["falls to 1e-07", "train.scheduler=linear"]),
        (["train.global_batch_size=1000000000000"], CPU, ["the first step would not end", "train.micro_batch_size"]),
        (["method.r=1000000000000"], CPU, ["`method.r` is 1000000000000", "to 65,536"]),
        (["method.dropout=1.0"], CPU, ["from 0 to below 1"]),
        (["method.target_modules=3"], CPU, ["all-linear or a list"]),
        (["method.target_modules=[3]"], CPU, ["all-linear or a list"]),
        (["method=ia3", "method.target_modules=3"], CPU, ["write auto or a list"]),
        (["method=prompt_tuning", "method.init_text=''"], CPU, ["`method.init_text` is empty"]),
        (["data.weights=[inf]"], CPU, ["`data.weights` is [inf]", "one positive number"]),
        (["data.weights=[1e300]"], CPU, ["at most 10,000 with data.mix=concat"]),
        (["model.source=hub", "model.path=/models/mine"], CPU, ["no name on a hub", "model=folder"]),
        (["model.source=modelscope", "model.path=a--b"], CPU, ["no name on a hub"]),
        (["cluster.threads_per_process=1000000"], CPU, ["`cluster.threads_per_process` is 1000000"]),
        (["data.cache_dir=''"], CPU, ["`data.cache_dir` is empty"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(overrides: list[str], devices: Devices, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_config(overrides), devices)
    for part in said:
        assert part in str(caught.value)


def test_compiling_needs_a_compiler_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config(["train.compile=true", "train.global_batch_size=16"])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", "/nowhere/g++ -O3")
    with pytest.raises(ConfigError, match=r"/nowhere/g\+\+ is not on this machine: .* variable CXX"):
        check(config, CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match=r"gcc or clang is not on this machine: .* variable CC"):
        check(config, Devices("cuda", 1, 8))
    (tmp_path / "clang").touch(0o755)
    check(config, Devices("cuda", 1, 8))
    (tmp_path / "Python.h").unlink()
    with pytest.raises(ConfigError, match="python3-dev"):
        check(config, Devices("cuda", 1, 8))


def test_fused_layers_need_an_architecture_that_liger_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table is read from the package, without importing it: that would take torch."""
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    (package / "monkey_patch.py").write_text('TABLE = {\n    "llama": apply_liger_kernel_to_llama,\n}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    liger_architectures.cache_clear()
    config = compose_config(["train.fused_layers=liger", "strategy=ddp", "train.global_batch_size=16"])
    check(config, EIGHT_GPUS)
    check_fused(config, "llama")
    with pytest.raises(ConfigError, match=r"no kernels for mamba, .* Those that it has: llama\. Leave"):
        check_fused(config, "mamba")
    liger_architectures.cache_clear()


def test_schedulers_and_optimizers_are_names_of_transformers() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(SCHEDULERS) <= {item.value for item in SchedulerType}
    assert set(OPTIMIZERS) <= {item.value for item in OptimizerNames}


def test_configuration_errors_do_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from tunewright.launch.cli import main\n"
        "assert main(['train', 'strategy=zero4']) == 2\n"
        "assert main(['train', 'data=registry', 'data.names=[nothing]']) == 3\n"
        "assert main(['config', '--keys']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIG_DIR.parents[1], capture_output=True)


@pytest.mark.parametrize("name", choices("experiment"))
def test_another_model_than_an_experiments_is_that_model(name: str) -> None:
    """An experiment chooses a model by its choice alone: a path of its own would stay when another one is chosen."""
    needs = NEEDS.get(f"experiment={name}", [])
    other = compose_config([f"experiment={name}", "model=qwen2_5_0_5b", *needs])
    assert other.model.path == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_sweep_is_every_combination() -> None:
    points = list(expand_sweep(["method.r=4,8", "strategy=ddp,zero2", "data.names=[demo]"]))
    assert points[0] == ["method.r=4", "strategy=ddp", "data.names=[demo]"]
    assert len(points) == 4
    assert len({tuple(point) for point in points}) == 4


def test_a_configuration_reads_back_as_it_was_written(tmp_path: Path) -> None:
    config = compose_config(["experiment=demo", "method=qlora", "strategy=zero2"])
    (tmp_path / "config.yaml").write_text(redacted_yaml(config), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.resume is schema.Resume.never


def test_the_lists_of_choices_and_keys_are_complete() -> None:
    listed = choices_text()
    assert all(f"  {name}" in listed for _, name in ALL_CHOICES)
    keys = keys_text()
    assert all(f"train.{key}" in keys for key in schema.help_of(schema.TrainConfig))


@pytest.mark.parametrize("name", ["my/rows.jsonl", "hub:org/rows", "modelscope:org/rows", "rows"])
def test_a_run_is_named_after_its_data_whatever_that_is_called_by(name: str) -> None:
    assert compose_config(["data=registry", f"data.names=[{name}]"]).name == "tiny-rows-lora-single"
