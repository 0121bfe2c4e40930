"""CPU processes get their share of the cores and wait without spinning for long, unless the user says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.launch.cli import main
from tunewright.launch.command import build_command
from tunewright.plan.devices import Devices
from tunewright.plan.rules import check
from tunewright.ranks import without_ranks
from tunewright.run_folder import RunDir
from tunewright.threads import COUNT, SPIN, WAITING, exported, remarks

CPU = Devices("cpu", 0, 8)
SPINNING = {"GOMP_SPINCOUNT": str(SPIN)}


@pytest.fixture(autouse=True)
def _as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (COUNT, *WAITING):
        monkeypatch.delenv(name, raising=False)


def environment(*overrides: str, devices: Devices = CPU) -> dict[str, str]:
    config = compose_config(overrides)
    found = build_command(config, RunDir(Path("runs/any")), check(config, devices), devices, None).env
    return {name: value for name, value in found.items() if name in (COUNT, *WAITING)}


@pytest.mark.parametrize(
    ("given", "overrides", "wanted", "told"),
    [
        ({}, ["strategy=ddp"], {COUNT: "4", **SPINNING}, None),
        ({}, ["cluster.threads_per_process=3"], {COUNT: "3", **SPINNING}, None),
        ({COUNT: "4"}, ["strategy=ddp"], {COUNT: "4", **SPINNING}, None),
        ({COUNT: "8"}, ["strategy=ddp"], {COUNT: "8", **SPINNING}, "OMP_NUM_THREADS=8 threads, as exported; its share"),
        ({COUNT: "5"}, ["cluster.threads_per_process=3"], {COUNT: "3", **SPINNING}, "=3 counts, not the exported"),
        ({COUNT: ""}, [], {COUNT: "8", **SPINNING}, None),
        ({COUNT: "8,2"}, [], {COUNT: "8", **SPINNING}, None),  # OpenMP's list, whose second is for nested threads
        # torchrun's and accelerate's own, in a rank of theirs
        ({COUNT: "1", "LOCAL_RANK": "0"}, [], {COUNT: "8", **SPINNING}, None),
        ({"OMP_WAIT_POLICY": "active"}, [], {COUNT: "8"}, None),
        ({"GOMP_SPINCOUNT": "5"}, [], {COUNT: "8"}, None),
    ],
)
def test_what_is_typed_comes_before_what_is_exported_and_that_before_a_share(
    given: dict[str, str],
    overrides: list[str],
    wanted: dict[str, str],
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert environment(*overrides) == wanted
    config = compose_config(overrides)
    said = " ".join(remarks(config, check(config, CPU).world_size, CPU))
    assert (said == "") if told is None else (told in said)


def test_a_gpus_ranks_wait_as_they_come() -> None:
    assert environment("strategy=ddp", devices=Devices("cuda", 2, 8)) == {COUNT: "4"}


def test_a_ranks_share_is_not_what_its_children_get() -> None:
    assert without_ranks({COUNT: "1", "RANK": "0", "HOME": "/"}) == {"HOME": "/"}
    assert without_ranks({COUNT: "1", "HOME": "/"}) == {COUNT: "1", "HOME": "/"}
    assert exported({COUNT: "1", "PET_NNODES": "1"}) is None


def test_a_dry_run_shows_what_decides(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(COUNT, "6")
    assert main(["train", "--dry-run", "cluster.threads_per_process=2"]) == 0
    shown = capsys.readouterr().out
    assert "cluster.threads_per_process=2 counts, not the exported OMP_NUM_THREADS=6." in shown
    assert f" {COUNT}=2 " in shown
    assert f" GOMP_SPINCOUNT={SPIN} " in shown


def test_an_exported_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COUNT, "many")
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS is 'many' in the environment: export a whole number"):
        environment()
