"""Models are found where their source says, whole, and without the network."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import losses
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.trainer.methods import adapt, parameter_counts
from tunewright.trainer.model import load, tiny
from tunewright.trainer.model.download import has_weights
from tunewright.trainer.model.load import load_model, torch_dtype
from tunewright.trainer.model.model_folder import find_model
from tunewright.trainer.model.tokenizer import load_tokenizer, stop_tokens


def test_the_embedded_model_is_kept_under_a_key_of_what_made_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tiny.tiny_key()
    assert tiny_model.name == f"tiny-{key}"
    changed = tmp_path / "corpus.jsonl"
    changed.write_bytes(tiny.CORPUS.read_bytes() + b'{"text": "One line more."}\n')
    monkeypatch.setattr(tiny, "CORPUS", changed)
    assert tiny.tiny_key() != key


def test_the_embedded_model_speaks_its_chat_template(tiny_model: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(tiny_model), AutoConfig.from_pretrained(tiny_model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer("快递 parcel 🎁")["input_ids"]) == "快递 parcel 🎁"
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.model_type == "qwen2"


def test_the_embedded_tokenizer_loads_as_it_was_trained(tiny_tokenizer: Any) -> None:
    trained = tiny.train_tokenizer()
    for text in tiny._texts(trained):
        assert tiny_tokenizer(text)["input_ids"] == trained(text)["input_ids"]


def test_a_hub_model_in_the_local_cache_is_opened_without_the_network(tiny_model: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--org--small"
    shutil.copytree(tiny_model, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    code = (
        "from tunewright.config.compose import compose_config\n"
        "from tunewright.trainer.model.model_folder import find_model\n"
        "print(find_model(compose_config(['model=qwen2_5_7b', 'model.path=org/small']).model, ''))\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def found() -> str:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert found() == str(cached / "snapshots" / "abc")
    (cached / "snapshots" / "abc" / "model.safetensors").unlink()  # a download that was cut off
    assert found() == "None"


def test_a_sharded_model_needs_every_shard(tmp_path: Path) -> None:
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "model-1.safetensors").touch()
    assert not has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert has_weights(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    for path, said in ((tmp_path, "holds no model weights"), (tmp_path / "none", "does not exist")):
        with pytest.raises(ConfigError, match=said):
            find_model(compose_config(["model=folder", f"model.path={path}"]).model, "")
    assert find_model(compose_config(["model=folder", f"model.path={tiny_model}"]).model, "") == tiny_model


@pytest.mark.parametrize(("method", "r"), [("full", 0), ("lora", 4), ("qlora", 4)])
def test_parameters_are_counted_by_hand(tiny_model: Path, method: str, r: int) -> None:
    """A LoRA pair on a matrix (rows, columns) has r (rows + columns) weights; two 4-bit weights share a byte."""
    config = compose_config([f"method={method}", *([f"method.r={r}"] if r else [])])
    dtype = torch_dtype(config.model.dtype, "cpu")
    model = adapt(load_model(tiny_model, config.model, dtype, method=config.method), config.method)
    width, inner, layers, vocabulary = 256, 768, 4, 4096
    shapes = [(width, width)] * 2 + [(width, width // 2)] * 2 + [(width, inner)] * 3
    biases = 2 * width  # of q (256), k and v (128 each)
    norms = 2 * width
    base = layers * (sum(a * b for a, b in shapes) + biases + norms) + width + 2 * vocabulary * width
    adapter = layers * sum(r * (a + b) for a, b in shapes)
    assert parameter_counts(model) == ((adapter, base + adapter) if r else (base, base))


def test_a_named_template_is_saved_with_the_model_and_stops_it(train_here: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    run = train_here("named", "model.template=human_assistant", "method=full", "train.max_steps=1")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert text == "Human: a\nAssistant:"
    stops = GenerationConfig.from_pretrained(run / "final").eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])


def test_the_token_that_ends_the_templates_turns_stops_generation_too(tiny_model: Path) -> None:
    config = compose_config().model
    tokenizer = load_tokenizer(tiny_model, config)
    model = load_model(tiny_model, config, torch_dtype(config.dtype, "cpu"))
    model.generation_config.eos_token_id = 7  # a base model that ends texts with another token than turns
    assert stop_tokens(model, tokenizer) == sorted({7, tokenizer.convert_tokens_to_ids("<|im_end|>")})


@pytest.fixture(scope="module")
def without_weights(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as a download of config.json and tokenizer leaves it."""
    folder = tmp_path_factory.mktemp("shape")
    for file in small_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_model_without_weights_trains_on_drawn_ones(
    method: str, without_weights: Path, train_here: Callable[..., Path]
) -> None:
    settings = ["model=folder", f"model.path={without_weights}", f"method={method}", "data.max_samples=16"]
    settings += ["train.max_steps=2", "train.logging_steps=1", "train.learning_rate=0.01", "train.warmup_ratio=0"]
    run = train_here(f"drawn-{method}", *settings, "model.random_weights=true")
    first, last = losses(run)
    assert first == pytest.approx(math.log(4096), rel=0.05)  # it knows nothing
    assert last < first
    assert losses(train_here(f"drawn-again-{method}", *settings, "model.random_weights=true")) == [first, last]


def test_a_folder_without_weights_is_refused_unless_they_are_drawn(without_weights: Path) -> None:
    config = compose_config(["model=folder", f"model.path={without_weights}"])
    with pytest.raises(ConfigError, match="holds no model weights"):
        find_model(config.model, config.data.cache_dir)
    config.model.random_weights = True
    assert find_model(config.model, config.data.cache_dir) == without_weights


def test_a_base_is_read_straight_to_the_device_that_trains() -> None:
    from transformers.integrations import HfDeepSpeedConfig

    gpu, options = torch.device("cuda", 3), {"dtype": torch.bfloat16}
    assert load._placed(gpu, options) == {"device_map": {"": gpu}}
    assert load._placed(torch.device("cpu"), options) == load._placed(None, options) == {}
    assert load._placed(gpu, {**options, "quantization_config": {}}) == {"device_map": {"": gpu}}
    stage3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert load._placed(gpu, options) == {}  # transformers refuses it there
    del stage3
    assert load._placed(gpu, options) == {"device_map": {"": gpu}}
