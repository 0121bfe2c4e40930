"""A dataset's name finds its entry, whatever the registry says, and what is wrong is told with what to write "
"instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tunewright.config.compose import compose_config
from tunewright.config.schema import Compat
from tunewright.errors import DataError, StorageError
from tunewright.registry import Entry, Place, edited_registry, load_entry, parse_entry
from tunewright.shipped import shipped
from tunewright.trainer.data.hub_datasets import read_snapshot
from tunewright.trainer.data.sources import Rows, open_datasets

ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}
CHAT_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def registry(folder: Path, entry: Any = None, rows: Any = None, name: str = "mine") -> Path:
    (folder / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": "rows.json"} if entry is None else entry}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "rows.json").write_text(json.dumps([ROW] if rows is None else rows), encoding="utf-8")
    return folder


def entry_of(name: str, folder: Path, *overrides: str) -> Entry:
    return load_entry(name, compose_config([f"data.dir={folder}", *overrides]).data)


def opened(folder: Path, *names: str, offline: bool = False, split: str | None = None, **data: Any) -> list[Rows]:
    overrides = [f"data.dir={folder}", f"data.cache_dir={folder}/cache", *(f"data.{key}={data[key]}" for key in data)]
    return open_datasets(list(names), compose_config(overrides).data, offline=offline, split=split)


# ---- entries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "place", "location"),
    [
        ({"file_name": "a.json", "file_sha1": "0" * 40}, Place.file, "dir/a.json"),
        ({"cloud_file_name": "s3://bucket/a.jsonl"}, Place.cloud, "s3://bucket/a.jsonl"),
        ({"hf_hub_url": "org/a", "ms_hub_url": "org/b", "om_hub_url": "org/c"}, Place.hub, "org/a"),
        ({"ms_hub_url": "org/b", "subset": "en", "split": "train_sft", "folder": "x"}, Place.modelscope, "org/b"),
        (
            {"hf_hub_url": "org/a", "formatting": "sharegpt", "tags": {**CHAT_TAGS, "system_tag": "system"}},
            Place.hub,
            "org/a",
        ),
        ({"hf_hub_url": "org/a", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}}, Place.hub, "org/a"),
        (
            {"file_name": "a.json", "columns": {"messages": "m", "images": "i", "kto_tag": "k"}},
            Place.file,
            "dir/a.json",
        ),
        ({"file_name": "wiki.txt", "columns": {"prompt": "text"}, "num_samples": 10}, Place.file, "dir/wiki.txt"),
    ],
)
@pytest.mark.parametrize("compat", list(Compat))
def test_every_shape_of_entry_parses(raw: Any, place: Place, location: str, compat: Compat) -> None:
    entry = parse_entry("甄嬛", raw, Path("dir/dataset_info.json"), compat)
    assert (entry.place, entry.location) == (place, location)
    for key in ("subset", "split", "folder", "num_samples"):
        assert getattr(entry, key) == raw.get(key)


def test_the_hub_of_an_entry_on_both_can_be_chosen() -> None:
    raw = {"hf_hub_url": "org/a", "ms_hub_url": "org/b"}
    assert parse_entry("x", raw, Path("r.json"), prefer_modelscope=True).location == "org/b"


def test_columns_and_tags_that_are_not_named_keep_their_defaults() -> None:
    raw = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"system": "s"}, "tags": {"user_tag": "user"}}
    entry = parse_entry("x", raw, Path("r.json"))
    assert entry.columns == {"messages": "conversations", "system": "s", "tools": "tools"}
    assert entry.tags["user_tag"] == "user"
    assert entry.tags["role_tag"] == "from"


def test_compat_leaves_them_out_as_llamafactory_does() -> None:
    raw = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m"}, "tags": CHAT_TAGS, "note": 1}
    entry = parse_entry("x", raw, Path("r.json"), Compat.llamafactory)
    assert entry.columns == {"messages": "m"}
    assert entry.tags["system_tag"] is None


@pytest.mark.parametrize("nothing", [None, ""])
@pytest.mark.parametrize("compat", list(Compat))
def test_a_column_can_be_left_out(nothing: str | None, compat: Compat) -> None:
    raw = {"file_name": "a.json", "columns": {"query": nothing, "prompt": "p"}, "tags": {"system_tag": nothing}}
    entry = parse_entry("x", raw, Path("r.json"), compat)
    assert "query" not in entry.columns
    assert (entry.named, entry.without) == ({"prompt"}, {"query"})
    assert entry.tags["system_tag"] is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "names no source"),
        ({"filename": "rows.json"}, "no key 'filename'. Did you mean 'file_name'"),
        ({"file_name": "rows.json", "colums": {}}, "Did you mean 'columns'"),
        ({"file_name": "missing.json"}, "there is no file or folder"),
        ({"file_name": "row.json"}, "Did you mean 'rows.json'"),
        ({"file_name": "rows.json", "formatting": "sharegp"}, "Did you mean 'sharegpt'"),
        ({"file_name": "rows.json", "ranking": True}, "preference data"),
        ({"file_name": "rows.json", "columns": {"chosen": "a", "rejected": "b"}}, "preference data"),
        ({"file_name": "rows.json", "columns": {"images": "pictures"}}, "trains on text"),
        ({"file_name": "rows.json", "columns": {"promt": "instruction"}}, "Did you mean 'prompt'"),
        ({"file_name": "rows.json", "columns": {"prompt": 3}}, "must be a column's name"),
        ({"file_name": "rows.json", "columns": {"response": "answer"}}, "no column 'answer'.*It has|The data has"),
        ({"file_name": "rows.json", "columns": {"response": None}}, "nothing to learn"),
        ({"file_name": "rows.json", "num_samples": "many"}, "must be int"),
        ({"file_name": "rows.json", "num_samples": 0}, "a number of rows from 1"),
        ({"file_name": ["rows.json"]}, "`file_name` is .*; it must be str"),
        ({"hf_hub_url": 5}, "`hf_hub_url` is 5; it must be str"),
        ({"file_name": "rows.json", "formatting": ["alpaca"]}, "`formatting` is"),
        ({"file_name": "rows.json", "columns": ["prompt"]}, "`columns` must be an object"),
        ({"file_name": "rows.json", "formatting": "sharegpt"}, "no column 'conversations'"),
        ({"script_url": "mine.py"}, "Python code from elsewhere"),
        ({"om_hub_url": "org/name"}, "OpenMind"),
        ({"file_name": "../outside.json"}, "reaches outside its own folder"),
        ({"file_name": "/etc/passwd"}, r"outside its own folder: /etc/passwd.*data\.allow_outside=true"),
        ({"file_name": "link.json"}, "reaches outside its own folder"),
        ({"file_name": "linked"}, r"reaches outside its own folder: .*outside\.json"),
        ({"file_name": "saved"}, "reaches outside its own folder"),
        (
            {"cloud_file_name": "file:///etc/passwd"},
            r"in no store that.*`file_name`.*allow_outside",
        ),
        ({"cloud_file_name": "local://rows.json"}, "in no store"),
        ({"cloud_file_name": "/etc/passwd"}, "in no store"),
        ({"cloud_file_name": "rows.json"}, "in no store"),
        ({"cloud_file_name": "simplecache::file:///etc/passwd"}, "in no store"),
        ({"cloud_file_name": "s3::file:///etc/passwd"}, "in no store"),
        ({"cloud_file_name": "git://.:rows.json"}, "in no store"),
        ({"ms_hub_url": "org/name", "folder": "../../elsewhere"}, "leaves the dataset"),
        ({"ms_hub_url": "org/name", "folder": "/etc"}, "leaves the dataset"),
        ("rows.json", "must be an object"),
    ],
)
def test_a_wrong_entry_is_told_with_its_place(tmp_path: Path, entry: Any, said: str) -> None:
    data = tmp_path / "data"
    (data / "linked").mkdir(parents=True)
    (tmp_path / "outside.json").write_text(json.dumps([ROW]))
    for link in (data / "link.json", data / "linked" / "rows.json"):
        link.symlink_to(tmp_path / "outside.json")
    Dataset.from_list([ROW]).save_to_disk(data / "saved")
    (file,) = (data / "saved").glob("*.arrow")
    file.rename(tmp_path / "outside.arrow")
    file.symlink_to(tmp_path / "outside.arrow")
    with pytest.raises(DataError, match=said) as caught:
        opened(registry(tmp_path / "data", entry), "mine")
    assert "entry 'mine' of " + str(tmp_path / "data" / "dataset_info.json") in str(caught.value)


def test_allow_outside_reads_what_a_registry_names_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.json").write_text(json.dumps([ROW]))
    folder = registry(tmp_path / "data", {"file_name": "../outside.json"})
    assert list(opened(folder, "mine", allow_outside=True)[0]) == [ROW]


@pytest.mark.parametrize("name", ["../../outside.arrow", "/etc/outside.arrow", ".."])
def test_a_saved_dataset_names_its_own_files_alone(tmp_path: Path, name: str) -> None:
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    for overrides in ({}, {"allow_outside": True}):  # nothing that `datasets` writes looks like this
        with pytest.raises(DataError, match="not one of its own files"):
            opened(registry(tmp_path, {"file_name": "saved"}), "mine", **overrides)
        with pytest.raises(DataError, match="not one of its own files"):
            opened(tmp_path, str(tmp_path / "saved"), **overrides)
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "lost.arrow"}]}))
    with pytest.raises(StorageError, match=r"cannot be read: No such file or directory: .*lost\.arrow"):
        opened(tmp_path, str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"not as datasets\.save_to_disk leaves a folder"):
        opened(tmp_path, str(tmp_path / "saved"))


def test_links_of_a_folder_that_is_named_itself_are_followed(tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text(json.dumps([ROW]))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "rows.json").symlink_to(tmp_path / "outside.json")  # as the Hub's own cache is made
    assert list(opened(tmp_path, str(tmp_path / "linked"))[0]) == [ROW]


@pytest.mark.parametrize("name", ["../outside.jsonl", "{}/outside.jsonl"])
def test_the_card_of_a_dataset_names_its_own_files_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "outside.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "snapshot" / "own.jsonl").write_text(json.dumps(ROW) + "\n")
    entry = Entry("x", "'modelscope:org/name'", Place.modelscope, "org/name")
    card = tmp_path / "snapshot" / "README.md"
    card.write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {name.format(tmp_path)}\n---\n")
    with pytest.raises(DataError, match=r"the card of 'org/name' names .*outside\.jsonl, which is no file of its own"):
        next(read_snapshot(entry, tmp_path / "snapshot"))
    card.unlink()
    assert list(read_snapshot(entry, tmp_path / "snapshot")) == [ROW]


def test_a_folder_is_not_taken_for_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(DataError, match=r"would read the folder 'org/name' that is here.*\./org/name"):
        opened(tmp_path, "hub:org/name")


def test_an_unknown_name_lists_the_known_ones_and_the_registry(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'mine'") as caught:
        entry_of("mein", registry(tmp_path))
    assert str(tmp_path / "dataset_info.json") in str(caught.value)


def test_names_outside_ascii_are_found(tmp_path: Path) -> None:
    assert entry_of("甄嬛", registry(tmp_path, name="甄嬛")).location.endswith("rows.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": }', "dataset_info.json:1:7: not JSON"),
        (b'{"\xff"}', "byte 2 is 0xff"),
        (b"[]", "object of name: entry"),
    ],
)
def test_a_broken_registry_is_told_with_the_place(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "dataset_info.json").write_bytes(content)
    with pytest.raises(DataError, match=said):
        entry_of("a", tmp_path)


def test_a_name_that_is_there_twice_is_not_lost_by_writing(tmp_path: Path) -> None:
    text = '{"a": {"file_name": "x"}, "a": {"file_name": "y"}}'
    (tmp_path / "dataset_info.json").write_text(text)
    assert entry_of("a", tmp_path).location.endswith("y")
    with (
        pytest.raises(DataError, match="has 'a' twice"),
        edited_registry(tmp_path / "dataset_info.json") as entries,
    ):
        entries["b"] = {}
    assert (tmp_path / "dataset_info.json").read_text() == text


def test_without_a_registry_the_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no registry at .*data\.dir"):
        entry_of("a", tmp_path)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    registry(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nno\n')
    with pytest.raises(DataError) as caught:
        opened(tmp_path, "mein", "mine", str(tmp_path / "bad.jsonl"), str(tmp_path / "none.json"))
    lines = str(caught.value).splitlines()
    assert ["'mein'" in lines[0], "bad.jsonl:2:1" in lines[1], "none.json" in lines[2]] == [True, True, True]


# ---- names that need no registry, folders, splits -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "formatting"),
    [
        (ROW, "alpaca"),
        ({"question": "a", "answer": "b"}, "alpaca"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "openai"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt"),
        ({"chat": [{"from": "user", "text": "a"}, {"from": "assistant", "text": "b"}]}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a"}, "text"),
        ({"messages": [{"role": "User", "content": "a"}, {"role": "Bot", "content": "b"}]}, "sharegpt"),
        ({"prompt": "a", "completion": "b", "label": True}, "prompt_completion"),
    ],
)
def test_a_path_is_read_by_what_its_columns_are_called(tmp_path: Path, row: Any, formatting: str) -> None:
    from tunewright.trainer.data.formats import to_conversation

    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (rows,) = opened(tmp_path, str(tmp_path / "rows.json"))
    assert rows.entry.formatting == formatting
    assert to_conversation(next(iter(rows)), rows.entry).answer in ("b", "Hello.", "a")


@pytest.mark.parametrize(
    ("formatting", "row"),
    [
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}], "chosen": {}, "rejected": {}}),
        ("openai", {"messages": [{"role": "user", "content": "a"}], "rejected_response": "b"}),
        ("prompt_completion", {"prompt": "a", "completion": "b", "rejected": "c"}),
    ],
)
def test_an_entry_that_does_not_choose_its_answers_is_refused_beside_rejected_ones(
    tmp_path: Path, formatting: str, row: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"entry 'mine' of .* is preference data"):
        opened(registry(tmp_path, {"file_name": "rows.json", "formatting": formatting}, [row]), "mine")
    chosen = {"file_name": "rows.json", "columns": {"prompt": "a", "response": "chosen"}}
    assert opened(registry(tmp_path, chosen, [{"a": "b", "chosen": "c", "rejected": "d"}]), "mine")


CHAT = {"messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]}
CALLING = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
CALLED = {
    "conversations": [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": [5, 3]}}'},
        {"from": "observation", "value": '{"area": 15}'},
        {"from": "gpt", "value": "b"},
    ],
    "tools": '[{"name": "f", "parameters": {"type": "object"}}]',
}
PICTURED = {"formatting": "sharegpt", "tags": CHAT_TAGS}
RANKED = {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "m", "chosen": "c", "rejected": "r"}}


@pytest.mark.parametrize(
    ("entry", "row", "said"),
    [
        ({}, ROW, ""),  # identity, alpaca_en_demo, alpaca_zh_demo
        (CALLING, CALLED, ""),  # glaive_toolcall_en_demo, glaive_toolcall_zh_demo
        (CALLING, {**CALLED, "tools": "[]"}, ""),
        ({**PICTURED, "columns": {"messages": "messages", "images": "images"}}, CHAT, "has images"),  # mllm_demo
        ({**PICTURED, "columns": {"messages": "messages", "audios": "audios"}}, CHAT, "has audios"),  # mllm_audio_demo
        # mllm_video_demo, mllm_video_audio_demo
        ({**PICTURED, "columns": {"messages": "messages", "videos": "v", "audios": "a"}}, CHAT, "has videos, audios"),
        (RANKED, CHAT, r"preference data \(`c`, `r`\)"),  # dpo_en_demo, dpo_zh_demo
        ({"columns": {"messages": "m", "kto_tag": "label"}}, CHAT, r"preference data \(`label`\)"),  # kto_en_demo
        # wiki_demo, c4_demo
        ({"columns": {"prompt": "text"}}, {"text": "a"}, '"formatting": "text"'),
    ],
)
@pytest.mark.parametrize("compat", list(Compat))
def test_llamafactorys_demo_entries_load_or_say_why_not(
    tmp_path: Path, entry: dict[str, Any], row: dict[str, Any], said: str, compat: Compat
) -> None:
    from tunewright.trainer.data.formats import to_conversation

    folder = registry(tmp_path, {"file_name": "rows.json", **entry}, [row])
    if said:
        with pytest.raises(DataError, match=said):
            opened(folder, "mine", compat=compat.value)
    else:
        (rows,) = opened(folder, "mine", compat=compat.value)
        assert [to_conversation(found, rows.entry).answer for found in rows] == [row.get("output", "b")]


def test_one_file_has_no_other_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one file, which has no split 'validation'"):
        opened(registry(tmp_path), "mine", split="validation")


def test_columns_without_a_plain_meaning_are_an_error_that_lists_them(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"left": "a", "right": "b"}]))
    with pytest.raises(DataError, match="not plain: left, right"):
        opened(tmp_path, str(tmp_path / "rows.json"))


def test_shipped_datasets_are_found_in_any_folder_unless_a_name_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = compose_config().data
    assert Path(load_entry("demo", data).location) == shipped("data") / "demo.json"
    with pytest.raises(DataError, match=r"no registry at data/dataset_info.json.*Did you mean 'demo'.*demo, demo_eval"):
        load_entry("demoo", data)
    (tmp_path / "data").mkdir()
    registry(tmp_path / "data", name="demo")
    assert load_entry("demo", data).location == "data/rows.json"
    assert Path(load_entry("demo_eval", data).location) == shipped("data") / "demo_eval.json"
    with pytest.raises(DataError, match="no registry at elsewhere/"):  # a folder that somebody named is that folder
        load_entry("demo", compose_config(["data.dir=elsewhere"]).data)


def test_names_are_relative_to_the_root_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    registry(project / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = compose_config([f"data.root={project}"]).data
    assert load_entry("mine", data).location == str(project / "data" / "rows.json")
    assert load_entry("data/rows.json", data).location == str(project / "data" / "rows.json")


def test_an_entry_goes_before_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(tmp_path, name="demo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert entry_of("demo", tmp_path).location.endswith("rows.json")


def test_a_folder_is_its_files_in_order_and_a_split_those_that_carry_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("b-validation.jsonl", "a-train-00.jsonl", "a-train-01.jsonl"):
        (folder / name).write_text(json.dumps({**ROW, "output": name}) + "\n")

    def outputs(split: str | None) -> list[str]:
        return [row["output"] for row in opened(tmp_path, str(folder), split=split)[0]]

    assert outputs(None) == [
        "a-train-00.jsonl",
        "a-train-01.jsonl",
    ]  # what is set aside by its name is not for training
    assert outputs("train") == ["a-train-00.jsonl", "a-train-01.jsonl"]
    assert outputs("validation") == ["b-validation.jsonl"]
    with pytest.raises(DataError, match=r"split 'test' in its name\. It holds: a-train-00\.jsonl"):
        opened(tmp_path, str(folder), split="test")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    assert list(opened(tmp_path, str(plain), split="train")[0]) == [ROW]
    (folder / "c-train.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(DataError, match=r"several kinds: \.csv, \.jsonl"):
        opened(tmp_path, str(folder))


@pytest.mark.parametrize(("content", "said"), [("[]", "has no rows"), ("", "has no rows"), ("[{}]", "not plain")])
def test_empty_files_are_told(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=said):
        opened(tmp_path, str(tmp_path / "rows.json"))


def test_a_cloud_file_is_copied_once_and_read_offline(tmp_path: Path) -> None:
    (tmp_path / "store.jsonl").write_text(json.dumps(ROW) + "\n")
    folder = registry(tmp_path, {"cloud_file_name": f"file://{tmp_path}/store.jsonl"})
    assert list(opened(folder, "mine", allow_outside=True)[0]) == [ROW]
    before = opened(folder, "mine", allow_outside=True)[0].identity
    (tmp_path / "store.jsonl").write_text(json.dumps({**ROW, "output": "changed"}) + "\n")
    assert opened(folder, "mine", offline=True, allow_outside=True)[0].identity == before
    assert opened(folder, "mine", allow_outside=True)[0].identity != before


def test_a_cloud_folder_is_not_written_above_its_cache(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/rows/../../escaped.jsonl", b"{}")
    with pytest.raises(DataError, match=r"names with '\.\.', which would lead out of the cache"):
        opened(registry(tmp_path, {"cloud_file_name": "memory://bucket/rows"}), "mine", allow_outside=True)


@pytest.mark.parametrize(
    ("location", "said"),
    [("file:///none/such.jsonl", "cannot be read"), ("nostore://a/b.json", "cannot be read|nostore")],
)
def test_a_cloud_file_that_is_not_there_is_a_storage_error(tmp_path: Path, location: str, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        opened(registry(tmp_path, {"cloud_file_name": location}), "mine", allow_outside=True)
    with pytest.raises(StorageError, match="`offline` is true"):
        opened(registry(tmp_path, {"cloud_file_name": location}), "mine", offline=True, allow_outside=True)


@pytest.mark.parametrize("setting", ["data.names", "data.eval_names"])
def test_an_unknown_name_is_told_with_the_setting_that_has_it(setting: str, tmp_path: Path) -> None:
    registry(tmp_path)
    other = {"data.names": "data.eval_names", "data.eval_names": "data.names"}[setting]
    config = compose_config([f"data.dir={tmp_path}", f"{setting}=[nowhere]", f"{other}=[mine]"])
    with pytest.raises(DataError, match=f"`{setting}` asks for 'nowhere'"):
        load_entry("nowhere", config.data)
