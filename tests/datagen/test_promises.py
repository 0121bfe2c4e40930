"""What a user was promised about keys, failures, and stopping."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

KEYS = ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY")


def leaks(folder: Path, key: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def echoing(fake: Any, key: str) -> Any:
    """A server that puts the key wherever it can."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in key)

    def script(asked: Any) -> Any:
        if asked.cell is None:
            plan = {**fake.PLAN, "system": "s KEY", "topics": [key, f"x{key}y"]}
            return fake.Reply(json.dumps(plan).replace("KEY", escaped))
        if asked.cell == 1 and not asked.tries:
            return fake.Reply(status=500, error={"message": f"broken {key}", "code": key})
        if asked.cell == 2:
            return fake.Reply(f"no JSON {key}", finish_reason=key)
        if asked.cell == 3:
            return fake.Reply(None, refusal=key)
        if asked.cell == 4:
            return fake.Reply(status=422, error={"message": key})
        row = json.loads(fake.good(asked.cell).content)
        return fake.Reply(json.dumps({**row, "output": "KEY"}).replace("KEY", escaped if asked.cell == 5 else key))

    return script


@pytest.mark.parametrize("provider", ["openai", "openai_compatible", "azure"])
def test_no_file_and_no_word_holds_the_key(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, key: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if provider == "azure":
        monkeypatch.delenv("OPENAI_API_KEY")
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", key)
    server = serve(echoing(fake, key))
    url = server.url.removesuffix("/v1") if provider == "azure" else server.url
    changed = {"provider": provider, "model": "mine", "base_url": url}
    code, text = datagen(*fake.settings(server, tmp_path, **changed))
    assert code == 0, text
    assert {asked.key for asked in server.asked} == {key}
    assert key not in text
    names = {path.name for path in tmp_path.iterdir()}
    assert {"riddles.html", "riddles.md", "riddles.plan.json", "riddles.system.txt", "riddles.json"} <= names
    assert not leaks(tmp_path, key)
    assert "[key]" in (tmp_path / "riddles.json").read_text()
    if provider == "azure":
        paths = {asked.path for asked in server.asked}
        assert paths == {"/openai/deployments/mine/chat/completions?api-version=2024-10-21"}


@pytest.mark.parametrize("setting", ["task", "base_url", "model"])
def test_a_key_in_a_setting_is_refused(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, key: str, setting: str
) -> None:
    server = serve()
    values = {"task": f"Say {key}.", "base_url": f"{server.url}/{key}", "model": key}
    code, text = datagen(*fake.settings(server, tmp_path, **{setting: values[setting]}))
    assert code == 2
    assert key not in text
    assert not server.asked
    assert not leaks(tmp_path, key)


def test_a_traceback_and_a_debug_log_hold_no_key(
    serve: Any, fake: Any, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_LOG", "debug")
    bug = "import tunewright.datagen.curation as h\ndef no(*a): raise RuntimeError('a bug')\nh.Curation._take = no"
    process = fake.start(serve(), tmp_path, bug)
    text = process.communicate(timeout=30)[0]
    assert "a bug" in text
    assert "Traceback" in text
    assert key not in text
    assert not leaks(tmp_path, key)


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, {"message": "no"}, "does not accept the key"),
        (403, {"message": "no"}, "may not use model"),
        (404, {"message": "no", "code": "model_not_found"}, "no model"),
        (429, {"message": "pay", "code": "insufficient_quota"}, "no credit left"),
        (400, {"message": "long", "code": "context_length_exceeded"}, "longer than"),
        (400, {"message": "This model's maximum context length is 8 tokens"}, "longer than"),
        (400, {"message": "the request exceeds the available context size"}, "longer than"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_succeed_stops_and_loses_nothing_that_was_paid(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, status: int, error: dict[str, str], words: str, late: bool
) -> None:
    def script(asked: Any) -> Any:
        if late and asked.cell != 3:
            time.sleep(0.3 if asked.cell is not None else 0)
            return None
        return fake.Reply(status=status, error=error)

    server = serve(script)
    code, text = datagen(*fake.settings(server, tmp_path, concurrency=8))
    assert code in (2, 6)
    assert words in text
    assert text.strip().count("\n") < 4
    assert len(server.asked) == (9 if late else 1)  # nothing was sent after it
    logged = [record for record in fake.records(tmp_path) if "content" in record] if late else []
    assert len(logged) == len(server.answered)


def test_a_judge_that_does_not_exist_is_named(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(lambda asked: fake.Reply(status=404) if asked.body["model"] == "nobody" else None)
    code, text = datagen(*fake.settings(server, tmp_path, judge__threshold=3, judge__model="nobody"))
    assert code == 2
    assert "no model 'nobody'" in text


def test_a_low_yield_says_why(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(lambda asked: None if asked.cell is None else fake.Reply("no", finish_reason="length"))
    code, text = datagen(*fake.settings(server, tmp_path, examples=4))
    assert code == 3
    assert "cut at max_tokens 12" in text


def test_a_reply_that_takes_too_long_is_asked_for_again(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    def script(asked: Any) -> Any:
        if asked.cell == 0 and not asked.tries:
            time.sleep(1.5)
        return None

    server = serve(script)
    assert datagen(*fake.settings(server, tmp_path, timeout=1, examples=4))[0] == 0
    assert sum(asked.cell == 0 for asked in server.asked) == 2


def interrupted(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=20)[0]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "tunewright datagen 'task=" in text
    return text


def test_ctrl_c_while_the_server_wants_to_be_left_alone(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    haste = fake.Reply(status=429, headers={"Retry-After": "100"})
    server = serve(lambda asked: haste if (asked.cell or 0) >= 4 else None)
    process = fake.start(server, tmp_path)
    fake.wait_until(lambda: len(server.asked) >= 6)
    time.sleep(0.3)
    began = time.monotonic()
    interrupted(process)
    assert time.monotonic() - began < 8  # not the 10 seconds that replies get to arrive
    server.script = None
    server.asked.clear()
    assert datagen(*fake.settings(server, tmp_path))[0] == 0
    assert len(server.asked) == 16


def test_ctrl_c_while_one_after_the_other(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(lambda asked: fake.good(asked.number) if asked.number else None, delay=0.3)
    process = fake.start(server, tmp_path, mode="sequential")
    fake.wait_until(lambda: len(server.asked) >= 4)
    interrupted(process)
    assert len(server.answered) == len(server.asked)
    server.delay = 0
    assert datagen(*fake.settings(server, tmp_path, mode="sequential"))[0] == 0
    assert len(server.asked) == 21


def test_on_a_terminal_one_line_refreshes_itself(serve: Any, fake: Any, tmp_path: Path) -> None:
    server = serve(delay=0.3)
    near, far = pty.openpty()
    command = [sys.executable, "-c", fake.COMMAND, "datagen", *fake.settings(server, tmp_path, concurrency=2)]
    process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, cwd=fake.ROOT, start_new_session=True)
    os.close(far)
    text, stopped = b"", False
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if select.select([near], [], [], 0.1)[0]:
            try:
                text += os.read(near, 4096)
            except OSError:
                break
        if not stopped and len(server.asked) >= 7:
            process.send_signal(signal.SIGINT)
            stopped = True
    assert process.wait(timeout=20) == 130
    os.close(near)
    assert text.count(b"\x1b[2Kaccepted") > 3
    assert b"this continues it" in text
    assert b"Traceback" not in text


def test_elsewhere_lines_are_plain(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    code, text = datagen(*fake.settings(serve(), tmp_path))
    assert code == 0
    assert "\x1b" not in text
    assert "\r" not in text
    assert "accepted 20/20" in text
