"""What README.md and docs/*.md name exists: files, settings, choices, targets, options, modules, anchors.

`make docs-check` runs the commands (tests/docs_check.py); here they are only read.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import pkgutil
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import pytest

from tests.docs_check import EXCLUDED, INSTEAD, STAYS, Place, reason_of, walk, with_option
from tests.documents import REPOSITORY, Command, Document, Span, documents, matches, take_apart, words
from tunewright.config.choices import choices
from tunewright.config.compose import compose_config, expand_sweep
from tunewright.config.method_schema import METHODS
from tunewright.config.schema import GROUPS, Config, help_of
from tunewright.datagen.settings import keys as datagen_keys
from tunewright.datagen.settings import load_settings
from tunewright.errors import EXIT_CODES, ConfigError
from tunewright.identity import ADJUSTABLE, CALLED, OPERATIONAL
from tunewright.launch.cli import parser
from tunewright.launch.demo import WAYS
from tunewright.trainer.data.messages import CALL, FLAGS, REASONING_KEYS, ROLES

DOCUMENTS = documents()
COMMANDS = [command for document in DOCUMENTS for command in document.commands]
SPANS = [span for document in DOCUMENTS for span in document.spans]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")

# What a document names as the reader's own, or as what a command of the document writes.
YOURS = ("data/riddles", "data/planned", "data/things", "data/mine", "data/alpaca_data_zh")
# Names of other people's: LLaMA-Factory's entries and settings, DeepSpeed's, loaders'.
OTHERS = (r"\w+_demo", "preprocessing_num_workers", "zero_hpz_partition_size")
PLACEHOLDER = re.compile(r"\.\.\.|^[A-Z_]*$|^N$|^org/name$")


@lru_cache
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (REPOSITORY / name).is_file()]


@lru_cache
def sources() -> str:
    """The text of every program and setting; what it does not hold, nobody reads or writes."""
    kept = [name for name in tracked() if not name.endswith((".md", ".json", ".jsonl", ".png")) or "configs/" in name]
    kept = [name for name in kept if name not in ("tests/test_docs.py", "tests/documents.py")]
    return "\n".join((REPOSITORY / name).read_text(encoding="utf-8") for name in kept)


@lru_cache
def modules() -> dict[str, list[str]]:
    """{short name: files} of our modules."""
    found: dict[str, list[str]] = {}
    for name in tracked():
        if name.startswith(("tunewright/", "launch/", "trainer/", "deliver/", "datagen/")) and name.endswith(".py"):
            found.setdefault(name.rpartition("/")[2].removesuffix(".py"), []).append(name)
    return found


@lru_cache
def options() -> set[str]:
    """Every option of a command, of ours or of the programs that `make` starts."""
    return set(re.findall(r"[\"'](--[a-z][a-z-]+)[\"']", sources())) | {"--help"}


def problem_of_path(text: str) -> str | None:
    path = text.rstrip("/")
    if not re.fullmatch(r"\.?[\w-][\w.-]*(/[\w.*-]+)*", path) or text.startswith(("org/", "path/", "runs/")):
        return None
    room = path.partition("/")[0]
    rooms = {name.partition("/")[0] for name in tracked() if "/" in name}
    if path.startswith(YOURS):
        return None
    if "/" in text and room in rooms:
        return None if any(name == path or name.startswith(f"{path}/") for name in tracked()) else "no such file"
    if "/" not in path and path.endswith(".py"):
        return None if any(name.endswith(f"/{path}") for name in tracked()) else "no such file"
    if "/" not in path and re.search(r"\.(json|jsonl|yaml|toml|txt|html|md)$", path):
        known = any(name.endswith(path) for name in tracked()) or path in sources()
        return None if known or path.startswith(("train.", "c4_demo.")) else "no such file, and no program writes one"
    return None


def problem_of_dotted(text: str) -> str | None:
    if re.fullmatch(r"tunewright(\.\w+)+(\(\))?", text):
        return problem_of_import(text.removesuffix("()"))
    match = re.fullmatch(r"(\w+)\.(\w+)", text)
    if match is None or re.search(r"\.(py|md|json|jsonl|yaml|toml|txt|html)$", text):
        return None
    first, second = match.groups()
    if first in GROUPS or text in dict.fromkeys(key for key, *_ in datagen_keys()):
        return problem_of_setting(text)
    for path in modules().get(first, ()):
        tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
        defined = {getattr(node, "name", None) for node in tree.body}
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            defined |= {getattr(target, "id", None) for target in targets}
        if second in defined:
            return None
    if first in modules():
        return f"{', '.join(modules()[first])} defines no {second}"
    return None if importlib.util.find_spec(first) else "no setting, module or package"


def problem_of_import(name: str) -> str | None:
    """Say what is wrong with the full name of a module, or of something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def problem_of_setting(text: str, document: str = "") -> str | None:
    """Say what is wrong with `key` or `key=value`; a value in capitals or with dots stands for any."""
    key, equals, value = text.partition("=")
    placeholder = not equals or not value or PLACEHOLDER.search(value) is not None
    if key.isupper() or re.fullmatch(r"[A-Z_]+", key):
        return None if re.search(rf"\b{key}\b", sources()) else "nothing reads this variable"
    if key in GROUPS and equals:
        return None if placeholder or value in choices(key) else f"not one of {', '.join(choices(key))}"
    datagen = {name for name, *_ in datagen_keys()}
    if key in datagen and (document == "docs/datagen.md" or key not in help_of(Config)):
        return None if placeholder else refusal(lambda: load_settings(["task=x", "name=x", text]))
    if key.startswith("method.") or (document == "docs/methods.md" and "." not in key):
        field = key.removeprefix("method.")
        owners = [name for name, kind in METHODS.items() if field in help_of(kind)]
        if owners:
            return None if placeholder else uncomposed(f"method={owners[0]}", f"method.{field}={value}")
        if key.startswith("method."):
            return "no method has it"
    group, dot, field = key.partition(".")
    if not dot:
        return None if key in help_of(Config) else "no setting"
    if field not in settings_of(group):
        return "no setting"
    return None if placeholder else uncomposed(text)


