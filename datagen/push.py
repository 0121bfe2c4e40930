"""Upload a dataset to the Hugging Face Hub: its files and its card in one commit. The token is never written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tunewright.errors import ConfigError, PeerError, StorageError, TunewrightError

CARD = "README.md"  # what the Hub shows of a repository
MESSAGE = "Dataset made with tunewright datagen"
LOG_IN = "run `hf auth login`, or export HF_TOKEN=... with a token that may write"


def push(folder: Path, files: Sequence[Path], repo: str, private: bool, say: Callable[[str], None]) -> str:
    """Upload the files of a folder to a dataset repository, which is made if need be, and return its address.

    A file that ends in .md is the card and becomes README.md.

    Raises:
        ConfigError: no token, a token without permission, a name that cannot be one, or a private dataset is asked
            for where a public one is.
        StorageError: a file is not there.
        PeerError: the Hub cannot be reached, or fails.
    """
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    places = _places(folder, files)
    token = _token()
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        name = str(address.repo_id)
        if private and not api.dataset_info(name).private:
            raise ConfigError(f"{address} exists and is public, but a private one is asked for: choose another name.")
        say(f"Uploading {', '.join(places)} to {address}")
        operations = [CommitOperationAdd(place, str(path)) for place, path in places.items()]
        api.create_commit(name, operations, commit_message=MESSAGE, repo_type="dataset")
    except HFValidationError as error:
        raise ConfigError(f"'{repo}' cannot be a dataset on the Hub: write NAME or ORGANISATION/NAME.") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it.") from error
    except HfHubHTTPError as error:
        answer = (error.server_message or "").replace(token, "[token]")
        raise _refusal(error.response.status_code, " ".join(answer.split()), repo) from error
    except json.JSONDecodeError as error:
        raise PeerError(f"{api.endpoint} answers like no Hub. Is HF_ENDPOINT right?") from error
    except ValueError as error:  # how the client tells that the Hub refuses the head of the card
        reason = " ".join(str(error).replace(token, "[token]").split())
        raise ConfigError(f"The Hub refuses the dataset: {reason}") from error
    except (HTTPError, OSError, RuntimeError, KeyError) as error:
        raise PeerError(
            f"{api.endpoint} cannot be reached, or broke off ({type(error).__name__}). The files are in {folder}; "
            "the same command tries again."
        ) from error
    return str(address)


def _places(folder: Path, files: Sequence[Path]) -> dict[str, Path]:
    """Return the files by their path in the repository."""
    places: dict[str, Path] = {}
    for path in files:
        place = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        place = CARD if path.suffix == ".md" else place
        if place in places:
            raise ConfigError(f"{places[place]} and {path} would both be {place} on the Hub.")
        if not path.is_file():
            raise StorageError(f"{path} is not there, so it cannot be uploaded.")
        places[place] = path
    if not places:
        raise ConfigError(f"There is nothing to upload in {folder}.")
    return places


def _token() -> str:
    from huggingface_hub import get_token
    from huggingface_hub.errors import OIDCError

    try:
        token = get_token()
    except OIDCError as error:
        raise ConfigError("HF_OIDC_RESOURCE is set, but gave no token: unset it, or use HF_TOKEN.") from error
    if not token:
        raise ConfigError(f"There is no token for the Hub: {LOG_IN}.")
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError("The token for the Hub holds a blank or a character outside ASCII: copy it again.")
    return token


def _refusal(status: int, answer: str, repo: str) -> TunewrightError:
    """Return what an HTTP status means for the user."""
    said = f" (it says: {answer})" if answer else ""
    if status == 401:
        return ConfigError(f"The Hub does not know the token{said}: {LOG_IN}.")
    if status in (402, 403):
        return ConfigError(f"The token may not write to '{repo}' on the Hub{said}: use another name, or {LOG_IN}.")
    if status == 404:
        return ConfigError(f"The Hub has no '{repo}' that this token may write to{said}: {LOG_IN}.")
    if status in (409, 412):
        return PeerError(f"'{repo}' changed on the Hub meanwhile{said}: try again.")
    if status < 500 and status not in (408, 429):
        return ConfigError(f"The Hub refuses '{repo}' with status {status}{said}.")
    return PeerError(f"The Hub failed with status {status}{said}. Nothing is lost; the same command tries again.")
