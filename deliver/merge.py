"""`tunewright merge RUN`: the base model with the run's adapter in its weights, a model folder like any other.

    RUN/merged/model*.safetensors  config.json  generation_config.json  tokenizer and chat template  merge.json

It is written aside, loaded again and compared with base and adapter on rows of the run, and only then given its name.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from tunewright.deliver.base_tensors import Checkpoint
from tunewright.deliver.generate import open_run
from tunewright.deliver.merge_check import Comparison, Reference, pick_rows
from tunewright.deliver.merge_folder import RECORD, check_out, new_folder
from tunewright.deliver.merge_layers import Adapted, adapter_config
from tunewright.deliver.merge_weights import Written, size_of, write_merged
from tunewright.errors import ConfigError, StorageError
from tunewright.files import write_json
from tunewright.folders import check_name
from tunewright.run_folder import RunDir
from tunewright.trainer.inputs import check_base
from tunewright.trainer.model.load import quiet_libraries
from tunewright.trainer.model.tokenizer import load_tokenizer, stop_tokens
from tunewright.trainer.prepared import find_prepared, prepare

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# How far right merges were from base and adapter, on a CPU, with LoRA, DoRA, IA3 and replaced embeddings, in random
# models of 2 to 64 layers and in the trained embedded one: bf16 0.3% to 3.9%, fp16 0.03% to 0.5%, fp32 to 0.0002%. So
# twice the worst of each half format, whose precisions are 8 times apart, and for fp32 what other kernels may add.
TOLERANCE = {torch.bfloat16: 8e-2, torch.float16: 1e-2, torch.float32: 1e-4}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def adapted_run(path: Path, *, trusted: bool = False) -> tuple[RunDir, DictConfig]:
    """Return a finished run, or the run of a checkpoint with that as its result, whose result is an adapter.

    Raises:
        ConfigError: there is none, or the run trained a whole model, or is not `trusted`, see `open_run`.
    """
    run, config = open_run(path, trusted=trusted, checkpoints=True)
    if not (run.final / "adapter_config.json").is_file():
        raise ConfigError(f"{run.final} is a whole model already, not an adapter: it needs no merge. Load it as it is.")
    return run, config


def merge_run(
    path: Path,
    *,
    dtype: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    max_shard: str = "2GB",
    trusted: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Merge a run's adapter into its base, check the result, and return its folder.

    Raises:
        ConfigError: the run has nothing that can be merged, or the folder is taken.
        StorageError: base and adapter do not fit, or what was written is not what base and adapter are together.
    """
    quiet_libraries()
    run, config = adapted_run(path, trusted=trusted)
    limit = parse_size(max_shard)
    adapter_config(run.final)  # says no before anything long begins
    prepared = find_prepared(config) or prepare(config, say)
    model_path = prepared.model_path
    check_base(run, model_path)
    folder = run.merged if out is None else out
    check_name(folder.name, "--out")
    check_out(folder, overwrite, [run.path, run.final, model_path])
    base_config = _base_config(model_path, config)
    chosen = DTYPES[dtype] if dtype else (torch.float16 if base_config.dtype is torch.float16 else torch.bfloat16)

    base = _without_weights(base_config, config)
    checkpoint = Checkpoint(model_path)
    adapted = Adapted(run.final, base, checkpoint)
    needed = size_of(checkpoint, chosen, adapted)
    trash_root = run.path.parent if out is None else folder.parent
    with new_folder(folder, trash_root, say) as staging:
        free = shutil.disk_usage(staging).free
        if free < needed:
            raise StorageError(
                f"{folder.parent} has {free / 1e9:.3g} GB free, and the merged model takes {needed / 1e9:.3g} GB. "
                f"Use --out on another disk."
            )
        say(f"Merging {run.final} into {model_path}, {_name(chosen)}, about {needed / 1e9:.3g} GB")
        written = write_merged(adapted, staging, chosen, limit, say)
        _write_rest(staging, base, written, run, model_path, config, chosen)
        del adapted
        say("Comparing it with base and adapter on rows of the run")
        reference = Reference(config, model_path, run.final, pick_rows(prepared.cache), chosen)
        comparison = reference.compare(staging)
        refuse_different(written, comparison, chosen)
        record = {
            "adapter": str(run.final),
            "base": str(model_path),
            "dtype": _name(chosen),
            **asdict(written),
            **{key: value if math.isfinite(value) else None for key, value in asdict(comparison).items()},
        }
        write_json(staging / RECORD, record)
    for line in _summary(folder, written, comparison):
        say(line)
    return folder