def settings_of(group: str) -> set[str]:
    kinds = {item.name: item.default_factory for item in Config.__dataclass_fields__.values()}
    return set(help_of(kinds[group])) if group in kinds else set()  # type: ignore[arg-type]


def refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except ConfigError as error:
        return str(error)
    return None


@lru_cache
def uncomposed(*overrides: str) -> str | None:
    """Say why overrides do not compose."""
    return refusal(partial(compose_config, overrides))


def problem_of_make(given: list[str]) -> str | None:
    for word in given:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"\$\(?\(?{name}\b|^{name} [?:]?=|\b{name}\b", MAKEFILE, flags=re.MULTILINE):
            return f"the Makefile reads no {name}"
        if not equals and not re.search(rf"^{re.escape(name)}:", MAKEFILE, flags=re.MULTILINE):
            return f"there is no target {name}"
    passed = next((word.partition("=")[2] for word in given if word.startswith("ARGS=")), "")
    recipe = re.search(rf"^{given[0]}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE) if given else None
    script = re.search(r"(?:bench|tests)/\S+\.py", recipe[1]) if recipe else None
    return problem_of_script(script[0], passed.split()) if script else None


def problem_of_script(path: str, given: Sequence[str]) -> str | None:
    """Say which option a program that `make` starts does not have."""
    if problem := problem_of_path(path):
        return problem
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    return next((f"{path} has no {word}" for word in given if word[:2] == "--" and f'"{word}"' not in text), None)


def problem_of_tunewright(given: list[str]) -> str | None:
    """Parse a command's options, and compose what it sets."""
    if not given or given[0].startswith("-"):
        return None
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
            args, rest = parser().parse_known_args(given)
    except SystemExit:
        said = noise.getvalue().strip().splitlines()[-1]
        return None if len(given) == 1 and "are required" in said else said  # a command's name alone
    if any(word.startswith("-") for word in rest):
        return f"no option {rest}"
    overrides = [*getattr(args, "overrides", []), *rest]
    if args.command == "datagen":
        theirs = [word for word in overrides if not word.startswith("plan=")]  # a file of the reader's
        return refusal(lambda: load_settings(theirs)) if theirs else None
    overrides = [word for word in overrides if "=" in word]
    return next(filter(None, (uncomposed(*job) for job in expand_sweep(overrides))), None)


def problem_of_command(text: str) -> str | None:
    given = words(text)
    while given and re.fullmatch(r"[A-Z_]+=.*", given[0]):
        given = given[1:]
    if not given or given[0] in ("export", "source"):
        return None
    name = given[0].rpartition("/")[2]
    if name == "make":
        return problem_of_make(given[1:])
    if name == "tunewright":
        return problem_of_tunewright(given[1:])
    if name == "python":
        return problem_of_script(given[1], given[2:])
    if name == "accelerate":
        overrides = given[given.index("trainer") + 1 :] if "trainer" in given else []
        paths = [problem_of_path(word) for word in given if word.startswith("configs/")]
        return next(filter(None, paths), None) or uncomposed(*overrides)
    return None if name in ("head", "kill", "pip") else f"what is {name}?"


def problem_of_span(span: Span) -> str | None:
    """Say what is wrong with a span, by what it looks like; None also where it looks like nothing of ours."""
    text = span.text
    head = text.split()[0]
    if head in ("make", "tunewright", "python") and " " in text:
        return problem_of_command(text.replace("...", " ").replace("RUN", "runs/x"))
    if re.match(r"data [a-z]", text):
        return problem_of_tunewright([*text.split(), "x"])
    if re.fullmatch(r"--[a-z-]+( \S+)?", text):
        return None if head in options() else "no command has this option"
    parts = re.findall(r"[\w.]+=(?:\"[^\"]*\"|\S*)", text)
    if parts and " ".join(parts) == text:
        return next(filter(None, (problem_of_setting(part, span.document) for part in parts)), None)
    if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", text):
        return None if text in sources() else "nothing reads this variable"
    if re.fullmatch(r"[A-Za-z]+(_[a-z0-9]+)+|[A-Z][a-z]+([A-Z][a-z]+)+", text):
        others = any(re.fullmatch(pattern, text) for pattern in OTHERS)
        return None if others or re.search(rf"\b{text}\b", sources()) else "no program or setting has this name"
    return problem_of_path(text) or problem_of_dotted(text)


def failures(found: Iterator[tuple[str, str, str | None]]) -> str:
    return "\n".join(f"{where}: {text}: {problem}" for where, text, problem in found if problem)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_what_is_named_exists(document: Document) -> None:
    told = failures((span.where, span.text, problem_of_span(span)) for span in document.spans)
    assert not told, told


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_commands_parse_and_their_settings_compose(document: Document) -> None:
    refused = [command for command in document.commands if command.error is None]
    told = failures((command.where, command.text, problem_of_command(command.text)) for command in refused)
    assert not told, told


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_and_anchors_lead_somewhere(document: Document) -> None:
    by_name = {other.name: other for other in DOCUMENTS}
    folder = (REPOSITORY / document.name).parent

    def problem(target: str) -> str | None:
        path, _, anchor = target.partition("#")
        if "://" in target:
            return None
        found = (folder / path).resolve() if path else REPOSITORY / document.name
        if not found.exists():
            return "no such file"
        name = str(found.relative_to(REPOSITORY))
        return None if not anchor or anchor in by_name[name].anchors else "no such heading"

    told = failures((link.where, link.text, problem(link.text)) for link in document.links)
    assert not told, told


def test_a_command_stands_in_a_block_that_is_run() -> None:
    """Not in an indented one, which nobody could tell from output."""
    lines = [line for document in DOCUMENTS for line in document.indented]
    told = [f"{line.where}: {line.text}" for line in lines if re.match(r"(\S*/)?(make|tunewright) [a-z]", line.text)]
    # The diagram at the head of architecture.md begins with the command that it takes apart.
    assert [line for line in told if "─►" not in line] == []


def test_every_exception_to_running_has_its_command() -> None:
    told = [
        pattern
        for table in (EXCLUDED, INSTEAD, STAYS)
        for pattern in table
        if not any(map(reason_matcher(pattern), COMMANDS))
    ]
    assert told == []
    assert all(reason for table in (EXCLUDED, INSTEAD, STAYS) for reason in table.values())


def reason_matcher(pattern: str) -> Callable[[Command], bool]:
    return lambda command: reason_of(command.text, {pattern: "x"}) is not None


def test_errors_are_shown_with_a_class_of_ours() -> None:
    shown = [command.error for command in COMMANDS if command.error]
    assert shown
    assert set(shown) <= set(EXIT_CODES)


def readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_every_choice_document_and_exit_code() -> None:
    text = readme()
    for group in ("strategy", "method"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{group}` |"))
        assert sorted(re.findall(r"\w+", row.partition("` |")[2])) == choices(group)
    told = " ".join(text.split("Exit codes: ")[1].split("\n\n")[0].split())
    assert set(EXIT_CODES.values()) <= set(map(int, re.findall(r"\b\d+\b", told)))
    where = text.split("\ndocs/ ")[1].split("\nbench/ ")[0]
    assert set(re.findall(r"[\w]+\.md", where)) == {
        name[5:] for name in tracked() if re.fullmatch(r"docs/\w+\.md", name)
    }
    rooms = {name.partition("/")[0] for name in tracked() if "/" in name and not name.startswith(".")}
    assert {line.partition("/")[0] for line in text.splitlines() if re.match(r"[a-z]+/ ", line)} == rooms


def test_what_the_readme_measured_is_one_machines() -> None:
    parts = [part for part in readme().split("\n\n") if not part.startswith("<!--")]
    measured = [index for index, part in enumerate(parts) if re.search(r"^\|.*---:", part, flags=re.MULTILINE)]
    assert measured
    assert all("One machine's figures" in parts[index - 1] for index in measured)


def helps() -> list[str]:
    """The descriptions and epilogues of every command of ours."""
    found, waiting = [], [parser()]
    for command in waiting:
        found += [command.description or "", command.epilog or ""]
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return found


def test_help_shows_commands_that_parse_and_compose() -> None:
    lines = [line.strip() for text in helps() for line in text.splitlines() if line.startswith("  tunewright ")]
    shown = [re.split(r" {2,}", line)[0] for line in lines]
    assert len(shown) > 8
    told = failures(("--help", command, problem_of_command(command)) for command in shown)
    assert not told, told


def test_runs_of_the_demo_that_are_named_are_runs_that_it_makes() -> None:
    texts = [*helps(), MAKEFILE, *(command.text for command in COMMANDS), *(span.text for span in SPANS)]
    named = {name for text in texts for name in re.findall(r"runs/demo/([\w-]+)", text)}
    assert named
    assert named <= set(WAYS)


def test_data_md_lists_every_template() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    listed = text.split("model.template=chatml ")[1].split(",")[0].split()
    assert listed == sorted(path.stem for path in (REPOSITORY / "configs" / "templates").glob("*.jinja"))


def test_data_md_lists_the_roles_and_keys_of_turns() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    roles = text.split("| roles, in any case | ")[1].split(" |")[0]
    listed = {}
    for part in roles.split("; "):
        role, names = part.split(": ")
        listed |= dict.fromkeys(names.split(", "), CALL if role == "a call" else role)
    assert listed == {name: role for name, role in ROLES.items() if name != role}
    for keys in (FLAGS, REASONING_KEYS):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{keys[0]}`, "))
        assert sorted(re.findall(r"`(\w+)`", row.split(" | ")[0])) == sorted(keys)


def test_architecture_md_follows_the_first_row() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = json.loads(re.search(r'^    (\{"instruction".*?\})\n\n', text, flags=re.DOTALL | re.MULTILINE)[1])  # type: ignore[index]
    assert shown == json.loads((REPOSITORY / "data" / "demo.json").read_text(encoding="utf-8"))[0]


def test_runs_md_lists_what_may_change() -> None:
    text = (REPOSITORY / "docs" / "runs.md").read_text(encoding="utf-8").split("## What may change")[1]
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    listed = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    conditions = {"train.global_batch_size"}
    assert listed - conditions == (OPERATIONAL | ADJUSTABLE | CALLED) - {"resume", "overwrite"}


TEXT = """\
# A `b` title, of a kind

See [there](other.md#a-b).

```sh
make demo    # builds
a "x
y" \\
  z
```

<!-- figures differ elsewhere -->
```
$ tunewright x
took 12.5 s,
done
```

    indented
"""


def test_a_document_is_taken_apart() -> None:
    found = take_apart("x.md", TEXT)
    assert found.anchors == {"a-b-title-of-a-kind"}
    assert [(span.line, span.text) for span in found.spans] == [(1, "b")]
    assert [link.text for link in found.links] == ["other.md#a-b"]
    assert [(one.line, one.text, one.printed, one.figures) for one in found.commands] == [
        (6, "make demo    # builds", None, False),
        (7, 'a "x\ny" \\\n  z', None, False),
        (14, "tunewright x", "took 12.5 s,\ndone", True),
    ]
    assert words(found.commands[0].text) == ["make", "demo"]
    assert [line.text for line in found.indented] == ["indented"]


def test_what_is_printed_is_held_to_what_is_shown() -> None:
    assert matches("took 12.5 s,\ndone", "took 12.5\n s, done\n", figures=False)
    assert not matches("took 12.5 s", "took 13 s", figures=False)
    assert matches("took 12.5 s", "took 1,300 s", figures=True)
    assert not matches("took 12.5 s", "took 13 min", figures=True)
    assert matches("first\n...\nlast", "first\na\nb\nlast", figures=False)
    assert not matches("first", "first\nand more", figures=False)


WRONG = """\
trainer/no_such.py, no_such.py, no_such.json, train.no_such, data.mix=no_such, strategy=zero9, method.no_such,
resum=auto, make no-such, make zero2 NO_SUCH=1, tunewright no_such, tunewright train --no-such, --no-such,
NO_SUCH_VARIABLE, no_such_name, process.no_such, nosuchpackage.thing, data add --no-such,
make bench ARGS=--no-such, python bench/train.py --no-such"""


@pytest.mark.parametrize("text", re.split(r",\s+", WRONG))
def test_what_does_not_exist_is_told(text: str) -> None:
    assert problem_of_span(Span("docs/x.md", 1, text))


SHOWN = """\
```sh
export GREETING=hello
test "$GREETING" = hello
exit 3
make test    # some minutes
```

```
$ echo "$GREETING" 5 of 7
hello 5 of 7
```

```
$ echo goodbye
hello
```

```
$ echo "DataError: no rows"; exit 3
DataError: no rows
```
"""


def test_commands_that_do_not_hold_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path, {"PATH": os.environ["PATH"]})
    count = walk(take_apart("x.md", SHOWN), place)
    assert count == {"ok": 4, "WRONG": 2, "not run": 1}
    told = capsys.readouterr().out
    assert "WRONG    x.md:4  exit 3" in told
    assert "exit code 3, not 0" in told
    assert "WRONG    x.md:14  echo goodbye" in told
    assert "not run  x.md:5  make test    # some minutes  (the tests, which run by themselves)" in told


def test_a_command_that_takes_too_long_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    place = Place(tmp_path, {"PATH": os.environ["PATH"]})
    assert place.run("echo up; sleep 60 & wait", timeout=0.3) == (124, "up\n")
    assert place.run("echo up; sleep 60", until="^up") == (0, "up\n")
    assert place.run("echo down", until="^up") == (1, "down\n")


def test_arguments_are_added_through_make_as_well() -> None:
    assert with_option("tunewright train a=1    # why", "--dry-run") == "tunewright train a=1 --dry-run"
    added = with_option('make zero3 NPROC=8 ARGS="data.dir=my"', "--dry-run")
    assert words(added)[-1] == "ARGS=data.dir=my --dry-run"
