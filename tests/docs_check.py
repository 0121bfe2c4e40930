"""Type every command of README.md and docs/*.md as a newcomer would: `make docs-check`.

    python -m tests.docs_check                          # every document; some twenty minutes on two cores
    python -m tests.docs_check docs/data.md --keep      # one, and its copy of the checkout stays

Each document gets a copy of the checkout, a home of its own and no network, so that nothing of the user's is touched;
what a document needs it has to make itself, or to ask of the reader (`READERS`). A command has to end with exit code 0,
or with that of the error which the document shows, and to print what the document shows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.rooms import make_rooms
from tests.datagen import fake_server
from tests.documents import REPOSITORY, Command, Document, documents, matches, words
from tunewright.errors import EXIT_CODES

LONGEST = 1200  # seconds that a command may take on a busy machine
MODELS = Path("~/.cache/tunewright/models").expanduser()  # of which a copy is used
UP = 120  # seconds in which what serves has to say so

# What is not run, and why: {pattern of the whole command: reason}.
EXCLUDED = {
    r"make (test|test-slow|test-versions)\b.*": "the tests, which run by themselves",
    r"make bench-check": "compares with the history of the repository, which the copy has not",
    r"make (bench|bench-\w+)\b.*": "measures, for minutes to hours; beside other people's programs",
    r"make gpu-(check|rehearsal)\b.*": "needs a GPU, or builds an environment from the network",
    r"\S*tunewright doctor\b.*": "its exit code is what it finds of the machine; tests/launch/test_doctor.py runs it",
    r"\S*accelerate launch --num_processes 8 .*": "eight GPUs",
    r"\S*accelerate launch --config_file my_accelerate.yaml .*": "eight GPUs, and a model of the Hub",
    r".*\bhub:org/name\b.*": "a dataset of the Hub",
    r".*\bmerge runs/riddles\b.*|.*\bchat runs/(riddles|soft)\b.*": "a run that needs a GPU and a model of the Hub",
    r".*\bcompare runs/(guanaco/|qwen2_5_7b-).*": "runs that need a GPU and a model of the Hub",
    r".*experiment=rocm_.*": "a dataset and a model of the Hub",
    r".*experiment=bloom_.*": "a dataset of the reader's, and a model of the Hub",
    r".*base_url=http://localhost:11434/v1 .*": "a server of the reader's",
    r".*base_url=http://127.0.0.1:60893/v1 .*": "a server of the test suite; tests/datagen/test_real_server.py runs it",
}
# What is run otherwise: {pattern: (what is appended, reason)}.
INSTEAD = {
    r"(?!\S*tunewright plan ).*\bmodel=qwen2_5_7b\b(?!.*c_attn).*": ("--dry-run", "weights of the Hub, and GPUs"),
    r".*MODEL=qwen2_5_7b\b.*": ("--dry-run", "weights of the Hub, and GPUs"),
    r".*experiment=huanhuan_(?!.*(model=tiny|--dry-run)).*": ("--dry-run", "weights of the Hub, and GPUs"),
    r".*experiment=gpt_llm_trainer\b.*": ("--dry-run", "weights of the Hub, and a GPU"),
}
# What serves until it is stopped: {pattern: what it prints when it is up}.
STAYS = {r"make tensorboard": "TensorBoard .* at http"}


def reason_of(command: str, table: Mapping[str, object]) -> object | None:
    """Return what a table has for a command, or None."""
    text = " ".join(words(command))
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, text, flags=re.DOTALL)), None)


@dataclass
class Place:
    """A copy of the checkout in which one document's commands run."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, command: str, timeout: float = LONGEST, until: str | None = None) -> tuple[int, str]:
        """Return the exit code and what was printed.

        A command that takes too long is stopped, with code 124, and so is one that has printed `until`, with code 0.
        """
        deadline = time.monotonic() + timeout
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:

            def printed() -> str:
                return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode("utf-8", "replace")

            started = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.root,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while started.poll() is None and time.monotonic() < deadline:
                    if until and re.search(until, printed()):
                        return 0, printed()
                    time.sleep(0.1)
                code = started.poll()
                return (1 if until else code) if code is not None else 124, printed()
            finally:  # also at Ctrl-C, which a session of its own does not hear
                if started.poll() is None:
                    os.killpg(started.pid, signal.SIGTERM)
                    started.wait()


