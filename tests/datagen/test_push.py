"""The upload, through the real client, to a hub on loopback."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunewright.datagen.push import push
from tunewright.errors import ConfigError, PeerError, StorageError, TunewrightError


def _write_hub() -> Any:
    """The module beside this file: with importlib mode, tests are no packages."""
    spec = importlib.util.spec_from_file_location("write_hub", Path(__file__).with_name("write_hub.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


write_hub = _write_hub()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    from huggingface_hub import constants

    with write_hub.WriteHub() as server:
        monkeypatch.setenv("HF_TOKEN", write_hub.TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        # Read when the package is imported, which may have been long ago.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield server


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    contents = {
        "riddles.json": '[{"instruction": "什么东西越洗越脏？", "input": "", "output": "水"}]',
        "riddles_eval.json": "[]",
        "riddles.manifest.json": "{}",
        "riddles.card.md": "---\npretty_name: riddles\n---\n\n# riddles\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return [tmp_path / name for name in contents]


Push = Callable[..., str]


@pytest.fixture
def upload(tmp_path: Path, files: list[Path]) -> Push:
    def run(repo: str, *, private: bool = False, say: Callable[[str], None] = lambda _: None) -> str:
        return push(tmp_path, files, repo, private, say)

    return run


def test_uploads_everything_in_one_commit(hub: Any, upload: Push, files: list[Path]) -> None:
    said: list[str] = []

    address = upload("alice/riddles", private=True, say=said.append)

    assert address == f"{hub.url}/datasets/alice/riddles"
    assert hub.private == {"alice/riddles": True}
    names = ["README.md", "riddles.json", "riddles.manifest.json", "riddles_eval.json"]
    assert [(repo, committed) for repo, _, committed in hub.commits] == [("alice/riddles", names)]
    stored = hub.repos["alice/riddles"]
    assert stored["riddles.json"] == files[0].read_bytes()
    assert stored["README.md"] == files[3].read_bytes()
    assert len(said) == 1
    assert address in said[0]


def test_a_name_alone_belongs_to_the_token(hub: Any, upload: Push) -> None:
    assert upload("riddles") == f"{hub.url}/datasets/alice/riddles"
    assert hub.private == {"alice/riddles": False}


def test_again_commits_only_what_changed(hub: Any, upload: Push, files: list[Path]) -> None:
    upload("alice/riddles")
    files[0].write_text("[1]")
    upload("alice/riddles")
    assert [committed for _, _, committed in hub.commits][1:] == [["riddles.json"]]

    assert upload("alice/riddles").endswith("/datasets/alice/riddles")  # nothing changed
    assert len(hub.commits) == 2


def test_private_rows_never_go_to_a_public_dataset(hub: Any, upload: Push) -> None:
    hub.add("alice/riddles", private=False)
    with pytest.raises(ConfigError, match="is public"):
        upload("alice/riddles", private=True)
    assert hub.repos["alice/riddles"] == {}


def test_without_a_token(hub: Any, upload: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"hf auth login.*HF_TOKEN"):
        upload("alice/riddles")


@pytest.mark.parametrize("token", ["hf_wrong_token_123", "hf_schlüssel_123", "hf_a b"])
def test_a_wrong_token_is_not_named(hub: Any, upload: Push, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match="token") as caught:
        upload("alice/riddles")  # the server repeats the token in its answer
    assert token not in str(caught.value)


@pytest.mark.parametrize("repo", ["a/b/c", "alice/has blank", "https://huggingface.co/datasets/alice/riddles", ""])
def test_a_name_that_cannot_be_one(hub: Any, upload: Push, repo: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a dataset"):
        upload(repo)


def test_no_permission(hub: Any, upload: Push) -> None:
    with pytest.raises(ConfigError, match=r"may not write to 'bob/riddles'.*namespace bob"):
        upload("bob/riddles")


@pytest.mark.parametrize(
    ("part", "status", "kind"),
    [
        ("/commit/", 403, ConfigError),
        ("/commit/", 404, ConfigError),
        ("/commit/", 412, PeerError),
        ("/commit/", 500, PeerError),
        ("/repos/create", 429, PeerError),
        ("/repos/create", 503, PeerError),
        ("/repos/create", 422, ConfigError),
    ],
)
def test_refusals(hub: Any, upload: Push, part: str, status: int, kind: type[TunewrightError]) -> None:
    hub.fail[part] = (status, {"error": f"because of {write_hub.TOKEN}"}, {})
    with pytest.raises(kind) as caught:
        upload("alice/riddles")
    assert "because of [token]" in str(caught.value)


def test_a_card_that_the_hub_refuses(hub: Any, upload: Push, files: list[Path]) -> None:
    files[3].write_text("# no head")
    with pytest.raises(ConfigError, match="no head"):
        upload("alice/riddles")
    assert hub.commits == []


@pytest.mark.parametrize("raw", [b"<html>hello</html>", b"{}"])
def test_a_server_that_is_no_hub(hub: Any, upload: Push, raw: bytes) -> None:
    hub.raw = raw
    with pytest.raises(PeerError, match=hub.url):
        upload("alice/riddles")


def test_nobody_listens(hub: Any, upload: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(PeerError, match="cannot be reached"):
            upload("alice/riddles")


def test_offline(hub: Any, upload: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        upload("alice/riddles")


def test_missing_files_are_told_before_anything_is_made(hub: Any, tmp_path: Path, files: list[Path]) -> None:
    with pytest.raises(StorageError, match=r"gone\.json"):
        push(tmp_path, [*files, tmp_path / "gone.json"], "alice/riddles", False, print)
    with pytest.raises(ConfigError, match="nothing"):
        push(tmp_path, [], "alice/riddles", False, print)
    (tmp_path / "other.md").write_text("x")
    with pytest.raises(ConfigError, match=r"README\.md"):
        push(tmp_path, [*files, tmp_path / "other.md"], "alice/riddles", False, print)
    assert hub.repos == {}


def test_a_fresh_process_needs_only_the_environment_and_no_torch(hub: Any, tmp_path: Path, files: list[Path]) -> None:
    script = (
        "import sys; from pathlib import Path; from tunewright.datagen.push import push\n"
        f"print(push(Path({str(tmp_path)!r}), [Path({str(files[0])!r})], 'alice/riddles', False, print))\n"
        "assert 'torch' not in sys.modules"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/datasets/alice/riddles"
    assert write_hub.TOKEN not in done.stdout + done.stderr
