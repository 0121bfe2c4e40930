"""Each shipped experiment: the settings and counts that its source publishes, and a short training of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import losses, manifest, read_metrics
from tunewright.config.choices import choices
from tunewright.config.compose import compose_config
from tunewright.deliver.compare import compare
from tunewright.launch.cli import main
from tunewright.plan.devices import Devices
from tunewright.plan.rules import check
from tunewright.run_folder import RunDir

ONE_GPU, EIGHT_GPUS = Devices("cuda", 1, 8), Devices("cuda", 8, 64)
NAMED = {"gpt_llm_trainer": ["data.names=[ours]"]}  # its data is what the user had generated

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HUANHUAN = {
    "model.path": "Qwen/Qwen2.5-7B-Instruct",
    "model.dtype": "bfloat16",
    "method.name": "lora",
    "method.r": 8,
    "method.alpha": 32,
    "method.dropout": 0.1,
    "method.target_modules": SEVEN,
    "data.cutoff_len": 1024,
    "train.learning_rate": 5e-4,
    "train.scheduler": "cosine",
    "train.micro_batch_size": 4,
    "train.gradient_accumulation_steps": 4,
    "train.epochs": 30,
}
GUANACO = {
    "model.path": "NousResearch/Llama-2-7b-chat-hf",
    "data.names": ["hub:mlabonne/guanaco-llama2-1k"],
    "train.epochs": 1,
    "strategy.name": "single",
}
GUANACO_LORA = {**GUANACO, "method.r": 8, "method.alpha": 8, "train.learning_rate": 2e-4}
BLOOM = {
    "model.path": "Langboat/bloom-1b4-zh",
    "model.template": "human_assistant",
    "method.name": "prompt_tuning",
    "method.virtual_tokens": 10,
    "data.cutoff_len": 256,
    "train.micro_batch_size": 4,
    "train.gradient_accumulation_steps": 8,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "bloom_prompt_tuning_soft": {**BLOOM, "method.init_text": None},
    "bloom_prompt_tuning_hard": {**BLOOM, "method.init_text": "下面是一段人与智能助手的对话。"},
    "demo": {"model.name": "tiny", "data.names": ["demo"], "data.eval_names": ["demo_eval"], "method.name": "lora"},
    "gpt_llm_trainer": {
        "model.path": "NousResearch/Llama-2-7b-chat-hf",
        "model.template": "llama2",
        "method.name": "qlora",
        "method.r": 64,
        "method.alpha": 16,
        "method.dropout": 0.1,
        "method.bits": 4,
        "method.quant_type": "nf4",
        "method.compute_dtype": "float16",
        "data.eval_size": 0.1,
        "train.optimizer": "paged_adamw_32bit",
        "train.learning_rate": 2e-4,
        "train.scheduler": "constant",
        "train.warmup_ratio": 0.03,
        "train.max_grad_norm": 0.3,
        "train.weight_decay": 0.001,
        "train.micro_batch_size": 4,
        "train.global_batch_size": 4,
        "train.group_by_length": True,
        "train.eval_steps": 5,
        "train.seed": 42,
    },
    "huanhuan_single": {**HUANHUAN, "strategy.name": "single"},
    "huanhuan_zero2": {**HUANHUAN, "strategy.deepspeed": "zero2_offload", "cluster.num_processes": 8},
    "huanhuan_zero3": {**HUANHUAN, "strategy.deepspeed": "zero3", "cluster.num_processes": 8},
    "rocm_guanaco_full": {**GUANACO, "method.name": "full"},
    "rocm_guanaco_lora": {**GUANACO_LORA, "method.name": "lora"},
    "rocm_qlora_guanaco": {
        **GUANACO_LORA,
        "method.name": "qlora",
        "method.bits": 4,
        "method.quant_type": "nf4",
        "method.double_quant": True,
    },
}
# (trained, all) parameters, the latter with what the method adds
COUNTS = {
    "bloom_prompt_tuning_soft": (20_480, 1_303_132_160),
    "bloom_prompt_tuning_hard": (20_480, 1_303_132_160),
    "gpt_llm_trainer": (33_554_432, 6_771_970_048),
    "huanhuan_single": (20_185_088, 7_635_801_600),
    "huanhuan_zero2": (20_185_088, 7_635_801_600),
    "huanhuan_zero3": (20_185_088, 7_635_801_600),
    "rocm_guanaco_full": (6_738_415_616, 6_738_415_616),
    "rocm_guanaco_lora": (4_194_304, 6_742_609_920),
    "rocm_qlora_guanaco": (4_194_304, 6_742_609_920),
    "bloom_prompt_tuning_soft method=p_tuning": (12_609_536, 1_315_721_216),
    "bloom_prompt_tuning_soft method=prefix_tuning": (983_040, 1_304_094_720),
}


def composed(experiment: str, *overrides: str) -> Any:
    name, *more = experiment.split()
    return compose_config([f"experiment={name}", *NAMED.get(name, []), *more, *overrides])


def test_every_experiment_is_covered() -> None:
    assert sorted(PUBLISHED) == choices("experiment")
    assert set(PUBLISHED) - {"demo"} == {name.split()[0] for name in COUNTS}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_an_experiment_has_the_published_settings(experiment: str) -> None:
    config = composed(experiment)
    check(config, EIGHT_GPUS)
    tree = OmegaConf.create(OmegaConf.to_container(config, enum_to_str=True))
    assert {key: OmegaConf.select(tree, key) for key in PUBLISHED[experiment]} == PUBLISHED[experiment]


@pytest.mark.parametrize("experiment", COUNTS)
def test_an_experiment_has_the_published_parameters(experiment: str) -> None:
    from tunewright.trainer.model.config_json import model_numbers
    from tunewright.trainer.model.meta_model import count, empty_model, hf_config

    config = composed(experiment)
    assert count(config, empty_model(hf_config(config, model_numbers(config)))) == COUNTS[experiment]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with `huanhuan` (2,030 rows) and `ours` (40, with a system message), and what the others read."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("data")
    rows = [{"instruction": f"第{number}问", "input": "", "output": f"答{number % 7}"} for number in range(2030)]
    system = "Given a number, name the next one."
    ours = [{"system": system, "instruction": f"{n}", "output": f"It is {n + 1}."} for n in range(40)]
    texts = [{"text": f"<s>[INST] Say {'so ' * (n % 5)}{n} [/INST] It is {n}. </s>"} for n in range(40)]
    for name, content in (("huanhuan", rows), ("ours", ours), ("guanaco", texts)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    entries = {name: {"file_name": f"{name}.json"} for name in ("huanhuan", "ours")}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    Dataset.from_list(rows[:64]).save_to_disk(str(folder / "alpaca_data_zh"))
    return folder


@pytest.mark.parametrize(("experiment", "steps"), [("huanhuan_zero3", 480), ("huanhuan_single", 3810)])
def test_huanhuan_takes_the_published_steps(experiment: str, steps: int, data: Path) -> None:
    from tunewright.launch.row_counts import training_rows
    from tunewright.plan.batch_plan import planned_steps

    config = composed(experiment, f"data.dir={data}")
    plan = check(config, ONE_GPU if experiment == "huanhuan_single" else EIGHT_GPUS)
    rows = training_rows(config)
    assert rows is not None
    assert (rows.examples, rows.cache) == (2030, None)
    assert planned_steps(config, plan, 2030, 0).total == steps


def test_a_dry_run_tells_parameters_rows_and_steps(tunewright: Any, data: Path, tmp_path: Path) -> None:
    command = ["train", "experiment=huanhuan_zero2", f"data.dir={data}", f"output_root={tmp_path}", "--dry-run"]
    done = tunewright(*command)
    assert done.returncode == 0, done.stderr
    assert "qwen2_5_7b, method=lora: 20,185,088 of 7,635,801,600 parameters are trained (0.264%)" in done.stdout
    assert "2,030 examples to train on" in done.stdout
    assert "480 optimiser steps: 16 an epoch, 30 epochs; 128 rows a step = 8 ranks x 4 micro-batches" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_a_network_tells_the_parameters(tunewright: Any, tmp_path: Path) -> None:
    """Neither are the weights here, nor the rows, nor does any name resolve."""
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path / "hf")}
    nowhere |= {"HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
    done = tunewright("train", "experiment=rocm_qlora_guanaco", "--dry-run", f"output_root={tmp_path}/runs", **nowhere)
    assert done.returncode == 0, done.stderr
    assert "4,194,304 of 6,742,609,920 parameters are trained (0.062%)" in done.stdout
    assert "Rows and steps are not known here: 'hub:mlabonne/guanaco-llama2-1k'" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_tells_the_parameters_before_what_is_wrong_with_the_data(tunewright: Any, tmp_path: Path) -> None:
    done = tunewright("train", "experiment=bloom_prompt_tuning_hard", "--dry-run", f"output_root={tmp_path}/runs")
    assert done.returncode == 3
    assert "20,480 of 1,303,132,160 parameters are trained (0.002%)" in done.stdout
    assert done.stderr.startswith("DataError: `data.names` asks for 'data/alpaca_data_zh'")


# Each of them trained, with the embedded model in place of its own

SMALL = [
    "model=tiny",
    "train.max_steps=3",
    "train.logging_steps=1",
    "data.cutoff_len=64",
    "cluster.threads_per_process=1",
]
TrainHere = Callable[..., Path]


def check_run(run: Path, method: str, strategy: str = "single") -> dict[str, Any]:
    found = manifest(run)
    assert (found["status"], found["method"], found["strategy"]) == ("done", method, strategy)
    assert found["steps"] == 3
    assert len(losses(run)) == 3
    trainable, total = found["parameters"]["trainable"], found["parameters"]["total"]
    assert trainable == total if method == "full" else 0 < trainable < total
    return found


@pytest.fixture(scope="module")
def guanaco(train_here: TrainHere, data: Path) -> dict[str, Path]:
    """The three runs that are compared."""
    more = [*SMALL, f"data.names=[{data}/guanaco.json]"]
    names = ("rocm_guanaco_full", "rocm_guanaco_lora", "rocm_qlora_guanaco")
    return {name: train_here(name, f"experiment={name}", *more) for name in names}


def test_rocm_guanaco_trains_three_ways(guanaco: dict[str, Path]) -> None:
    full, lora, qlora = (
        check_run(guanaco[name], method)["parameters"]
        for name, method in (
            ("rocm_guanaco_full", "full"),
            ("rocm_guanaco_lora", "lora"),
            ("rocm_qlora_guanaco", "qlora"),
        )
    )
    assert lora == qlora  # 4-bit weights are counted one by one
    assert full["total"] + lora["trainable"] == lora["total"]


def test_the_three_ways_are_compared(guanaco: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    out = compare(list(guanaco.values()), tmp_path, echo=said.append)
    text = (out / "comparison.txt").read_text()
    assert text.strip() in "\n".join(said)
    table = {line.partition("  ")[0]: line for line in text.splitlines()}
    for run in guanaco.values():
        counts = manifest(run)["parameters"]
        share = counts["trainable"] / counts["total"]
        assert f"{counts['trainable']:,} of {counts['total']:,} ({share:.3%})" in table["trainable parameters"]
        assert f"{manifest(run)['final']['train_loss']:.4f}" in table["final train loss"]
    assert table["method"].split()[1:] == ["full", "lora", "qlora"]
    assert table["world size"].split()[2:] == ["1", "1", "1"]
    for row in ("peak memory (largest rank)", "wall time", "device", "final train loss"):
        assert len(table[row].removeprefix(row).split()) >= 3
        assert " - " not in f"{table[row]} "


def test_huanhuan_trains_alone(train_here: TrainHere, data: Path) -> None:
    found = check_run(train_here("huanhuan_single", "experiment=huanhuan_single", f"data.dir={data}", *SMALL), "lora")
    assert found["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("experiment", "strategy", "stage"), [("huanhuan_zero2", "zero2_offload", 2), ("huanhuan_zero3", "zero3", 3)]
)
def test_huanhuan_trains_on_two_ranks(experiment: str, strategy: str, stage: int, train: Any, data: Path) -> None:
    run = train(experiment, f"experiment={experiment}", f"data.dir={data}", "cluster.num_processes=2", *SMALL)
    distributed = check_run(run, "lora", strategy)["distributed"]
    assert (distributed["world_size"], distributed["zero_stage"]) == (2, stage)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_bloom_trains_and_answers_from_a_checkpoint(
    kind: str, train_here: TrainHere, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"bloom_prompt_tuning_{kind}"
    more = [f"data.names=[{data}/alpaca_data_zh]", "train.save_steps=2", "model.template=human_assistant"]
    run = train_here(name, f"experiment={name}", *SMALL, *more)
    assert check_run(run, "prompt_tuning")["parameters"]["trainable"] == 10 * 256  # tokens x the model's width
    saved = json.loads((run / "final" / "adapter_config.json").read_text(encoding="utf-8"))
    begun = ("RANDOM", None) if kind == "soft" else ("TEXT", PUBLISHED[name]["method.init_text"])
    assert (saved["prompt_tuning_init"], saved["prompt_tuning_init_text"]) == begun
    capsys.readouterr()
    question = ["--prompt", "第1问", "--max-new-tokens", "8"]
    assert main(["chat", str(run / "checkpoints" / "checkpoint-2"), *question]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "> 第1问"
    assert said[2].startswith("base  | ")
    assert any(line.startswith("tuned | ") for line in said)


def test_gpt_llm_trainer_trains_merges_and_answers(
    train_here: TrainHere, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = ["data.names=[ours]", f"data.dir={data}", "train.eval_steps=2", "train.max_steps=3"]
    run = train_here("gpt_llm_trainer", "experiment=gpt_llm_trainer", *SMALL, *more)
    found = check_run(run, "qlora")
    assert (found["data"]["train"]["examples"], found["data"]["eval"]["examples"]) == (36, 4)
    assert [line["step"] for line in read_metrics(run) if "eval_loss" in line] == [2, 3]
    assert main(["merge", str(run), "--dtype", "fp16"]) == 0, capsys.readouterr().err

    folder = RunDir(run).merged
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype is torch.float16
    system = {"role": "system", "content": "Given a number, name the next one."}
    messages = [system, {"role": "user", "content": "7"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith(f"[INST] <<SYS>>\n{system['content']}\n<</SYS>>\n\n7 [/INST]")
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = model.float().generate(**batch, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]
