"""Shared by the trainer's tests: the embedded model, and training in this process where one device is enough."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose_config
from launch.hardware import find_devices
from launch.rundir import Claim, RunDir, prepare_folder
from launch.train import check_all
from trainer.prepare import prepare

# What the shipped chat templates write around turns.
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"]


class Quiet:
    """A console for runs inside a test."""

    def say(self, text: str) -> None:
        pass


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The folder of the embedded model, built on first use."""
    return prepare(compose_config(), lambda line: None).model_path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """A byte-level tokenizer that knows every shipped template's markers, without a template of its own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["A user asks.", "An assistant answers."], 400, special_tokens=["<s>", "</s>", *SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL
    )


@pytest.fixture(scope="session")
def small_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two narrow layers with the embedded model's tokenizer: a step takes milliseconds."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("small")
    shape = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hub_server() -> Any:
    """The class HubServer of tests/hub_server.py; with importlib mode, tests are no packages."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parents[1] / "hub_server.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.HubServer


@pytest.fixture(scope="session")
def train_here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train on one device in this process, and return the run folder."""
    from accelerate import PartialState

    from trainer.run import train

    root = tmp_path_factory.mktemp("here")

    def run(name: str, *overrides: str, checkpoint: Path | None = None) -> Path:
        config = compose_config([f"output_root={root}", f"name={name}", *overrides])
        check_all(config, find_devices())
        folder = RunDir(root / name)
        prepare_folder(config, Claim(folder, checkpoint))
        prepared = prepare(config, lambda line: None)
        train(config, folder, prepared.cache, prepared.model_path, PartialState(cpu=True), Quiet(), checkpoint)
        return folder.path

    return run


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that trainings of this test used, with their models as training left them."""
    import trainer.run

    made: list[Any] = []

    class Remembered(trainer.run.TunewrightTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(trainer.run, "TunewrightTrainer", Remembered)
    return made