def refuse_different(written: Written, comparison: Comparison, dtype: torch.dtype) -> None:
    """Say no to a merge that changed nothing, or that does not say what base and adapter say.

    Raises:
        StorageError: so it is.
    """
    if not written.changed_tensors:
        raise StorageError(
            f"No tensor changed: the adapter is zero, or smaller than {_name(dtype)} can hold. Nothing was written."
        )
    # An adapter of small effect needs a sharper look: a merge that does nothing is as far away as that effect.
    limit = TOLERANCE[dtype]
    if comparison.effect > limit:
        limit = min(limit, comparison.effect / 2)
    if not math.isfinite(comparison.difference):
        raise StorageError(f"The logits are not finite in {_name(dtype)}. Use another --dtype. Nothing was written.")
    if comparison.difference > limit:
        raise StorageError(
            f"The merged model differs from base and adapter by {comparison.difference:.1%} of the logits on "
            f"{comparison.rows} rows, more than the {limit:.2%} that {_name(dtype)} explains. Nothing was written."
        )


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 2GB or 500MB.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"`--max-shard {text}` is no size. Write for example 2GB or 500MB.")
    return math.ceil(float(match[1]) * UNITS[match[2] or ""])


def _base_config(model_path: Path, config: DictConfig) -> Any:
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(str(model_path), trust_remote_code=config.model.trust_remote_code)
    quantized = getattr(base, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ConfigError(
            f"The base model in {model_path} is itself quantised ({method}), so there are no 16-bit weights to merge "
            f"into. Serve it with the adapter beside it."
        )
    return base


def _without_weights(base_config: Any, config: DictConfig) -> Any:
    """Return the base model on the meta device: shapes and names only."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config, trust_remote_code=config.model.trust_remote_code)
    model.tie_weights()
    return model


def _write_rest(
    staging: Path,
    base: Any,
    written: Written,
    run: RunDir,
    model_path: Path,
    config: DictConfig,
    dtype: torch.dtype,
) -> None:
    """Write what makes weights a model: configuration, stop tokens, tokenizer and template, code of the model's own."""
    from transformers import GenerationConfig

    settings = base.config
    settings.dtype = dtype
    if written.untied:
        settings.tie_word_embeddings = False
        settings.get_text_config().tie_word_embeddings = False
    settings.save_pretrained(str(staging))
    tokenizer = load_tokenizer(run.final, config.model)
    tokenizer.save_pretrained(str(staging))
    if (model_path / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(str(model_path))
    base.generation_config.eos_token_id = stop_tokens(base, tokenizer)
    base.generation_config._from_model_config = False  # otherwise loading makes it anew, without our stop tokens
    # Not `save_pretrained`: it refuses what some models come with, a temperature without sampling for example.
    base.generation_config.to_json_file(str(staging / "generation_config.json"))
    for file in model_path.glob("*.py"):
        shutil.copyfile(file, staging / file.name)
    for file in staging.glob("*.safetensors"):
        shutil.copymode(staging / "config.json", file)  # safetensors lets only the owner read them


def _summary(folder: Path, written: Written, comparison: Comparison) -> list[str]:
    learnt = f"{comparison.adapter_loss:.4f} with the adapter, {comparison.merged_loss:.4f} merged"
    faint = comparison.difference > comparison.effect / 2
    hint = " (hardly more than rounding: --dtype fp32 shows it better)" if faint else ""
    tied = ["The head no longer equals the embeddings, so it has weights of its own."] if written.untied else []
    layers = f"{written.changed_layers} of {written.adapted_layers} adapted layers changed"
    return [
        f"{layers}, {written.changed_tensors} tensors",
        *tied,
        f"Logits on {comparison.rows} rows: {comparison.difference:.2%} from those of base and adapter (largest "
        f"{comparison.largest:.3g}); the adapter itself moves them by {comparison.effect:.1%}{hint}",
        f"Next-token loss: {learnt}",
        f"Saved to {folder}. Load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}), or train on it with "
        f"model=folder model.path={folder}",
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
