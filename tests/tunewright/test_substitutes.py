"""What is decided for the user, each time with the reason, and what is refused because there is a choice to make."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.plan.architecture import Architecture
from tunewright.plan.devices import Devices
from tunewright.plan.module_rules import check_modules
from tunewright.plan.rules import OPTIMIZERS, check
from tunewright.plan.substitutes import UNPAGED, adapter_folder, substitute

CPU, GPU = Devices("cpu", 0, 2), Devices("cuda", 1, 8)
BLOOM = "BloomForCausalLM has ALiBi"
PLAIN = Architecture(
    "llama", {}, {}, "lm_head", "embed_tokens", 512, "model.layers", 2, False, None, None, None, True, ["trl"], None, 0
)
ALIBI = Architecture(
    "bloom",
    {},
    {},
    "lm_head",
    "word_embeddings",
    512,
    "transformer.h",
    2,
    True,
    BLOOM,
    None,
    None,
    True,
    ["trl"],
    None,
    0,
)


def substituted(*overrides: str, architecture: Architecture = PLAIN, devices: Devices = CPU) -> tuple[Any, list[str]]:
    config = compose_config(overrides)
    check(config, devices)
    return config, substitute(config, architecture, devices)


@pytest.mark.parametrize("paged", sorted(UNPAGED))
def test_a_paged_optimiser_is_kept_on_a_gpu_alone(paged: str) -> None:
    config, said = substituted(f"train.optimizer={paged}", devices=GPU)
    assert (config.train.optimizer, said) == (paged, [])
    for strategy, devices, where in (("single", CPU, "no GPU here"), ("zero2_offload", GPU, "in host memory already")):
        config, (text,) = substituted(f"train.optimizer={paged}", f"strategy={strategy}", devices=devices)
        assert config.train.optimizer == UNPAGED[paged]
        assert text.startswith(f"Optimiser {UNPAGED[paged]} for {paged}: ")
        assert where in text


def test_every_paged_optimiser_has_a_substitute() -> None:
    assert set(UNPAGED) == {name for name in OPTIMIZERS if name.startswith("paged_")}
    assert set(UNPAGED.values()) <= set(OPTIMIZERS)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_batches_are_padded_for_virtual_tokens(method: str) -> None:
    config, (text,) = substituted(f"method={method}")
    assert not config.train.padding_free
    assert text.startswith(f"Padded batches: `method={method}` puts virtual tokens before every row")


def test_batches_are_padded_where_the_architecture_cannot_do_without() -> None:
    config, said = substituted(architecture=ALIBI)
    assert not config.train.padding_free
    assert said == [f"Padded batches: {BLOOM}."]
    assert substituted("train.padding_free=false", architecture=ALIBI)[1] == []
    assert substituted(architecture=PLAIN)[0].train.padding_free


def test_a_dry_run_tells_what_was_decided(tunewright: Any, tmp_path: Path) -> None:
    command = ["train", "model=bloom_1b4_zh", "method=prompt_tuning", "train.optimizer=paged_adamw_8bit", "--dry-run"]
    done = tunewright(*command, f"output_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "Padded batches: BloomForCausalLM has ALiBi" in done.stdout
    assert "Optimiser adamw_8bit for paged_adamw_8bit" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_come_with_the_evaluations_that_keep_best_compares() -> None:
    config, said = substituted("train.keep_best=true", "train.eval_steps=7")
    assert config.train.save_steps == 7
    assert said == ["Checkpoints every 7 steps, with each evaluation, as train.keep_best needs."]
    assert substituted("train.keep_best=true", "train.eval_steps=7", "train.save_steps=7")[1] == []
    assert substituted("train.eval_steps=7")[0].train.save_steps is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("train.keep_best=true data.eval_names=[] train.eval_steps=5", "`train.keep_best` looks at the eval loss, and"),
        ("train.keep_best=true data.eval_names=[] train.eval_steps=5", "set data.eval_size, data.eval_names or data."),
        ("train.early_stopping=2 data.eval_names=[] train.eval_steps=5", "`train.early_stopping` looks at the eval"),
        ("train.keep_best=true", "`train.keep_best` compares evaluations: set train.eval_steps"),
        ("train.early_stopping=2", "`train.early_stopping` compares evaluations: set train.eval_steps"),
        ("train.early_stopping=0 train.eval_steps=5", "`train.early_stopping` is 0"),
        ("train.keep_best=true train.eval_steps=5 train.save_steps=10", "Write the same number"),
    ],
)
def test_a_best_checkpoint_needs_evaluations(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        substituted(*overrides.split())
    assert said in str(caught.value)


# An adapter to go on with


def write_adapter(folder: Path, **changes: Any) -> Path:
    saved = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "target_modules": ["v_proj", "q_proj"]}
    saved |= {"use_rslora": True, "use_dora": False, "modules_to_save": ["norm"]}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**saved, **changes}))
    return folder


@pytest.mark.parametrize("of", ["folder", "run"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapters_shape_is_taken_over(method: str, of: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "run" / "final")
    given = folder if of == "folder" else folder.parent
    config, (text,) = substituted(f"method={method}", f"method.adapter={given}", "method.r=64")
    taken = config.method
    assert (taken.r, taken.alpha, taken.dropout, taken.rslora, taken.dora) == (3, 5, 0.25, True, False)
    assert list(taken.target_modules) == ["q_proj", "v_proj"]
    assert list(taken.modules_to_save) == ["norm"]
    assert taken.adapter == str(folder)
    assert text.endswith(f"{folder}: r 3, alpha 5, dropout 0.25 on q_proj, v_proj, as it was made.")


def test_an_adapters_pattern_of_names_is_taken_over(tmp_path: Path) -> None:
    pattern = r"model\.layers\.0\..*proj"
    folder = write_adapter(tmp_path / "adapter", target_modules=pattern, modules_to_save=None)
    config, _ = substituted(f"method.adapter={folder}")
    assert config.method.target_modules == pattern
    assert list(config.method.modules_to_save) == []


def test_what_is_no_adapter_to_go_on_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no adapter_config.json: write the folder"):
        substituted(f"method.adapter={tmp_path}/none")
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds no adapter_config.json"):
        substituted(f"method.adapter={tmp_path}/run")
    other = write_adapter(tmp_path / "ia3", peft_type="IA3")
    with pytest.raises(ConfigError, match="of the kind IA3: only LoRA"):
        substituted(f"method.adapter={other}")
    damaged = write_adapter(tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    with pytest.raises(ConfigError, match=r"adapter_config.json is damaged: .* line 1"):
        substituted(f"method.adapter={damaged}")
    for text, missing in (("[]", "peft_type"), ('{"peft_type": "LORA", "r": 8}', "lora_alpha, lora_dropout, target")):
        (damaged / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"adapter_config.json is damaged: it has no {missing}"):
            substituted(f"method.adapter={damaged}")
    with pytest.raises(ConfigError, match=r"leave method.init out"):
        substituted(f"method.adapter={other}", "method.init=pissa")


def test_an_adapter_has_to_fit_the_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    folder = write_adapter(tmp_path / "adapter", modules_to_save=None)
    config = compose_config([f"method.adapter={folder}"])
    substitute(config, PLAIN, CPU)
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    fits = replace(PLAIN, modules={q: "linear", v: "linear"}, sizes={q: [8, 4], v: [2, 4]})
    with pytest.raises(ConfigError, match="holds no weights: there is no adapter_model"):
        check_modules(config, fits)
    shape = {f"base_model.model.{q}.lora_A.weight": zeros(3, 4), f"base_model.model.{q}.lora_B.weight": zeros(8, 3)}
    save_file(shape, folder / "adapter_model.safetensors")
    check_modules(config, fits)
    for sizes, said in (
        ({q: [8, 5]}, "lora_A.weight has 3 x 4, where model.layers.0.self_attn.q_proj has 8 x 5"),
        ({q: [9, 4]}, "lora_B.weight has 8 x 3, where"),
        ({}, "the model has no such module"),
    ):
        with pytest.raises(ConfigError, match=f"an adapter for another model: its .*{said}"):
            check_modules(config, replace(fits, sizes=sizes))


def test_layers_are_recomputed_only_where_the_architecture_can() -> None:
    config = compose_config(["train.gradient_checkpointing=true"])
    check_modules(config, PLAIN)
    with pytest.raises(ConfigError, match="transformers cannot do for llama"):
        check_modules(config, replace(PLAIN, recomputes=False))


def test_training_goes_on_with_a_runs_adapter(train_here: Any, tmp_path: Path) -> None:
    """From a run's folder, in the shape it has, whatever the configuration says."""
    from safetensors.torch import load_file

    small = ["data.max_samples=16", "data.eval_names=[]", "train.max_steps=2", "data.cutoff_len=64"]
    first = train_here("adapter-first", *small, "method.r=2", "method.alpha=6", "method.target_modules=[q_proj,v_proj]")
    moved = tmp_path / "elsewhere"
    shutil.copytree(first / "final", moved)
    second = train_here("adapter-second", *small, f"method.adapter={moved}", "train.learning_rate=1e-12")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (moved, second / "final"))
    assert before.keys() == after.keys()
    assert all(before[name].sub(after[name]).abs().max() < 1e-6 for name in before)
    saved = json.loads((second / "final" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], sorted(saved["target_modules"])) == (2, 6, ["q_proj", "v_proj"])
    assert adapter_folder(str(second)) == (second / "final").resolve()
