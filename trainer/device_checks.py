"""What the devices here can compute, tried: python -m tunewright.trainer.device_checks CACHE

It prints a line of JSON for each thing: {"doing"} before it is tried, so that one that ends this process is named,
{"facts"} and {"finding"}.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.errors import first_line
from tunewright.findings import Finding, fix, note, of_each, ok
from tunewright.importing import uncollected
from tunewright.plan.device_table import find_device
from tunewright.ranks import die_with_parent, leave
from tunewright.text import size

if TYPE_CHECKING:
    import torch

GROUP = "device"
Check = Callable[["torch.device"], Iterable[Finding]]
TIRED = 0.6  # of what the device should do: below, something is wrong with it
# Of a GPU's listed rate: one large product in bfloat16 reaches 60 to 90 percent of it (docs/speed.md).
TIRED_GPU = 0.4
TIRED_HOST = 0.4  # of the lanes to the host, which go by way of a processor that others use
COPIED = 256 * 2**20  # bytes
SLOWER = 0.8  # of the median GPU's rate
SECONDS = 0.3  # that a rate is measured
CLOSE = 0.02  # of the largest value: how far two ways to compute the same may be apart in 16 bits


def main(argv: list[str]) -> int:
    """Try one thing after the other, each on all devices at once; what fails is a finding like others."""
    die_with_parent()
    say = Lines()
    cache = Path(argv[0]).expanduser()
    say(doing="import torch")
    try:
        with uncollected():
            import torch
    except Exception as error:  # a broken library raises what it likes
        told = f"torch cannot be imported: {first_line(error)}."
        say(finding=fix(GROUP, told, "pip install --force-reinstall torch"))
        return 0
    say(doing="look for GPUs")
    available = torch.cuda.is_available()
    kind, built = ("rocm", torch.version.hip) if torch.version.hip else ("cuda", torch.version.cuda)
    problem = None if available or not built else _why_none()
    say(facts={"kind": kind if built else "cpu", "built": built, "available": available, "problem": problem})
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if available else []
    devices = devices or [torch.device("cpu")]
    rates: dict[str, float] = {}
    checks: list[tuple[str, Check]] = [
        ("products", partial(product, cache=cache, rates=rates)),
        ("copies", copy),
        ("attention", varlen),
        ("bitsandbytes", four_bits),
    ]
    for what, check in checks:
        say(doing=f"{what} on {', '.join(map(_name, devices))}")
        # Ways to the host are shared: copies go one after the other.
        with ThreadPoolExecutor(1 if check is copy else len(devices)) as pool:
            found = list(pool.map(partial(_tried, what, check), devices))
        for finding in of_each([(_name(device), some) for device, some in zip(devices, found, strict=True)]):
            say(finding=finding)
    for finding in slower(rates):
        say(finding=finding)
    return 0


def _why_none() -> str | None:
    """Return what PyTorch says where it can use no GPU."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # the driver's own, of any kind
        return first_line(error)
    return None


def _tried(what: str, check: Check, device: torch.device) -> list[Finding]:
    """Return what a check finds of a device, also where it fails."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        return list(check(device))
    except torch.OutOfMemoryError:
        return [fix(GROUP, f"no room for {what}", "Free its memory: `tunewright doctor` names who has it under GPUs.")]
    except Exception as error:  # kernels raise what they like, and the next check is still worth a try
        return [fix(GROUP, f"{what}: {type(error).__name__}: {first_line(error)}", ADVICE[what])]


def slower(rates: dict[str, float]) -> list[Finding]:
    """Compare GPUs with each other, where there are enough of them to know the usual rate."""
    if len(rates) < 3:
        return []
    median = statistics.median(rates.values())
    do = "All others wait for it at every step: look at heat, power and clocks, and leave it out until it is as fast."
    return [
        fix(GROUP, f"{name}: products at {rate / median:.0%} of its sisters' rate", do)
        for name, rate in rates.items()
        if rate < SLOWER * median
    ]


class Lines:
    """Writes lines of JSON to standard output, from which it takes everything else away: libraries write there too."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def __call__(self, **line: Any) -> None:
        print(json.dumps(line, default=asdict), file=self.out, flush=True)


def _name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else f"GPU {device.index}"


