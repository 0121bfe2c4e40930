"""How fast requests go out: as many as allowed, fewer where the server says so, none while it wants a pause."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tunewright.datagen.limiter import Limiter, Stopped, _duration


def test_all_that_is_allowed_goes_at_once(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(delay=0.3)
    assert datagen(*fake.settings(server, tmp_path, examples=64))[0] == 0
    assert server.most_at_once > 50


def test_concurrency_is_never_exceeded(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(delay=0.02)
    assert datagen(*fake.settings(server, tmp_path, examples=40, concurrency=5))[0] == 0
    assert server.most_at_once == 5


def test_a_server_with_a_narrow_rate_limit_ends_with_every_row(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    window: list[float] = []
    lock = threading.Lock()

    def script(asked: Any) -> Any:
        with lock:
            now = time.monotonic()
            window[:] = [moment for moment in window if now - moment < 0.5]
            if len(window) >= 12:
                return fake.Reply(status=429, headers={"Retry-After": "0.4"})
            window.append(now)
        return None

    server = serve(script)
    code, text = datagen(*fake.settings(server, tmp_path, examples=80, concurrency=64))
    assert code == 0, text
    assert fake.manifest(tmp_path)["rejects"] == {}
    assert len(server.answered) == 81


def test_one_refusal_holds_back_every_request(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    moments: list[float] = []

    def script(asked: Any) -> Any:
        moments.append(time.monotonic())
        if asked.cell == 4 and not asked.tries:
            return fake.Reply(status=429, headers={"retry-after-ms": "1200"})
        return None

    server = serve(script, delay=0.05)
    assert datagen(*fake.settings(server, tmp_path, concurrency=4))[0] == 0
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert max(gaps) > 0.9
    assert sum(gap > 0.5 for gap in gaps) == 1


def test_nothing_left_in_the_headers_is_a_pause(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    moments: list[float] = []

    def script(asked: Any) -> Any:
        moments.append(time.monotonic())
        reply = fake.good(asked.cell) if asked.cell is not None else None
        if asked.cell == 0:
            reply.headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1s"}
        return reply

    server = serve(script)
    assert datagen(*fake.settings(server, tmp_path, concurrency=1))[0] == 0
    assert moments[2] - moments[1] >= 1
    assert all(asked.tries == 0 for asked in server.asked)


def test_a_wait_that_is_too_long_ends_the_run(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(lambda asked: fake.Reply(status=429, headers={"Retry-After": "4000"}))
    code, text = datagen(*fake.settings(server, tmp_path))
    assert (code, len(server.asked)) == (6, 1)
    assert "asks to wait 4000 s" in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360), ("20ms", 0.02), ("1.5", 1.5), ("1h2m3s", 3723), ("", 0), (None, 0), ("nan", 0), ("-3", 0)],
)
def test_times_in_headers(text: str | None, seconds: float) -> None:
    assert _duration(text) == pytest.approx(seconds)


def test_refusals_of_one_moment_count_once_and_replies_win_back_room() -> None:
    async def run() -> None:
        limiter = Limiter(64)
        for _ in range(30):
            limiter.refused(None)
        assert limiter.room == 32
        for _ in range(33):
            limiter.answered({})
        assert limiter.room == 33
        for _ in range(5000):
            limiter.answered({"x-ratelimit-remaining-requests": "what"})
        assert limiter.room == 64
        limiter.answered({"x-ratelimit-remaining-requests": "7"})
        assert limiter.room == 7

    asyncio.run(run())


def test_what_waits_gives_up_when_nothing_may_be_sent() -> None:
    async def run() -> float:
        limiter = Limiter(4)
        limiter.refused(60)

        async def wait() -> None:
            async with limiter.slot():
                raise AssertionError

        waiting = [asyncio.create_task(wait()) for _ in range(3)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        limiter.stop()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in found] == [Stopped] * 3
        return time.monotonic() - began

    assert asyncio.run(run()) < 5
