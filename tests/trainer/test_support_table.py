"""The support table, combination by combination: what it allows trains, what it refuses is refused with its reason."""

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
from tunewright.launch.command import accelerate_config, environment_of
from tunewright.plan.devices import Devices, find_devices
from tunewright.plan.rules import check, world_size
from tunewright.plan.support import BEGIN, DEVICES, DOCUMENT, STRATEGIES, Combination, combinations, support_of, table

ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
STEPS = 6
# A learning rate with which each method gets somewhere in six steps.
RATES = {"full": 3e-3, "freeze": 3e-3, "lora": 1e-2, "qlora": 1e-2, "prompt_tuning": 0.3, "p_tuning": 1e-2}
RATES |= {"prefix_tuning": 0.3, "ia3": 0.1}


def overrides(chosen: Combination) -> list[str]:
    items = [f"method={chosen.method}", f"strategy={chosen.strategy}"]
    items.append(f"train.padding_free={'true' if chosen.layout == 'padding-free' else 'false'}")
    if chosen.method == "qlora":
        items.append(f"method.bits={chosen.bits}")
    if chosen.init != "default":
        items.append(f"method.init={chosen.init}")
    return items


def label(chosen: Combination) -> str:
    return f"{chosen.strategy}-{chosen.method}-{chosen.bits}-{chosen.layout}-{chosen.init}"


def on(device: str) -> Devices:
    return Devices(device, 0 if device == "cpu" else 8, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_every_combination_is_allowed_or_refused_with_its_reason(device: str) -> None:
    for chosen in combinations(device):
        config = compose_config(overrides(chosen))
        if support_of(chosen).outcome == "refused":
            with pytest.raises(ConfigError, match="Use ") as refusal:
                check(config, on(device))
            named = (f"strategy={chosen.strategy}", f"method.init={chosen.init}")
            assert any(setting in str(refusal.value) for setting in named)
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
    """Train the selected combinations of a strategy in one start of its ranks; return {its label: what happened}."""
    known: dict[str, dict[str, Any]] = {}
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    selected = [item.callspec.params["chosen"] for item in mine if item.name.startswith("test_a_combination")]

    def run(strategy: str) -> dict[str, Any]:
        if strategy not in known:
            found = [chosen for chosen in selected if chosen.strategy == strategy]
            known[strategy] = _train_all(found, small_model, tmp_path_factory.mktemp(strategy))
        return known[strategy]

    return run


def _train_all(combinations: list[Combination], model: Path, root: Path) -> dict[str, Any]:
    devices = find_devices()
    common = [f"output_root={root / 'runs'}", "model=folder", f"model.path={model}", "data.eval_names=[]"]
    common += [f"train.max_steps={STEPS}", "train.logging_steps=1", "data.max_samples=16", "train.scheduler=constant"]
    common += ["train.global_batch_size=16", "train.micro_batch_size=8", "cluster.threads_per_process=1"]
    config = None
    for chosen in combinations:
        rate = f"train.learning_rate={RATES[chosen.method]}"
        config = compose_config([*common, rate, f"name={label(chosen)}", *overrides(chosen)])
        (root / f"{label(chosen)}.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    assert config is not None
    ranks = world_size(config, devices)
    settings = root / "settings" / "accelerate.yaml"
    settings.parent.mkdir()
    settings.write_text(yaml.safe_dump(accelerate_config(config, ranks)))
    done = subprocess.run(
        [*ACCELERATE, str(settings), str(Path(__file__).with_name("train_combinations.py")), str(root)],
        env={**os.environ, **environment_of(config, ranks, devices)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = {file.stem: json.loads(file.read_text()) for file in root.glob("*.json")}
    assert results, done.stdout[-3000:] + done.stderr[-3000:]
    return results


def allowed(device: str) -> list[Combination]:
    return [chosen for chosen in combinations(device) if support_of(chosen).outcome != "refused"]


def with_speed(device: str) -> list[Any]:
    """Combinations; those of a strategy much like a wholly tested one are slow, a few methods aside."""
    marked = []
    for chosen in allowed(device):
        usual = chosen.method in ("full", "lora", "qlora", "prompt_tuning") and chosen.bits != 8
        quick = chosen.strategy in ("single", "zero2", "zero3") or (usual and chosen.layout == "padding-free")
        marked.append(pytest.param(chosen, marks=[] if quick else [pytest.mark.slow], id=label(chosen)))
    return marked


HERE = find_devices().kind


@pytest.mark.parametrize("chosen", with_speed("cpu"))
@pytest.mark.skipif(HERE != "cpu", reason="the combinations of a GPU are in test_a_combination_trains_on_a_gpu")
def test_a_combination_trains(chosen: Combination, trained: Callable[[str], dict[str, Any]]) -> None:
    _check_trained(chosen, trained(chosen.strategy)[label(chosen)])


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", allowed("cuda"), ids=label)
@pytest.mark.skipif(HERE == "cpu", reason="needs a GPU")
def test_a_combination_trains_on_a_gpu(chosen: Combination, trained: Callable[[str], dict[str, Any]]) -> None:
    _check_trained(chosen, trained(chosen.strategy)[label(chosen)])


def _check_trained(chosen: Combination, result: dict[str, Any]) -> None:
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
    assert result["padding_free"] == (support_of(chosen).outcome == "trains" and chosen.layout == "padding-free")
    stage = int(chosen.strategy[4]) if chosen.strategy.startswith("zero") else None
    assert result["facts"]["zero_stage"] == stage
    assert result["facts"]["engine"] == ("DeepSpeedEngine" if stage else result["facts"]["engine"])
    assert result["facts"]["world_size"] == (
        1 if chosen.strategy == "single" else len(set(result["facts"]["process_ids"]))
    )
    assert (result["facts"]["parameters_partitioned"] > 0) == (stage == 3)
    assert set(result["fused"]) == {True}
    assert result["ddp"] == ([True, False] if chosen.strategy == "ddp" else [None, None])
    by_hand = sum(_numel(result["sizes"][name]) for name in result["trained"])
    assert result["parameters"]["trainable"] == by_hand
    if chosen.bits == 16:  # a tensor of a quantised base has two weights in a byte, see test_methods
        assert result["parameters"]["total"] == sum(map(_numel, result["sizes"].values()))


def _numel(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_the_tables_strategies_are_the_shipped_ones() -> None:
    from tunewright.config.choices import choices

    assert sorted(["auto", *STRATEGIES]) == choices("strategy")
