"""A wrong module name is answered from the model's shape alone, before a weight is fetched or loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.plan.architecture import Architecture
from tunewright.plan.devices import Devices, find_devices
from tunewright.plan.module_rules import check_modules
from tunewright.plan.rules import check
from tunewright.trainer.model.config_json import _given_numbers, model_numbers
from tunewright.trainer.model.meta_model import describe, empty_model, hf_config

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a config.json says of a small model of each family.
NUMBERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": False},
    "qwen2_tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", **SIZES},
    "gemma2": {"model_type": "gemma2", **SIZES, "head_dim": 16},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "head_dim": 16},
    "phi3": {"model_type": "phi3", **SIZES},
    "bloom": {"model_type": "bloom", "vocab_size": 512, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt2": {"model_type": "gpt2", **SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
}
# head, embedding, layers, tied, a word of why rows cannot lie end to end, learnt positions
KNOWN = {
    "llama": ("lm_head", "model.embed_tokens", "model.layers", False, None, None),
    "qwen2": ("lm_head", "model.embed_tokens", "model.layers", False, None, None),
    "qwen2_tied": ("lm_head", "model.embed_tokens", "model.layers", True, None, None),
    "qwen3": ("lm_head", "model.embed_tokens", "model.layers", False, None, None),
    "mistral": ("lm_head", "model.embed_tokens", "model.layers", False, None, None),
    "gemma2": ("lm_head", "model.embed_tokens", "model.layers", True, "caps attention scores", None),
    "gemma3": ("lm_head", "model.embed_tokens", "model.layers", True, None, None),
    "phi3": ("lm_head", "model.embed_tokens", "model.layers", False, None, None),
    "bloom": ("lm_head", "transformer.word_embeddings", "transformer.h", True, "ALiBi", None),
    "gpt2": ("lm_head", "transformer.wte", "transformer.h", True, None, 1024),
}

Describe = Callable[[str], Architecture]


def model_of(name: str) -> Any:
    return empty_model(hf_config(compose_config(), NUMBERS[name]))


@pytest.fixture(scope="module")
def architecture() -> Describe:
    """Describe a family, once for all tests."""
    known: dict[str, Architecture] = {}

    def run(name: str) -> Architecture:
        if name not in known:
            known[name] = describe(model_of(name))
        return known[name]

    return run


@pytest.mark.parametrize("name", NUMBERS)
def test_an_architecture_is_known_from_its_numbers(name: str, architecture: Describe) -> None:
    found = architecture(name)
    problem = KNOWN[name][4]
    assert (found.head, found.embedding, found.layers, found.tied) == KNOWN[name][:4]
    assert found.num_layers == 2
    assert found.positions == KNOWN[name][5]
    assert (found.padding_free_problem is None) == (problem is None)
    assert (problem or "") in (found.padding_free_problem or "")


@pytest.mark.parametrize("name", NUMBERS)
def test_all_linear_adapts_every_matrix_but_the_head(name: str, architecture: Describe) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    adapted = get_peft_model(model_of(name), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    layers = {name for name, module in adapted.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    found = architecture(name)
    assert layers == {module for module, kind in found.modules.items() if kind == "linear"} - {found.head}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_kept_is_what_was_found(name: str, architecture: Describe, tmp_path: Path) -> None:
    kept, text = tmp_path / "kept.json", json.dumps(architecture(name).as_json())
    kept.write_text(text)
    assert Architecture.read(kept) == architecture(name)
    kept.write_text(text[:30])
    assert Architecture.read(kept) is None


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("qwen2", "method.target_modules=[c_attn]", "'c_attn', but qwen2 has no such module. Did you mean q_proj, k_"),
        ("qwen2", "method.target_modules=[c_attn]", "q_proj, k_proj, v_proj? It has embed_tokens, q_proj, k_proj, "),
        ("gpt2", "method.target_modules=[q_proj]", "gpt2 has no such module. Did you mean c_attn? It has wte, wpe, "),
        ("llama", "method.target_modules=[query_key_value]", "Did you mean q_proj, k_proj, v_proj?"),
        ("phi3", "method.target_modules=[v_proj]", "Did you mean qkv_proj?"),
        ("bloom", "method.target_modules=[up_proj]", "Did you mean dense_h_to_4h?"),
        ("llama", "method.target_modules=[q_porj]", "Did you mean q_proj?"),
        ("llama", "method.target_modules=[q_proj,v_prooj]", "'v_prooj'"),
        ("llama", "method.target_modules=[xyzzy]", "no such module. It has "),
        ("llama", "method.target_modules=[mlp]", "which is a block; it holds down_proj, gate_proj, up_proj."),
        ("llama", "method.target_modules=[self_attn]", "a block; it holds k_proj, o_proj, q_proj, v_proj."),
        ("llama", "method.target_modules=[input_layernorm]", "which holds no matrix to adapt"),
        ("llama", "method.target_modules=[proj]", "'proj'"),  # the end of a name, but no name
        ("llama", "method.target_modules=[lm_head]", "would pass an adapter by"),
        ("llama", "method.target_modules=[lm_head]", "method.modules_to_save=[lm_head]"),
        ("qwen2_tied", "method.target_modules=[lm_head]", "head of this model is its input embedding"),
        ("qwen2_tied", "method.target_modules=[q_proj,embed_tokens]", "one weight for both"),
        ("qwen2_tied", "method.modules_to_save=[lm_head]", "method.extra_modules=[embed_tokens]"),
        ("qwen2_tied", "method.modules_to_save=[embed_tokens]", "would part them"),
        ("llama", "method.modules_to_save=[wte]", "`method.modules_to_save` has 'wte'"),
        ("llama", "method.modules_to_save=[wte]", "Did you mean embed_tokens?"),
        ("llama", "method.modules_to_save=[q_proj] method.target_modules=[q_proj,v_proj]", "leave one of them out"),
        ("llama", "method.modules_to_save=[mlp] method.target_modules=[v_proj,up_proj]", "adapts with 'up_proj'"),
        ("llama", "method=qlora method.modules_to_save=[q_proj]", "quantises to 4 bits"),
        ("llama", "method=qlora method.bits=8 method.modules_to_save=[mlp]", "quantises to 8 bits"),
        ("llama", "method=ia3 method.target_modules=[k_proj,lm_head]", "method=freeze method.extra_modules=[lm_head]"),
        ("qwen2_tied", "method=ia3 method.target_modules=[lm_head]", "one weight for both"),
        ("llama", "method=freeze method.layers=0 method.extra_modules=[mlp]", "inside the layers: name it in"),
        ("llama", "method=freeze method.layers=3", "the model has 2 layers: write a number from -2 to 2"),
        ("llama", "method=freeze method.layers=-3", "the model has 2 layers"),
        ("llama", "method=freeze method.modules=[lm_head]", "outside the layers: name it in method.extra_modules"),
        ("llama", "method=freeze method.modules=[mpl]", "Did you mean mlp?"),
        ("llama", "method=freeze method.extra_modules=[wte]", "Did you mean embed_tokens?"),
        ("phi3", "method=ia3", "PEFT knows no IA3 modules for phi3"),
        ("phi3", "method=ia3", "It has o_proj, qkv_proj, gate_up_proj, down_proj, lm_head."),
        ("llama", "method=ia3 method.target_modules=[c_attn]", "Did you mean q_proj, k_proj, v_proj?"),
        (
            "llama",
            "method=ia3 method.target_modules=[k_proj] method.feedforward_modules=[down_proj]",
            "'down_proj', which `method.target_modules` has not",
        ),
        ("gpt2", "data.cutoff_len=2048", "has learnt 1024 positions. Write 1024 or less."),
    ],
)
def test_a_wrong_name_is_answered_with_those_that_exist(
    name: str, overrides: str, said: str, architecture: Describe
) -> None:
    config = compose_config(overrides.split())
    check(config, Devices("cpu", 0, 2))
    with pytest.raises(ConfigError) as caught:
        check_modules(config, architecture(name))
    assert said in str(caught.value)


def test_an_empty_list_of_modules_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`method.target_modules` is empty"):
        check(compose_config(["method.target_modules=[]"]), Devices("cpu", 0, 2))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", "method.target_modules=[q_proj,embed_tokens] method.modules_to_save=[lm_head,norm]"),
        ("llama", "method.target_modules=[self_attn.q_proj,model.layers.1.mlp.down_proj]"),
        ("gpt2", "method.target_modules=[c_attn,mlp.c_proj] data.cutoff_len=1024"),
        ("bloom", "method=ia3 data.cutoff_len=4096"),
        ("phi3", "method=ia3 method.target_modules=[qkv_proj,down_proj] method.feedforward_modules=[down_proj]"),
        ("qwen2_tied", "method=freeze method.layers=-2 method.modules=[mlp] method.extra_modules=[embed_tokens,norm]"),
    ],
)
def test_right_names_pass(name: str, overrides: str, architecture: Describe) -> None:
    check_modules(compose_config(overrides.split()), architecture(name))


def test_names_are_listed_without_numbers_and_not_without_end(architecture: Describe) -> None:
    llama = architecture("llama")
    assert "0" not in llama.leaves(("linear", "embedding", ""))
    many = replace(llama, modules={f"model.layers.0.m{number}": "linear" for number in range(40)})
    with pytest.raises(ConfigError, match="m23 and 16 more"):
        check_modules(compose_config(["method.target_modules=[wrong_one]"]), many)


# The whole way, as a user goes it


def test_the_command_answers_without_a_network_or_a_run_folder(tunewright: Any, tmp_path: Path) -> None:
    done = tunewright("train", "model=qwen2_5_7b", "method.target_modules=[c_attn]", f"output_root={tmp_path}/runs")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("ConfigError: `method.target_modules` has 'c_attn', but qwen2 has no such module.")
    assert "Did you mean q_proj, k_proj, v_proj?" in line
    assert not (tmp_path / "runs").exists()


PLAN = """
import sys
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.plan.devices import find_devices
from tunewright.launch.train import plan_job
try:
    plan_job(compose_config(sys.argv[1:]), find_devices())
