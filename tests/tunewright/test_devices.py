"""Visible devices are counted as the drivers' variables say, and a process alone is shown the first of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.launch.command import build_command
from tunewright.plan import devices as hardware
from tunewright.plan.devices import Devices
from tunewright.plan.rules import check
from tunewright.run_folder import RunDir

VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
CPU = Devices("cpu", 0, 2)


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, 8),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, 1),
        ({"HIP_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "-1"}, 0),
        ({"HIP_VISIBLE_DEVICES": "1", "ROCR_VISIBLE_DEVICES": "0,1"}, 1),
    ],
)
def test_visible_devices_follow_the_environment(
    variables: dict[str, str], seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hardware._visible(8, VARIABLES) == seen


def test_the_count_agrees_with_torch() -> None:
    import torch

    devices = hardware.find_devices()
    assert devices.count == torch.cuda.device_count()
    assert devices.gpu == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("kind", "given", "shown"),
    [
        ("cuda", {}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "3, 5"}, {"CUDA_VISIBLE_DEVICES": "3"}),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-1a"}, {"CUDA_VISIBLE_DEVICES": "GPU-1a"}),
        ("rocm", {}, {"HIP_VISIBLE_DEVICES": "0"}),
        ("rocm", {"HIP_VISIBLE_DEVICES": "2,3"}, {"HIP_VISIBLE_DEVICES": "2"}),
        ("rocm", {"CUDA_VISIBLE_DEVICES": "2,3"}, {"HIP_VISIBLE_DEVICES": "2"}),
        ("rocm", {"ROCR_VISIBLE_DEVICES": "4,5"}, {"HIP_VISIBLE_DEVICES": "0"}),  # the first that ROCR left
        ("rocm", {"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "1"}, {"HIP_VISIBLE_DEVICES": "1"}),
    ],
)
def test_one_process_is_shown_the_first_gpu_of_the_users_choice(
    kind: str, given: dict[str, str], shown: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    env, accelerate = command_of("strategy=single", devices=Devices(kind, 2, 8))
    assert {name: value for name, value in env.items() if name in VARIABLES} == shown
    assert "gpu_ids" not in accelerate  # with which accelerate would set CUDA_VISIBLE_DEVICES over it


@pytest.mark.parametrize(
    ("strategy", "devices"), [("ddp", Devices("cuda", 2, 8)), ("zero2", Devices("rocm", 1, 8)), ("single", CPU)]
)
def test_other_runs_see_what_the_user_sees(strategy: str, devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "0,1")
    env, accelerate = command_of(f"strategy={strategy}", devices=devices)
    assert not {*env} & {*VARIABLES}
    assert "gpu_ids" not in accelerate


def command_of(*overrides: str, devices: Devices) -> tuple[dict[str, str], dict[str, object]]:
    config = compose_config(overrides)
    command = build_command(config, RunDir(Path("runs/any")), check(config, devices), devices, None)
    return command.env, command.accelerate
