"""The table of planned and measured memory: it is that of the committed figures, and still what is planned."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# The files of bench/ are scripts, which find each other beside them; last, so that they hide nothing else.
sys.path.append(str(REPOSITORY / "bench"))
memory = importlib.import_module("memory")

AGAIN = (
    memory.Cell("qwen2", "tiny"),
    memory.Cell("qwen2", "tiny", "full", dtype="float32", accumulation=3),
    memory.Cell("qwen2", "tiny", "full", "ddp", accumulation=3),
    memory.Cell("qwen2", "tiny", "full", "zero1", accumulation=3),
    memory.Cell("qwen2", "tiny", "full", "zero2_offload"),
    memory.Cell("qwen2", "tiny", "full", "zero3"),
)


def test_the_page_shows_the_committed_result() -> None:
    """`python bench/memory.py --docs` writes it."""
    page = memory.PAGE.read_text(encoding="utf-8")
    assert page == memory.with_section(page, memory.read(memory.RESULT))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what is known of them, for all cells."""
    return tmp_path_factory.mktemp("memory")


@pytest.mark.parametrize("cell", AGAIN, ids=lambda cell: cell.id)
def test_the_plan_is_still_what_was_measured(cell: memory.Cell, root: Path) -> None:
    found = memory.read(memory.RESULT)["cells"][cell.id]
    planned, _ = memory.plan(cell, root, memory.write_rows(root))
    assert planned == pytest.approx(memory.measured(found), rel=memory.WITHIN)
