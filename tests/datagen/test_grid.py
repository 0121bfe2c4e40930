"""Cells are a pure function of settings, plan, sources and number."""

from __future__ import annotations

from collections import Counter

from tunewright.datagen.documents import Chunk
from tunewright.datagen.grid import Cell, cell
from tunewright.datagen.plan import Plan
from tunewright.datagen.settings import DatagenConfig

PLAN = Plan("You are {0}.", ("a", "b", "c", "d", "e"), ("p", "q"))
CHUNKS = [Chunk("f.md", number, f"fact {{x}} {number} %s", str(number)) for number in range(1, 8)]


def grid(examples: int = 40, seed: int = 42, chunks: list[Chunk] | None = None, **changed: object) -> list[Cell]:
    config = DatagenConfig(task="Say {task} ${x} %d.", name="n", examples=examples, seed=seed, attempts=1)
    for key, value in changed.items():
        setattr(config, key, value)
    return [cell(config, PLAN, chunks or [], index) for index in range(examples)]


def test_each_topic_comes_once_in_every_round_in_changing_order() -> None:
    topics = [cell.topic for cell in grid()]
    rounds = [tuple(topics[start : start + 5]) for start in range(0, 40, 5)]
    assert all(sorted(one) == list(PLAN.topics) for one in rounds)
    assert len(set(rounds)) > 1


def test_difficulty_rises_round_by_round_and_begins_anew() -> None:
    found = [cell.difficulty for cell in grid()][::5]
    assert found == [*PLAN.difficulties, *PLAN.difficulties]


def test_personas_and_forms_all_occur() -> None:
    found = grid(200)
    assert {cell.persona for cell in found} == set(PLAN.personas)
    assert {cell.form for cell in found} == set(PLAN.forms)


def test_every_chunk_comes_once_before_one_comes_again() -> None:
    sources = [cell.source for cell in grid(21, chunks=CHUNKS)]
    assert Counter(sources) == {f"f.md#{number}": 3 for number in range(1, 8)}
    assert all(len(set(sources[start : start + 7])) == 7 for start in (0, 7, 14))


def test_the_seed_decides_and_more_examples_only_add() -> None:
    assert grid() == grid()
    assert [cell.topic for cell in grid()] != [cell.topic for cell in grid(seed=1)]
    assert grid(100)[:40] == grid(40)
    assert grid(100, chunks=CHUNKS)[:40] == grid(40, chunks=CHUNKS)


def test_braces_of_the_user_arrive_as_they_are() -> None:
    prompt = grid(3, chunks=CHUNKS)[0].messages[0][1]
    assert "Say {task} ${x} %d." in prompt
    assert "You are {0}." in prompt
    assert "fact {x} " in prompt


def test_what_all_cells_share_comes_first() -> None:
    first, second = (cell.messages[0][1] for cell in grid(2))
    shared = next(number for number, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    assert shared > 0.6 * len(first)


def test_every_cell_has_a_name_of_its_own_that_all_its_settings_decide() -> None:
    assert len({cell.id for cell in grid(300)}) == 300
    for changed in ({"model": "m"}, {"temperature": 1.0}, {"max_tokens": 3}, {"task": "other"}, {"turns": 2}):
        assert grid(2)[0].id != grid(2, **changed)[0].id
    assert grid(2)[0].id == grid(2, concurrency=3, similarity=0.5)[0].id
