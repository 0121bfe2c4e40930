"""TRL's SFTTrainer: at its defaults, or with `tuned` as an expert sets it (bf16 base and adapters, packing).

python bench/trl_script.py JOB.json [tuned]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from steps import Report, StepLines, common_arguments, load, peft_config, print_step, quantization, read_job
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from workload import Job


def dataset(job: Job) -> Dataset:
    """Conversations as prompt and completion: TRL learns the completion."""
    rows = json.loads(Path(job.rows).read_text())
    users = [row["instruction"] + ("\n" + row["input"] if row["input"] else "") for row in rows]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": user}] for user in users],
            "completion": [[{"role": "assistant", "content": row["output"]}] for row in rows],
        }
    )


def defaults(job: Job) -> dict[str, Any]:
    """The model by its name, so in float32 under autocast; adapters, if any, by their settings.

    `max_length` alone is set: at its default, 1,024, long rows would be cut.
    """
    args = {"bf16": True, **common_arguments(job)}
    if job.drawn:
        model: Any = load(job, torch.float32, quantized=job.method == "qlora")
    else:
        model = job.model
        args["model_init_kwargs"] = {"quantization_config": quantization()} if job.method == "qlora" else None
    return {"model": model, "args": SFTConfig(max_length=job.cutoff, **args), "peft_config": peft_config(job)}


def tuned(job: Job) -> dict[str, Any]:
    """Everything in bfloat16 without autocast, packs of about the tokens of a global batch, no checkpointing."""
    import peft

    args = {**common_arguments(job), "per_device_train_batch_size": 1, "bf16": False, "gradient_checkpointing": False}
    packing = job.method != "prompt_tuning"  # PEFT drops position ids there, so that packed rows would mix
    if packing:  # one pass over the rows, in as many packs as they make
        args |= {"max_steps": -1, "num_train_epochs": 1}
    else:
        args["per_device_train_batch_size"] = job.per_device
    config = SFTConfig(packing=packing, max_length=job.pack if packing else job.cutoff, **args)
    dtype = torch.float32 if job.method == "full" else torch.bfloat16
    model = load(job, dtype, quantized=job.method == "qlora")
    adapters = peft_config(job)
    if adapters is not None:
        torch.manual_seed(job.seed)
        model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    elif torch.cuda.is_available() or job.strategy == "single":
        config.bf16 = True  # full fine-tuning keeps float32 weights: bfloat16 ones lose small updates
    return {"model": model, "args": config}


def train(job: Job, settings: dict[str, Any], report: Report) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    callbacks = [StepLines(report)]
    SFTTrainer(train_dataset=dataset(job), processing_class=tokenizer, callbacks=callbacks, **settings).train()


def main() -> None:
    job = read_job()
    train(job, tuned(job) if sys.argv[2:] == ["tuned"] else defaults(job), print_step)
    PartialState().destroy_process_group()  # gloo's threads may abort a rank that exits without


if __name__ == "__main__":
    main()
