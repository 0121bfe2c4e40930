"""Does a GPU compute what a CPU computes? python bench/gpu/smoke.py OUT.jsonl [--tiny]

The attention kernel beside attention document by document, forward and backward; then three steps of each kind of
training on the embedded model's shape, on the GPU and on the CPU of this machine, whose losses must agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import cells  # noqa: E402
import torch  # noqa: E402
from worker import BENCH, forget  # noqa: E402

from tunewright.errors import TunewrightError  # noqa: E402
from tunewright.trainer.model import attention  # noqa: E402

LENGTHS = [5, 1, 130, 64, 300]
WINDOW = 50
HEADS = ((4, 4), (8, 2))
SIZES = (64, 96, 128, 256)
# Of bfloat16 and float16, relative to the largest value: a kernel sums in another order.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.004}
LOSS_TOLERANCE = {"bfloat16": 0.02, "float32": 0.001}
STEPS = 3
OF_KERNELS = ("train.fused_layers", "train.cross_entropy")  # what the CPU beside it does without

TRAININGS: dict[str, list[str]] = {
    "LoRA, bfloat16": ["method=lora", "model.dtype=bfloat16"],
    "LoRA, float32": ["method=lora", "model.dtype=float32"],
    "LoRA, padded": ["method=lora", "model.dtype=bfloat16", "train.padding_free=false"],
    "QLoRA": ["method=qlora", "model.dtype=bfloat16"],
    "QLoRA, padded": ["method=qlora", "model.dtype=bfloat16", "train.padding_free=false"],
    "full": ["method=full", "model.dtype=bfloat16"],
    "full, padded": ["method=full", "model.dtype=bfloat16", "train.padding_free=false"],
    "LoRA, fused layers": ["method=lora", "model.dtype=bfloat16", "train.fused_layers=liger"],
    "LoRA, cut cross-entropy": ["method=lora", "model.dtype=bfloat16", "train.cross_entropy=cut_exact"],
    "full, TRL's head": ["method=full", "model.dtype=bfloat16", "train.cross_entropy=trl"],
    "prompt tuning": ["method=prompt_tuning", "model.dtype=bfloat16"],
    "packing": ["method=lora", "model.dtype=bfloat16", "data.packing=true", "train.global_batch_size=2"],
}


def kernel(device: str, dtype: torch.dtype, size: int, heads: tuple[int, int], window: int | None) -> dict[str, Any]:
    """Return how far the kernel's output and gradients are from those of attention document by document."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads[0], heads[1], heads[1])
    # As a model with one projection for all three has them: heads of a row together, rows apart.
    together = torch.randn(1, sum(LENGTHS), sum(counts), size, generator=generator).to(device, dtype)
    values = [part.transpose(1, 2) for part in together.split(counts, dim=2)]
    upstream = torch.randn(1, sum(LENGTHS), heads[0], size, generator=generator).to(device, dtype)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=device)
    results = []
    for run in (_kernel, _by_document):
        inputs = [value.detach().requires_grad_() for value in values]
        out = run(inputs, bounds, window)
        out.backward(upstream)
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    errors = [
        float((mine.float() - other.float()).abs().max() / other.float().abs().max())
        for mine, other in zip(*results, strict=True)
    ]
    return {"error": max(errors), "errors": errors, "ok": max(errors) <= TOLERANCE[dtype]}


def _kernel(inputs: list[torch.Tensor], bounds: torch.Tensor, window: int | None) -> torch.Tensor:
    if not attention.kernel_can(inputs[0], inputs[2], 0.0):
        if inputs[0].device.type == "cuda":
            raise RuntimeError("the kernel is not used on this GPU")
        return _by_document(inputs, bounds, window)  # a rehearsal without a GPU
    return attention._varlen_kernel(*inputs, bounds, max(LENGTHS), None, window)


def _by_document(inputs: list[torch.Tensor], bounds: torch.Tensor, window: int | None) -> torch.Tensor:
    return attention._per_document(*inputs, bounds, None, window, 0.0)


