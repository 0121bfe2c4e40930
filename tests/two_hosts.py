"""Two machines in one: network namespaces joined by a cable, each with a host name of its own, and folders of its own.

It needs root, as a container or a virtual machine has it; tests that use it are skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

WIRE = "wire"  # the name of the network interface on both


def _possible() -> bool:
    if not (shutil.which("ip") and shutil.which("unshare")):
        return False
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made and subprocess.run(["unshare", "--uts", "--mount", "true"], check=False).returncode == 0


needs_two_hosts = pytest.mark.skipif(not _possible(), reason="two hosts in one need network namespaces (root)")


@dataclass(frozen=True)
class Host:
    """One of the two."""

    namespace: str
    name: str
    address: str

    def start(
        self, command: Sequence[str | Path], output: IO[str], *, cwd: Path, own: Path | None = None, **env: str
    ) -> subprocess.Popen[str]:
        """Start a command there; `own` is a folder that has something else in it on each host, nothing at first."""
        disk = f"mount -t tmpfs none {own} && " if own else ""
        # The kernel's propagation of mounts would give both the same.
        script = f'hostname {self.name} && {disk}exec "$@"'
        whole = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "--propagation", "private"]
        network = {"GLOO_SOCKET_IFNAME": WIRE, "NCCL_SOCKET_IFNAME": WIRE}
        return subprocess.Popen(
            [*whole, "sh", "-c", script, "sh", *map(str, command)],
            cwd=cwd,
            env={**os.environ, **network, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def cut(self) -> None:
        """Pull the cable out of this host."""
        subprocess.run(["ip", "-n", self.namespace, "link", "set", WIRE, "down"], check=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Give two hosts that reach each other, and nobody else."""
    hosts = [Host(f"tw{os.getpid()}{one}", f"host-{one}", f"10.77.0.{number}") for number, one in enumerate("ab", 1)]
    first, second = hosts
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.namespace], check=True)
        ends = ["ip", "link", "add", WIRE, "netns", first.namespace, "type", "veth"]
        subprocess.run([*ends, "peer", "name", WIRE, "netns", second.namespace], check=True)
        for host in hosts:
            for command in (f"addr add {host.address}/24 dev {WIRE}", f"link set {WIRE} up", "link set lo up"):
                subprocess.run(["ip", "-n", host.namespace, *command.split()], check=True)
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], check=False)
