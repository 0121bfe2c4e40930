"""`tunewright datagen` against a real server with a real model, directly and through a proxy that goes wrong."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tunewright.datagen.grid import cell
from tunewright.datagen.plan import Plan, plan_prompt
from tunewright.datagen.prompts import score_prompt
from tunewright.datagen.settings import load_settings

TASK = "Answer questions about everyday things in one sentence. 也可以用中文提问。"
RunDatagen = Callable[..., tuple[int, str]]
PLAN = Plan("You answer in one sentence.", ("tools", "places"), ("a student",))
ROW = {"instruction": "Why?", "input": "", "output": "Because."}
FILES = ("things.json", "things_eval.json", "dataset_info.json", "things.manifest.json")
REPOSITORY = Path(__file__).parents[2]
COMMAND = "import argparse, sys; from tunewright.datagen.cli import add_parser; p = argparse.ArgumentParser()\n"
COMMAND += "add_parser(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); sys.exit(a.run(a))"


def settings(real_server: Any, url: str, out: Path, **changed: Any) -> list[str]:
    values = {"task": TASK, "name": "things", "examples": 20, "out": out, "base_url": url, "model": real_server.model}
    # The model says everything in a few sentence patterns: rows much more alike than those of a real one are kept.
    values |= {"temperature": 1.0, "concurrency": 4, "max_tokens": 256, "similarity": 0.95, **changed}
    return [f"{key}={value}" for key, value in values.items()]


def logged(out: Path) -> list[dict[str, Any]]:
    """The logged replies to requests for examples."""
    lines = (out / "things.datagen.jsonl").read_bytes().split(b"\n")[:-1]
    return [record for record in map(json.loads, lines) if "index" in record]


def rows(out: Path) -> list[dict[str, str]]:
    return [row for name in FILES[:2] for row in json.loads((out / name).read_text(encoding="utf-8"))]


def outputs(out: Path) -> dict[str, bytes]:
    """The written files, without the settings that say where they were made."""
    found = {name: (out / name).read_bytes() for name in FILES}
    manifest = json.loads(found["things.manifest.json"])
    for key in ("out", "base_url"):
        del manifest["settings"][key]
    return {**found, "things.manifest.json": json.dumps(manifest).encode()}


def delivered(proxy: Any) -> Counter[str]:
    """How often each prompt got a whole answer: what it would be wrong to ask for, and pay, again."""
    return Counter(seen.prompt for seen in proxy.seen if seen.delivered)


def test_the_model_gives_each_kind_of_reply_that_a_request_asks_for(real_server: Any, json_model: Any) -> None:
    client = openai.OpenAI(base_url=real_server.url, api_key="none", max_retries=0)

    def ask(prompt: str) -> str:
        reply = client.chat.completions.create(
            model=real_server.model, messages=[{"role": "user", "content": prompt}], max_tokens=400, temperature=1.0
        )
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(4) as pool:
        for kind in json_model.KINDS:
            prompts = [f"The task:\n{TASK}\n\n{kind.marker}.\n\nThis is number {number}." for number in range(6)]
            replies = list(pool.map(ask, prompts))
            assert sum(map(kind.valid, replies)) >= 3, (kind.name, replies)
            assert len(set(replies)) >= 3, (kind.name, replies)


def test_the_requests_of_the_command_hold_the_phrases_that_the_model_knows(json_model: Any) -> None:
    single, turns = (load_settings([f"task={TASK}", "name=things", f"turns={count}"]) for count in (1, 3))
    prompts = {
        "plan": plan_prompt(TASK),
        "single": cell(single, PLAN, [], 0).messages[0][1],
        "turns": cell(turns, PLAN, [], 0).messages[0][1],
        "score": score_prompt(single, PLAN, ROW),
    }
    for name, prompt in prompts.items():
        assert [kind.name for kind in json_model.KINDS if kind.marker and kind.marker in prompt] == [name]


@pytest.fixture
def plan(tmp_path: Path) -> str:
    """A plan file, so that a test counts requests for examples only."""
    PLAN.write(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


def test_a_real_model_makes_a_plan_that_is_shown_saved_and_used(
    real_server: Any, datagen: RunDatagen, tmp_path: Path
) -> None:
    asked = settings(real_server, real_server.url, tmp_path, examples=4, turns=2, **{"judge.threshold": 1})
    code, text = datagen(*asked, "--plan-only")
    assert code == 0, text
    saved = json.loads((tmp_path / "things.plan.json").read_text(encoding="utf-8"))
    assert len(saved["topics"]) >= 4
    assert saved["topics"][0] in text
    code, text = datagen(*asked)
    assert code == 0, text
    manifest = json.loads((tmp_path / "things.manifest.json").read_text(encoding="utf-8"))
    assert manifest["plan"] == saved
    assert sum(manifest["scores"].values()) >= 4
    assert all(row["history"] for row in rows(tmp_path))


def test_a_dataset_from_a_real_model_is_checked_row_by_row_and_trains(
    real_server: Any, datagen: RunDatagen, train: Callable[..., Path], tmp_path: Path, plan: str
) -> None:
    # Replies take some 40 tokens: this limit cuts some of them off, so that real rejects are certain.
    code, text = datagen(*settings(real_server, real_server.url, tmp_path, examples=20, max_tokens=44, plan=plan))
    assert code == 0, text
    made = rows(tmp_path)
    assert len(made) == 20
    assert len({row["instruction"] for row in made}) > 16
    manifest = json.loads((tmp_path / "things.manifest.json").read_text())
    replies = logged(tmp_path)
    assert len(replies) == 20 + sum(manifest["rejects"].values())
    cut = sum(reply["finish_reason"] == "length" for reply in replies)
    assert manifest["rejects"].get("cut at max_tokens", 0) == cut > 0
    whole = [json.loads(reply["content"]) for reply in replies if is_example(reply)]
    assert len(whole) >= 10
    for row in whole:
        assert {**row, "system": manifest["system_message"]} in made
    for row in made:
        # A reply writes a quote or a line's end as JSON does.
        begins = json.dumps(row["output"][:10], ensure_ascii=False)[1:-1]
        assert any(begins in reply["content"] for reply in replies), begins
    assert manifest["usage"]["completion_tokens"] > 20 * 20
    names = ["data=registry", f"data.dir={tmp_path}", "data.names=[things]", "data.eval_names=[things_eval]"]
    run = train("things", "model=tiny", *names, "train.max_steps=2", "strategy=single")
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"


def is_example(reply: dict[str, Any]) -> bool:
    """An opinion of its own on what is a good reply: strict JSON with three stripped strings, two of them not empty."""
    try:
        found = json.loads(reply["content"])
    except ValueError:
        return False
    return (
        reply["finish_reason"] == "stop"
        and isinstance(found, dict)
        and set(found) == {"instruction", "input", "output"}
        and all(isinstance(value, str) and value == value.strip() for value in found.values())
        and bool(found["instruction"] and found["output"])
    )


def test_a_storm_of_faults_ends_with_the_exact_number_of_rows_and_nothing_paid_twice(
    real_server: Any, faults: Any, proxy: Any, datagen: RunDatagen, tmp_path: Path, plan: str
) -> None:
    storm = [
        faults.rate_limited(1),
        faults.rate_limited(0.2, milliseconds=True),
        faults.status(500),
        faults.status(503),
        faults.html(200),
        faults.html(502),
        faults.truncated(),
        faults.dropped(),
        faults.dropped(keep=0.0),
        faults.dropped(keep=0.6),
        faults.slow(wait=4),  # longer than the timeout
        faults.slow(pause=0.3),
        faults.no_usage(),
        faults.ignores_format(),
        faults.finished_by("length"),
        faults.limits(limit_requests=9, remaining_requests=0, reset_requests="1s"),
    ]
    random.Random(0).shuffle(storm)
    left = iter([None, *storm])  # the first request settles what the server accepts
    server = proxy(lambda seen: next(left, None) if seen.tries == 0 else None)
    code, text = datagen(*settings(real_server, server.url, tmp_path, examples=20, timeout=3, plan=plan))
    assert code == 0, text
    assert {seen.fault for seen in server.seen} == {fault.name for fault in storm} | {"pass"}
    assert len(rows(tmp_path)) == 20
    replies = logged(tmp_path)
    manifest = json.loads((tmp_path / "things.manifest.json").read_text())
    assert len(replies) == len({reply["id"] for reply in replies}) == 20 + sum(manifest["rejects"].values())
    assert sorted(reply["index"] for reply in replies) == list(range(len(replies)))
    assert not [reply for reply in replies if "error" in reply]
    assert manifest["rejects"]["cut at max_tokens"] >= 1  # the one whose finish_reason was changed
    # Delivered once each, except that the client had left before the slow one was answered.
    late = next(
        seen.prompt for seen in server.seen if seen.fault == "slow" and not seen.tries and gave_up(server, seen)
    )
    assert {prompt: n for prompt, n in delivered(server).items() if n > 1 and prompt != late} == {}
    assert len(delivered(server)) == len(replies)
    limited = [seen for seen in server.seen if seen.status == 429]
    assert len(limited) == 2


def gave_up(server: Any, seen: Any) -> bool:
    return any(other.prompt == seen.prompt and other.tries for other in server.seen)


def test_a_server_that_refuses_parameters_is_asked_without_them(
    real_server: Any, faults: Any, proxy: Any, datagen: RunDatagen, tmp_path: Path, plan: str
) -> None:
    def script(seen: Any) -> Any:
        if "max_tokens" in seen.body:
            return faults.status(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if seen.body.get("response_format", {}).get("type") == "json_schema":
            return faults.unsupported("response_format")
        return None

    server = proxy(script)
    code, text = datagen(*settings(real_server, server.url, tmp_path, examples=3, plan=plan))
    assert code == 0, text
    assert {reply["format"] for reply in logged(tmp_path)} == {"tool"}
    assert [seen.status for seen in server.seen].count(400) == 2


@pytest.mark.parametrize(("name", "exit_code"), [("insufficient_quota", 6), ("401", 2)])
def test_a_fatal_answer_in_the_middle_keeps_what_was_paid(
    real_server: Any, faults: Any, proxy: Any, datagen: RunDatagen, tmp_path: Path, name: str, exit_code: int
) -> None:
    fatal = {"insufficient_quota": faults.insufficient_quota(), "401": faults.status(401)}[name]
    server = proxy(lambda seen: fatal if seen.number >= 6 else None)
    code, text = datagen(*settings(real_server, server.url, tmp_path, examples=8, concurrency=1))
    assert code == exit_code, text
    assert len(server.billed) == 6
    paid, asked = set(delivered(server)), len(server.seen)
    server.script = None
    code, text = datagen(*settings(real_server, server.url, tmp_path, examples=8))
    assert code == 0, text
    assert len(rows(tmp_path)) == 8
    assert not paid & {seen.prompt for seen in server.seen[asked:]}


@pytest.mark.parametrize("torn", [b"", b'{"id": "0123", "content": "\xe8'])
def test_a_killed_run_pays_nothing_twice_and_its_files_follow_from_the_log_alone(
    real_server: Any, faults: Any, proxy: Any, datagen: RunDatagen, tmp_path: Path, torn: bytes
) -> None:
    killed, replayed = tmp_path / "killed", tmp_path / "replayed"
    server = proxy(lambda seen: faults.slow(wait=0.1))
    command = [sys.executable, "-c", COMMAND, "datagen", *settings(real_server, server.url, killed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 60
        while len(delivered(server)) < 9:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    log = killed / "things.datagen.jsonl"
    before, paid = log.read_bytes(), {reply["index"] for reply in logged(killed)}
    assert paid
    assert not (killed / "things.json").exists()
    with log.open("ab") as file:
        file.write(torn)
    asked = len(server.seen)
    code, text = datagen(*settings(real_server, server.url, killed))
    assert code == 0, text
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    config = load_settings(settings(real_server, server.url, killed))
    manifest = json.loads((killed / "things.manifest.json").read_text())
    made = Plan(**{key: value if key == "system" else tuple(value) for key, value in manifest["plan"].items()})
    known = {cell(config, made, [], index).messages[0][1] for index in paid}
    assert len(known) == len(paid)
    again = {seen.prompt for seen in server.seen[asked:]}
    assert not again & (known | {plan_prompt(TASK)})
    # The same replies without an interruption: a server asked twice would not give them again, their log does.
    replayed.mkdir()
    shutil.copy(log, replayed)
    asked = len(server.seen)
    assert datagen(*settings(real_server, server.url, replayed))[0] == 0
    assert len(server.seen) == asked
    assert outputs(replayed) == outputs(killed)
