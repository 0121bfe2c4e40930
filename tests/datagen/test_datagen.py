"""`tunewright datagen` against a real HTTP server on loopback, with the real openai client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config
from tunewright.trainer.data.formats import Conversation, to_conversation
from tunewright.trainer.data.sources import Rows, open_datasets

TASK = "Answer a riddle with a single word, said plainly, e.g. ${echo}: 谜语."
RunDatagen = Callable[..., tuple[int, str]]
FILES = ("riddles.json", "riddles_eval.json", "dataset_info.json", "riddles.manifest.json")
COMMAND = "import argparse, sys; from tunewright.datagen.cli import add_parser; p = argparse.ArgumentParser()\n"
COMMAND += "add_parser(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); sys.exit(a.run(a))"


def generated(name: str, folder: Path) -> Rows:
    """Return the rows of a dataset as training reads them."""
    return open_datasets([name], compose_config([f"data.dir={folder}"]).data, offline=True)[0]


def settings(server: Any, out: Path, **changed: Any) -> list[str]:
    values = {"task": TASK, "name": "riddles", "examples": 20, "out": out, "base_url": server.url, **changed}
    return [f"{key}={value}" for key, value in values.items()]


def outputs(out: Path) -> dict[str, str]:
    """The written files, without the two settings that differ between the servers and folders of a test."""
    texts = {name: (out / name).read_text(encoding="utf-8") for name in FILES}
    manifest = json.loads(texts["riddles.manifest.json"])
    for key in ("out", "base_url", "concurrency"):
        del manifest["settings"][key]
    return {**texts, "riddles.manifest.json": json.dumps(manifest)}


def cells(server: Any) -> list[int]:
    return [cell for cell in server.answered if cell is not None]


def start(server: Any, out: Path, **changed: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, "datagen", *settings(server, out, **changed)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2]
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_description_becomes_a_dataset_that_the_trainer_reads(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    server = serve(delay=0.05)
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json", "tags": {"a": "b"}}}')
    code, text = datagen(*settings(server, tmp_path))
    assert code == 0, text
    rows = {name: list(generated(name, tmp_path)) for name in ("riddles", "riddles_eval")}
    assert (len(rows["riddles"]), len(rows["riddles_eval"])) == (18, 2)
    assert not {row["instruction"] for row in rows["riddles"]} & {row["instruction"] for row in rows["riddles_eval"]}
    conversation = to_conversation(rows["riddles"][0], generated("riddles", tmp_path).entry)
    assert isinstance(conversation, Conversation)
    messages = conversation.messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == fake.SYSTEM_MESSAGE
    registry = json.loads((tmp_path / "dataset_info.json").read_text())
    assert registry["mine"] == {"file_name": "mine.json", "tags": {"a": "b"}}
    manifest = json.loads((tmp_path / "riddles.manifest.json").read_text())
    assert manifest["usage"] == {"prompt_tokens": 2100, "completion_tokens": 420}
    assert len(server.asked) == 21
    assert 8 < server.most_at_once <= 20
    assert all(TASK in asked.body["messages"][0]["content"] for asked in server.asked)
    assert "'data.names=[riddles]' 'data.eval_names=[riddles_eval]'" in text


def test_a_second_run_asks_nothing_and_more_examples_ask_only_for_the_rest(
    serve: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    server = serve()
    assert datagen(*settings(server, tmp_path))[0] == 0
    before = outputs(tmp_path)
    assert datagen(*settings(server, tmp_path))[0] == 0
    assert (len(server.asked), outputs(tmp_path)) == (21, before)
    assert datagen(*settings(server, tmp_path, examples=25))[0] == 0
    assert sorted(cells(server)) == list(range(25))
    assert len(server.asked) == 26


@pytest.mark.parametrize("torn", [b"", b'{"id": "0123', b"\xe8"])
def test_a_killed_run_ends_with_the_files_of_one_that_was_not_and_pays_nothing_twice(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path, torn: bytes
) -> None:
    def script(asked: Any) -> Any:
        return fake.Reply("I'm sorry, but I can't help with that.") if (asked.cell or 0) % 5 == 4 else None

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert datagen(*settings(serve(script), whole, concurrency=3))[0] == 0
    server = serve(script, delay=0.1)
    process = start(server, killed, concurrency=4)
    wait_until(lambda: len(server.answered) > 8)
    process.kill()
    process.wait()
    log = killed / "riddles.datagen.jsonl"
    paid = [json.loads(line).get("index") for line in log.read_text().splitlines()]
    with log.open("ab") as file:
        file.write(torn)
    server.answered.clear()
    code, text = datagen(*settings(server, killed))
    assert code == 0, text
    assert not {cell for cell in paid if cell is not None} & set(cells(server))
    assert None not in server.answered  # nor the system message
    assert outputs(killed) == outputs(whole)


def test_ctrl_c_waits_for_what_is_paid_and_names_the_command_that_continues(
    serve: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    server = serve(delay=0.3)
    process = start(server, tmp_path, concurrency=4)
    wait_until(lambda: len(server.asked) >= 5)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=20)[0]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "tunewright datagen 'task=" in text
    logged = [line for line in (tmp_path / "riddles.datagen.jsonl").read_text().splitlines() if '"sent"' not in line]
    assert len(logged) == 1 + len(server.answered) == 1 + len(server.asked)
    server.delay = 0
    assert datagen(*settings(server, tmp_path))[0] == 0
    assert len(server.asked) == 21


def test_transport_faults_are_retried_and_bad_replies_rejected_by_reason(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    served: dict[int, float] = {}

    def script(asked: Any) -> Any:
        first = asked.tries == 0
        if asked.cell == 1 and first:
            served[429] = time.monotonic()
            return fake.Reply(status=429, headers={"Retry-After": "1"})
        if asked.cell == 1:
            served[200] = time.monotonic()
        bad = {
            2: fake.Reply(status=500) if first else None,
            3: fake.Reply(body="<html>busy</html>", content_type="text/html") if first else None,
            4: fake.Reply(body='{"choices": [{"mess') if first else None,
            5: fake.Reply('{"instruction": "Solve', finish_reason="length"),
            6: fake.Reply('{"instruction": "Solve'),
            7: fake.Reply(None, refusal="No."),
            8: fake.Reply('{"instruction": "a", "input": "", "output": ""}'),
            9: fake.good(0),
            10: fake.Reply('{"instruction": "a", "input": "", "output": 3}'),
            11: fake.Reply('{"instruction": "a \\ud800", "input": "", "output": "b"}'),
            12: fake.Reply('<think>{hm}</think>```json\n{"instruction": "x", "input": null, "output": "a\nb"}\n```'),
        }
        return bad.get(asked.cell)

    server = serve(script)
    code, text = datagen(*settings(server, tmp_path))
    assert code == 0, text
    assert served[200] - served[429] >= 1
    manifest = json.loads((tmp_path / "riddles.manifest.json").read_text())
    assert manifest["rejects"] == {
        "broken characters": 1,
        "cut at max_tokens": 1,
        "duplicate": 1,
        "empty": 1,
        "not JSON": 1,
        "refused": 1,
        "wrong fields": 1,
    }
    logged = [json.loads(line) for line in (tmp_path / "riddles.datagen.jsonl").read_text().splitlines()]
    assert sorted(record["index"] for record in logged if "index" in record) == list(range(27))


@pytest.mark.parametrize(
    ("refused", "status", "used", "requests"),
    [
        ({"json_schema"}, 400, "tool", 1),
        ({"json_schema", "tool"}, 400, "json_object", 2),
        ({"json_schema", "tool", "json_object"}, 422, "plain", 3),
        ({"json_schema"}, 500, "tool", 2),
    ],
)
def test_a_server_that_refuses_a_reply_format_is_asked_with_the_next(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path, refused: set[str], status: int, used: str, requests: int
) -> None:
    def script(asked: Any) -> Any:
        rung = "tool" if "tools" in asked.body else asked.body.get("response_format", {}).get("type", "plain")
        return fake.Reply(status=status) if rung in refused else None

    server = serve(script)
    code, text = datagen(*settings(server, tmp_path, examples=4))
    assert code == 0, text
    assert len(server.asked) == 5 + requests
    logged = [json.loads(line) for line in (tmp_path / "riddles.datagen.jsonl").read_text().splitlines()]
    assert {record["format"] for record in logged if "index" in record} == {used}


def test_a_model_that_wants_max_completion_tokens_gets_it(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    words = {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "code": None}
    server = serve(lambda asked: fake.Reply(status=400, error=words) if "max_tokens" in asked.body else None)
    assert datagen(*settings(server, tmp_path, examples=3, temperature="null"))[0] == 0
    assert server.asked[-1].body["max_completion_tokens"] == 2048
    assert "temperature" not in server.asked[-1].body


@pytest.mark.parametrize(
    ("status", "error", "code", "words"),
    [
        (401, {"message": "Incorrect API key provided: {key}"}, 2, "OPENAI_API_KEY"),
        (403, {"message": "no access"}, 2, "may not use model 'gpt-4.1'"),
        (404, {"message": "unknown", "code": "model_not_found"}, 2, "no model 'gpt-4.1'"),
        (429, {"message": "pay", "code": "insufficient_quota"}, 6, "no credit left"),
    ],
)
def test_a_fatal_refusal_stops_after_one_request_without_naming_the_key(
    serve: Any,
    fake: Any,
    datagen: RunDatagen,
    tmp_path: Path,
    key: str,
    status: int,
    error: dict[str, str],
    code: int,
    words: str,
) -> None:
    body = {**error, "message": error["message"].replace("{key}", key)}
    server = serve(lambda asked: fake.Reply(status=status, error=body))
    found, text = datagen(*settings(server, tmp_path))
    assert (found, len(server.asked)) == (code, 1)
    assert words in text
    assert key not in text


def test_a_server_that_dies_is_said_so_and_nothing_is_lost(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.datagen.provider.BACKOFF", lambda state: 0.01)
    dead = True
    server = serve(lambda asked: fake.Reply(status=503) if dead and (asked.cell or 0) >= 6 else None)
    code, text = datagen(*settings(server, tmp_path))
    assert code == 6, text
    assert "continues" in text
    dead = False
    server.asked.clear()
    assert datagen(*settings(server, tmp_path))[0] == 0
    assert len(server.asked) == 14


def test_a_low_yield_writes_what_there_is_and_ends_with_3(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    server = serve(lambda asked: fake.Reply("no") if asked.cell is not None and asked.cell >= 4 else None)
    code, text = datagen(*settings(server, tmp_path, examples=5))
    assert code == 3
    assert len(cells(server)) == 15
    assert "4 of 5 rows" in text
    assert "not JSON 11" in text
    assert len(list(generated("riddles", tmp_path))) == 3


def test_rows_with_one_instruction_are_not_split_over_training_and_held_out(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    row = {"instruction": "Translate.", "output": "ja"}
    server = serve(lambda a: None if a.cell is None else fake.Reply(json.dumps({**row, "input": f"{a.cell}"})))
    code, text = datagen(*settings(server, tmp_path))
    assert code == 0
    assert "Nothing is held out" in text
    assert len(list(generated("riddles", tmp_path))) == 20
    assert "riddles_eval" not in json.loads((tmp_path / "dataset_info.json").read_text())


def test_the_key_is_sent_to_the_server_and_written_nowhere(
    serve: Any, fake: Any, datagen: RunDatagen, tmp_path: Path, key: str
) -> None:
    echo = {"instruction": f"What is {key}?", "input": "", "output": "a key"}
    server = serve(lambda asked: fake.Reply(json.dumps(echo)) if asked.cell == 0 else None)
    code, text = datagen(*settings(server, tmp_path))
    assert code == 0
    assert {asked.key for asked in server.asked} == {key}
    assert key not in text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert not [path for path in written if key.encode() in path.read_bytes()]


def test_other_settings_under_the_same_name_are_refused_with_what_differs(
    serve: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    server = serve()
    assert datagen(*settings(server, tmp_path, examples=3))[0] == 0
    code, text = datagen(*settings(server, tmp_path, examples=3, seed=7, model="other"))
    assert code == 2
    assert "seed: there 42, now 7" in text
    assert "model: there 'gpt-4.1', now 'other'" in text
    assert "task:" not in text
    assert len(server.asked) == 4


def test_a_dataset_that_was_not_generated_is_not_overwritten(serve: Any, datagen: RunDatagen, tmp_path: Path) -> None:
    server = serve()
    (tmp_path / "riddles.json").write_text("[]")
    for name in ("riddles", "dataset_info"):
        code, text = datagen(*settings(server, tmp_path, name=name))
        assert code == 2, text
        assert "Choose another `name`" in text
    assert not server.asked


def test_two_processes_do_not_share_an_output(serve: Any, datagen: RunDatagen, tmp_path: Path) -> None:
    server = serve(delay=0.5)
    process = start(server, tmp_path)
    try:
        wait_until(lambda: len(server.asked) >= 1)
        code, text = datagen(*settings(server, tmp_path))
        assert code == 2
        assert "Another process" in text
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=x", "name=y", "exampels=5"], "Did you mean 'examples'?"),
        (["task=x", "name=y", "examples=many"], "write a whole number"),
        (["task=x", "name=y", "temperature=hot"], "write a number"),
        (["task=x", "name=y", "api_key=sk-very-secret"], "export OPENAI_API_KEY"),
        (["task=", "name=y"], "No value for `task`. For example: tunewright datagen"),
        (["task=x"], "No value for `name`"),
        (["task=x", "name=y", "out="], "No value for `out`"),
        (["task=x", "name=../y"], "write letters"),
        (["task=x", "name=y", "examples=0"], "`examples` is 0: write a number from 2"),
        (["task=x", "name=y", "similarity=0"], "write a number from 0.1 to 1"),
        (["task=x", "name=y", "similarity=1.1"], "write a number from 0.1 to 1"),
        (["task=x", "name=y", "judge.threshold=6"], "write a number from 1 to 5"),
        (["task=x", "name=y", "min_output=0"], "`min_output` is 0: write a number from 1"),
        (["task=x", "name=y", "min_output=9", "max_output=8"], "`max_output` is 8: write at least `min_output`, 9"),
        (["task=x", "name=y", "base_url=localhost:80"], "must be an address"),
        (["a riddle", "name=y"], "not key=value"),
    ],
)
def test_a_wrong_setting_ends_with_2_and_says_what_to_write(
    datagen: RunDatagen, arguments: list[str], words: str
) -> None:
    code, text = datagen(*arguments)
    assert code == 2
    assert words in text
    assert "sk-very-secret" not in text


def test_without_a_key_only_a_server_on_this_machine_is_asked(
    serve: Any, datagen: RunDatagen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    code, text = datagen("task=x", "name=y", f"out={tmp_path}")
    assert code == 2
    assert "export OPENAI_API_KEY" in text
    monkeypatch.setenv("OPENAI_BASE_URL", serve().url)
    assert datagen("task=x", "name=y", "examples=3", f"out={tmp_path}")[0] == 0


def test_a_dry_run_asks_and_writes_nothing(serve: Any, datagen: RunDatagen, tmp_path: Path) -> None:
    server = serve()
    code, text = datagen(*settings(server, tmp_path / "new"), "--dry-run")
    assert code == 0
    assert TASK in text
    assert not server.asked
    assert not (tmp_path / "new").exists()


def test_the_command_line_does_not_wait_for_openai_or_torch() -> None:
    code = "import tunewright.datagen.cli, sys; sys.exit(bool({'torch', 'openai', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ).returncode == 0
