"""What a run is made from, as digests that its manifest keeps and that are compared when it continues."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from tunewright.errors import ConfigError
from tunewright.identity import table
from tunewright.plan.batch_plan import BatchPlan
from tunewright.run_folder import RunDir

if TYPE_CHECKING:
    from tunewright.trainer.data.token_cache import CachedDataset
    from tunewright.trainer.prepared import Prepared

HELD_OUT = "held-out data"
SAMPLES, SAMPLE_BYTES = 32, 1 << 14  # of each file of weights: no training leaves them all as they were


def planned_inputs(plan: BatchPlan) -> dict[str, str]:
    """Return what is known before anything is prepared: the rows of a step."""
    return {"batch": f"about {plan.tokens} tokens" if plan.tokens else f"{plan.global_batch} {plan.unit}s a step"}


def prepared_inputs(config: DictConfig, prepared: Prepared) -> dict[str, str]:
    """Return digests of the model's files and of the tokens that train and are held out, and how many they are."""
    found = {"model": _folder(prepared.model_path)}
    if config.method.get("adapter"):
        found["adapter"] = _folder(Path(config.method.adapter))
    return {**found, "training data": _rows(config, prepared, "train"), HELD_OUT: _rows(config, prepared, "eval")}


def _rows(config: DictConfig, prepared: Prepared, split: str) -> str:
    digest = hashlib.sha256()
    for cached, chosen in prepared.cache.chosen(split):
        if not len(chosen):
            continue
        digest.update(_tokens(cached, streaming=config.data.streaming))
        digest.update(np.asarray(chosen, np.int64).tobytes())
    examples, tokens, _ = prepared.cache.counts(split)
    return f"{examples:,} examples of {tokens:,} tokens, {digest.hexdigest()[:16]}" if examples else "none"


def other_held_out(run: RunDir, config: DictConfig, prepared: Prepared) -> str | None:
    """Return a remark where the rows that a run holds out are others now than when it was trained, else None.

    A question about new rows is a fair one; that they are new, and may have been trained on, has to be said.
    """
    before, now = run.read_manifest().get("inputs", {}).get(HELD_OUT), _rows(config, prepared, "eval")
    if before in (None, now):
        return None
    return f"{run.path.name}: held-out rows are others than when it was trained (then {before}; now {now})."


def check_base(run: RunDir, model_path: Path) -> None:
    """Refuse a base model that is not the one a run was trained on: its adapter would say something else on it.

    Raises:
        ConfigError: so it is. Runs of versions that wrote no digest are not checked.
    """
    trained_on, now = run.read_manifest().get("inputs", {}).get("model"), _folder(model_path)
    if trained_on and trained_on != now:
        raise ConfigError(
            f"{run.path} was trained on another model than what {model_path} holds now:\n"
            f"{table([('model', trained_on, now)])}\nPut the files of then back there."
        )


def _folder(folder: Path) -> str:
    """Return a digest of a model or adapter folder: configuration and code whole, weights by size and samples.

    Where the folder lies and what it is called decides nothing.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    others = [*folder.glob("config.json"), *folder.glob("adapter_config.json"), *sorted(folder.glob("*.py"))]
    digest, size = hashlib.sha256(), 0
    for file in (*others, *weights):
        size += file.stat().st_size
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for part in _samples(file) if file in weights else [file.read_bytes()]:
            digest.update(part)
    return f"{len(weights)} file{'' if len(weights) == 1 else 's'} of {size / 1e6:,.1f} MB, {digest.hexdigest()[:16]}"


def _samples(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        for start in np.linspace(0, max(size - SAMPLE_BYTES, 0), SAMPLES).astype(np.int64).tolist():
            opened.seek(start)
            yield opened.read(SAMPLE_BYTES)


def _tokens(cached: CachedDataset, *, streaming: bool) -> bytes:
    """Return a digest of a dataset's tokens and labels; of a stream, of its first ones and of what its rows come from.

    Not of the files: another version may write the same tokens otherwise.
    """
    digest = hashlib.sha256()
    table = cached.tokens()
    for name in ("input_ids", "labels"):
        chunks = table.column(name).chunks
        # All lengths, then all tokens: how many rows lie in a chunk depends on the number of workers.
        for chunk in chunks:
            digest.update(np.diff(_numbers(chunk.offsets)).tobytes())
        for chunk in chunks:
            digest.update(_numbers(chunk.flatten()).tobytes())
    if streaming:
        digest.update(repr((cached.rows.identity, cached.rows.entry.meaning())).encode())
    return digest.digest()


def _numbers(array: Any) -> np.ndarray:
    """Return an Arrow array of int32 as numpy's; pyarrow's own conversion would import pandas."""
    return np.frombuffer(array.buffers()[1] or b"", np.int32)[array.offset : array.offset + len(array)]
