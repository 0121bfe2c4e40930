"""`tunewright doctor`: each fault is made for real, and found, and what is well is not called a fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import TIMEOUT
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.findings import FIX, NOTE, OK, Finding, of_each
from tunewright.launch.doctor import clock, compiler, disks, examine, limits, meeting, network, ports, variables
from tunewright.plan.devices import Devices, find_devices

Answer = tuple[int, list[Finding]]


def answer(done: subprocess.CompletedProcess[str]) -> Answer:
    """Return exit code and findings of `doctor --json`."""
    told = json.loads(done.stdout)
    assert done.returncode == told["to_fix"], done.stderr
    return done.returncode, [Finding(**one) for one in told["findings"]]


def only(found: list[Finding], group: str, words: str) -> Finding:
    """Return the one finding of a group that says so."""
    matching = [one for one in found if one.group == group and words in one.found]
    assert len(matching) == 1, (words, [one for one in found if one.group == group])
    return matching[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte that is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    (folder / "everything").write_bytes(bytes(2**20))
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A throw-away environment that has all of this one, and an old version of one package before it."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "all.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    wheel = tmp_path / "py3langid-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as parts:
        parts.writestr("py3langid-0.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: py3langid\nVersion: 0.1.0\n")
        parts.writestr("py3langid-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        parts.writestr("py3langid-0.1.0.dist-info/RECORD", "")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", packages, wheel]
    subprocess.run([*install, "--disable-pip-version-check"], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that this process listens at."""
    with socket.create_server(("", 0)) as server:
        yield int(server.getsockname()[1])


def test_every_fault_is_found_and_counted(small_disk: Path, environment: Path, taken: int, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()  # without a compiler
    (tmp_path / "broken" / "bitsandbytes").mkdir(parents=True)
    (tmp_path / "broken" / "bitsandbytes" / "__init__.py").write_text("import os; os.kill(os.getpid(), 11)\n")
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "CXX")}
    env |= {"PATH": str(tmp_path / "path"), "PYTHONPATH": str(tmp_path / "broken"), "MASTER_PORT": str(taken)}
    env |= {"GLOO_SOCKET_IFNAME": "nowhere9", "CUDA_LAUNCH_BLOCKING": "1", "HF_TOKEN": "hf_" + 4 * "secret"}
    overrides = [f"output_root={small_disk}/runs", "strategy=zero3_offload", "model=qwen2_5_7b"]
    done = subprocess.run(
        [environment, "-m", "tunewright.launch.cli", "doctor", "--json", *overrides],
        capture_output=True, text=True, env=env, timeout=TIMEOUT, cwd=tmp_path,
    )  # fmt: skip
    code, found = answer(done)
    assert code >= 7
    for group, words, do in (
        ("packages", "py3langid 0.1.0 is outside of the window", "pip install 'py3langid"),
        ("compiler", "There is no C++ compiler (c++) on the path. strategy=zero3_offload needs it.", "g++"),
        ("device", "was ended by SIGSEGV at: bitsandbytes on CPU", "Install anew"),
        ("disks", f"output_root {small_disk}/runs cannot be written: No space left on device", "Make room"),
        ("network", "Offline, and model.path=Qwen/Qwen2.5-7B-Instruct is not whole", "model=folder"),
        ("environment", "GLOO_SOCKET_IFNAME=nowhere9: there is no network interface nowhere9", "lo"),
        ("ports", f"Port {taken}, which MASTER_PORT names, is taken by", "Unset MASTER_PORT"),
    ):
        finding = only(found, group, words)
        assert finding.state == FIX
        assert do in finding.do
    assert f"(process {os.getpid()})" in only(found, "ports", str(taken)).found
    assert only(found, "environment", "CUDA_LAUNCH_BLOCKING=1").state == NOTE
    # What came before the library took its process along is there.
    assert only(found, "device", "CPU: products of").state != FIX
    assert only(found, "device", "attention without padding").state == OK
    assert "hf_secret" not in done.stdout