def product(device: torch.device, cache: Path, rates: dict[str, float]) -> Iterator[Finding]:
    """Multiply matrices, and compare the rate with what is listed for a GPU, or was ever seen of this CPU.

    Args:
        rates: where each GPU's is written, in FLOP/s.
    """
    import torch

    from tunewright.trainer.hardware import product_rates
    from tunewright.trainer.peak import Peak

    if device.type == "cpu":
        best = Peak(device, torch.float32, cache)
        share = best.start / best.known if best.start and best.known else None
        half = max(max(rates) for rates in product_rates(device, torch.bfloat16, SECONDS))
        told = f"products of {_flops(best.start)} in float32, {_flops(half)} in bfloat16"
        if share is not None and share < TIRED:
            do = "Something else computes here (see limits), or it is too hot: try again."
            yield note(GROUP, f"{told}, {share:.0%} of what was seen here before", do)
        else:
            yield ok(GROUP, told)
        return
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if supported else torch.float16
    if not supported:
        major, minor = torch.cuda.get_device_capability(device)
        do = "Train with model.dtype=float32: bfloat16 is emulated there, and much slower."
        yield note(GROUP, f"no units for bfloat16 (compute capability {major}.{minor})", do)
    torch.ones(1024, 1024, device=device, dtype=dtype).matmul(torch.ones(1024, 1024, device=device, dtype=dtype))
    rate = max(max(rates) for rates in product_rates(device, dtype, SECONDS))
    rates[_name(device)] = rate
    told = f"products of {_flops(rate)} in {str(dtype).removeprefix('torch.')}"
    listed = find_device(torch.cuda.get_device_name(device))
    if listed is None:
        yield ok(GROUP, told)
    elif rate < TIRED_GPU * listed.rate:
        do = "Compare it with its sisters; look at heat, power and clocks (nvidia-smi -q -d PERFORMANCE), reset it."
        yield fix(GROUP, f"{told}, {rate / listed.rate:.0%} of the listed {_flops(listed.rate)}", do)
    else:
        yield ok(GROUP, f"{told}, {rate / listed.rate:.0%} of what is listed")


def copy(device: torch.device) -> Iterator[Finding]:
    """Copy within the device's memory, and between it and the host."""
    import torch

    one = torch.ones(COPIED, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    inside = 2 * _rate(lambda: other.copy_(one), device)  # each byte is read and written
    if device.type == "cpu":
        yield ok(GROUP, f"copies of {size(inside)}/s, read and written")
        return
    host = torch.ones(COPIED, dtype=torch.uint8, pin_memory=True)
    to, back = _rate(lambda: one.copy_(host), device), _rate(lambda: host.copy_(one), device)
    told = f"copies of {size(inside)}/s, {size(to)}/s from and {size(back)}/s to the host"
    listed = find_device(torch.cuda.get_device_name(device))
    if listed and inside < TIRED * listed.bandwidth:
        do = "Its memory is slower than it should be: look at clocks and at who else uses it (nvidia-smi -q)."
        yield fix(GROUP, f"{told}; its memory should do {size(listed.bandwidth)}/s", do)
    elif listed and min(to, back) < TIRED_HOST * listed.host_link:
        do = f"Up to {size(listed.host_link)}/s should come and go: look at its PCIe slot. Offload needs it."
        yield note(GROUP, told, do)
    else:
        yield ok(GROUP, told)


def varlen(device: torch.device) -> Iterator[Finding]:
    """Attention without padding, beside PyTorch's own on each row alone."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from tunewright.trainer.model import attention

    lengths, dtype = [5, 130, 1, 64], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)
    )
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    kernel = attention.kernel_can(query, value, 0.0)
    mine, _ = attention.varlen_attention(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=ends, max_length_q=max(lengths)
    )
    rows = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    alone = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in rows]
    expected = torch.cat(alone, dim=2).transpose(1, 2)
    apart = float((mine.float() - expected.float()).abs().max() / expected.float().abs().max())
    if apart > CLOSE:
        yield fix(GROUP, f"attention without padding is wrong by {apart:.0%}.", ADVICE["attention"])
    elif device.type == "cuda" and not kernel:
        do = "Rows are computed one by one, which is right and slower; see train.attention_kernel in docs/speed.md."
        yield note(GROUP, "PyTorch's kernel for rows without padding is not for this GPU.", do)
    else:
        yield ok(GROUP, "attention without padding computes what it should")


def four_bits(device: torch.device) -> Iterator[Finding]:
    """A product with weights in 4 bits by bitsandbytes, beside the same with these weights unpacked."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(size, 256, generator=generator).to(device, dtype) for size in (512, 16))
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    mine = bitsandbytes.matmul_4bit(rows, packed.t(), quant_state=state)
    expected = rows @ dequantize_4bit(packed, state).t()
    apart = float((mine - expected).abs().max() / expected.abs().max())
    if apart > CLOSE:
        yield fix(GROUP, f"a product in 4 bits is wrong by {apart:.0%}.", ADVICE["bitsandbytes"])
    else:
        yield ok(GROUP, f"bitsandbytes {bitsandbytes.__version__} multiplies in 4 bits")


REINSTALL = "Install a torch whose build is for this GPU and this driver: python -m torch.utils.collect_env"
ADVICE = {
    "products": REINSTALL,
    "copies": "Free memory of the device, or look at its health: nvidia-smi -q",
    "attention": "Write train.padding_free=false, and report it with `tunewright doctor --json`.",
    "bitsandbytes": "pip install --force-reinstall bitsandbytes; without it every method but qlora runs.",
}


def _rate(move: Callable[[], object], device: torch.device) -> float:
    """Return how many bytes a second a copy of COPIED bytes moves."""
    from tunewright.trainer.hardware import drain

    move()
    drain(device)
    rounds, begun = 0, time.perf_counter()
    while rounds == 0 or time.perf_counter() - begun < SECONDS / 3:
        move()
        drain(device)
        rounds += 1
    return rounds * COPIED / (time.perf_counter() - begun)


def _flops(rate: float | None) -> str:
    rate = rate or 0.0
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