def losses(overrides: list[str], device: torch.device, model: Path, folder: Path) -> list[float]:
    """Train three steps and return the loss of each."""
    from accelerate import PartialState

    from tunewright.claims import Claim, prepare_folder
    from tunewright.config.compose import compose_config
    from tunewright.launch.train import check_all
    from tunewright.plan.devices import Devices
    from tunewright.run_folder import RunDir
    from tunewright.trainer.console import Printer
    from tunewright.trainer.prepared import prepare
    from tunewright.trainer.training import train

    forget()
    settings = ["model=folder", f"model.path={model}", f"output_root={folder}"]
    settings += [f"name={device.type}", f"train.max_steps={STEPS}", "train.logging_steps=1", "data.eval_names=[]"]
    settings += ["data.max_samples=64", "train.global_batch_size=8", "train.learning_rate=1e-3", "train.warmup_ratio=0"]
    config = compose_config([*settings, *overrides])
    check_all(config, Devices("cpu" if device.type == "cpu" else "cuda", int(device.type == "cuda"), 1))
    run = RunDir(folder / device.type)
    prepare_folder(config, Claim(run, None))
    prepared = prepare(config, lambda line: None)
    state = PartialState(cpu=device.type == "cpu")
    assert state.device.type == device.type
    train(config, run, prepared, state, Printer(lambda line: None))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def training(overrides: list[str], device: torch.device, scratch: Path) -> dict[str, Any]:
    """Compare a training on this device with the same on the CPU, from weights that were drawn on the CPU."""
    dtype = next(item.partition("=")[2] for item in overrides if item.startswith("model.dtype"))
    folder = Path(tempfile.mkdtemp(dir=scratch))
    model = _model(scratch)
    plain = [item for item in overrides if not item.startswith(OF_KERNELS)]
    mine = losses(overrides, device, model, folder)
    other = losses(plain, torch.device("cpu"), model, folder)
    apart = max(abs(a / b - 1) for a, b in zip(mine, other, strict=True))
    return {"losses": mine, "losses_cpu": other, "error": apart, "ok": apart <= LOSS_TOLERANCE[dtype]}


def _model(scratch: Path) -> Path:
    """Write a small random model once, so that both devices begin with the same weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tunewright.trainer.model import tiny

    folder = scratch / "model"
    if not folder.exists():
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**tiny.SHAPE)).save_pretrained(folder)
        tiny.train_tokenizer().save_pretrained(folder)
    return folder


def front_door(scratch: Path) -> dict[str, Any]:
    """`tunewright train`, through its launcher, as a user types it; on a GPU it plans what is left open."""
    import subprocess

    settings = ["model=folder", f"model.path={_model(scratch)}", "method=lora", "train.max_steps=3"]
    settings += [f"output_root={scratch}", "name=front-door", "data.eval_names=[]", f"data.dir={BENCH.parent / 'data'}"]
    done = subprocess.run(
        [sys.executable, "-m", "tunewright.launch.cli", "train", *settings],
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=120,
    )
    chosen = "Chosen: strategy=" in done.stdout or not torch.cuda.is_available()
    return {
        "ok": done.returncode == 0 and chosen,
        "exit_code": done.returncode,
        "output": (done.stdout + done.stderr)[-1500:],
    }


def checks(device: torch.device, scratch: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to check, by name."""

    def kernel_check(*args: Any) -> Callable[[], dict[str, Any]]:
        return lambda: kernel(device.type, *args)

    def training_check(overrides: list[str]) -> Callable[[], dict[str, Any]]:
        return lambda: training(overrides, device, scratch)

    grid = itertools.product(TOLERANCE, SIZES, HEADS, (None, WINDOW))
    named = {
        f"kernel {str(dtype).removeprefix('torch.')}, head {size}, {heads[0]}/{heads[1]} heads"
        f"{', window' if window else ''}": kernel_check(dtype, size, heads, window)
        for dtype, size, heads, window in grid
    }
    named |= {
        f"training {name}": training_check(overrides)
        for name, overrides in TRAININGS.items()
        if cells.cannot(overrides, gpu=device.type == "cuda") is None
    }
    return {**named, "tunewright train": lambda: front_door(scratch)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="accepted, for a rehearsal: shapes are small as they are")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    known = args.out.read_text().splitlines() if args.out.exists() else []
    begun = {json.loads(line)["name"] for line in known}
    with tempfile.TemporaryDirectory(prefix="tunewright-smoke-") as scratch, args.out.open("a") as out:
        for name, check in checks(device, Path(scratch)).items():
            if name in begun:
                continue
            print(json.dumps({"name": name, "begun": True}), file=out, flush=True)
            started = time.perf_counter()
            try:
                found = check()
            except (Exception, TunewrightError) as error:  # the next check may still tell something
                traceback.print_exc()
                found = {"ok": False, "problem": f"{type(error).__name__}: {error}"[:600]}
            seconds = round(time.perf_counter() - started, 2)
            print(json.dumps({"name": name, **found, "seconds": seconds}), file=out, flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
