"""An adapter's weights put into its base's, shard after shard.

The model is built without weights, with the adapter on it. Then the tensors of the base are read one by one: those of
an adapted layer go into that layer, PEFT merges it in float32, and its tensors are written; all others are copied. In
memory there is never more than a shard and a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tunewright.deliver.base_tensors import INDEX, WHOLE, Checkpoint
from tunewright.deliver.merge_layers import Adapted
from tunewright.errors import ConfigError
from tunewright.files import write_json
from tunewright.terminal import Progress


@dataclass
class Written:
    """What became of the base's tensors."""

    adapted_layers: int = 0
    changed_layers: int = 0
    changed_tensors: int = 0
    untied: bool = False  # the head no longer equals the embeddings

    def count(self, changed: int) -> None:
        self.adapted_layers += 1
        self.changed_layers += changed > 0
        self.changed_tensors += changed


def size_of(checkpoint: Checkpoint, dtype: torch.dtype, adapted: Adapted) -> int:
    """Return the bytes that the merged model takes at most; a head that may part from its embeddings included."""
    heads = [
        checkpoint.numel(adapted.names[stored]) for one in adapted.tied_pairs() if (stored := adapted._stored(one[0]))
    ]
    return dtype.itemsize * (sum(map(checkpoint.numel, checkpoint.names)) + sum(heads))


def write_merged(
    adapted: Adapted, out: Path, dtype: torch.dtype, max_shard: int, say: Callable[[str], None] = print
) -> Written:
    """Write the weights of base and adapter together into `out`, in `dtype`, and tell what changed."""
    written = Written()
    shards = Shards(out, max_shard)
    total, done = size_of(adapted.checkpoint, dtype, adapted), 0
    with Progress(say, sys.stdout, leave=False) as progress:
        for name, tensor in _tensors(adapted, dtype, written):
            progress.update("written: MB", done // 10**6, total // 10**6)
            shards.add(name, tensor)
            done += tensor.nbytes
    shards.finish()
    return written


def _tensors(adapted: Adapted, dtype: torch.dtype, written: Written) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the merged model once, by its name in the files."""
    done: set[str] = set()  # names of the model

    def counted(values: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        changed = 0
        for ours, value in values.items():
            done.add(ours)
            new = _cast(value, dtype, ours)
            changed += not torch.equal(new, _cast(adapted.read(ours), dtype, ours))
            yield adapted.names.get(ours, ours), new
        written.count(changed)

    for source, target in adapted.tied_pairs():
        embedding, head = adapted.merged(source), adapted.merged(target)
        if _same(embedding[source], head[target]):
            done.add(target)
            del head[target]
        else:
            written.untied = True
        for values in (embedding, head):
            if values:
                yield from counted(values)
    ours_of = {theirs: ours for ours, theirs in adapted.names.items()}
    for theirs in adapted.checkpoint.names:
        ours = ours_of.get(theirs)
        if ours in done:
            continue
        if ours is not None and (ours in adapted.replaced or adapted.layer_of(ours) is not None):
            yield from counted(adapted.merged(ours))
        else:
            tensor = adapted.checkpoint.get(theirs)
            yield theirs, _cast(tensor, dtype if adapted.rounded(ours or theirs, dtype) else tensor.dtype, theirs)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.to(other.dtype), other) and torch.equal(one, other.to(one.dtype))


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a copy in `dtype`, of integers and masks a copy as it is.

    Raises:
        ConfigError: a value is too large for `dtype`.
    """
    if not tensor.is_floating_point():
        return tensor.clone().contiguous()
    cast = tensor.to(dtype, copy=True).contiguous()
    if dtype is torch.float16 and not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        raise ConfigError(f"{name} has values that are too large for fp16. Use --dtype bf16.")
    return cast


class Shards:
    """Files of at most `limit` bytes each, named as transformers names them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.waiting: dict[str, torch.Tensor] = {}
        self.bytes = self.total = 0
        self.written: list[list[str]] = []  # names of the tensors of each file

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.waiting and self.bytes + tensor.nbytes > self.limit:
            self._flush()
        self.waiting[name] = tensor
        self.bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the rest, give the files their names, which tell how many there are, and write the index."""
        self._flush()
        count = len(self.written)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        names = names if count > 1 else [WHOLE]
        for index, name in enumerate(names):
            self._part(index).rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, held in zip(names, self.written, strict=True) for tensor in held}
            index_file = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index_file)

    def _part(self, index: int) -> Path:
        return self.folder / f"shard-{index}.part"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.waiting, self._part(len(self.written)), metadata={"format": "pt"})
        self.written.append(list(self.waiting))
        self.total += self.bytes
        self.waiting, self.bytes = {}, 0
