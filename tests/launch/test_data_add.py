"""`tunewright data add` puts a file into a registry and loses nothing that is there."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, DataError
from tunewright.launch.data.add import add_entry, propose, run
from tunewright.launch.data.check import compose
from tunewright.registry import load_entry

ROWS = [{"instruction": "", "output": "no question"}, {"instruction": "Say seven.", "input": "", "output": "Seven."}]
ENTRY = {
    "file_name": "rows.json",
    "columns": {"prompt": "instruction", "query": "input", "response": "output"},
}


def folder_with(folder: Path, rows: Any = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def add(file: Path, folder: Path, name: str | None = None, *, copy: bool = False, dry_run: bool = False) -> int:
    return run(Namespace(file=file, name=name, dir=folder, overrides=[], copy=copy, dry_run=dry_run))


def registry_of(folder: Path) -> Any:
    return json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))


def test_a_registry_is_made_and_its_entry_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path / "data")
    add(folder / "rows.json", folder)
    assert registry_of(folder) == {"rows": ENTRY}
    assert load_entry("rows", compose_config([f"data.dir={folder}"]).data).columns["response"] == "output"
    said = capsys.readouterr().out
    assert "Row 1 as a conversation:\n  user       Say seven.\n  assistant  Seven.\n" in said
    assert "1 of the first 2 rows cannot be used. The most frequent reason: `instruction` is empty." in said
    assert f"Added 'rows' to {folder}/dataset_info.json" in said


def test_what_is_there_stays_in_order_with_every_key(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    before = {
        "甄嬛": {"file_name": "甄嬛.json", "note": "莫名", "extra": [1, None, {"b": 1, "a": 2}]},
        "b": {"hf_hub_url": "org/name"},
        "a": {"script_url": "x", "columns": {"prompt": None}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(before), encoding="utf-8")  # with \\u escapes
    add(folder / "rows.json", folder, "皇上")
    after = registry_of(folder)
    assert after == {**before, "皇上": ENTRY}
    assert list(after) == ["甄嬛", "b", "a", "皇上"]
    assert list(after["甄嬛"]["extra"][2]) == ["b", "a"]
    text = (folder / "dataset_info.json").read_text(encoding="utf-8")
    assert '  "甄嬛": {\n    "file_name": "甄嬛.json"' in text


def test_another_entry_of_that_name_is_refused_and_the_registry_kept(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "dataset_info.json").write_text('{"rows": {"file_name": "other.json"}}')
    with pytest.raises(DataError, match=r"another entry 'rows'.*other\.json.*--name"):
        add(folder / "rows.json", folder)
    assert (folder / "dataset_info.json").read_text() == '{"rows": {"file_name": "other.json"}}'
    add(folder / "rows.json", folder, "mine")
    assert list(registry_of(folder)) == ["rows", "mine"]


def test_the_same_entry_again_changes_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": ENTRY}))
    assert add(folder / "rows.json", folder) == 0
    assert "this entry already; nothing to do" in capsys.readouterr().out
    assert (folder / "dataset_info.json").read_text() == json.dumps({"rows": ENTRY})


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = folder_with(tmp_path / "source"), tmp_path / "data"
    add(source / "rows.json", folder, copy=True, dry_run=True)
    assert not folder.exists()
    assert json.loads(capsys.readouterr().out.split("\n\n")[0]) == {"rows": ENTRY}


def test_a_file_elsewhere_is_refused_or_copied(tmp_path: Path) -> None:
    source, folder = folder_with(tmp_path / "source"), tmp_path / "data"
    with pytest.raises(DataError, match=r"--copy.*data\.names=\["):
        add(source / "rows.json", folder)
    assert not folder.exists()
    add(source / "rows.json", folder, copy=True)
    assert json.loads((folder / "rows.json").read_text()) == ROWS
    assert registry_of(folder) == {"rows": ENTRY}
    folder_with(source, [*ROWS, ROWS[1]])
    with pytest.raises(DataError, match="is there already and is not the same"):
        add(source / "rows.json", folder, "changed", copy=True)
    assert list(registry_of(folder)) == ["rows"]


def test_another_content_under_the_same_name_is_not_passed_over(tmp_path: Path) -> None:
    source, folder = folder_with(tmp_path / "source"), tmp_path / "data"
    add(source / "rows.json", folder, copy=True)
    folder_with(source, [*ROWS, ROWS[1]])
    with pytest.raises(DataError, match="is there already and is not the same"):
        add(source / "rows.json", folder, copy=True)


def test_a_folder_is_copied_whole(tmp_path: Path) -> None:
    source, folder = folder_with(tmp_path / "my parts"), tmp_path / "data"
    add(source, folder, copy=True)
    assert registry_of(folder) == {"my_parts": {**ENTRY, "file_name": "my parts"}}
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "dataset_info.json",
        "my parts",
    ]
    assert load_entry("my_parts", compose_config([f"data.dir={folder}"]).data)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"foo": "a", "bar": "b"}], "bar, foo"),
        ([{"instruction": "a", "output": ""}] * 3, "None of the first 3 rows.*`output` is empty"),
        ([], "has no rows"),
    ],
)
def test_a_file_that_cannot_be_understood_is_told(tmp_path: Path, rows: Any, said: str) -> None:
    folder = folder_with(tmp_path, rows)
    with pytest.raises(DataError, match=said):
        add(folder / "rows.json", folder)
    assert not (folder / "dataset_info.json").exists()


def test_the_folder_of_the_registry_goes_by_both_spellings(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    args = Namespace(
        file=folder / "rows.json", name="a", dir=None, copy=False, dry_run=False, overrides=[f"data.dir={folder}"]
    )
    assert run(args) == 0
    assert compose(["a"], [], None, folder).data.dir == compose(["a"], [f"data.dir={folder}"], None).data.dir
    args.dir = folder
    with pytest.raises(ConfigError, match="both say where the registry is"):
        run(args)
    args.overrides, args.dir = ["model=tiny"], folder
    with pytest.raises(ConfigError, match="takes no 'model=tiny'"):
        run(args)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [], "images": ["a.png"]}, "has images (`images`); tunewright trains on text"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            'preference data (`chosen`, `rejected`).*"response": "chosen"',
        ),
        ({"chosen": [], "rejected": []}, "preference data (`chosen`, `rejected`)"),
        ({"prompt": "a", "completion": "b", "rejected_response": "c"}, "preference data (`rejected_response`)"),
        ({"prompt": "a", "completion": "b", "label": False}, "preference data (`label`).*rows whose `label` is true"),
    ],
)
def test_what_is_not_for_supervised_fine_tuning_is_not_added(tmp_path: Path, row: Any, said: str) -> None:
    folder = folder_with(tmp_path, [ROWS[1], row])
    with pytest.raises(DataError, match=said.replace("(", r"\(").replace(")", r"\)")):
        add(folder / "rows.json", folder)
    assert not (folder / "dataset_info.json").exists()


def test_a_missing_file_and_an_unusable_name_are_told(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    with pytest.raises(DataError, match=r"no file or folder .*row\.json\. Did you mean 'rows\.json'"):
        add(folder / "row.json", folder)
    with pytest.raises(DataError, match="would have to be quoted"):
        add(folder / "rows.json", folder, "a, b")


@pytest.mark.parametrize("broken", ['{"a": {"file_name": "x"}, "a": {"file_name": "y"}}', '{"a": ', "[]"])
def test_a_registry_that_would_lose_something_is_not_written(tmp_path: Path, broken: str) -> None:
    folder = folder_with(tmp_path)
    (folder / "dataset_info.json").write_text(broken)
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        add(folder / "rows.json", folder)
    assert (folder / "dataset_info.json").read_text() == broken


def test_conversations_are_proposed_with_their_tags(tmp_path: Path) -> None:
    turns = [{"from": "user", "value": "Say\nseven."}, {"from": "assistant", "value": "Seven."}]
    folder = folder_with(tmp_path, [{"dialogue": turns}])
    meaning, preview = propose(folder / "rows.json")
    assert (meaning["formatting"], meaning["columns"]) == ("sharegpt", {"messages": "dialogue"})
    assert preview[1:] == ["  user       Say↵", "             seven.", "  assistant  Seven."]


def test_two_processes_at_once_lose_no_entry(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tunewright.launch.data.add import add_entry\n"
        "sys.stdin.readline()\n"  # both have started
        "for number in range(40):\n"
        "    add_entry(Path(sys.argv[1]), f'{sys.argv[2]}{number}', {'file_name': f'{number}.json'})\n"
    )
    registry = tmp_path / "dataset_info.json"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(registry), name], stdin=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in started] == [0, 0]
    assert set(registry_of(tmp_path)) == {f"{name}{number}" for name in "ab" for number in range(40)}


def test_a_linked_registry_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "dataset_info.json").symlink_to(tmp_path / "real.json")
    add_entry(tmp_path / "dataset_info.json", "mine", {"file_name": "x.json"})
    assert (tmp_path / "dataset_info.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"mine": {"file_name": "x.json"}}


def test_the_command_adds_and_a_clash_ends_with_3(
    tunewright: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "data")
    done = tunewright("data", "add", folder / "rows.json", "--dir", folder, "--name", "甄嬛")
    assert done.returncode == 0, done.stderr
    assert f"tunewright data check 甄嬛 data.dir={folder}" in done.stdout
    (folder / "dataset_info.json").write_text('{"甄嬛": {"file_name": "other.json"}}', encoding="utf-8")
    done = tunewright("data", "add", folder / "rows.json", "--dir", folder, "--name", "甄嬛")
    assert done.returncode == 3
    assert done.stderr.startswith("DataError: ")
    assert "Traceback" not in done.stderr
