"""Model files from the Hub or ModelScope, fetched once before ranks start; ranks only ever open a folder."""

from __future__ import annotations

import json
from pathlib import Path

from tunewright.config.schema import ModelConfig, Source
from tunewright.errors import ConfigError, StorageError

# Other formats of the same weights, which transformers does not read.
IGNORED = ["original/*", "consolidated*", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth", "*.tflite"]
# What a tokenizer and its chat template need: enough to look at data, without the weights.
TOKENIZER_FILES = ["*token*", "*vocab*", "merges.txt", "*.jinja", "*.model", "*.tiktoken", "*config.json"]


def find_hub(model: ModelConfig) -> Path | None:
    """Return the folder of a Hub model that is whole in the local cache, without using the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if has_weights(folder) else None


def find_config(model: ModelConfig) -> Path | None:
    """Return the config.json of a Hub model where the local cache has it, without using the network."""
    if model.source is not Source.hub:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def fetch_config(model: ModelConfig, *, offline: bool = False) -> Path:
    """Return the config.json of a model on a hub, fetched with the few files that its tokenizer needs.

    Raises:
        StorageError: see `fetch_hub`.
    """
    fetch = fetch_modelscope if model.source is Source.modelscope else fetch_hub
    return fetch(model, offline=offline, weights=False) / "config.json"


def fetch_hub(model: ModelConfig, *, offline: bool = False, weights: bool = True) -> Path:
    """Download a Hub model, or its tokenizer alone, with progress, and return its folder.

    Raises:
        StorageError: it does not exist, is gated, or the Hub cannot be reached or must not be.
    """
    absent = StorageError(
        f"`model.path` is '{model.path}', which is not whole on this machine, and `offline` is true. Fetch it on a "
        f"machine with a network first, or use a folder (model=folder model.path=...)."
    )
    if offline and weights:
        raise absent
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        if not weights:
            return Path(
                snapshot_download(
                    model.path, revision=model.revision, allow_patterns=TOKENIZER_FILES, local_files_only=offline
                )
            )
        # Many repositories hold the weights twice: the older .bin files are fetched only where there is nothing else.
        folder = Path(snapshot_download(model.path, revision=model.revision, ignore_patterns=[*IGNORED, "*.bin"]))
        if not has_weights(folder):
            folder = Path(snapshot_download(model.path, revision=model.revision, ignore_patterns=IGNORED))
        return folder
    except GatedRepoError as error:
        raise StorageError(
            f"`model.path` is '{model.path}', which is gated: accept its licence on the Hub, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise StorageError(f"`model.path` is '{model.path}', but the Hub has no such model.") from error
    except (HfHubHTTPError, OSError) as error:  # LocalEntryNotFoundError, an OSError, when there is no connection
        if offline:
            raise absent from error
        raise StorageError(
            f"`model.path` is '{model.path}' and could not be fetched from the Hub ({type(error).__name__}). Use "
            f"model=tiny, a folder (model=folder model.path=...), or ModelScope (model.source=modelscope)."
        ) from error


def fetch_modelscope(model: ModelConfig, *, offline: bool = False, weights: bool = True) -> Path:
    """Download a ModelScope model, or its tokenizer alone, unless it is there, and return its folder.

    Raises:
        ConfigError: the modelscope package is not installed.
        StorageError: it does not exist, or cannot or must not be fetched.
    """
    try:
        from modelscope import snapshot_download
        from modelscope_hub.errors import CacheNotFound
    except ImportError as error:
        raise ConfigError(
            "`model.source=modelscope` needs the modelscope package: pip install 'tunewright[modelscope]'."
        ) from error
    try:
        wanted = None if weights else TOKENIZER_FILES
        return Path(
            snapshot_download(model.path, revision=model.revision, allow_patterns=wanted, local_files_only=offline)
        )
    except CacheNotFound as error:
        raise StorageError(
            f"`model.path` is '{model.path}', which is not on this machine, and `offline` is true."
        ) from error
    except OSError as error:
        raise StorageError(
            f"`model.path` is '{model.path}' and could not be fetched from ModelScope: {error}"
        ) from error


def has_weights(folder: Path) -> bool:
    """Tell whether a model folder holds all of its weight files."""
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all((folder / shard).exists() for shard in shards):
            return True
    return any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))
