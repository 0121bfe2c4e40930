"""Python and packages beside the windows that tunewright declares, and the newest versions that it was tested with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tunewright.findings import Finding, fix, note, ok

GROUP = "packages"
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")


def look() -> list[Finding]:
    """Compare what is installed with what the installed tunewright says that it needs."""
    try:
        wanted = [Requirement(text) for text in requires("tunewright") or []]
        python = SpecifierSet(metadata("tunewright")["Requires-Python"] or "")
    except PackageNotFoundError:
        return [
            note(
                GROUP,
                "tunewright runs from a folder and is not installed: which versions it needs is not known here.",
                "Install it where you can: pip install -e . in the checkout.",
            )
        ]
    return [_python(python), *_packages(wanted)]


def _python(window: SpecifierSet) -> Finding:
    mine = platform.python_version()
    if not window.contains(mine, prereleases=True):
        return fix(GROUP, f"Python {mine} is outside of {window}.", "Make the environment anew with such a Python.")
    return ok(GROUP, f"Python {mine} ({window})")


def _packages(wanted: list[Requirement]) -> list[Finding]:
    windows = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    extras = [one for one in wanted if one.marker and one.marker.evaluate({"extra": "tested"}) and one not in windows]
    tested = {one.name: Version(str(one.specifier).removeprefix("==")) for one in extras}
    found: dict[str, Version] = {}
    wrong: list[Finding] = []
    for window in windows:
        try:
            mine = found[window.name] = Version(version(window.name))
        except PackageNotFoundError:
            wrong.append(fix(GROUP, f"{window.name} is not installed.", f"pip install '{_bare(window)}'"))
            continue
        if not window.specifier.contains(mine, prereleases=True):
            wrong.append(
                fix(
                    GROUP,
                    f"{window.name} {mine} is outside of the window {window.specifier}.",
                    f"pip install '{_bare(window)}'",
                )
            )
        elif window.name in tested and mine.release > tested[window.name].release:
            wrong.append(
                note(
                    GROUP,
                    f"{window.name} {mine} is newer than {tested[window.name]}, the newest that was tested.",
                    f"Where something fails that should not: pip install '{window.name}=={tested[window.name]}'",
                )
            )
    shown = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
    return [*wrong, ok(GROUP, f"{len(windows) - len(wrong)} of {len(windows)} packages as tested: {shown}")]


def _bare(window: Requirement) -> str:
    return f"{window.name}{window.specifier}"
