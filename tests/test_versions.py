"""Declared windows, pinned versions and the extra `tested` say the same."""

from __future__ import annotations

import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]


def pins() -> dict[str, str]:
    """Return {package: version} of constraints.txt for this Python."""
    found = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                found[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    return found


def declared() -> list[Requirement]:
    return [Requirement(text) for text in requires("tunewright") or []]


def test_what_is_pinned_lies_in_the_declared_windows() -> None:
    windows = [one for one in declared() if one.marker is None]
    assert len(windows) > 20
    for window in windows:
        pinned = pins().get(window.name.lower())
        assert pinned is None or pinned in window.specifier, window


def test_the_tested_extra_is_what_is_pinned() -> None:
    tested = [one for one in declared() if one.marker and one.marker.evaluate({"extra": "tested"})]
    tested = [one for one in tested if str(one.specifier).startswith("==")]
    assert {one.name.lower() for one in tested} >= {"torch", "transformers", "trl", "peft", "deepspeed"}
    for one in tested:
        assert str(one.specifier) == f"=={pins()[one.name.lower()]}", one


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tests/versions.py reads pyproject.toml with tomllib")
def test_the_oldest_end_is_the_lower_bounds() -> None:
    sys.path.append(str(REPOSITORY / "tests"))
    import versions

    assert versions.oldest("torch>=2.11,<2.16") == "torch==2.11"
    assert versions.oldest("pytest") == "pytest"
    assert all("==" in versions.oldest(one) for one in versions.dependencies() if ">=" in one)
