"""What a user writes without a trainer: alpaca rows to masked token ids, one row at a time through `datasets.map`.

python bench/map_script.py DATA.json MODEL OUT [PROCESSES]
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer

CUTOFF = 1024


def main(data: str, model: str, out: str, processes: int | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        user = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        full = tokenizer.apply_chat_template(messages, return_dict=False)
        labels = [-100] * len(prompt) + full[len(prompt) :]
        return {"input_ids": full[:CUTOFF], "labels": labels[:CUTOFF]}

    dataset = load_dataset("json", data_files=data, split="train")
    # num_proc=1 would start a pool of one process; None stays in this one.
    dataset = dataset.map(encode, num_proc=processes, remove_columns=dataset.column_names)
    dataset.save_to_disk(out)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