except ConfigError as error:
    print(error)
print("torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_known_architecture_is_checked_without_importing_torch(tmp_path: Path) -> None:
    """The model is given by its numbers alone: there are no weights that could be touched."""
    numbers = ",".join(f"{key}:{value}" for key, value in NUMBERS["gpt2"].items())
    overrides = ["model=folder", "model.source=hub", "model.path=org/none", f"model.architecture={{{numbers}}}"]
    overrides += ["method.target_modules=[q_proj]"]
    overrides += [f"data.cache_dir={tmp_path}/cache", f"output_root={tmp_path}/runs", "offline=true"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PLAN, *overrides],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "gpt2 has no such module. Did you mean c_attn?" in done.stdout, done.stderr
        assert done.stdout.splitlines()[-1] == "False False"
    assert len(list((tmp_path / "cache" / "architectures").iterdir())) == 1
    assert not (tmp_path / "runs").exists()


def test_the_numbers_of_a_choice_are_not_taken_for_another_model(tunewright: Any, tmp_path: Path) -> None:
    command = ["train", "model=qwen2_5_7b", "--dry-run", "offline=true", f"output_root={tmp_path}"]
    away = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
    other = tunewright(*command, "model.path=org/other", **away)
    assert other.returncode == 4
    assert "`model.path` is 'org/other'" in other.stderr
    assert "`model.architecture` are those of Qwen/Qwen2.5-7B-Instruct alone" in other.stderr
    assert "parameters" not in other.stdout
    config = compose_config(["model=qwen2_5_7b", "model.path=org/other", "offline=true"])
    assert _given_numbers(config) is None
    config.model.path = "Qwen/Qwen2.5-7B-Instruct"
    numbers = _given_numbers(config)
    assert numbers is not None
    assert (numbers["hidden_size"], "of" in numbers) == (3584, False)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.path=org/other"], "`model.source=embedded` builds tiny on this machine"),
        (["model.revision=main"], "`model.source=embedded` has no revisions"),
        (["model.architecture=3"], "write a mapping such as {model_type: qwen2}"),
    ],
)
def test_a_model_that_would_not_be_the_one_named_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(compose_config(overrides), find_devices())


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "without a config.json"), ("{", "is damaged"), ("[]", "names no `model_type`")],
)
def test_a_folder_with_a_broken_configuration_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        model_numbers(compose_config(["model=folder", f"model.path={tmp_path}"]))


