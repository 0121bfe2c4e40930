"""Machines that are not here are named, and the one that is here tells what a rank can have."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.plan import machine
from tunewright.plan.device_table import DEVICES, find_device
from tunewright.plan.devices import Devices
from tunewright.plan.machine import machine_here, parse_machine


@pytest.mark.parametrize(
    ("text", "name", "count", "node"),
    [
        ("8xH100-80GB", "H100-80GB", 8, 8),
        ("1x4090", "RTX-4090", 1, 1),
        ("1xMI250", "MI250", 1, 1),
        ("4090", "RTX-4090", 1, 1),
        ("rtx4090", "RTX-4090", 1, 1),
        ("8xA100-SXM", "A100-80GB", 8, 8),
        ("4070", "RTX-4070", 1, 1),
        ("2x8xh100", "H100-80GB", 16, 8),
        ("2 x 8 x H100", "H100-80GB", 16, 8),
        ("4*A100", "A100-80GB", 4, 4),
        ("8XA100-40GB-PCIe", "A100-40GB-PCIE", 8, 8),
    ],
)
def test_a_machine_is_named(text: str, name: str, count: int, node: int) -> None:
    found = parse_machine(text)
    assert (found.name, found.count, found.node, found.here) == (name, count, node, False)
    assert (found.network is not None) == (count > node)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB-PCIE"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIE"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX-4070-TI"),
        ("NVIDIA GeForce RTX 4060", "RTX-4060"),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_driver_names_a_device(told: str, name: str | None) -> None:
    found = find_device(told)
    assert (found.name if found else None) == name


def test_every_device_is_found_by_its_own_name() -> None:
    assert [find_device(device.name) for device in DEVICES] == list(DEVICES)


def test_the_network_between_hosts_is_told() -> None:
    assert parse_machine("2x8xH100@400Gb").network == 50e9
    assert parse_machine("2 x 8xH100 @ 25GB/s").network == 25e9


@pytest.mark.parametrize(
    ("text", "told"),
    [("8xH1000", "Did you mean"), ("8x", "write a number and a device"), ("0xT4", "whole numbers from 1")],
)
def test_what_is_not_known_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_machine(text)


def test_fewer_devices_of_a_machine_may_have_a_better_link() -> None:
    """Eight cards share the way between two processors, four hang on one."""
    eight = parse_machine("8x4090")
    assert (eight.link, eight.of(4).link, eight.of(4).memory) == (10e9, 24e9, eight.memory)


def test_ranks_on_a_cpu_share_it() -> None:
    config = compose_config(["strategy=ddp", "cluster.num_processes=2"], None)
    two = machine_here(Devices("cpu", 0, 2), config)
    one = two.of(1)
    assert two.kind == "cpu"
    assert two.count == 2
    assert two.memory > 0
    assert one.memory == pytest.approx(2 * two.memory, abs=2)


NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *nvlink*) echo "	 Link 0: 25 GB/s";;
  *) echo "NVIDIA A100-SXM4-80GB, 80000"; echo "NVIDIA A100-SXM4-80GB, 70000";;
esac
"""


def test_gpus_here_are_those_that_their_driver_tells_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No NVIDIA driver is where tests run: what its tool prints there is in a script."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine_here(Devices("cuda", 2, 16), compose_config(["strategy=single"], None))
    assert (found.name, found.count, found.memory, found.here) == ("A100-80GB", 2, 70000 * 2**20, True)
    assert found.link == 240e9


def test_amd_gpus_are_read_from_their_driver_s_files(tmp_path: Path) -> None:
    for number, used in enumerate((0, 4 * 2**30)):
        card = tmp_path / f"card{number}" / "device"
        card.mkdir(parents=True)
        (card / "mem_info_vram_total").write_text(f"{64 * 2**30}\n")
        (card / "mem_info_vram_used").write_text(f"{used}\n")
        (card / "product_name").write_text("AMD Instinct MI250X/MI250\n")
    (tmp_path / "card2-DP-1").mkdir()  # a screen's socket
    assert machine._ask_amd(tmp_path) == ("AMD Instinct MI250X/MI250", 60 * 2**30, True)


def test_gpus_whose_driver_tells_nothing_have_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine_here(Devices("cuda", 2, 16), compose_config(["strategy=single"], None))
    assert (found.rate, found.memory) == (None, 0)
