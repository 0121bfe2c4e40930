"""What `tunewright doctor` tells of GPUs: NVIDIA's real bindings with a library of ours behind them, AMD's files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT
from tunewright.findings import FIX, NOTE, OK, Finding
from tunewright.launch.doctor import gpus
from tunewright.launch.doctor.gpus import Gpu, Seen
from tunewright.plan.devices import find_devices

GIB = 2**30

# Two GPUs with NVLink between them. The second is hot, has eight of sixteen lanes, rows of memory that wait for a
# reset, one error, and 70 of 80 GiB taken by the process of the test.
LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long u64;
static long second(void *handle) { return (long)handle == 2; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned n) { strcpy(out, "535.104"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 12020; return 0; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) { *out = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetName(void *h, char *out, unsigned n) { strcpy(out, "NVIDIA H100 80GB HBM3"); return 0; }
int nvmlDeviceGetUUID(void *h, char *out, unsigned n) { strcpy(out, second(h) ? "GPU-bb" : "GPU-aa"); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, u64 *out) {
  out[0] = 80ull << 30; out[2] = second(h) ? 70ull << 30 : 0; out[1] = out[0] - out[2]; return 0; }
int nvmlDeviceGetEccMode(void *h, int *now, int *next) { *now = *next = 1; return 0; }
int nvmlDeviceGetTotalEccErrors(void *h, int type, int counter, u64 *out) {
  *out = type == 1 && counter == 0 ? second(h) : 99; return 0; }
int nvmlDeviceGetRemappedRows(void *h, unsigned *a, unsigned *b, unsigned *pending, unsigned *failed) {
  *a = *b = *failed = 0; *pending = second(h); return 0; }
int nvmlDeviceGetCurrPcieLinkWidth(void *h, unsigned *out) { *out = second(h) ? 8 : 16; return 0; }
int nvmlDeviceGetMaxPcieLinkWidth(void *h, unsigned *out) { *out = 16; return 0; }
int nvmlDeviceGetComputeMode(void *h, int *out) { *out = 0; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(void *h, u64 *out) { *out = second(h) ? 0x40 : 0x1; return 0; }
int nvmlDeviceGetP2PStatus(void *a, void *b, int index, int *out) { *out = index == 2 ? 0 : 1; return 0; }
struct process { unsigned pid; u64 used; unsigned gi, ci; };
int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, struct process *out) {
  if (!second(h)) { *count = 0; return 0; }
  if (!out) { *count = 1; return 7; }
  *count = 1; out[0].pid = atoi(getenv("HOLDER")); out[0].used = 70ull << 30; return 0; }
"""  # what is left out, MIG among it, the bindings report as a function that an old driver does not have


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(LIBRARY)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "driver.c"], check=True)
    script = (
        "import json\nfrom dataclasses import asdict\nfrom threading import Event\n"
        "from tunewright.launch.doctor import gpus\n"
        "seen, over = gpus.see(), Event()\nover.set()\n"
        "assert gpus.slowed_down(seen.gpus, over) == seen.gpus\n"
        "found = gpus.judge(seen, gpus.visible(seen)) + gpus.judge_driver(seen, 'cuda', '13.0', False)\n"
        "print(json.dumps([asdict(one) for one in found]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"LD_LIBRARY_PATH": str(folder), "HOLDER": str(os.getpid())}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return [Finding(**one) for one in json.loads(done.stdout)]


def test_what_nvidias_bindings_read(told: list[Finding]) -> None:
    texts = {one.found: one.state for one in told}
    assert texts["GPU 0: NVIDIA H100 80GB HBM3, 80.00 GiB of 80.00 GiB free, ECC on"] == OK
    crowded = next(text for text in texts if text.startswith("GPU 1: NVIDIA"))
    assert texts[crowded] == FIX
    assert f"({os.getpid()}, 70.00 GiB)" in crowded
    assert texts["GPU 1: it is too hot, the hardware slows it down."] == FIX
    assert texts["GPU 1: damaged rows of its memory wait to be replaced."] == FIX
    assert texts["GPU 1: errors of its memory that ECC could not correct: 1"] == FIX
    assert texts["GPU 1: 8 of 16 PCIe lanes."] == NOTE
    assert texts["between GPUs, NVLink: 0-1"] == OK
    assert texts["Driver 535.104 runs CUDA up to 12.2; torch is built for 13.0."] == FIX
    assert len(texts) == 8, "nothing is said against the first"


def test_no_driver_and_no_gpu() -> None:
    if find_devices().gpu:
        pytest.skip("there is a GPU here")
    assert gpus.judge(gpus.see()) == []


ONE = Gpu(0, "NVIDIA A100", 80 * GIB, 0)


def test_links_over_pcie_are_worth_a_word() -> None:
    pair = [replace(ONE, links={1: "PCIe, by the other processor"}), replace(ONE, index=1)]
    note = gpus.judge(Seen(pair))[-1]
    assert (note.state, note.found) == (NOTE, "between GPUs, PCIe, by the other processor: 0-1")
    assert "zero2" in note.do
    assert gpus.judge(Seen(pair), visible={0})[-1].found.startswith("GPU 0"), "the other is hidden"


@pytest.mark.parametrize(
    ("kind", "built", "cuda", "available", "state", "words"),
    [
        ("cpu", None, (13, 0), False, FIX, "torch is built for CPUs"),
        ("cuda", "13.0", (12, 8), False, FIX, "runs CUDA up to 12.8; torch is built for 13.0"),
        ("cuda", "12.8", (12, 2), True, OK, "torch is built for CUDA 12.8"),
        ("cuda", "12.8", (13, 0), False, FIX, "torch can use none"),
        ("rocm", "7.0", None, True, OK, "torch is built for ROCM 7.0"),
    ],
)
def test_the_driver_beside_torch(
    kind: str, built: str | None, cuda: tuple[int, int] | None, available: bool, state: str, words: str
) -> None:
    (finding,) = gpus.judge_driver(Seen([ONE], "1", cuda), kind, built, available)
    assert (finding.state, words in finding.found) == (state, True), finding


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen([replace(ONE, index=index, uuid=f"GPU-{index}a") for index in range(3)])
    for value, expected in {"2,0": {0, 2}, "GPU-1a": {1}, "": set(), "0,7,1": {0}}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert gpus.visible(seen) == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus.visible(seen) is None


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_what_amds_driver_writes(tmp_path: Path) -> None:
    """Two MI250X halves joined by xGMI, the first with memory of this process and errors; a card of another maker."""
    nodes, card = "class/kfd/kfd/topology/nodes", "class/drm/card{}/device"
    files = {"module/amdgpu/version": "6.8.5", f"{nodes}/0/gpu_id": "0", f"{card.format(0)}/vendor": "0x1a03"}
    for number in (1, 2):
        link = f"type 11\nnode_from {number}\nnode_to {3 - number}\nweight 15"
        files |= {
            f"{nodes}/{number}/gpu_id": str(1000 + number),
            f"{nodes}/{number}/io_links/0/properties": f"type 2\nnode_from {number}\nnode_to 0",
            f"{nodes}/{number}/p2p_links/0/properties": link,
            f"{card.format(number)}/vendor": "0x1002",
            f"{card.format(number)}/product_name": "AMD Instinct MI250X",
            f"{card.format(number)}/mem_info_vram_total": str(64 * GIB),
            f"{card.format(number)}/mem_info_vram_used": str((2 - number) * 60 * GIB),
            f"{card.format(number)}/ras/umc_err_count": f"ue: {2 - number}\nce: 5",
            f"{card.format(number)}/current_link_width": "16",
            f"{card.format(number)}/max_link_width": "16",
        }
    files[f"class/kfd/kfd/proc/{os.getpid()}/vram_1001"] = str(60 * GIB)
    write(tmp_path, files)
    seen = gpus.see_amd(tmp_path)
    assert seen.driver == "6.8.5"
    told = [(one.state, one.found) for one in gpus.judge(seen)]
    assert told[0][0] == FIX
    assert f"AMD Instinct MI250X, 4.00 GiB of 64.00 GiB free; taken by {seen.gpus[0].holders[0]}" in told[0][1]
    assert f"({os.getpid()}, 60.00 GiB)" in seen.gpus[0].holders[0]
    assert told[1] == (FIX, "GPU 0: errors of its memory that ECC could not correct: 1")
    assert told[2] == (OK, "GPU 1: AMD Instinct MI250X, 64.00 GiB of 64.00 GiB free")
    assert told[3] == (OK, "between GPUs, xGMI: 0-1")
    assert gpus.see_amd(tmp_path / "none").gpus == []
