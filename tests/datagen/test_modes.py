"""Batches, one after the other, conversations, and a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config
from tunewright.trainer.data.formats import Conversation, to_conversation
from tunewright.trainer.data.sources import open_datasets

TURNS = {"turns": [{"user": f"question {n}", "assistant": f"reply {n}"} for n in range(3)]}


def read(out: Path, name: str = "riddles") -> list[list[dict[str, Any]]]:
    """Messages of each row as training reads them."""
    rows = open_datasets([name], compose_config([f"data.dir={out}"]).data, offline=True)[0]
    found = [to_conversation(row, rows.entry) for row in rows]
    assert all(isinstance(one, Conversation) for one in found)
    return [[dict(message) for message in one.messages] for one in found if isinstance(one, Conversation)]


# ---- batch ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(serve: Any, fake: Any) -> Any:
    server = serve()
    server.batches = fake.FakeBatches()
    return server


def batch(fake: Any, server: Any, out: Path, **changed: Any) -> list[str]:
    found: list[str] = fake.settings(server, out, mode="batch", **changed)
    return found


def test_a_batch_is_submitted_looked_at_and_collected(fake: Any, batches: Any, datagen: Any, tmp_path: Path) -> None:
    code, text = datagen(*batch(fake, batches, tmp_path))
    assert code == 75
    assert "Submitted 25 requests as batch_0" in text
    code, text = datagen(*batch(fake, batches, tmp_path))
    assert code == 75
    assert "batch_0: in_progress" in text
    batches.batches.status = "completed"
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    assert batches.batches.asked == [list(range(25))]
    manifest = fake.manifest(tmp_path)
    assert (manifest["counts"]["accepted"], manifest["counts"]["requests"]) == (20, 26)
    # The plan at full price, the batch at half.
    assert manifest["cost"]["usd"] == pytest.approx((1 + 25 / 2) * (100 * 2 + 20 * 8) / 1e6)
    before = fake.written(tmp_path)
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    assert (fake.written(tmp_path), len(batches.batches.made), len(batches.asked)) == (before, 1, 1)
    assert len(read(tmp_path)) == 18


def test_an_expired_batch_keeps_what_was_made_and_a_second_one_asks_for_the_rest(
    fake: Any, batches: Any, datagen: Any, tmp_path: Path
) -> None:
    datagen(*batch(fake, batches, tmp_path))
    batches.batches.status, batches.batches.answers = "expired", lambda number, cell: number or cell % 2
    code, text = datagen(*batch(fake, batches, tmp_path))
    assert code == 75
    assert "batch_0: expired" in text
    assert batches.batches.asked[1][:9] == list(range(2, 20, 2))  # 0 went alone, to find out what the server accepts
    assert not set(batches.batches.asked[1]) & set(range(1, 25, 2))
    batches.batches.status = "completed"
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    assert len(batches.batches.made) == 2
    assert fake.manifest(tmp_path)["rejects"] == {}


def test_bad_lines_are_rejected_or_asked_for_again(fake: Any, batches: Any, datagen: Any, tmp_path: Path) -> None:
    def reply(cell: int) -> Any:
        return {1: fake.Reply(status=400), 2: fake.Reply("no"), 3: fake.Reply(None, refusal="No.")}.get(
            cell, fake.good(cell)
        )

    server = batches.batches
    server.reply, server.status = reply, "completed"
    server.spoil = lambda text: "\n".join(["[]", "{", '{"custom_id": "x"}', "7", "", *text.splitlines()])
    datagen(*batch(fake, batches, tmp_path))
    code, text = datagen(*batch(fake, batches, tmp_path))
    assert code == 0, text
    assert "cannot be read" in text
    assert fake.manifest(tmp_path)["rejects"] == {"no reply": 1, "not JSON": 1, "refused": 1}


def test_a_failed_batch_says_why_and_may_be_submitted_again(
    fake: Any, batches: Any, datagen: Any, tmp_path: Path
) -> None:
    datagen(*batch(fake, batches, tmp_path))
    batches.batches.status = "failed"
    code, text = datagen(*batch(fake, batches, tmp_path))
    assert code == 2
    assert "the file is not right" in text
    batches.batches.status = "completed"
    assert datagen(*batch(fake, batches, tmp_path))[0] == 75
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    assert len(batches.batches.made) == 2


def test_a_server_without_batches_is_named(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    code, text = datagen(*batch(fake, server, tmp_path))
    assert code == 2
    assert "no Batch API" in text
    assert "mode=parallel" in text
    assert datagen(*fake.settings(server, tmp_path))[0] == 0


@pytest.mark.parametrize("taken", [True, False])
def test_an_answer_that_was_lost_while_submitting_pays_nothing_twice(
    fake: Any, batches: Any, datagen: Any, tmp_path: Path, taken: bool
) -> None:
    server = batches.batches
    server.lose_create, server.fail_create = taken, 0 if taken else 500
    code, text = datagen(*batch(fake, batches, tmp_path))
    assert code == 6
    assert "continues" in text
    server.lose_create, server.fail_create = False, 0
    assert datagen(*batch(fake, batches, tmp_path))[0] == 75
    assert len(server.made) == 1
    server.status = "completed"
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    assert len(server.made) == 1


def test_killed_between_submitting_and_logging(fake: Any, batches: Any, datagen: Any, tmp_path: Path) -> None:
    datagen(*batch(fake, batches, tmp_path))
    log = tmp_path / "riddles.datagen.jsonl"
    kept = [line for line in log.read_text().splitlines(True) if '"id": "batch-0"' not in line]
    log.write_text("".join(kept))
    batches.batches.status = "completed"
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    assert len(batches.batches.made) == 1


def test_killed_while_collecting(fake: Any, batches: Any, datagen: Any, tmp_path: Path) -> None:
    datagen(*batch(fake, batches, tmp_path))
    batches.batches.status = "completed"
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    whole = fake.written(tmp_path)
    log = tmp_path / "riddles.datagen.jsonl"
    lines = log.read_text().splitlines(True)
    log.write_text("".join(lines[:15]) + lines[15][:40])
    assert datagen(*batch(fake, batches, tmp_path))[0] == 0
    assert fake.written(tmp_path) == whole
    assert len(batches.batches.made) == 1


def test_a_batch_is_as_large_as_the_budget_allows(fake: Any, batches: Any, datagen: Any, tmp_path: Path) -> None:
    cap = {"budget__tokens": 20_000}
    assert datagen(*batch(fake, batches, tmp_path, **cap))[0] == 75
    first = len(batches.batches.asked[0])
    assert 0 < first < 10  # of about 3,400 tokens each at the worst
    batches.batches.status = "completed"
    code, _ = datagen(*batch(fake, batches, tmp_path, **cap))
    assert code == 75
    assert len(batches.batches.asked[1]) >= first - 1  # what the first one really took left room
    code, text = datagen(*batch(fake, batches, tmp_path, budget__tokens=1000))
    assert code == 3
    assert "budget.tokens = 1,000" in text
    assert fake.manifest(tmp_path)["counts"]["accepted"] > first


def test_a_batch_asks_as_the_server_wants_it(fake: Any, batches: Any, datagen: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(fake.PLAN))
    words = {"message": "Unsupported parameter: use 'max_completion_tokens'.", "code": None}
    batches.script = lambda asked: fake.Reply(status=400, error=words) if "max_tokens" in asked.body else None
    assert datagen(*batch(fake, batches, tmp_path, plan=plan))[0] == 75
    lines = [json.loads(line) for line in batches.batches.files["file-0"].splitlines()]
    assert all("max_completion_tokens" in line["body"] for line in lines)
    assert 0 not in batches.batches.asked[0]  # it was the request that found out


# ---- one after the other --------------------------------------------------------------------------------------------


def sequential(fake: Any, server: Any, out: Path, **changed: Any) -> list[str]:
    found: list[str] = fake.settings(server, out, mode="sequential", **{"examples": 15, **changed})
    return found


def numbered(fake: Any) -> Any:
    """A reply that depends on how often the server was asked."""
    return lambda asked: fake.good(asked.number) if asked.number else None


def test_earlier_replies_are_shown_one_request_at_a_time(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(numbered(fake))
    code, text = datagen(*sequential(fake, server, tmp_path))
    assert code == 0, text
    assert server.most_at_once == 1
    shown = [sum(m["role"] == "assistant" for m in asked.body["messages"]) for asked in server.asked[1:]]
    assert shown == [*range(11), 10, 10, 10, 10]
    assert server.asked[2].body["messages"][1]["content"] == fake.good(1).content
    before = fake.written(tmp_path)
    assert datagen(*sequential(fake, server, tmp_path))[0] == 0
    assert (len(server.asked), fake.written(tmp_path)) == (16, before)


def test_a_loop_that_was_killed_pays_nothing_twice(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(numbered(fake), delay=0.1)
    process = fake.start(server, tmp_path / "a", mode="sequential", examples=15)
    fake.wait_until(lambda: len(server.answered) >= 7)
    process.kill()
    process.communicate()
    logged = sum("index" in record and not record.get("sent") for record in fake.records(tmp_path / "a"))
    server.delay = 0
    before = len(server.asked)
    assert datagen(*sequential(fake, server, tmp_path / "a"))[0] == 0
    assert len(server.asked) - before == 15 - logged


def test_other_rules_need_no_other_requests(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(numbered(fake))
    assert datagen(*sequential(fake, server, tmp_path))[0] == 0
    code, _ = datagen(*sequential(fake, server, tmp_path, max_output=1, budget__requests=1))
    assert (code, len(server.asked)) == (3, 16)
    assert datagen(*sequential(fake, server, tmp_path))[0] == 0
    assert len(server.asked) == 16


def test_a_reply_that_builds_on_a_missing_one_is_kept(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.datagen.provider.BACKOFF", lambda state: 0.001)
    bad = {"on": True}

    def script(asked: Any) -> Any:
        if bad["on"] and 5 <= asked.number < 13:
            return fake.Reply(status=500)
        return fake.good(asked.number) if asked.number else None

    server = serve(script)
    assert datagen(*sequential(fake, server, tmp_path, examples=6, attempts=1.2))[0] == 0
    asked = len(server.asked)
    bad["on"] = False
    assert datagen(*sequential(fake, server, tmp_path, examples=7, attempts=1.2))[0] == 0
    assert len(server.asked) == asked + 1


# ---- conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["alpaca", "sharegpt"])
def test_conversations_are_read_by_the_registry_with_every_turn(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, shape: str
) -> None:
    def script(asked: Any) -> Any:
        if asked.cell is None:
            return None
        row = json.loads(fake.good(asked.cell).content)
        turns = [{"user": row["instruction"], "assistant": row["output"]}, *TURNS["turns"][1:]]
        return fake.Reply(json.dumps({"turns": turns if asked.cell != 3 else turns[:1]}))

    server = serve(script)
    code, text = datagen(*fake.settings(server, tmp_path, turns=3, format=shape))
    assert code == 0, text
    found = read(tmp_path)
    assert {tuple(message["role"] for message in one) for one in found} == {("system", *("user", "assistant") * 3)}
    assert {one[-1]["content"] for one in found} == {"reply 2"}
    assert all(one[1]["content"].startswith("Solve ") for one in found)
    assert fake.manifest(tmp_path)["rejects"] == {"one exchange only": 1}
    assert "3 exchanges" in server.asked[1].body["messages"][0]["content"]


def test_both_shapes_are_the_same_messages(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    found = []
    for shape in ("alpaca", "sharegpt", "alpaca"):
        assert datagen(*fake.settings(server, tmp_path, format=shape))[0] == 0
        found.append((read(tmp_path), read(tmp_path, "riddles_eval")))
    assert found[0] == found[1] == found[2]
    assert len(server.asked) == 21


# ---- judge ----------------------------------------------------------------------------------------------------------


def judged(fake: Any) -> Any:
    """Scores by the number of the riddle: 0 to 5, and once no number."""

    def script(asked: Any) -> Any:
        text = asked.body["messages"][0]["content"]
        if not text.startswith("Score one"):
            return None
        number = int(text.rpartition("riddle ")[2].split()[0])
        score = "high" if number == 7 else number % 5 + 1
        return fake.Reply(json.dumps({"score": score, "reason": "so"}))

    return script


def test_rows_below_the_threshold_are_dropped_and_another_threshold_asks_for_no_score_twice(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    server = serve(judged(fake))
    code, text = datagen(*fake.settings(server, tmp_path, judge__threshold=3))
    assert code == 0, text
    manifest = fake.manifest(tmp_path)
    assert manifest["rejects"] == {"no score": 1, "score below 3": 14}
    assert sum(manifest["scores"].values()) == 34
    asked = len(server.asked)
    assert datagen(*fake.settings(server, tmp_path, judge__threshold=2))[0] == 0
    assert len(server.asked) == asked
    assert fake.manifest(tmp_path)["rejects"]["score below 2"] == 6


def test_killed_while_judging(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    whole = serve(judged(fake))
    assert datagen(*fake.settings(whole, tmp_path / "whole", judge__threshold=3))[0] == 0
    server = serve(judged(fake), delay=0.1)
    process = fake.start(server, tmp_path / "b", judge__threshold=3, concurrency=6)
    fake.wait_until(lambda: len(server.answered) >= 14)
    process.kill()
    process.communicate()
    logged = sum(not record.get("sent") for record in fake.records(tmp_path / "b")) - 1
    server.delay = 0
    before = len(server.asked)
    assert datagen(*fake.settings(server, tmp_path / "b", judge__threshold=3))[0] == 0
    assert len(server.asked) - before == len(whole.asked) - logged
    assert fake.written(tmp_path / "b") == fake.written(tmp_path / "whole")
