"""The files are a pure function of the log: of its replies, not of the order in which they came."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rapidfuzz.distance import Indel

from tunewright.datagen.filtering import opening, prompt_tokens
from tunewright.datagen.reply_log import ReplyLog
from tunewright.registry import read_registry


def near_copies(fake: Any) -> Any:
    """Cells 3, 6, 9 ... are close to the one before; some are bad."""

    def script(asked: Any) -> Any:
        cell = asked.cell
        if cell is None or cell % 3 or not cell:
            return fake.Reply("no") if cell == 5 else None
        row = json.loads(fake.good(cell - 1).content)
        return fake.Reply(json.dumps({**row, "instruction": row["instruction"] + " Please.", "output": f"o {cell}"}))

    return script


def test_arrival_order_changes_no_byte_and_no_request(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    found, asked = [], []
    for number, concurrency in enumerate((1, 7, 64)):
        draw = random.Random(number)
        waits = {cell: draw.uniform(0, 0.04) for cell in range(-1, 200)}
        plain = near_copies(fake)

        def script(request: Any, waits: Any = waits, plain: Any = plain) -> Any:
            fake.time.sleep(waits[-1 if request.cell is None else request.cell])
            return plain(request)

        server = serve(script)
        code, text = datagen(*fake.settings(server, tmp_path / str(number), examples=30, concurrency=concurrency))
        assert code == 0, text
        found.append(fake.written(tmp_path / str(number)))
        asked.append(sorted(request.cell or -1 for request in server.asked))
    assert found[0] == found[1] == found[2]
    assert asked[0] == asked[1] == asked[2]
    manifest = fake.manifest(tmp_path / "2")
    assert manifest["rejects"]["near-duplicate"] > 5
    outputs = {row["output"] for row in json.loads((tmp_path / "2" / "riddles.json").read_text())}
    assert not any(text.startswith("o ") for text in outputs - {"o 6"})  # 5 was bad, so 6 is no copy of a row


def test_more_examples_end_as_if_they_had_been_asked_for_at_once(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    server = serve(near_copies(fake))
    for examples in (12, 30):
        assert datagen(*fake.settings(server, tmp_path / "a", examples=examples))[0] == 0
    asked = len(server.asked)
    assert datagen(*fake.settings(server, tmp_path / "b", examples=30))[0] == 0
    assert fake.written(tmp_path / "a") == fake.written(tmp_path / "b")
    assert len(server.asked) == 2 * asked


def test_other_rules_choose_anew_from_what_is_paid(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(near_copies(fake))
    assert datagen(*fake.settings(server, tmp_path))[0] == 0
    before, asked = fake.written(tmp_path), len(server.asked)
    assert datagen(*fake.settings(server, tmp_path, similarity=1, eval_share=0.2))[0] == 0
    assert "near-duplicate" not in fake.manifest(tmp_path)["rejects"]
    assert fake.manifest(tmp_path)["counts"]["eval"] == 4
    assert datagen(*fake.settings(server, tmp_path))[0] == 0
    assert (fake.written(tmp_path), len(server.asked)) == (before, asked)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"min_output": 17}, "too short"), ({"max_output": 10}, "too long"), ({"language": "zh"}, "wrong language")],
)
def test_rules_for_language_and_length(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    long = "This answer is a whole sentence of plain English words, which nobody takes for another language."

    def script(asked: Any) -> Any:
        if asked.cell is None:
            return None
        row = json.loads(fake.good(asked.cell).content)
        return fake.Reply(json.dumps({**row, "output": long if asked.cell % 2 else "水果是甜的"}))

    server = serve(script)
    if reason == "too short":
        changed = {"min_output": 10}
    code, text = datagen(*fake.settings(server, tmp_path, examples=6, **changed))
    assert code == 0, text
    assert set(fake.manifest(tmp_path)["rejects"]) == {reason}


def test_near_copies_never_straddle_the_split(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(near_copies(fake))
    code, text = datagen(*fake.settings(server, tmp_path, examples=40, similarity=0.95, eval_share=0.3))
    assert code == 0, text
    train, test = (json.loads((tmp_path / f"riddles{part}.json").read_text()) for part in ("", "_eval"))
    highest = max(
        Indel.normalized_similarity(prompt_tokens(opening(one)), prompt_tokens(opening(other)))
        for one in train
        for other in test
    )
    found = fake.manifest(tmp_path)["similarity"]["highest_train_test"]
    assert found == pytest.approx(highest)
    assert found < 0.95
    assert f"held out: {found:.2f}" in text


def test_prompts_that_differ_in_a_sign_are_split_too(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(3000))

    def script(asked: Any) -> Any:
        row = {"instruction": f"{words} {asked.cell}", "input": "", "output": "x"}
        return None if asked.cell is None else fake.Reply(json.dumps(row))

    server = serve(script)
    code, text = datagen(*fake.settings(server, tmp_path, examples=10, similarity=1))
    assert code == 0, text  # alike by 0.9997, and still not equal


@pytest.mark.parametrize("crash", [1, 2, 5, 6])
def test_killed_between_two_files(serve: Any, fake: Any, datagen: Any, tmp_path: Path, crash: int) -> None:
    server = serve()
    assert datagen(*fake.settings(server, tmp_path / "whole", eval_share=0.1))[0] == 0
    (tmp_path / "b").mkdir()
    log = "riddles.datagen.jsonl"
    (tmp_path / "b" / log).write_bytes((tmp_path / "whole" / log).read_bytes())
    dies = (
        "import os, itertools; c = itertools.count(1); plain = os.replace\n"
        "def replace(*a):\n"
        "    plain(*a)\n"
        f"    if next(c) == {crash}: os.kill(os.getpid(), 9)\n"
        "os.replace = replace"
    )
    process = fake.start(server, tmp_path / "b", dies)
    process.communicate(timeout=30)
    assert process.returncode == -9
    registry = tmp_path / "b" / "dataset_info.json"
    for entry in read_registry(registry).values() if registry.exists() else ():
        assert (tmp_path / "b" / str(entry["file_name"])).exists()
    assert datagen(*fake.settings(server, tmp_path / "b"))[0] == 0
    assert fake.written(tmp_path / "b") == fake.written(tmp_path / "whole")
    assert len(server.asked) == 21


def test_a_registry_entry_changes_its_shape_and_keeps_what_a_user_added(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    server = serve()
    for shape in ("sharegpt", "alpaca"):
        assert datagen(*fake.settings(server, tmp_path, format=shape))[0] == 0
        registry = json.loads((tmp_path / "dataset_info.json").read_text())
        assert registry["riddles"].get("formatting", "alpaca") == shape
        registry["riddles"]["num_samples"] = 5
        (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
    assert registry["riddles"]["num_samples"] == 5


def test_rows_that_are_there_are_written_though_one_before_them_is_missing(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    server = serve(lambda asked: fake.Reply(status=429, headers={"Retry-After": "1"}) if asked.cell == 2 else None)
    code, text = datagen(*fake.settings(server, tmp_path, budget__minutes=0.01))
    assert code == 3, text
    assert fake.manifest(tmp_path)["counts"]["accepted"] >= 15
    server.script = None
    assert datagen(*fake.settings(server, tmp_path))[0] == 0
    whole = fake.written(tmp_path)
    assert datagen(*fake.settings(server, tmp_path / "b"))[0] == 0
    for name in ("riddles.json", "riddles_eval.json"):
        assert fake.written(tmp_path / "b")[name] == whole[name]


def test_hashes_in_the_manifest_are_those_of_the_files(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    assert datagen(*fake.settings(serve(), tmp_path))[0] == 0
    hashes = fake.manifest(tmp_path)["hashes"]
    assert set(hashes) == {"riddles.json", "riddles_eval.json"}
    for name, found in hashes.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == found
    assert not list(tmp_path.glob("*.part"))


def test_no_cut_of_the_log_stops_the_next_run(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    assert datagen(*fake.settings(server, tmp_path, examples=3))[0] == 0
    data = (tmp_path / "riddles.datagen.jsonl").read_bytes()
    whole = ReplyLog(tmp_path / "riddles.datagen.jsonl").records
    place = tmp_path / "cut.jsonl"
    for end in range(0, len(data), 7):
        place.write_bytes(data[:end])
        log = ReplyLog(place)
        assert whole.items() >= log.records.items()
        log.begin({}) if not end else None
        log.close()
