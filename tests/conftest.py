"""Shared by all tests: where things are, how `tunewright` is run as a user runs it, and training in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunewright.checkpoints import PART, RECORD, commit, files_in, read_record, seal
from tunewright.claims import Claim, prepare_folder
from tunewright.config.compose import compose_config
from tunewright.files import write_json
from tunewright.launch.train import check_all
from tunewright.plan.devices import find_devices
from tunewright.run_folder import RunDir, copy_of
from tunewright.trainer.prepared import prepare
from tunewright.trees import digest

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 400  # seconds: far above what any command here takes, below what hides a hang


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> None:
    """Anything that would reach for a hub fails at once instead of retrying."""
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tunewright() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in the repository and return what it printed and its exit code."""

    def run(*args: str | Path, timeout: float = TIMEOUT, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tunewright.launch.cli", *map(str, args)],
            cwd=REPOSITORY,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def train(tunewright: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train with the given overrides through the launcher, and return the run folder of a run that succeeded."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str, **env: str) -> Path:
        done = tunewright("train", f"output_root={root}", f"name={name}", *overrides, **env)
        logs = "\n".join(path.read_text()[-3000:] for path in sorted((root / name / "logs").glob("*.log")))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
        return root / name

    return run


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The folder of the embedded model, built on first use."""
    return prepare(compose_config(), lambda line: None).model_path


@pytest.fixture(scope="session")
def hub_server() -> Any:
    """The class HubServer of tests/hub_server.py; with importlib mode, tests are no packages."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.HubServer


@pytest.fixture(scope="session")
def train_here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train on one device in this process, and return the run folder; further options are those of `train`."""
    from accelerate import PartialState

    from tunewright.trainer.console import Printer
    from tunewright.trainer.training import train

    root = tmp_path_factory.mktemp("here")

    def run(name: str, *overrides: str, checkpoint: Path | None = None, **options: Any) -> Path:
        config = compose_config([f"output_root={root}", f"name={name}", *overrides])
        check_all(config, find_devices())
        folder = RunDir(root / name)
        prepare_folder(config, Claim(folder, checkpoint))
        prepared = prepare(config, lambda line: None)
        options = {"output": Printer(lambda line: None), **options}
        train(config, folder, prepared, PartialState(cpu=True), checkpoint=checkpoint, **options)
        return folder.path

    return run


def write_checkpoint(run: RunDir, step: int, epoch: float = 1.0) -> Path:
    """Commit a checkpoint of a run whose folder is prepared, with nothing but a state in it."""
    staging = run.checkpoints / PART / f"checkpoint-{step}"
    staging.mkdir(parents=True)
    (staging / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": epoch}))
    alone = {"world_size": 1, "strategy": "single", "zero_stage": None}
    told = {"step": step, "epoch": epoch, **alone, "run": copy_of(run)}
    return commit(staging, {**told, "files": seal(staging, files_in(staging))})


def reseal(checkpoint: Path) -> None:
    """Make a checkpoint whole again whose files were changed, as somebody could who wants it to be taken for one."""
    record = {key: value for key, value in read_record(checkpoint).items() if key != "digest"}
    record["files"] = seal(checkpoint, record["files"])
    write_json(checkpoint / RECORD, {**record, "digest": digest(record)})


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[float]:
    """Return the training loss of each logged step."""
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def manifest(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "manifest.json").read_text(encoding="utf-8")))


# What the shipped chat templates write around turns.
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"]


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


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that trainings of this test used, with their models as training left them."""
    import tunewright.trainer.training

    made: list[Any] = []

    class Remembered(tunewright.trainer.training.TunewrightTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(tunewright.trainer.training, "TunewrightTrainer", Remembered)
    return made
