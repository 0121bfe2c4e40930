"""Answers of the base and of the tuned model, the two of them in one copy of the weights where that is possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from peft import PeftModel

from tunewright.errors import ConfigError
from tunewright.run_folder import RunDir, settings_of
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.methods.prompt_learning import learns_prompt
from tunewright.trainer.model.load import load_model, quiet_libraries, torch_dtype
from tunewright.trainer.model.tokenizer import load_tokenizer, stop_ids, stop_tokens
from tunewright.trust import check_code, check_ours

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_of(path: Path, *, checkpoints: bool = False) -> RunDir:
    """Return the run folder at `path`, or with `checkpoints` the run of a checkpoint, that one being its result.

    Raises:
        ConfigError: there is no run, or it has not finished.
    """
    if checkpoints and path.parent.name == RunDir(path).checkpoints.name and (path / "trainer_state.json").is_file():
        return RunDir(path.parent.parent, path)
    run = RunDir(path)
    if not run.manifest.is_file():
        raise ConfigError(f"{path} is not a run folder: it has no {run.manifest.name}.")
    if not run.final.is_dir():
        status = run.read_manifest().get("status")
        last = run.last_checkpoint()
        instead = f", or name one of its checkpoints, for example {last}" if last and checkpoints else ""
        raise ConfigError(f"{path} has no result yet (status: {status}). Continue it with resume=auto{instead}.")
    return run


def open_run(path: Path, *, trusted: bool, checkpoints: bool = False) -> tuple[RunDir, DictConfig]:
    """Return the run folder at `path`, see `run_of`, with its configuration.

    Raises:
        ConfigError: there is no result; or it is somebody else's, or would run code, and is not `trusted`.
    """
    run = run_of(path, checkpoints=checkpoints)
    check_ours(run.config, run.read_manifest(), trusted=trusted, how="--trust")
    config = settings_of(run, trusted=trusted)
    check_code(config.model.trust_remote_code, config.model.path, trusted=trusted)
    return run, config


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weights_of(config: DictConfig, model_path: Path) -> tuple[Any, ...]:
    """Return what decides the base model's weights: runs that agree in it can share one copy."""
    model, method = config.model, config.method
    common = model_path, model.dtype, model.trust_remote_code, model.random_weights
    if method.name != "qlora":
        return common
    return (*common, method.bits, method.quant_type, method.double_quant, method.compute_dtype)


class Answerer:
    """A tokenizer and a base model that gives greedy answers, with or without a run's adapter on it.

    `weights` is a model that is loaded already, see `weights_of`; how it is asked is the configuration's own in any
    case.
    """

    def __init__(self, config: DictConfig, model_path: Path, weights: Any = None) -> None:
        quiet_libraries()
        self.config = config
        self.tokenizer = load_tokenizer(model_path, config.model)
        self.renderer = Renderer.of(config, self.tokenizer)
        self.tokenizer.padding_side = "left"  # so that every prompt of a batch ends where its answer begins
        self.dtype = torch_dtype(config.model.dtype, device().type)
        self.model: Any = self._load(model_path) if weights is None else weights
        self.model.eval()

    def _load(self, model_path: Path) -> Any:
        config = self.config
        return load_model(model_path, config.model, self.dtype, method=config.method, device=device())

    @property
    def stops(self) -> list[int]:
        """The ids that end an answer."""
        return stop_tokens(self.model, self.tokenizer)

    @contextmanager
    def tuned(self, run: RunDir) -> Iterator[None]:
        """Put the run's result in place of the base model for the time of the context."""
        base = self.model
        if (run.final / "adapter_config.json").is_file():
            adapted = PeftModel.from_pretrained(base, str(run.final), autocast_adapter_dtype=False)
            self.model = adapted.eval()
            try:
                yield
            finally:
                prompt = adapted.active_peft_config.is_prompt_learning  # which leaves the base as it is
                self.model = base if prompt else adapted.unload()
            return
        saved = self.config.model.copy()
        saved.random_weights = False  # those were the ones that it began with
        self.model = load_model(run.final, saved, self.dtype, device=device()).eval()
        try:
            yield
        finally:
            self.model = base

    def answer(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """Return the greedy answer to each prompt, see `Renderer.prompt`; they are generated together."""
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device())
        inputs, start = dict(batch), batch["input_ids"].shape[1]
        model = self.model
        with torch.no_grad():
            if learns_prompt(model) and model.active_peft_config.peft_type != "PREFIX_TUNING":
                inputs, start = behind_virtual_tokens(model, inputs), 0
                model = model.get_base_model()
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.stops,
            )
        special = self.config.data.special_tokens_in_answers
        return [said(self.tokenizer, ids, special_tokens=special) for ids in output[:, start:].tolist()]


def said(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, special_tokens: bool) -> str:
    """Return the text of an answer's ids; with `special_tokens` those are said as well, up to the one that ends it."""
    if special_tokens:
        ends = stop_ids(tokenizer) | {tokenizer.pad_token_id}
        ids = list(takewhile(lambda number: number not in ends, ids))
    return str(tokenizer.decode(ids, skip_special_tokens=not special_tokens)).strip()


def behind_virtual_tokens(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the embeddings (B, n + T, width) of prompts padded on the left, each with its virtual tokens before it.

    PEFT (0.21) puts the virtual tokens before the padding: further from a short prompt than in training.
    """
    mask = batch["attention_mask"]  # (B, T)
    embedded = model.word_embeddings(batch["input_ids"])  # (B, T, width)
    virtual = model.get_prompt(batch_size=len(mask)).to(embedded.dtype)  # (B, n, width)
    padding = (mask.shape[1] - mask.sum(dim=1)).tolist()
    rows = [
        torch.cat((row[:length], tokens, row[length:]))
        for row, tokens, length in zip(embedded, virtual, padding, strict=True)
    ]
    ones = mask.new_ones(virtual.shape[:2])
    return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.cat((mask, ones), dim=1)}