def make_place(root: Path, home: Path, server: str) -> Place:
    """Copy what git knows or would know, with an environment that uses the copy's code and nothing of the user's."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    installed = Path(sys.prefix)
    (root / ".venv").mkdir()
    for part in installed.iterdir():
        if part.name not in (".ready", "rooms"):
            (root / ".venv" / part.name).symlink_to(part)
    (root / ".venv" / ".ready").touch()  # newer than the copied pyproject.toml: `make` installs nothing
    write_readers_files(root)
    kept = {
        name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR", "USER", "OMP_WAIT_POLICY") if name in os.environ
    }
    env = {
        **kept,
        "HOME": str(home),
        "PATH": f"{root / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(make_rooms(root / ".venv" / "rooms", root)),  # before the checkout that is installed
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OPENAI_BASE_URL": server,
    }
    return Place(root, env)


def write_readers_files(root: Path) -> None:
    """Write what the documents say that the reader has."""
    rows = json.loads((root / "data" / "demo.json").read_text(encoding="utf-8"))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    turns = [
        {"conversations": [{"from": "human", "value": row["input"]}, {"from": "gpt", "value": row["output"]}]}
        for row in rows
    ]
    registry = {
        "huanhuan": {"file_name": "huanhuan.jsonl"},
        "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    }
    for name, text in READERS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        filled = {"ROWS": lines, "TURNS": json.dumps(turns, ensure_ascii=False), "REGISTRY": json.dumps(registry)}
        (root / name).write_text(filled.get(text, text), encoding="utf-8")


# Files that the documents take for the reader's own.
READERS = {
    "my/rows.jsonl": "ROWS",
    "data/mine.jsonl": "ROWS",
    "my-registry/dataset_info.json": "REGISTRY",
    "my-registry/huanhuan.jsonl": "ROWS",
    "my-registry/chats.json": "TURNS",
    "handbook/opening.md": "# Opening hours\n\nThe shop is open from nine to five, and on Saturdays until noon.\n",
    "seeds.jsonl": json.dumps({"instruction": "Solve it.", "input": "What has hands?", "output": "A clock."}) + "\n",
}


def check(command: Command, place: Place) -> str | None:
    """Run a command and say what is wrong with the document, or None."""
    text = command.text
    if exported := re.fullmatch(r"export (\w+)=(\S+)", text):
        place.env[exported[1]] = exported[2]
        return None
    up = reason_of(text, STAYS)
    if up is not None:
        code, printed = place.run(text, UP, str(up))
        return f"does not serve (exit code {code}):\n{printed}" if code else None
    instead = reason_of(text, INSTEAD)
    if isinstance(instead, tuple):
        text = with_option(text, instead[0])
    code, printed = place.run(text)
    expected = EXIT_CODES[command.error] if command.error else 0
    if code != expected:
        return f"exit code {code}, not {expected}:\n{printed[-3000:]}"
    if command.printed is not None and not matches(command.printed, printed, command.figures):
        return f"prints something else:\n{printed[-6000:]}"
    return None


def with_option(text: str, option: str) -> str:
    """Append an option to a command; through `make` by ARGS."""
    given, bare = words(text), re.sub(r"\s+# .*$", "", text)
    if given[0] != "make":
        return f"{bare} {option}"
    before = next((word.partition("=")[2] for word in given if word.startswith("ARGS=")), "")
    return f'{bare} ARGS="{before} {option}"'


def walk(document: Document, place: Place) -> Counter[str]:
    """Run the commands of a document, and count what became of them."""
    count: Counter[str] = Counter()
    for command in document.commands:
        first = command.text.partition("\n")[0]
        if reason := reason_of(command.text, EXCLUDED):
            print(f"  not run  {command.where}  {first}  ({reason})", flush=True)
            count["not run"] += 1
            continue
        begun = time.monotonic()
        problem = check(command, place)
        state = "ok" if problem is None else "WRONG"
        count[state] += 1
        instead = reason_of(command.text, INSTEAD)
        how = f", as {instead[0]}: {instead[1]}" if isinstance(instead, tuple) else ""
        print(f"  {state:<7}  {command.where}  {first}  ({time.monotonic() - begun:.0f} s{how})", flush=True)
        if problem:
            print("\n".join(f"           | {line}" for line in problem.splitlines()), flush=True)
    return count


def main() -> int:
    """Run what was asked for; 0 when every command holds."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    asked.add_argument("documents", nargs="*", metavar="DOCUMENT", help="for example README.md; default: all")
    asked.add_argument("--keep", action="store_true", help="leave the copies of the checkout, and say where they are")
    asked.add_argument("--fresh", action="store_true", help="build the embedded model anew, as on a new machine")
    args = asked.parse_args()
    found = {document.name: document for document in documents()}
    if unknown := set(args.documents) - set(found):
        asked.error(f"no such document: {', '.join(sorted(unknown))} (there are {', '.join(found)})")
    count: Counter[str] = Counter()
    with ExitStack() as stack:
        server = stack.enter_context(fake_server.FakeServer())
        top = Path(tempfile.mkdtemp(prefix="tunewright-docs-"))
        if args.keep:
            print(f"Copies: {top}")
        else:
            stack.callback(shutil.rmtree, top)
        home = top / "home"
        home.mkdir()
        if MODELS.is_dir() and not args.fresh:
            shutil.copytree(MODELS, home / ".cache" / "tunewright" / "models")
        for name in args.documents or found:
            print(name, flush=True)
            root = top / name.replace("/", "-").removesuffix(".md")
            root.mkdir()
            count += walk(found[name], make_place(root, home, server.url))
    print(f"{count['ok']} commands hold, {count['WRONG']} do not, {count['not run']} were not run.")
    return 1 if count["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
