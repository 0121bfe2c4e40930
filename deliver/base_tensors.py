"""The tensors of a model folder, read from its files one by one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from tunewright.errors import StorageError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = ((WHOLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


class Checkpoint:
    """The tensors of a model folder, read from its files when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[Path, Any] | None = None
        self.files = {name: path for path in _weight_files(folder) for name in sorted(self._tensors(path).keys())}
        self.names = list(self.files)  # file by file

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor; it may lie in the file, so copy what is to be kept.

        Raises:
            StorageError: the file is damaged.
        """
        tensors = self._tensors(self.files[name])
        try:
            return tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name)
        except Exception as error:  # safetensors and torch each have several for a damaged file
            raise StorageError(f"{self.files[name]}: the tensor {name} cannot be read: {error}") from error

    def numel(self, name: str) -> int:
        tensors = self._tensors(self.files[name])
        shape = tensors[name].shape if isinstance(tensors, dict) else tensors.get_slice(name).get_shape()
        return torch.Size(shape).numel()

    def _tensors(self, path: Path) -> Any:
        """Open a file, or return it when it is the one that was opened last: tensors are mostly read in their order."""
        if self._open is None or self._open[0] != path:
            self._open = None
            try:
                self._open = (path, _opened(path))
            except Exception as error:  # as above
                raise StorageError(f"{path} cannot be read: {error}") from error
        return self._open[1]


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load, in its order of preference.

    Raises:
        StorageError: there are none.
    """
    for whole, index in WEIGHTS:
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / name for name in names]
    raise StorageError(f"{folder} holds none of {', '.join(name for pair in WEIGHTS for name in pair)}.")


def _opened(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        opened: Any = safe_open(str(path), framework="pt")
        return opened.__enter__()
    # Files of torch before 1.6 are no archives and cannot be mapped.
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
