"""examples/quickstart.ipynb, run from its first cell to its last in a folder of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copy(EXAMPLES / "stand_in.py", folder)
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    assert (folder / "runs" / "comparison" / "comparison.html").is_file()
    assert not list(folder.glob("runs/*/logs/rank*.log"))  # trained in the kernel
    return notebook


def said(notebook: Any) -> list[str]:
    """What each cell showed, as text."""
    shown = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
        shown.append("\n".join(texts))
    return shown


def test_the_notebook_goes_the_whole_way(executed: Any) -> None:
    text = "\n".join(said(executed))
    assert "108 rows in data/tickets.json, 12 held out" in text
    assert "step 70/70" in text
    assert "Saved to runs/full/final" in text
    assert re.search(r"first_letter [\d.]+ before, [\d.]+ after", text)
    after = float(re.search(r"full: exact match .* before, ([\d.]+)% .* after", text)[1])
    assert after > 50
    assert "tuned: billing" in text
    assert "`method=qlora` cannot run under `strategy=zero3`" in text
    assert any("image/png" in str(cell.get("outputs")) for cell in executed.cells)


def test_the_committed_notebook_shows_what_it_does_and_no_place_of_a_machine(executed: Any) -> None:
    committed = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert [bool(text) for text in said(committed)] == [bool(text) for text in said(executed)]
    assert not re.search(r"/(tmp|home|root|Users|work)/", (EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