def test_a_machine_on_which_ranks_meet(tunewright: Callable[..., Any], tmp_path: Path) -> None:
    done = tunewright("doctor", "--json", "--ranks", "2", f"output_root={tmp_path}")
    _, found = answer(done)
    ranks = only(found, "ranks", "2 CPU ranks met after")
    assert ranks.state == OK
    assert "an all-reduce of 16.0 MiB takes" in ranks.found
    assert {one.group for one in found} >= set(examine.GROUPS) - {"GPUs"}
    for what in ("CPU: products of", "CPU: copies of", "attention without padding computes", "multiplies in 4 bits"):
        assert only(found, "device", what).state in (OK, NOTE)
    assert only(found, "packages", "packages as tested: torch").state == OK
    assert all(one.do for one in found if one.state != OK), "each says what to do"


def freeze(number: int, frozen: list[psutil.Process]) -> None:
    """Stop the rank of this number as soon as it has begun."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not frozen:
        for process in psutil.Process().children(recursive=True):
            try:
                mine = meeting.MODULE in process.cmdline() and process.environ().get("RANK") == str(number)
            except psutil.Error:
                continue
            if mine and "launch" not in process.cmdline():
                process.suspend()
                frozen.append(process)
                return
        time.sleep(0.05)


def test_a_rank_that_never_joins_is_named_within_a_minute() -> None:
    """It is frozen as soon as it begins, as by a scheduler that suspends it or a disk that does not answer."""
    frozen: list[psutil.Process] = []
    watcher = threading.Thread(target=freeze, args=(1, frozen))
    watcher.start()
    begun = time.monotonic()
    found = meeting.look(compose_config(["strategy=ddp", "cluster.num_processes=2"]), 2, find_devices())
    took = time.monotonic() - begun
    watcher.join()
    assert took < 60, found
    (finding,) = found
    assert finding.state == FIX
    assert "rank 1" in finding.found
    assert "rank 0" not in finding.found
    assert not frozen[0].is_running() or frozen[0].status() == psutil.STATUS_ZOMBIE, "nothing of it is left"


# What a rank's interpreter does while it starts: it ends, or its import of torch never comes back.
ENDS = "os._exit(9)"
HANGS = """
    class Disk:
        def find_spec(self, name, *_):
            if name == "torch":
                time.sleep(999)
    sys.meta_path.insert(0, Disk())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "told"),
    [
        (ENDS, r"rank 1 has not begun and has ended with 9\."),
        (HANGS, r"rank 1 \(process \d+\) imports torch, in File .*sitecustomize\.py.*, after \d+ s\. 1 other waited"),
    ],
    ids=["ends", "hangs"],
)
def test_a_rank_that_ends_or_hangs_is_named(
    does: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    condition = "if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RUN_ID'):"
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys, time\n{condition}\n    {does}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begun = time.monotonic()
    (finding,) = meeting.look(compose_config(["strategy=ddp", "cluster.num_processes=2"]), 2, find_devices())
    assert finding.state == FIX
    assert re.match(told, finding.found), finding
    assert time.monotonic() - begun < 60


def rank(number: int, *stages: str) -> meeting.Rank:
    lines = [{"stage": stage, "time": 0.0, "pid": os.getpid()} for stage in stages]
    return meeting.Rank(number, lines)


def test_who_is_behind() -> None:
    far, near = rank(0, "started", "imported", "met"), rank(1, "started")
    never = rank(2)
    moved = [10.0, 5.0, 0.0]
    assert meeting._behind([far, near, never], moved, 25.0) == []
    assert meeting._behind([far, near, never], moved, 31.0) == [near, never]
    # Where nothing moves for long, none of them can be told from the others.
    assert meeting._behind([far], [10.0], 44.0) == []
    assert meeting._behind([far], [10.0], 46.0) == [far]


def test_a_rank_that_comes_late_and_computes_slowly() -> None:
    ranks = [rank(number, *meeting.STAGES) for number in range(3)]
    for one, (late, rate) in zip(ranks, [(0, 1e12), (0, 1e12), (9, 6e11)], strict=True):
        one.lines[1]["time"] = one.lines[2]["time"] = late
        one.lines[-1] |= {"seconds": 0.5, "bytes": 3 * 2**30, "rate": rate, "gpu": "NVIDIA H100 80GB HBM3"}
    texts = {one.found: one.state for one in meeting._figures(ranks)}
    told = "3 GPU ranks met after 9.0 s; an all-reduce of 3.00 GiB takes 500.0 ms, 8.00 GiB/s a rank"
    assert texts[f"{told}; 345.52 GiB/s are usual between such GPUs"] == NOTE
    assert texts["Rank 2 came 9 s after the first."] == NOTE
    assert next(state for text, state in texts.items() if "rank 2 at 60% of the median's rate" in text) == FIX


def test_ranks_that_are_asked_for_must_be_possible() -> None:
    with pytest.raises(ConfigError, match="--ranks 0: write a number from 1"):
        examine.examine([], None, 0)
    with pytest.raises(ConfigError, match=r"`cluster\.num_processes` is 0: write a number from 1"):
        examine.examine(["cluster.num_processes=0"], None, None)


def test_more_ranks_than_there_is_memory_for_are_not_started() -> None:
    (finding,) = meeting.look(compose_config(["strategy=ddp"]), 1_000_000, CPU)
    assert finding.state == FIX
    assert "1,000,000 ranks were not started" in finding.found


def test_a_compiler_that_does_without_the_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compiler.look(None)[0].state == OK
    real = shutil.which(os.environ.get("CXX", "c++"))
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nfor one; do case "$one" in -I*) ;; *) set -- "$@" "$one";; esac; shift; done\n'
                       f'exec {real} "$@"\n')  # fmt: skip
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    (finding,) = compiler.look(None)
    assert finding.state == NOTE, "nothing here needs it"
    assert "Python.h" in finding.found
    assert "python3-dev" in finding.do
    assert compiler.look("train.compile=true")[0].state == FIX


