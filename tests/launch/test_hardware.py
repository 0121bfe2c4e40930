"""Visible devices are counted as the drivers' variables say."""

from __future__ import annotations

import pytest

from launch import hardware


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, 8),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, 1),
        ({"HIP_VISIBLE_DEVICES": "1", "ROCR_VISIBLE_DEVICES": "0,1"}, 1),
    ],
)
def test_visible_devices_follow_the_environment(
    variables: dict[str, str], seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hardware._visible(8, names) == seen


def test_the_count_agrees_with_torch() -> None:
    import torch

    devices = hardware.find_devices()
    assert devices.count == torch.cuda.device_count()
    assert devices.gpu == torch.cuda.is_available()
