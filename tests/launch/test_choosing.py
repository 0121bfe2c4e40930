"""What is chosen on a CPU where memory could be short, and what is refused: by a real limit on the address space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tunewright.config.compose import compose_config
from tunewright.errors import MemoryShortage
from tunewright.launch.ask_torch import ensure_architecture
from tunewright.launch.choosing import choose, most_host_memory
from tunewright.launch.planning import Plan, make_plan
from tunewright.plan.devices import find_devices
from tunewright.plan.machine import machine_here, parse_machine
from tunewright.plan.rules import check
from tunewright.plan.ways import batches, devices_of
from tunewright.trainer.footprint.footprints import make_footprint
from tunewright.trainer.model.meta_model import find_architecture, make_architecture

FIT = """
import resource, sys
from tunewright.config.compose import compose_config
from tunewright.errors import MemoryShortage
from tunewright.launch.choosing import fit, planned
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import check
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), resource.RLIM_INFINITY))
config, devices = compose_config(sys.argv[2:]), find_devices()
try:
    print(fit(config, devices, check(config, devices), None))
except MemoryShortage as error:
    print("refused:", error)
print(config.train.micro_batch_size, config.train.gradient_checkpointing, "torch" in sys.modules)
print(planned(config, devices, None))
"""


@pytest.fixture(scope="module")
def settings(small_model: Path) -> list[str]:
    """Of a stream of rows of which each may have 8,192 tokens: attention keeps their scores where they are padded."""
    long = ["data.streaming=true", "train.max_steps=2", "data.cutoff_len=8192", "train.global_batch_size=4"]
    return ["model=folder", f"model.path={small_model}", "train.padding_free=false", *long]


@pytest.fixture(scope="module")
def plan(settings: list[str]) -> Plan:
    config, devices = compose_config(settings, choose=None), find_devices()
    return make_plan(config, machine_here(devices, compose_config(settings)), devices.cores)


@pytest.mark.parametrize(
    ("machine", "overrides", "name"),
    [
        ("8xH100-80GB", [], "qwen2_5_7b-demo-lora-ddp"),
        ("1xH100-80GB", ["train.micro_batch_size=2"], "qwen2_5_7b-demo-lora-single"),
        ("8xH100-80GB", ["strategy=zero2"], "qwen2_5_7b-demo-lora-zero2"),
        ("8xH100-80GB", ["cluster.num_processes=1"], "qwen2_5_7b-demo-lora-single"),
    ],
)
def test_on_gpus_a_run_is_called_after_the_fastest_that_fits(machine: str, overrides: list[str], name: str) -> None:
    there = parse_machine(machine)
    devices = devices_of(there, 8)
    settings = ["model=qwen2_5_7b", "data=demo", "data.cutoff_len=1024", "offline=true", *overrides]
    asked = compose_config(settings, choose=None)
    architecture = find_architecture(asked) or make_architecture(asked)
    make_footprint(asked, there.kind, batches(asked, devices, architecture))  # in this process, for speed
    said: list[str] = []
    config = compose_config(settings, choose=lambda config: choose(config, devices, there, say=said.append))
    assert config.name == name
    assert said == [line for line in said if line.startswith(f"Chosen: strategy={config.strategy.name} train.micro_")]
    assert len(said) == 1
    plan = check(config, devices)
    assert plan.global_batch == 16
    assert plan.world_size == (1 if "single" in name else 8)
    if overrides == ["train.micro_batch_size=2"]:
        assert plan.micro_batch == 2


def test_what_fits_no_gpu_is_refused_before_anything_is_loaded() -> None:
    there = parse_machine("RTX-4090")
    settings = ["model=llama3_1_70b", "offline=true", "train.global_batch_size=1", "strategy=single"]
    with pytest.raises(MemoryShortage, match=r"lora under single on 1 rank, .* needs .* a rank, of 2\d\.\d"):
        compose_config(settings, choose=lambda config: choose(config, devices_of(there, 8), there))


def need(plan: Plan, micro_batch: int) -> int:
    """Return the bytes that the way takes which everything is left as it was for."""
    ways = [way for way in plan.ways if (way.strategy, way.method, way.recompute) == ("single", "lora", False)]
    (memory,) = (way.memory for way in ways if way.micro_batch == micro_batch and way.layers is None)
    assert memory
    return memory.needed


def fitted(limit: float, *settings: str) -> list[str]:
    """Return what `fit` says in a process that may have so many bytes, and what it leaves of the settings."""
    told = subprocess.run(
        [sys.executable, "-c", FIT, str(int(limit)), *settings],
        cwd=REPOSITORY,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert told.returncode == 0, told.stderr
    return told.stdout.splitlines()


def test_where_host_memory_is_short_the_fastest_that_fits_is_taken(plan: Plan, settings: list[str]) -> None:
    assert need(plan, 1) < 1.2 * need(plan, 1) < need(plan, 2) < need(plan, 4)
    said, left, told = fitted(1.2 * need(plan, 1), *settings)
    assert said.startswith("The longest row has 8,192 tokens: ")
    micro_batch, recompute, torch = left.split()
    assert (micro_batch, recompute) in (("1", "False"), ("1", "True"), ("2", "True"))
    assert torch == "False"
    assert told.startswith("Planned for rows of up to 8,192 tokens: ")
    assert "activations" in told
    said, left, _ = fitted(20 * need(plan, 4), *settings)
    assert (said, left) == ("None", "4 False False")


def test_what_is_written_and_cannot_fit_is_refused_with_what_is_nearest(plan: Plan, settings: list[str]) -> None:
    written = ["train.micro_batch_size=4", "train.gradient_checkpointing=false"]
    said, left, _ = fitted(1.2 * need(plan, 1), *settings, *written)
    assert said.startswith("refused: lora under single on 1 rank, 4 rows at a time needs ")
    assert "What is nearest and fits: strategy=single train.micro_batch_size=" in said
    assert left == "4 False False"


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_what_is_taken_for_the_most_is_more_than_what_is_planned(
    micro_batch: int, plan: Plan, settings: list[str]
) -> None:
    config = compose_config([*settings, f"train.micro_batch_size={micro_batch}"])
    most = most_host_memory(config, ensure_architecture(config), check(config, find_devices()), 8192)
    assert need(plan, micro_batch) < most < 20 * need(plan, micro_batch)
