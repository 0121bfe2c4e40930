"""Plain transformers Trainer with padding, as its documentation has it: python bench/trainer_script.py JOB.json"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from steps import StepLines, common_arguments, load, peft_config, read_job
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from workload import encode


def main() -> None:
    job = read_job()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = json.loads(Path(job.rows).read_text())
    dataset = Dataset.from_list(rows).map(lambda row: encode(tokenizer, row), remove_columns=list(rows[0]))
    args = TrainingArguments(**common_arguments(job))
    if job.method == "full":  # float32 weights under autocast
        args.bf16 = not job.strategy.startswith("zero")
        model = load(job, torch.float32)
    else:  # the base as it is stored, in bfloat16; PEFT keeps its adapters in float32
        import peft

        model = load(job, torch.bfloat16, quantized=job.method == "qlora")
        if job.method == "qlora":
            model = peft.prepare_model_for_kbit_training(model)
        torch.manual_seed(job.seed)
        model = peft.get_peft_model(model, peft_config(job))
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model, args, collator, dataset, processing_class=tokenizer, callbacks=[StepLines()]).train()
    PartialState().destroy_process_group()  # gloo's threads may abort a rank that exits without


if __name__ == "__main__":
    main()
