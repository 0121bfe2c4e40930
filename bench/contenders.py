"""Who trains, each through its own front door: how it is started, which lines tell of a step, where its losses are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from judge import Step
from measure import CORES
from workload import Job

BENCH = Path(__file__).resolve().parent
MARK = "BENCH "


@dataclass(frozen=True)
class Contender:
    """`same_rows` tells that each of its steps has the same rows as the others' (packing forms its own)."""

    name: str
    argv: Callable[[Job], list[str]]
    is_step: Callable[[str], bool]
    steps: Callable[[Job, str], list[Step]]
    same_rows: bool = True
    cannot: Callable[[str, str], str | None] = lambda method, strategy: None


def environment(job: Job) -> dict[str, str]:
    """Fresh caches, no network, and the cores shared out among the ranks: the same for every contender.

    How long waiting threads spin is left to each: tunewright sets it for its ranks, nobody else does.
    """
    return {
        **os.environ,
        "HF_HOME": f"{job.out}/hf",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": f"{job.out}/inductor",
        "OMP_NUM_THREADS": str(_threads(job)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _threads(job: Job) -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or max(CORES // job.ranks, 1))


def _script(job: Job, name: str, *more: str) -> list[str]:
    path = Path(job.out) / "job.json"
    path.write_text(json.dumps(asdict(job)))
    ranks = ["-m", "torch.distributed.run", f"--nproc-per-node={job.ranks}", "--standalone"] if job.ranks > 1 else []
    return [sys.executable, *ranks, str(BENCH / name), str(path), *more]


def _marked(job: Job, log: str) -> list[Step]:
    found = [json.loads(line.partition(MARK)[2]) for line in log.splitlines() if line.startswith(MARK)]
    return [Step(line["loss"], line.get("grad_norm", 0.0), line.get("num_tokens")) for line in found]


def _is_marked(line: str) -> bool:
    return line.startswith(MARK)


def _no_loop(method: str, strategy: str) -> str | None:
    return None if strategy == "single" and method in ("lora", "full") else "one process; LoRA or full"


def scripts() -> list[Contender]:
    return [
        Contender("loop by hand", lambda job: _script(job, "loop_script.py"), _is_marked, _marked, True, _no_loop),
        Contender("TRL, defaults", lambda job: _script(job, "trl_script.py"), _is_marked, _marked),
        Contender("TRL, tuned", lambda job: _script(job, "trl_script.py", "tuned"), _is_marked, _marked, False),
        Contender("Trainer, padding", lambda job: _script(job, "trainer_script.py"), _is_marked, _marked),
    ]


# --- tunewright -------------------------------------------------------------------------------------------------------


def refused(method: str, strategy: str) -> str | None:
    whole = method == "qlora" and strategy == "zero3"
    return "each rank would hold the 4-bit weights whole" if whole else None


def settings(job: Job) -> list[str]:
    """The overrides of `tunewright train` for a job."""
    values = {
        "model": "folder",
        "model.path": job.model,
        "model.dtype": "bfloat16",
        "model.random_weights": job.drawn,
        "data": "registry",
        "data.names": "[bench]",
        "data.dir": job.registry,
        "data.cache_dir": job.out,
        "data.cutoff_len": job.cutoff,
        "method": job.method,
        "strategy": job.strategy,
        "train.max_steps": job.steps,
        "train.global_batch_size": job.batch,
        "train.micro_batch_size": job.micro or job.batch,  # a memory bound: ranks may share rows out unevenly
        "train.learning_rate": job.learning_rate,
        "train.scheduler": "constant",
        "train.warmup_ratio": 0,
        "train.logging_steps": 1,
        "train.save_steps": 0,  # nor does any other here write a checkpoint
        "train.seed": job.seed,
        "output_root": job.out,
        "name": "run",
    }
    if job.method in ("lora", "qlora"):
        values |= {"method.r": job.rank, "method.alpha": 2 * job.rank}
    if job.strategy != "single":
        values["cluster.num_processes"] = job.ranks
    return [f"{key}={value}" for key, value in values.items()]


def is_step(line: str) -> bool:
    """Whether a line of tunewright's reports a step."""
    return "  loss " in line and "grad norm" in line


def tunewright(
    extra: list[str] | None = None,
    name: str = "tunewright",
    cannot: Callable[[str, str], str | None] = refused,
) -> Contender:
    def argv(job: Job) -> list[str]:
        return [sys.executable, "-m", "tunewright.launch.cli", "train", *settings(job), *(extra or [])]

    def steps(job: Job, log: str) -> list[Step]:
        file = Path(job.out) / "run" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [Step(line["loss"], line["grad_norm"], line["tokens_seen"]) for line in lines if "loss" in line]

    return Contender(name, argv, is_step, steps, cannot=cannot)


def compiled() -> Contender:
    def cannot(method: str, strategy: str) -> str | None:
        return "does not compile under ZeRO-3" if strategy == "zero3" else None

    return tunewright(["train.compile=true"], "tunewright, compiled", cannot)


def recomputing() -> Contender:
    """As TRL's defaults do: every layer computes its activations again."""
    return tunewright(["train.gradient_checkpointing=true"], "tunewright, recomputing")


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------

# What helps it on this workload: no checkpointing, and rows in packs of a step's tokens that do not see each other.
# It refuses `pure_bf16` on a CPU.
LLAMAFACTORY_BEST = {"disable_gradient_checkpointing": True, "flash_attn": "sdpa"}
PACKING = {"packing": True, "neat_packing": True, "per_device_train_batch_size": 1}
PACKING |= {"max_steps": -1, "num_train_epochs": 1}
PACKING |= {"include_num_input_tokens_seen": "no"}  # its mask of four dimensions makes the sum of the mask overflow


def llamafactory(python: str, *, best: bool = False, packing: bool = False) -> Contender:
    """LLaMA-Factory 0.9.5 by its own command. Its `qwen` template adds a system turn unless told not to."""

    def argv(job: Job) -> list[str]:
        config: dict[str, Any] = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": job.model,
            "dataset_dir": str(Path(job.rows).parent),
            "dataset": "bench",
            "template": "qwen",
            "default_system": "",
            "cutoff_len": job.cutoff,
            "finetuning_type": "full" if job.method == "full" else "lora",
            "lora_rank": job.rank,
            "lora_alpha": 2 * job.rank,
            "lora_target": "all",
            "disable_shuffling": True,
            "per_device_train_batch_size": job.per_device,
            "max_steps": job.steps,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "include_num_input_tokens_seen": "non_padding",
            "bf16": True,
            "use_cpu": True,
            "seed": job.seed,
            "output_dir": f"{job.out}/run",
        }
        if os.path.exists("/dev/nvidia0"):
            del config["use_cpu"]
        if best:
            config |= LLAMAFACTORY_BEST | (PACKING | {"cutoff_len": job.pack} if packing else {})
        path = Path(job.out) / "train.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        return [str(Path(python).with_name("llamafactory-cli")), "train", str(path)]

    def steps(job: Job, log: str) -> list[Step]:
        file = Path(job.out) / "run" / "trainer_state.json"
        history = json.loads(file.read_text())["log_history"] if file.exists() else []
        return [
            Step(line["loss"], line.get("grad_norm", 0.0), line.get("num_input_tokens_seen"))
            for line in history
            if "loss" in line
        ]

    def cannot(method: str, strategy: str) -> str | None:
        if method == "prompt_tuning":
            return "has no prompt tuning"
        if method == "qlora":
            return "no bitsandbytes in PEER_PYTHON"
        return None if strategy == "single" else "not driven on several ranks here"

    name = f"LLaMA-Factory, {'packing' if packing else 'no checkpointing' if best else 'defaults'}"
    return Contender(name, argv, lambda line: "'grad_norm'" in line, steps, not packing, cannot)
