"""Environment variables that change what a run does, each explained; values of secrets are not shown."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from tunewright.findings import Finding, fix, note, ok
from tunewright.plan.devices import Devices
from tunewright.ranks import rank_variables
from tunewright.redaction import names_secret, redact
from tunewright.text import clip

GROUP = "environment"
WIDTH = 60  # of a value that is shown

# (name, what it does there). Names end with * where they are many.
HARMLESS = (
    ("CUDA_VISIBLE_DEVICES", "the GPUs that a run may use, counted anew from 0"),
    ("HIP_VISIBLE_DEVICES", "the AMD GPUs that a run may use"),
    ("ROCR_VISIBLE_DEVICES", "the AMD GPUs that a run may use, before HIP_VISIBLE_DEVICES counts what is left"),
    ("CUDA_DEVICE_ORDER", "how GPUs are numbered: FASTEST_FIRST, or PCI_BUS_ID as nvidia-smi does"),
    ("CUDA_HOME", "the CUDA toolkit that kernels are compiled with"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "how many queues of work a GPU has"),
    ("PYTORCH_ALLOC_CONF", "how PyTorch cuts GPU memory into pieces"),
    ("PYTORCH_CUDA_ALLOC_CONF", "the older name of PYTORCH_ALLOC_CONF"),
    ("NCCL_SOCKET_IFNAME", "the network interfaces that NCCL uses"),
    ("GLOO_SOCKET_IFNAME", "the network interface that gloo uses"),
    ("NCCL_IB_HCA", "the InfiniBand cards that NCCL uses"),
    ("NCCL_TOPO_FILE", "the machine's links as NCCL is told them, not as it finds them"),
    ("NCCL_*", "a setting of NCCL"),
    ("TORCH_NCCL_*", "how PyTorch watches NCCL"),
    ("RCCL_*", "a setting of RCCL"),
    ("HSA_*", "a setting of ROCm's driver"),
    ("UCX_*", "a setting of UCX"),
    ("HF_HOME", "where models and datasets from the Hub are kept"),
    ("HF_HUB_CACHE", "where models from the Hub are kept"),
    ("HF_DATASETS_CACHE", "where prepared datasets are kept"),
    ("HF_ENDPOINT", "the server that stands for the Hub"),
    ("HF_TOKEN", "the key for gated and private repositories"),
    ("HF_HUB_DISABLE_XET", "downloads go over plain HTTP"),
    ("MODELSCOPE_CACHE", "where models from ModelScope are kept"),
    ("MODELSCOPE_DOMAIN", "the server that stands for ModelScope"),
    ("TORCH_EXTENSIONS_DIR", "where kernels that were compiled are kept"),
    ("TRITON_CACHE_DIR", "where Triton's kernels are kept"),
    ("TUNEWRIGHT_CACHE", "where tokens and the embedded model are kept, `data.cache_dir`"),
    ("TMPDIR", "where temporary files go"),
    ("CXX", "the C++ compiler for kernels"),
    ("DS_ACCELERATOR", "the device that DeepSpeed takes"),
    ("OMP_WAIT_POLICY", "how threads wait: PASSIVE suits a shared machine, ACTIVE an empty one"),
    ("GOMP_SPINCOUNT", "how long threads spin before they sleep"),
    ("MKL_NUM_THREADS", "threads of MKL's products, before OMP_NUM_THREADS"),
    ("http_proxy", "what downloads go through"),
    ("https_proxy", "what downloads go through"),
    ("all_proxy", "what downloads go through"),
    ("no_proxy", "hosts that are reached without the proxy"),
    ("REQUESTS_CA_BUNDLE", "whose certificates are believed"),
    ("SSL_CERT_FILE", "whose certificates are believed"),
)
# (name, what it does there, what to do): it costs speed, or hides something, and may be left over from a search for
# a fault.
COSTLY = (
    ("CUDA_LAUNCH_BLOCKING", "each kernel is waited for: training is much slower", "unset it outside of debugging"),
    ("AMD_SERIALIZE_KERNEL", "each kernel is waited for: training is much slower", "unset it outside of debugging"),
    ("NCCL_P2P_DISABLE", "GPUs talk through the host's memory, not to each other", "unset it, unless they hang"),
    ("NCCL_SHM_DISABLE", "GPUs of one machine talk through the network", "unset it, and give /dev/shm more room"),
    ("NCCL_IB_DISABLE", "machines talk over Ethernet though there may be InfiniBand", "unset it where there is"),
    ("NCCL_NVLS_ENABLE", "whether NVSwitch sums", "unset it: NCCL finds out itself"),
    ("NCCL_ALGO", "one algorithm for every size of message", "unset it: NCCL chooses by size"),
    ("NCCL_PROTO", "one protocol for every size of message", "unset it: NCCL chooses by size"),
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL compares every collective of all ranks first", "unset it outside of debugging"),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "each tensor is asked of the driver: much slower", "unset it"),
    ("NVIDIA_TF32_OVERRIDE", "0 forbids, 1 forces TF32 in float32 products, whatever PyTorch is told", "unset it"),
    ("TORCHDYNAMO_DISABLE", "train.compile=true compiles nothing", "unset it to compile"),
    ("TORCH_LOGS", "PyTorch logs what it compiles", "unset it outside of debugging"),
    ("LD_PRELOAD", "a library is put before all others in every process", "unset it where it is not meant"),
    ("LD_LIBRARY_PATH", "its CUDA, NCCL and cuDNN come before those that PyTorch brings", "unset it where it is not "
     "meant for them"),
    ("PYTHONPATH", "what lies there is imported before what is installed", "unset it where it is not meant"),
    ("BNB_CUDA_VERSION", "bitsandbytes' library for this CUDA, whatever PyTorch's is", "unset it"),
    ("KMP_AFFINITY", "threads are bound to cores, those of all ranks to the same", "unset it for several ranks"),
    ("GOMP_CPU_AFFINITY", "threads are bound to cores, those of all ranks to the same", "unset it for several ranks"),
    ("TRANSFORMERS_CACHE", "nothing any more: transformers 5 does not read it", "write HF_HOME instead"),
    ("HF_HUB_ENABLE_HF_TRANSFER", "nothing any more: huggingface_hub 1 does not read it", "unset it"),
)  # fmt: skip
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
FOLDERS = ("TMPDIR", "CUDA_HOME")  # which nobody makes


def look(environment: Mapping[str, str], devices: Devices) -> list[Finding]:
    """Explain what is set."""
    found = [*_left_over(environment), *_wrong(environment, devices)]
    told = {name for one in found for name in re.findall(r"[A-Za-z_0-9]+", one.found.partition("=")[0])}
    for name, does, do in COSTLY:
        if environment.get(name) and name not in told:
            found.append(note(GROUP, f"{_shown(name, environment)}: {does}.", _sentence(do)))
            told.add(name)
    for name in OFFLINE:
        if _true(environment.get(name, "")):
            found.append(ok(GROUP, f"{_shown(name, environment)}: nothing is fetched from the Hub"))
    for name in sorted(set(environment) - told, key=str.lower):
        what = next((does for pattern, does in HARMLESS if _fits(name, pattern)), None)
        if what and environment[name]:
            found.append(ok(GROUP, f"{_shown(name, environment)}: {what}"))
    return found or [ok(GROUP, "no variable that changes what a run does")]


def _left_over(environment: Mapping[str, str]) -> Iterator[Finding]:
    names = rank_variables(environment)
    if names:
        yield note(
            GROUP,
            f"{', '.join(names)}: another launch's, not passed on to ranks by `tunewright train`.",
            "Unset them before an `accelerate launch` of your own, which would wait for ranks that nobody starts.",
        )


def _wrong(environment: Mapping[str, str], devices: Devices) -> Iterator[Finding]:
    """Look at values that cannot be meant."""
    for name in VISIBLE:
        if name in environment and not devices.gpu and environment[name].strip() in ("", "-1"):
            yield note(GROUP, f"{_shown(name, environment)}: hides every GPU.", "Unset it to train on one.")
    threads = environment.get("OMP_NUM_THREADS")
    if threads and "OMP_NUM_THREADS" not in rank_variables(environment):
        first = threads.partition(",")[0].strip()
        shown = _shown("OMP_NUM_THREADS", environment)
        if not first.isdecimal() or int(first) < 1:
            yield fix(GROUP, f"{shown} is no number of threads.", "export a whole number from 1, or unset it.")
        elif int(first) > devices.cores:
            yield note(GROUP, f"{shown}: more threads for each rank than the {devices.cores} cores.", "Unset it.")
        else:
            yield ok(GROUP, f"{shown}: threads of each rank, unless cluster.threads_per_process says it")
    for name in INTERFACES:
        wanted = environment.get(name, "").lstrip("^=")
        there = {interface for _, interface in socket.if_nameindex()}
        missing = [item for item in wanted.split(",") if item and not any(one.startswith(item) for one in there)]
        if missing and not environment[name].startswith("^"):
            yield fix(
                GROUP,
                f"{_shown(name, environment)}: there is no network interface {', '.join(missing)}.",
                f"Write one of {', '.join(sorted(there))}, or unset it.",
            )
    for name in FOLDERS:
        if environment.get(name) and not Path(environment[name]).is_dir():
            yield fix(GROUP, f"{_shown(name, environment)}: there is no such folder.", "Make it, or unset it.")


def _fits(name: str, pattern: str) -> bool:
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name == pattern or (pattern.endswith("_proxy") and name.lower() == pattern)


def _shown(name: str, environment: Mapping[str, str]) -> str:
    value = "(set, not shown)" if names_secret(name) else clip(redact(environment[name]), WIDTH)
    return f"{name}={value}"


def _true(value: str) -> bool:
    return value.strip().upper() in ("1", "ON", "YES", "TRUE")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