@pytest.mark.parametrize("source", ["hub", "modelscope"])
def test_a_hubs_model_is_checked_before_its_weights_are_fetched(
    source: str, tunewright: Any, tiny_model: Path, hub_server: Any, tmp_path: Path
) -> None:
    """Although the choice of `model` brings another model's numbers."""
    repository = tmp_path / "hub" / "models" / "org" / "mine"
    shutil.copytree(tiny_model, repository)
    assert (repository / "model.safetensors").is_file()
    command = ["train", "model=bloom_1b4_zh", f"model.source={source}", "model.path=org/mine"]
    command += ["method.target_modules=[c_attn]", f"output_root={tmp_path}/runs"]
    with hub_server(tmp_path / "hub") as hub:
        done = tunewright(*command, **hub.environment(tmp_path / "home"))
        assert done.returncode == 2, done.stderr
        assert "Did you mean q_proj, k_proj, v_proj?" in done.stderr
        assert any("config.json" in request for request in hub.requests)
        assert not [request for request in hub.requests if "model.safetensors" in request and "GET" in request]
    assert not (tmp_path / "runs").exists()


def test_a_number_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot use: .*'hidden_size': TypeError: .*'wide'"):
        hf_config(compose_config(), {**NUMBERS["llama"], "hidden_size": "wide"})
