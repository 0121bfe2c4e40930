"""Datasets of the Hub and of ModelScope, fetched by the real clients from a hub on loopback, and kept for offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

READ = """
import sys
from tunewright.config.compose import compose_config
from tunewright.errors import TunewrightError
from tunewright.trainer.data.build_cache import open_rows
config = compose_config(["data=registry", "data.names=[placeholder]", "data.dir=" + sys.argv[1], *sys.argv[3:]])
config.data.names = [sys.argv[2]]
if config.offline:
    import os
    os.environ["HF_HUB_OFFLINE"] = "1"
try:
    train, held = open_rows(config)
except TunewrightError as error:
    sys.exit(f"{error.exit_code} {error}")
for rows in (*train, *held):
    print(rows.entry.formatting, *sorted(row["output"] for row in rows), rows.identity[-1][:40])
"""


@pytest.fixture
def hub(tmp_path: Path, hub_server: Any) -> Iterator[Any]:
    """A hub with two datasets: one with splits, one with subsets."""
    plain, subsets = (tmp_path / "hub" / "datasets" / "org" / name for name in ("plain", "subsets"))
    for path, outputs in (
        (plain / "train.jsonl", "ab"),
        (plain / "validation.jsonl", "c"),
        (subsets / "en" / "train.jsonl", "d"),
        (subsets / "zh" / "train.jsonl", "e"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"instruction": "Say it.", "output": output} for output in outputs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [{"config_name": name, "data_files": f"{name}/train.jsonl"} for name in ("en", "zh")]
    (subsets / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    entries = {
        "zh": {"hf_hub_url": "org/subsets", "subset": "zh"},
        "fr": {"hf_hub_url": "org/subsets", "subset": "fr"},
        "by_folder": {"hf_hub_url": "org/subsets", "folder": "en"},
        "validation": {"hf_hub_url": "org/plain", "split": "validation"},
        "test": {"hf_hub_url": "org/plain", "split": "test"},
        "ms_zh": {"ms_hub_url": "org/subsets", "subset": "zh"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    with hub_server(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def read(hub: Any, tmp_path: Path) -> Any:
    """Read a dataset in a fresh process that knows this hub alone, and return what it printed or its error."""

    def run(name: str, *overrides: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path), name, f"data.cache_dir={tmp_path}/cache", *overrides],
            cwd=REPOSITORY,
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("hub:org/plain", "a b"), ("zh", "e"), ("by_folder", "d"), ("validation", "c"), ("ms_zh", "e")],
)
def test_a_dataset_is_read_by_name_subset_folder_and_split(read: Any, name: str, outputs: str) -> None:
    assert read(name).startswith(f"alpaca {outputs} ")


def test_modelscope_is_read_by_its_own_client(read: Any, hub: Any) -> None:
    assert read("modelscope:org/plain").startswith("alpaca a b ")
    assert any("/api/v1/datasets/org/plain" in request for request in hub.requests)


def test_a_stream_and_a_held_out_split_read_the_same_rows(read: Any) -> None:
    lines = read("hub:org/plain", "data.streaming=true", "data.eval_split=validation").splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == ["alpaca a b", "alpaca c"]


@pytest.mark.parametrize("name", ["hub:org/plain", "modelscope:org/plain"])
def test_offline_reads_what_was_read_before_and_asks_nobody(read: Any, hub: Any, name: str) -> None:
    online = read(name)
    hub.requests.clear()
    assert read(name, "offline=true") == online
    assert hub.requests == []


def test_a_new_commit_is_seen(read: Any, hub: Any) -> None:
    before = read("hub:org/plain")
    path = hub.root / "datasets" / "org" / "plain" / "train.jsonl"
    path.write_text(json.dumps({"instruction": "Say it.", "output": "new"}) + "\n")
    after = read("hub:org/plain")
    assert after.startswith("alpaca new ")
    assert after.rpartition(" ")[2] != before.rpartition(" ")[2]


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("hub:org/plian", [], "4 'hub:org/plian': the Hub has no dataset 'org/plian'"),
        ("hub:org/plain", ["offline=true"], "4 .*not on this machine, and `offline` is true"),
        ("modelscope:org/plain", ["offline=true"], "4 .*not on this machine, and `offline` is true"),
        ("modelscope:org/plian", [], "4 .*cannot be fetched from ModelScope"),
        ("fr", [], "3 entry 'fr'.*BuilderConfig 'fr' not found. Available: .*'en', 'zh'"),
        ("test", [], "3 entry 'test'.*Unknown split \"test\""),
    ],
)
def test_what_is_not_there_is_told(read: Any, name: str, overrides: list[str], said: str) -> None:
    assert re.search(said, read(name, *overrides))


@pytest.mark.parametrize("source", ["hub", "modelscope"])
def test_looking_at_data_fetches_a_models_tokenizer_and_no_weights(
    hub: Any, tunewright: Any, tmp_path: Path, tiny_model: Path, source: str
) -> None:
    model = tmp_path / "hub" / "models" / "org" / "tiny"
    model.mkdir(parents=True)
    for file in tiny_model.iterdir():
        if file.is_file():
            (model / file.name).write_bytes(file.read_bytes())
    command = ["data", "check", "hub:org/plain", f"model.source={source}", "model.path=org/tiny", "--json"]
    command.append(f"data.cache_dir={tmp_path}/cache")
    done = tunewright(*command, **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["examples"] == 2
    assert any("tokenizer.json" in request for request in hub.requests)
    assert not [request for request in hub.requests if "safetensors" in request and "GET" in request]
    hub.requests.clear()
    again = tunewright(*command, "offline=true", **hub.environment(tmp_path / "home"))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(done.stdout)
    assert hub.requests == []


def test_offline_refuses_a_model_that_is_not_there(hub: Any, tunewright: Any, tmp_path: Path) -> None:
    for source in ("hub", "modelscope"):
        model = ["model=folder", f"model.source={source}", "model.path=org/none", "offline=true"]
        done = tunewright("train", *model, f"output_root={tmp_path}", **hub.environment(tmp_path / "home"))
        assert done.returncode == 4, done.stderr
        assert "on this machine, and `offline` is true" in done.stderr
    assert hub.requests == []
    assert not list(tmp_path.glob("folder-*"))
