"""Secrets are kept out of what is written and shown, by their value; words that only look like a secret's name stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import manifest
from tunewright.claims import Claim, claim, prepare_folder
from tunewright.config.compose import compose_config, load_config
from tunewright.deliver.compare import compare
from tunewright.errors import ConfigError, DataError, StorageError
from tunewright.launch.cli import main
from tunewright.redaction import environment_secrets, names_secret, redact, redact_tree, typed_secrets
from tunewright.run_folder import RunDir, redacted_yaml

CANARY = "canary-0f3e9a77c1"
HF = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7z"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {HF}.", "token hf_***."),
        ("https://me:pa55@host.org/rows.json", "https://***@host.org/rows.json"),
        ("https://abcdef@host.org/rows.json", "https://***@host.org/rows.json"),
        ("s3://AKIDEXAMPLE:se/cr+et@bucket/rows.json", "s3://***@bucket/rows.json"),
        ("https://a.org/x?sv=1&sig=abc%2B&se=2", "https://a.org/x?sv=1&sig=***&se=2"),
        ("https://a.org/x?X-Amz-Signature=0a1b2c", "https://a.org/x?X-Amz-Signature=***"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("sk-proj-aBcdefghijklm1opqrstuvwx", "sk-***"),
    ],
)
def test_credentials_are_hidden_wherever_they_stand(text: str, shown: str) -> None:
    assert redact(f"cannot read '{text}'") == f"cannot read '{shown}'"


@pytest.mark.parametrize(
    "text",
    [
        "abfss://container@account.dfs.core.windows.net/rows.json",
        "http://localhost:8000/v1/models@main",
        "hub:org/name@main",
        "think_token: <think>",
        "data.weights=[1,0.5] train.tokens_per_batch=4096",
        "runs/sk-learn-with-all-the-rows and hf_hub_url, mail@example.org",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_names_of_secrets() -> None:
    secret = ["HF_TOKEN", "hub_token", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "client-secret"]
    assert all(names_secret(name) for name in secret)
    plain = ["TOKENIZERS_PARALLELISM", "tokens_per_batch", "PWD", "MONKEY", "KEYBOARD", "secretary"]
    assert not any(names_secret(name) for name in plain)


def test_secrets_of_the_environment_are_found_by_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"MY_TOKEN": CANARY, "LONG_SECRET": f"{CANARY}-more", "USE_TOKEN": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KEY_FILE_CREDENTIALS", str(tmp_path))
    found = environment_secrets()
    assert list(found.values())[:2] == ["LONG_SECRET", "MY_TOKEN"]
    assert not {"USE_TOKEN", "KEY_FILE_CREDENTIALS"} & set(found.values())
    tree = {"a": [f"x{CANARY}y", 1, None], "b": {"c": f"{CANARY}-more"}}
    assert redact_tree(tree) == {"a": ["x${oc.env:MY_TOKEN}y", 1, None], "b": {"c": "${oc.env:LONG_SECRET}"}}


def test_values_typed_for_names_of_secrets() -> None:
    typed = ["hub_token=abcd1", "+model={api_key: 'abcd2', path: x}", "--token", "abcd3", "model.pad_token=<pad>"]
    assert typed_secrets(typed) == ["abcd1", "abcd2", "abcd3"]


WITH_TOKEN = ["+model.template_kwargs={greeting: 'by ${oc.env:HF_TOKEN}', think_token: '<think>'}"]


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)


def test_a_run_keeps_a_reference_and_the_ranks_get_the_value(
    token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config([*WITH_TOKEN, f"output_root={tmp_path}", "name=run"])
    assert config.model.template_kwargs.greeting == f"by {CANARY}"
    run = RunDir(tmp_path / "run")
    prepare_folder(config, Claim(run))
    written = "".join(path.read_text(encoding="utf-8") for path in (run.config, run.manifest))
    assert CANARY not in written
    assert written.count("by ${oc.env:HF_TOKEN}") == 2
    assert load_config(run.config) == config
    assert load_config(run.config).model.template_kwargs.think_token == "<think>"
    monkeypatch.setenv("HF_TOKEN", "another-0f3e9a77c1")  # a new token makes no other run
    again = compose_config([*WITH_TOKEN, f"output_root={tmp_path}", "name=run", "resume=auto"])
    assert claim(again).run == run
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"config\.yaml refers to what is not set here: .*'HF_TOKEN'"):
        load_config(run.config)


def test_nothing_of_a_trained_run_holds_the_value(token: None, train_here: Callable[..., Path], tmp_path: Path) -> None:
    few = ["train.max_steps=1", "data.max_samples=4", "data.eval_names=[]", "train.save_steps=1"]
    run = train_here("secret", *few, *WITH_TOKEN)
    compare([run], tmp_path / "page", echo=lambda text: None)
    files = [path for folder in (run, tmp_path / "page") for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert "${oc.env:HF_TOKEN}" in json.dumps(manifest(run)["identity"])


def test_a_secret_as_such_is_no_setting() -> None:
    with pytest.raises(ConfigError, match=r"`data\.names` holds a password or key, 's3://\*\*\*@bucket/rows\.json'"):
        compose_config(["data=registry", "data.names=['s3://me:word@bucket/rows.json']"])
    with pytest.raises(ConfigError, match=r"`model\.template_kwargs\.by` holds a password or key, 'hf_\*\*\*'"):
        compose_config([f"+model.template_kwargs={{by: {HF}}}"])


def test_no_folder_is_named_after_a_secret(token: None) -> None:
    with pytest.raises(ConfigError, match="`name` holds the value of a secret variable"):
        compose_config(["name=run-${oc.env:HF_TOKEN}"])


@pytest.mark.parametrize(
    "typed",
    [
        ["train", f"hub_token={CANARY}"],
        ["train", f"model.hub_token={CANARY}"],
        ["train", f"+hub_token={CANARY}"],
        ["train", f"hub_token={CANARY},x"],
        ["train", f"hub_token=[{CANARY}"],
        ["train", f"--hub_token={CANARY}"],
        ["train", f"train.seed={HF}"],
        ["data", "check", f"https://me:{CANARY}@host/rows.json"],
        ["evaluate", f"https://me:{CANARY}@host/run"],
    ],
)
def test_a_refusal_does_not_show_it(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if typed[1].startswith("--"):  # argparse ends the program by itself
        with pytest.raises(SystemExit):
            main(typed)
    else:
        assert main(typed) in (2, 3)
    said = "".join(capsys.readouterr())
    assert "***" in said
    assert CANARY not in said
    assert HF not in said


def test_errors_hide_credentials_wherever_they_are_shown(token: None) -> None:
    for kind in (DataError, StorageError):
        assert (
            str(kind(f"https://me:word@host/x?sig=abc ({CANARY})")) == "https://***@host/x?sig=*** (${oc.env:HF_TOKEN})"
        )


def test_what_is_printed_of_a_configuration(token: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", *WITH_TOKEN]) == 0
    said = capsys.readouterr().out
    assert CANARY not in said
    assert "by ${oc.env:HF_TOKEN}" in said
    assert "think_token: <think>" in said
    assert redacted_yaml(compose_config()) == redacted_yaml(compose_config([]))


def test_a_registry_with_credentials_in_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry: dict[str, Any] = {"far": {"cloud_file_name": f"s3://me:{CANARY}@bucket/rows.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    assert main(["data", "check", "far", f"data.dir={tmp_path}", "offline=true"]) == 4
    said = "".join(capsys.readouterr())
    assert "s3://***@bucket/rows.json" in said
    assert CANARY not in said


def test_what_ends_a_rank_is_written_without_it(token: None, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import pathlib, sys\n"
        "from tunewright.trainer.console import Console, reported_errors\n"
        "logs = pathlib.Path(sys.argv[1])\n"
        "console = Console(logs)\n"
        "with reported_errors(logs, console):\n"
        "    console.say('by ' + sys.argv[2])\n"
        "    raise ValueError(f'https://me:word@host said no to {sys.argv[2]}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, CANARY], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    for text in (written, done.stdout + done.stderr):
        assert "https://***@host said no to ${oc.env:HF_TOKEN}" in text
        assert CANARY not in text
        assert "me:word" not in text
