"""The legality table, cell by cell: what it allows trains, what it refuses is refused with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.launch.command import _environment, accelerate_config
from tunewright.plan.devices import Devices, find_devices
from tunewright.plan.rules import check, world_size
from tunewright.plan.support import BEGIN, DEVICES, DOCUMENT, STRATEGIES, Cell, cells, table, verdict

ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
STEPS = 6
# A learning rate with which each method gets somewhere in six steps.
RATES = {"full": 3e-3, "freeze": 3e-3, "lora": 1e-2, "qlora": 1e-2, "prompt_tuning": 0.3, "p_tuning": 1e-2}
RATES |= {"prefix_tuning": 0.3, "ia3": 0.1}


def overrides(cell: Cell) -> list[str]:
    items = [f"method={cell.method}", f"strategy={cell.strategy}"]
    items.append(f"train.padding_free={'true' if cell.layout == 'padding-free' else 'false'}")
    if cell.method == "qlora":
        items.append(f"method.bits={cell.bits}")
    if cell.init != "default":
        items.append(f"method.init={cell.init}")
    return items


def label(cell: Cell) -> str:
    return f"{cell.strategy}-{cell.method}-{cell.bits}-{cell.layout}-{cell.init}"


def on(device: str) -> Devices:
    return Devices(device, 0 if device == "cpu" else 8, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_every_combination_is_allowed_or_refused_with_its_reason(device: str) -> None:
    for cell in cells(device):
        config = compose_config(overrides(cell))
        if verdict(cell).outcome == "refused":
            with pytest.raises(ConfigError, match="Use ") as refusal:
                check(config, on(device))
            assert f"strategy={cell.strategy}" in str(refusal.value) or f"method.init={cell.init}" in str(refusal.value)
        else:
            check(config, on(device))


def test_a_strategy_of_the_users_own_is_judged_by_its_zero_stage(tmp_path: Path) -> None:
    (tmp_path / "strategy").mkdir()
    text = "name: mine\nlauncher: deepspeed\ndeepspeed: zero3\n"
    (tmp_path / "strategy" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="ZeRO-3 splits weights"):
        check(compose_config(["strategy=mine", "method=qlora"], tmp_path), on("cpu"))


def test_the_documented_table_is_the_one_that_is_checked() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert BEGIN in text
    assert table() in text, "write it anew with: python -m tunewright.plan.support"


@pytest.fixture(scope="session")
def trained(
    request: pytest.FixtureRequest, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Train the selected cells of a strategy in one start of its ranks; return {cell label: what happened}."""
    known: dict[str, dict[str, Any]] = {}
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    selected = [item.callspec.params["cell"] for item in mine if item.name.startswith("test_a_cell")]

    def run(strategy: str) -> dict[str, Any]:
        if strategy not in known:
            cells = [cell for cell in selected if cell.strategy == strategy]
            known[strategy] = _train_all(cells, small_model, tmp_path_factory.mktemp(strategy))
        return known[strategy]

    return run


def _train_all(cells: list[Cell], model: Path, root: Path) -> dict[str, Any]:
    devices = find_devices()
    common = [f"output_root={root / 'runs'}", "model=folder", f"model.path={model}", "data.eval_names=[]"]
    common += [f"train.max_steps={STEPS}", "train.logging_steps=1", "data.max_samples=16", "train.scheduler=constant"]
    common += ["train.global_batch_size=16", "train.micro_batch_size=8", "cluster.threads_per_process=1"]
    config = None
    for cell in cells:
        rate = f"train.learning_rate={RATES[cell.method]}"
        config = compose_config([*common, rate, f"name={label(cell)}", *overrides(cell)])
        (root / f"{label(cell)}.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    assert config is not None
    ranks = world_size(config, devices)
    settings = root / "settings" / "accelerate.yaml"
    settings.parent.mkdir()
    settings.write_text(yaml.safe_dump(accelerate_config(config, ranks, devices)))
    done = subprocess.run(
        [*ACCELERATE, str(settings), str(Path(__file__).with_name("train_cells.py")), str(root)],
        env={**os.environ, **_environment(config, ranks, devices)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = {file.stem: json.loads(file.read_text()) for file in root.glob("*.json")}
    assert results, done.stdout[-3000:] + done.stderr[-3000:]
    return results


def allowed(device: str) -> list[Cell]:
    return [cell for cell in cells(device) if verdict(cell).outcome != "refused"]


def with_speed(device: str) -> list[Any]:
    """The cells; those of a strategy that differs little from a wholly tested one are slow, a few methods aside."""
    marked = []
    for cell in allowed(device):
        usual = cell.method in ("full", "lora", "qlora", "prompt_tuning") and cell.bits != 8
        quick = cell.strategy in ("single", "zero2", "zero3") or (usual and cell.layout == "padding-free")
        marked.append(pytest.param(cell, marks=[] if quick else [pytest.mark.slow], id=label(cell)))
    return marked


HERE = find_devices().kind


@pytest.mark.parametrize("cell", with_speed("cpu"))
@pytest.mark.skipif(HERE != "cpu", reason="the cells of a GPU are in test_a_cell_trains_on_a_gpu")
def test_a_cell_trains(cell: Cell, trained: Callable[[str], dict[str, Any]]) -> None:
    _check_trained(cell, trained(cell.strategy)[label(cell)])


@pytest.mark.gpu
@pytest.mark.parametrize("cell", allowed("cuda"), ids=label)
@pytest.mark.skipif(HERE == "cpu", reason="needs a GPU")
def test_a_cell_trains_on_a_gpu(cell: Cell, trained: Callable[[str], dict[str, Any]]) -> None:
    _check_trained(cell, trained(cell.strategy)[label(cell)])


def _check_trained(cell: Cell, result: dict[str, Any]) -> None:
    """The loss falls, every trained parameter moved, every frozen one is bit-identical, on the engine asked for."""
    assert "error" not in result, result["error"]
    assert result["status"] == "done"
    losses = result["losses"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.02, losses
    assert result["names_kept"]
    assert result["trained"]
    assert result["still"] == []
    assert result["disturbed"] == []
    assert result["padding_free"] == (verdict(cell).outcome == "trains" and cell.layout == "padding-free")
    stage = int(cell.strategy[4]) if cell.strategy.startswith("zero") else None
    assert result["facts"]["zero_stage"] == stage
    assert result["facts"]["engine"] == ("DeepSpeedEngine" if stage else result["facts"]["engine"])
    assert result["facts"]["world_size"] == (
        1 if cell.strategy == "single" else len(set(result["facts"]["process_ids"]))
    )
    assert (result["facts"]["parameters_partitioned"] > 0) == (stage == 3)
    by_hand = sum(_numel(result["sizes"][name]) for name in result["trained"])
    assert result["parameters"]["trainable"] == by_hand
    if cell.bits == 16:  # a tensor of a quantised base has two weights in a byte, see test_methods
        assert result["parameters"]["total"] == sum(map(_numel, result["sizes"].values()))


def _numel(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_the_tables_strategies_are_the_shipped_ones() -> None:
    from tunewright.config.compose import choices

    assert sorted(STRATEGIES) == choices("strategy")