def test_a_disk_with_little_room_and_a_read_only_one(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "everything").write_bytes(b"")
    (finding,) = [one for one in disks.look({"output_root": small_disk / "runs"}) if "MiB free" in one.found]
    assert (finding.state, "tmpfs" in finding.found) == (FIX, True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (finding,) = disks.look({"output_root": small_disk})
    assert "Read-only file system" in finding.found
    (finding,) = disks.look({"output_root": tmp_path, "data.cache_dir": tmp_path / "cache"})  # one disk, once
    assert f"output_root {tmp_path}, data.cache_dir {tmp_path}/cache: " in finding.found


def test_limits_of_a_container_and_of_a_shell(tmp_path: Path) -> None:
    job = tmp_path / "jobs" / "17"
    job.mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (job.parent / "memory.max").write_text(f"{3 * 2**30}\n")  # of all jobs
    (job.parent / "memory.current").write_text(f"{2 * 2**30}\n")
    (job / "memory.max").write_text("max\n")
    (job / "cpu.max").write_text("50000 100000\n")
    found = limits.look(1, tmp_path, "0::/jobs/17")
    assert only(found, "limits", "this container or job may have 3.00 GiB, of which 2.00 GiB are taken").state == FIX
    assert only(found, "limits", "of which this container or job may use 0.5 at a time").state == NOTE
    assert not any("container" in one.found for one in limits.look(1, tmp_path, "0::/"))
    older = tmp_path / "memory" / "jobs"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text(f"{2**30}\n")
    found = limits.look(1, tmp_path, "9:name=systemd:/\n4:memory:/jobs\n0::/")
    assert only(found, "limits", "this container or job may have 1.00 GiB").state == FIX
    script = (
        "from tunewright.launch.doctor import limits\n"
        "print([(one.state, one.found) for one in limits.look(1)])"
    )  # fmt: skip
    shell = f"ulimit -n 256; ulimit -v 60000000; exec {sys.executable} -c '{script}'"
    told = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=TIMEOUT).stdout
    assert "('fix', '256 open files (ulimit -n)')" in told
    assert "A process may address 57.22 GiB (ulimit -v)" in told


