"""What the server billed never exceeds what the user allowed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

WHOLE = {"price__input": 10, "price__output": 100}


def usd(server: Any) -> float:
    return float((server.billed[0] * 10 + server.billed[1] * 100) / 1e6)


@pytest.mark.parametrize(("setting", "cap"), [("usd", 1.0), ("tokens", 12_000), ("requests", 12)])
def test_a_cap_holds_at_64_in_flight_and_a_raised_one_goes_on(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, setting: str, cap: float
) -> None:
    # Every reply takes all that it may: the worst case is the real one.
    def script(asked: Any) -> Any:
        reply = fake.Reply(json.dumps(fake.PLAN)) if asked.cell is None else fake.good(asked.cell)
        reply.usage = (len(json.dumps(asked.body, ensure_ascii=False).encode()), asked.body["max_tokens"])
        return reply

    server = serve(script, delay=0.02)
    changed = {"examples": 100, "max_tokens": 500, **WHOLE}
    for part in (1, 2):
        code, text = datagen(*fake.settings(server, tmp_path, **changed, **{f"budget__{setting}": cap * part}))
        assert (code, f"budget.{setting} = " in text) == (3, True), text
        spent = {"usd": usd(server), "tokens": sum(server.billed), "requests": len(server.asked)}[setting]
        assert cap * part * 0.7 < spent <= cap * part
        rows = fake.manifest(tmp_path)["counts"]["accepted"]
        assert rows == len([cell for cell in server.answered if cell is not None])
        assert "Raise the budget" in text
    assert datagen(*fake.settings(server, tmp_path, **changed))[0] == 0
    assert sorted(cell for cell in server.answered if cell is not None) == list(range(100))


@pytest.mark.parametrize("fault", ["drop", "timeout", "no usage", "html"])
def test_what_nobody_tells_counts_at_its_worst(serve: Any, fake: Any, datagen: Any, tmp_path: Path, fault: str) -> None:
    def script(asked: Any) -> Any:
        if asked.cell is None:
            return None
        if fault == "timeout":
            time.sleep(1.3)
        if fault == "html":
            return fake.Reply(body="<html>")
        reply = fake.good(asked.cell)
        reply.drop, reply.tells_usage = fault == "drop", fault != "no usage"
        return reply

    server = serve(script)
    code, text = datagen(
        *fake.settings(server, tmp_path, timeout=1, max_tokens=1000, budget__tokens=7000, concurrency=2)
    )
    assert code == 3, text
    assert "budget.tokens = 7,000" in text
    asked = len(server.asked)
    assert asked == 3  # 120 tokens for the plan, and more than 2,300 for each other one
    code, text = datagen(*fake.settings(server, tmp_path, timeout=1, max_tokens=1000, budget__tokens=7000))
    assert code == 3
    assert len(server.asked) == asked  # the next run knows that too


def test_what_a_killed_run_had_in_flight_counts_for_the_next_one(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    server = serve(delay=0.5)
    process = fake.start(server, tmp_path, budget__requests=6, concurrency=4)
    fake.wait_until(lambda: len(server.asked) >= 4)
    process.kill()
    process.communicate()
    server.delay = 0
    for _ in range(2):
        code, text = datagen(*fake.settings(server, tmp_path, budget__requests=6))
        assert code == 3, text
        # A request is noted before it is sent: the one that was noted when the kill came may never have left.
        assert 5 <= len(server.asked) <= 6
    assert datagen(*fake.settings(server, tmp_path))[0] == 0
    assert fake.manifest(tmp_path)["counts"]["requests"] == 21  # as if it had not been killed


def test_dropped_by_ctrl_c_counts_too(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(lambda asked: None, delay=0.0)
    server.script = lambda asked: setattr(server, "delay", 3)  # the plan at once, the rest slowly
    process = fake.start(server, tmp_path, concurrency=4)
    fake.wait_until(lambda: len(server.asked) == 5)
    process.send_signal(signal.SIGINT)
    fake.wait_until(lambda: "sent" in (tmp_path / "riddles.datagen.jsonl").read_text())
    process.send_signal(signal.SIGINT)
    assert "continues it" in process.communicate(timeout=20)[0]
    server.script, server.delay = None, 0
    code, text = datagen(*fake.settings(server, tmp_path, budget__requests=7))
    assert code == 3, text
    assert len(server.asked) == 7


def test_repeated_requests_count(serve: Any, fake: Any, datagen: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tunewright.datagen.provider.BACKOFF", lambda state: 0.01)
    server = serve(lambda asked: fake.Reply(status=500) if asked.cell == 0 else None)
    code, _ = datagen(*fake.settings(server, tmp_path, budget__requests=9, concurrency=1))
    assert (code, len(server.asked)) == (3, 9)


def test_time_is_up(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(delay=0.3)
    code, text = datagen(*fake.settings(server, tmp_path, budget__minutes=0.02, concurrency=2))
    assert code == 3
    assert "budget.minutes = 0.02 are over" in text
    assert fake.manifest(tmp_path)["counts"]["accepted"] == len(server.answered) - 1


def test_time_is_up_while_the_server_wants_to_be_left_alone(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    haste = fake.Reply(status=429, headers={"Retry-After": "200"})
    server = serve(lambda asked: haste if (asked.cell or 0) > 3 else None)
    code, text = datagen(*fake.settings(server, tmp_path, budget__minutes=0.02))
    assert code == 3, text
    assert fake.manifest(tmp_path)["counts"]["accepted"] == 4


def test_a_budget_too_small_for_a_single_reply_names_itself(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    server = serve()
    code, text = datagen(*fake.settings(server, tmp_path, budget__tokens=10))
    assert code == 2
    assert "budget.tokens = 10" in text
    (tmp_path / "plan.json").write_text(json.dumps(fake.PLAN))
    code, text = datagen(*fake.settings(server, tmp_path, budget__tokens=10, plan=tmp_path / "plan.json"))
    assert code == 3
    assert "budget.tokens = 10" in text
    assert not server.asked


def test_a_judge_is_counted_at_its_own_price(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    def script(asked: Any) -> Any:
        return fake.Reply('{"score": 5, "reason": ""}') if asked.body["model"] == "gpt-4o" else None

    server = serve(script)
    changed = {"examples": 4, "model": "gpt-4.1-nano", "judge__threshold": 3, "judge__model": "gpt-4o"}
    assert datagen(*fake.settings(server, tmp_path, **changed))[0] == 0
    nano, judge = 100 * 0.10 + 20 * 0.40, 100 * 2.50 + 20 * 10.00
    assert fake.manifest(tmp_path)["cost"]["usd"] == pytest.approx((5 * nano + 4 * judge) / 1e6)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "mine", "budget__usd": 1}, "price.input= and price.output="),
        ({"model": "mine", "budget__usd": 1, "price__input": 1}, "budget.tokens= instead"),
        ({"provider": "openai_compatible", "model": "gpt-4.1", "budget__usd": 1}, "price of 'gpt-4.1' is not known"),
        ({"budget__usd": 1, "judge__threshold": 3, "judge__model": "other"}, "price of 'other', which scores"),
        ({"budget__usd": "nan"}, "write a number above 0"),
        ({"budget__tokens": 0}, "write a number above 0"),
        ({"price__input": -1}, "dollars for a million tokens"),
        ({"attempts": "inf"}, "`attempts` is inf"),
        ({"timeout": "nan"}, "`timeout` is nan"),
    ],
)
def test_a_cap_that_could_not_hold_is_refused(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    server = serve()
    code, text = datagen(*fake.settings(server, tmp_path, **changed))
    assert code == 2
    assert words in text
    assert not server.asked


def test_an_estimate_names_requests_tokens_and_dollars(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    code, text = datagen(*fake.settings(server, tmp_path, examples=100), "--dry-run")
    assert code == 0
    assert "about 125 requests" in text
    assert "$" in text
    assert "no price is known" in datagen(*fake.settings(server, tmp_path, model="mine"), "--dry-run")[1]
    assert not server.asked
