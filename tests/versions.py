"""The tests that versions of libraries can break, on both ends of the declared window: `make test-versions`.

    python tests/versions.py                  # both ends, and the table of docs/versions.md
    python tests/versions.py oldest --quick   # one, without what trains through the launcher

Each end gets an environment of its own, .venv-oldest or .venv-newest: the lower bounds of pyproject.toml, and what pip
takes of itself. It needs Python 3.11 or newer, for tomllib.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "versions.md"
BEGIN, END = "<!-- made by tests/versions.py: begin -->", "<!-- made by tests/versions.py: end -->"
ENDS = ("oldest", "newest")
QUICK = ["attention", "linear_cross_entropy", "fused_lora", "packing", "checkpoints", "models"]
TESTS = [*(f"tests/trainer/test_{name}.py" for name in (*QUICK, "parity")), "tests/test_demo.py"]
SHOWN = ("python", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "deepspeed", "bitsandbytes")
SHOWN += ("hydra-core", "openai", "tensorboard")


def dependencies() -> list[str]:
    """Return the declared windows, and what the tests need besides."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


def oldest(requirement: str) -> str:
    """Return `name==1.2` for `name>=1.2,<2`."""
    name, _, bound = requirement.partition(">=")
    return f"{name}=={bound.split(',')[0]}" if bound else requirement


def build(end: str) -> Path:
    """Return the interpreter of an end's environment, made where what is declared has changed since."""
    folder = REPOSITORY / f".venv-{end}"
    declared = dependencies()
    # The tools that tests run in are not what is tried out.
    tools = re.compile(r"(pytest|hypothesis|mypy|nbclient|ipykernel|ruff|setuptools|types-|fastapi|uvicorn|modelscope)")
    wanted = [oldest(one) if end == "oldest" and not tools.match(one) else one for one in declared]
    stamp = folder / "wanted.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"Building {folder.name}: {', '.join(wanted)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin/pip"), "install", "-qq", "--disable-pip-version-check", "--upgrade"]
        index = os.environ.get("TORCH_INDEX")
        extra = ["--retries", "1", "--extra-index-url", index] if index else []
        subprocess.run([*pip, *extra, *[one for one in wanted if one.startswith("torch")]], check=True)
        subprocess.run([*pip, *wanted], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(REPOSITORY)], check=True)
        stamp.write_text(json.dumps(wanted))
    return folder / "bin/python"


def run(python: Path, tests: list[str]) -> dict[str, dict[str, int]]:
    """Run test files and return {file: {"passed", "failed", "skipped"}}."""
    report = REPOSITORY / f".{python.parents[1].name.lstrip('.')}.xml"
    marks = ["-m", "not gpu and not slow and not chaos"]
    subprocess.run([str(python), "-m", "pytest", "-q", *marks, f"--junitxml={report}", *tests], cwd=REPOSITORY)
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = "skipped" if case.find("skipped") is not None else "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            kind = "failed"
        file = case.attrib["classname"].replace(".", "/") + ".py"
        counts.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0})[kind] += 1
    report.unlink()
    return counts


def versions(python: Path) -> dict[str, str]:
    script = "import json, platform, sys; from importlib.metadata import version; "
    script += "print(json.dumps({'python': platform.python_version(), **{p: version(p) for p in sys.argv[1:]}}))"
    return dict(json.loads(subprocess.check_output([str(python), "-c", script, *SHOWN[1:]])))


def table(found: dict[str, dict[str, str]], counts: dict[str, dict[str, dict[str, int]]]) -> str:
    ends = list(found)
    lines = [f"| | {' | '.join(ends)} |", "|---" * (len(ends) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(found[end][name] for end in ends)} |" for name in SHOWN]
    for file in sorted({file for end in ends for file in counts[end]}):
        cells = []
        for end in ends:
            told = [f"{number} {kind}" for kind, number in counts[end].get(file, {}).items() if number]
            cells.append(", ".join(told) or "not run")
        lines.append(f"| `{file}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", default=list(ENDS), help="oldest, newest, or both")
    parser.add_argument("--quick", action="store_true", help="without parity over ranks and the demo")
    args = parser.parse_args()
    if unknown := set(args.ends) - set(ENDS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(ENDS)}")
    tests = [file for file in TESTS if not args.quick or any(f"test_{name}.py" in file for name in QUICK)]
    pythons = {end: build(end) for end in args.ends}
    found = {end: versions(python) for end, python in pythons.items()}
    counts = {end: run(python, tests) for end, python in pythons.items()}
    made = table(found, counts)
    print(made)
    if not args.quick and set(args.ends) == set(ENDS):
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        told = f"`make test-versions`, {time.strftime('%Y-%m-%d')}:"
        PAGE.write_text(f"{before}{BEGIN}\n\n{told}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 1 if any(count["failed"] for end in counts.values() for count in end.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