def test_who_else_computes_is_told() -> None:
    other = subprocess.Popen(
        ["sh", "-c", f"({sys.executable} -c 'while True: pass' & echo $!) && exit"], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout
    pid = int(other.stdout.readline())  # its parent is gone: it is none of this process's own
    other.wait()
    try:
        time.sleep(0.3)
        told = [one.found for one in limits.look(1) if "other processes use" in one.found]
        used, names = limits._others()
    finally:
        os.kill(pid, signal.SIGKILL)
    assert len(told) == 1
    assert used > 0.05
    assert any(f"({pid}, " in name for name in names)


GPUS, CPU = Devices("cuda", 2, 8), Devices("cpu", 0, 2)


@pytest.mark.parametrize(
    ("environment", "devices", "state", "words"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, GPUS, OK, "CUDA_VISIBLE_DEVICES=0,1: the GPUs that a run may use"),
        ({"CUDA_VISIBLE_DEVICES": ""}, CPU, NOTE, "hides every GPU"),
        ({"NCCL_P2P_DISABLE": "1"}, GPUS, NOTE, "GPUs talk through the host's memory"),
        ({"NCCL_BUFFSIZE": "1"}, GPUS, OK, "a setting of NCCL"),
        ({"OMP_NUM_THREADS": "many"}, CPU, FIX, "is no number of threads"),
        ({"OMP_NUM_THREADS": "64"}, CPU, NOTE, "more threads for each rank than the 2 cores"),
        ({"HF_HUB_OFFLINE": "1"}, CPU, OK, "nothing is fetched"),
        ({"HF_TOKEN": "hf_" + 4 * "abcdef"}, CPU, OK, "HF_TOKEN=(set, not shown)"),
        ({"HTTPS_PROXY": "http://me:word@proxy:8080"}, CPU, OK, "HTTPS_PROXY=http://***@proxy:8080"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, CPU, NOTE, "RANK, WORLD_SIZE: another launch's"),
        ({"TMPDIR": "/no/such/folder"}, CPU, FIX, "there is no such folder"),
        ({"UNRELATED": "1"}, CPU, OK, "no variable that changes what a run does"),
    ],
)
def test_variables_are_explained(environment: dict[str, str], devices: Devices, state: str, words: str) -> None:
    (finding,) = variables.look(environment, devices)
    assert (finding.state, words in finding.found) == (state, True), finding


class Server(BaseHTTPRequestHandler):
    """A hub on this machine that has its own idea of the time."""

    code, ahead = 200, 0.0

    def do_HEAD(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() + self.ahead)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Callable[..., str]]:
    """Start a server and return its address."""
    servers = []

    def begin(code: int = 200, ahead: float = 0.0) -> str:
        handler = type("Mine", (Server,), {"code": code, "ahead": ahead})
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(url: str, *fetched: str, offline: bool = False) -> list[Finding]:
    return network.look(network.Hub("the Hub", url, "HF_ENDPOINT", list(fetched)), offline=offline)


def test_a_hub_that_answers_and_the_time_there(hub: Callable[..., str]) -> None:
    assert [(one.group, one.state) for one in asked(hub())] == [("network", OK), ("clock", OK)]
    found = asked(hub(ahead=3600))
    assert only(found, "clock", "behind that of the Hub").state == FIX
    assert "timedatectl" in found[1].do


def test_no_network_is_a_fault_only_where_something_is_to_be_fetched(taken: int, hub: Callable[..., str]) -> None:
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert only(asked(url), "network", "This configuration fetches nothing there.").state == NOTE
        needed = only(asked(url, "org/model"), "network", "Connection refused. org/model would be fetched there.")
        assert (needed.state, "HF_HUB_OFFLINE=1" in needed.do) == (FIX, True)
        assert only(asked(url, "org/model", offline=True), "network", "is not asked: offline").state == OK
    assert only(asked(hub(code=503)), "network", "answers with 503").state == NOTE


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(network, "SECONDS", 0.3)
    assert "no answer within" in asked(f"http://127.0.0.1:{taken}")[0].found


def test_a_proxy_that_wants_a_password(monkeypatch: pytest.MonkeyPatch, hub: Callable[..., str]) -> None:
    monkeypatch.setenv("http_proxy", hub(code=407))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (finding,) = asked("http://hub.invalid")
    assert (finding.state, "wants a password" in finding.found) == (FIX, True)


