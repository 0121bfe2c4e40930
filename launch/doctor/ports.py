"""Where ranks meet: the loopback, this machine's name, and the ports that launchers and TensorBoard take."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import psutil

from tunewright.findings import Finding, fix, note, ok

GROUP = "ports"
# `tunewright train` takes any free port; these are for what is started by hand.
USUAL = {29500: "accelerate's and torchrun's, unless --main_process_port says another", 6006: "TensorBoard's"}
SECONDS = 3.0


def look() -> list[Finding]:
    """Try what ranks do first."""
    return [*_loopback(), *_name(), *_taken()]


def _loopback() -> Iterator[Finding]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(SECONDS)
            with socket.create_connection(server.getsockname(), timeout=SECONDS):
                server.accept()[0].close()
    except OSError as error:
        yield fix(
            GROUP,
            f"A process cannot reach another one over 127.0.0.1: {error.strerror or error}.",
            "Bring the interface up (ip link set lo up), and let a firewall pass what stays on the machine.",
        )
    else:
        yield ok(GROUP, "processes reach each other over 127.0.0.1")


def _name() -> Iterator[Finding]:
    """gloo listens at the address that this machine's name has, unless it is told an interface."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        addresses = {str(one[4][0]) for one in socket.getaddrinfo(name, None)}
    except OSError as error:
        yield note(
            GROUP,
            f"This machine's name, {name}, has no address: {error.strerror or error}.",
            f"Add a line `127.0.1.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME.",
        )
        return
    mine = {one.address.partition("%")[0] for all_of in psutil.net_if_addrs().values() for one in all_of}
    foreign = {one for one in addresses if one.partition("%")[0] not in mine and not one.startswith("127.")}
    if foreign:
        yield fix(
            GROUP,
            f"This machine's name, {name}, has the address of another: {', '.join(sorted(foreign))}.",
            "Correct it in /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface that ranks are to use.",
        )


def _taken() -> Iterator[Finding]:
    exported = os.environ.get("MASTER_PORT", "")
    ports = dict(USUAL)
    if exported.isdecimal() and 0 < int(exported) < 65536:
        ports[int(exported)] = "MASTER_PORT's"
    free = []
    for port, whose in ports.items():
        if not _listened(port):
            free.append(str(port))
        elif whose == "MASTER_PORT's":
            yield fix(
                GROUP,
                f"Port {port}, which MASTER_PORT names, is taken{_by_whom(port)}.",
                "Unset MASTER_PORT, export a free one, or end who holds it.",
            )
        else:
            yield note(
                GROUP,
                f"Port {port} ({whose}) is taken{_by_whom(port)}.",
                "`tunewright train` takes a free one; name another port in what you start yourself.",
            )
    if free:
        yield ok(GROUP, f"free: {', '.join(free)}")


def _listened(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what another left behind is no listener
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _by_whom(port: int) -> str:
    with suppress(psutil.Error):  # other users' are not shown
        for one in psutil.net_connections("tcp"):
            if one.laddr and one.laddr.port == port and one.status == psutil.CONN_LISTEN and one.pid:
                return f" by {psutil.Process(one.pid).name()} (process {one.pid})"
    return ""
