"""The plan: made once, edited by hand, spread over the cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.datagen.plan import Plan, read_plan


def test_a_plan_is_shown_and_used_without_asking_again(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    code, text = datagen(*fake.settings(server, tmp_path), "--plan-only")
    assert (code, len(server.asked)) == (0, 1)
    assert fake.SYSTEM_MESSAGE in text
    assert "plan=" in text
    assert read_plan(tmp_path / "riddles.plan.json").topics == tuple(fake.PLAN["topics"])
    assert datagen(*fake.settings(server, tmp_path), "--plan-only")[0] == 0
    assert datagen(*fake.settings(server, tmp_path))[0] == 0
    assert [asked.cell for asked in server.asked].count(None) == 1


def edit(place: Path, **changed: Any) -> None:
    place.write_text(json.dumps({**json.loads(place.read_text()), **changed}))


def test_an_edited_plan_goes_on_as_the_command_says(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    datagen(*fake.settings(server, tmp_path), "--plan-only")
    place = tmp_path / "riddles.plan.json"
    edit(place, topics=["volcanoes"], system="You know volcanoes.")
    code, text = datagen(*fake.settings(server, tmp_path))
    assert code == 2  # or the edits would be lost
    assert f"plan={place}" in text
    code, text = datagen(*fake.settings(server, tmp_path, plan=place))
    assert code == 0, text
    assert len(server.asked) == 21
    assert all("Topic: volcanoes." in asked.body["messages"][0]["content"] for asked in server.asked[1:])
    assert (tmp_path / "riddles.system.txt").read_text() == "You know volcanoes.\n"
    assert read_plan(place).topics == ("volcanoes",)


def test_the_plan_that_is_in_use_may_be_named(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    assert datagen(*fake.settings(server, tmp_path))[0] == 0
    place = tmp_path / "riddles.plan.json"
    assert datagen(*fake.settings(server, tmp_path, plan=place))[0] == 0
    assert len(server.asked) == 21
    edit(place, topics=["volcanoes"])
    for changed in ({"plan": place}, {}):
        code, text = datagen(*fake.settings(server, tmp_path, **changed))
        assert code == 2, text
    assert len(server.asked) == 21


def test_another_task_before_anything_was_paid_but_the_plan_makes_a_new_plan(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path
) -> None:
    server = serve()
    datagen(*fake.settings(server, tmp_path), "--plan-only")
    (tmp_path / "riddles.plan.json").unlink()
    assert datagen(*fake.settings(server, tmp_path, task="Write a poem."))[0] == 0
    assert "Write a poem." in server.asked[1].body["messages"][0]["content"]
    assert "Write a poem." in server.asked[2].body["messages"][0]["content"]
    assert datagen(*fake.settings(server, tmp_path, task="Write a poem."))[0] == 0
    assert len(server.asked) == 22


def test_content_decides_and_not_the_name_of_a_file(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve()
    plan, source = tmp_path / "a.json", tmp_path / "a.md"
    plan.write_text(json.dumps(fake.PLAN))
    source.write_text("Volcanoes are mountains.")

    def run() -> tuple[int, str]:
        code, text = datagen(*fake.settings(server, tmp_path / "out", examples=3, plan=plan, source=source))
        return int(code), str(text)

    assert run()[0] == 0
    assert "Volcanoes are mountains." in server.asked[0].body["messages"][0]["content"]
    plan, source = plan.rename(tmp_path / "b.json"), source.rename(tmp_path / "b.md")
    assert run()[0] == 0
    assert len(server.asked) == 3
    source.write_text("Volcanoes are hills.")
    assert (run()[0], "  source: there" in run()[1]) == (2, True)
    source.write_text("Volcanoes are mountains.")
    edit(plan, personas=["a pilot"])
    assert (run()[0], "  plan: there" in run()[1]) == (2, True)
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no text under `system`"),
        ('{"system": " ", "topics": ["a"], "personas": ["b"]}', "no text under `system`"),
        ('{"system": "s", "topics": [], "personas": ["b"]}', "`topics` is not a list"),
        ('{"system": "s", "topics": ["a"]}', "`personas` is not a list"),
        ('{"system": "s", "topics": ["a", 1], "personas": ["b"]}', "`topics` is not a list"),
        ('{"system": "s", "topics": ["a"], "personas": ["b"], "froms": ["c"]}', "Did you mean 'forms'?"),
        ('{"system": "s", "topics": ["a"], "personas": ["b"], "forms": "c"}', "`forms` is not a list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_damaged_plan_is_named_with_the_part_that_is_wrong(
    serve: Any, fake: Any, datagen: Any, tmp_path: Path, content: str | bytes, words: str
) -> None:
    server, place = serve(), tmp_path / "p.json"
    place.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, text = datagen(*fake.settings(server, tmp_path, plan=place))
    assert code == 2
    assert words in text
    assert str(place) in text
    assert not server.asked


def test_what_is_left_out_of_a_plan_has_a_default(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"system": "s", "topics": ["a", "a ", ""], "personas": ["b"]}')
    plan = read_plan(tmp_path / "p.json")
    assert plan == Plan("s", ("a",), ("b",))
    assert len(plan.difficulties) > 2


def test_a_plan_that_cannot_be_used_is_asked_for_thrice(serve: Any, fake: Any, datagen: Any, tmp_path: Path) -> None:
    server = serve(lambda asked: fake.Reply("hm") if asked.number < 2 else None)
    assert datagen(*fake.settings(server, tmp_path, examples=3))[0] == 0
    assert [asked.cell for asked in server.asked].count(None) == 3
    server = serve(lambda asked: fake.Reply("hm"))
    code, text = datagen(*fake.settings(server, tmp_path / "b"))
    assert (code, len(server.asked)) == (3, 3)
    assert "plan=FILE" in text
