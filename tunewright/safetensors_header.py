"""What a safetensors file says of itself in its first bytes, without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path

from tunewright.errors import StorageError


def shapes(file: Path) -> dict[str, list[int]]:
    """Return {tensor: shape} of a safetensors file whose size is the one that they need.

    Raises:
        StorageError: a download that was interrupted, or a file that stands for another one.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        if first == b"version ":
            raise StorageError(
                f"{file} is Git LFS's note about the weights, not the weights: run `git lfs pull` there."
            )
        length = int.from_bytes(first, "little")
        header = opened.read(length) if length < size else b""
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        whole = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
        found = {name: list(value["shape"]) for name, value in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file} is damaged: it begins as no safetensors file does. Fetch it again.") from error
    if size != whole:
        raise StorageError(f"{file} has {size:,} bytes where its tensors need {whole:,}: fetch it again.")
    return found
