"""For the competitors' scripts: the job they are given, PEFT's settings, and a line for each optimiser step."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from workload import Job

MARK = "BENCH "
Report = Callable[[dict[str, Any]], None]


def print_step(figures: dict[str, Any]) -> None:
    """`BENCH {"step": 1, "loss": 9.7, ...}`"""
    print(MARK + json.dumps(figures), flush=True)


class StepLines(TrainerCallback):
    """Reports each log line of the first rank."""

    def __init__(self, report: Report = print_step) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            figures = {key: float(logs[key]) for key in ("loss", "grad_norm", "num_tokens") if key in logs}
            self.report({"step": state.global_step, **figures})


def read_job() -> Job:
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def peft_config(job: Job) -> Any:
    """PEFT's settings of a method, or None for full fine-tuning."""
    import peft

    task = peft.TaskType.CAUSAL_LM
    if job.method == "prompt_tuning":
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=job.virtual_tokens)
    if job.method in ("lora", "qlora"):
        return peft.LoraConfig(task_type=task, r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear")
    return None


def quantization() -> Any:
    """NF4 with double quantisation, as the QLoRA paper has it."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load(job: Job, dtype: Any, *, quantized: bool = False, attention: str = "sdpa") -> Any:
    """The model as a user loads it, or, where it has no weights, drawn on the device; the same ones for everybody."""
    import torch
    from transformers import AutoModelForCausalLM

    if not job.drawn:
        options = {"quantization_config": quantization()} if quantized else {}
        return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation=attention, **options)
    from tunewright.config.method_schema import QLoraConfig
    from tunewright.config.schema import ModelConfig, Source
    from tunewright.trainer.model.load import load_model

    source = ModelConfig(name="bench", path=job.model, source=Source.folder, random_weights=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    method = QLoraConfig() if quantized else None
    model = load_model(Path(job.model), source, torch.bfloat16, attention=attention, method=method, device=device)
    return model if quantized else model.to(dtype)


def common_arguments(job: Job) -> dict[str, Any]:
    """What is the same for all: batch, steps, learning rate, seed, order. The rest stays at each one's defaults."""
    import torch

    settings: dict[str, Any] = {
        "output_dir": job.out,
        "per_device_train_batch_size": job.per_device,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
    }
    if job.strategy.startswith("zero"):
        return settings | _zero(job)
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
    return settings


def _zero(job: Job) -> dict[str, Any]:
    """DeepSpeed, which on a CPU needs the process group made first (accelerate 1.15 trains without it otherwise)."""
    import torch
    from accelerate import PartialState

    stage = int(job.strategy.removeprefix("zero"))
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if torch.cuda.is_available():
        return {"deepspeed": config}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {"deepspeed": config, "bf16": False, "accelerator_config": {"use_configured_state": True}}