def test_what_a_configuration_fetches_from_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    first, second = network.hubs(compose_config())
    assert (first.url, first.fetched, second.url, second.fetched) == (
        "http://mirror", [], "https://www.modelscope.cn", [],
    )  # fmt: skip
    overrides = ["model=qwen2_5_7b", "data=registry", "data.names=[hub:org/name,modelscope:org/other]"]
    first, second = network.hubs(compose_config(overrides))
    assert first.fetched == ["Qwen/Qwen2.5-7B-Instruct", "hub:org/name"]
    assert first.missing == "Qwen/Qwen2.5-7B-Instruct"
    assert second.fetched == ["modelscope:org/other"]


def test_files_from_the_future(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").touch()
    assert all(one.state != FIX for one in clock.look({"output_root": tmp_path, "nowhere": tmp_path / "none"}))
    os.utime(tmp_path / "checkpoint-5", (time.time() + 4000,) * 2)
    finding = only(clock.look({"output_root": tmp_path}), "clock", "younger than now")
    assert finding.state == FIX


def test_the_usual_ports(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(ports, "USUAL", {taken: "somebody's"})
    assert only(ports.look(), "ports", f"Port {taken} (somebody's) is taken by").state == NOTE
    assert only(ports.look(), "ports", "reach each other over 127.0.0.1").state == OK


def test_a_check_that_fails_or_hangs_hides_no_other() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("what nobody has thought of")

    checks = {"ports": ports.look, "limits": broken, "disks": lambda: time.sleep(60) or []}
    found = examine._side_by_side(checks, 1.0)
    assert only(found, "limits", "RuntimeError: what nobody has thought of").state == FIX
    assert only(found, "disks", "no answer within 1 s").state == FIX
    assert any(one.group == "ports" for one in found)


def test_a_device_check_that_fails_is_a_finding() -> None:
    import torch

    from tunewright.trainer.device_checks import _tried

    def broken(device: torch.device) -> Iterator[Finding]:
        yield from ()
        torch.empty(2, device=device) @ torch.empty(3, device=device)

    (finding,) = _tried("bitsandbytes", broken, torch.device("cpu"))
    assert (finding.state, finding.found.startswith("bitsandbytes: RuntimeError: ")) == (FIX, True)


def test_devices_that_are_alike_are_told_of_once_and_a_tired_one_by_its_name() -> None:
    from tunewright.trainer.device_checks import slower

    good, bad = Finding("device", OK, "well"), Finding("device", FIX, "hot", "Cool it.")
    told = of_each([("GPU 0", [good]), ("GPU 1", [good, bad]), ("GPU 2", [good])])
    assert told == [replace(good, found="GPU 0, 1, 2: well"), replace(bad, found="GPU 1: hot")]
    (finding,) = slower({"GPU 0": 7e14, "GPU 1": 4e14, "GPU 2": 7.2e14})
    assert finding.found == "GPU 1: products at 57% of its sisters' rate"
    assert slower({"GPU 0": 7e14, "GPU 1": 4e14}) == [], "of two, nobody knows which is usual"


def test_one_screen() -> None:
    found = [
        Finding("ports", OK, "free: 29500"),
        Finding("ports", FIX, "Port [29501] is taken.", "Unset it."),
        Finding("ranks", NOTE, "Rank 1 came late.", "Look there."),
    ]
    text = examine.screen(found, 2.0)
    assert text.splitlines()[0].split() == ["ports", "✓", "free:", "29500"]
    assert "✗ Port [29501] is taken." in text
    assert "→ Unset it." in text
    assert text.splitlines()[-1] == "1 thing must be fixed; 1 to know of, 3 looked at in 2.0 s."


@pytest.mark.parametrize(
    ("overrides", "devices", "ranks"),
    [
        ([], GPUS, 2),
        ([], CPU, 1),
        (["strategy=single"], GPUS, 1),
        (["strategy=zero2"], CPU, 2),
        (["cluster.num_processes=4"], CPU, 4),
    ],
)
def test_how_many_ranks_shared_memory_is_for(overrides: list[str], devices: Devices, ranks: int) -> None:
    assert examine._most_ranks(compose_config(overrides), devices) == ranks
