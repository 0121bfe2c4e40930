"""LLaMA-Factory's preprocessing alone, in its own environment: the first lines of its `run_sft`, without the training.

PEER/bin/python bench/llamafactory_script.py train.yaml     # `tokenized_path` in the YAML says where to save
"""

from __future__ import annotations

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args, read_args
from llamafactory.model import load_tokenizer


def main() -> None:
    model_args, data_args, training_args, _, _ = get_train_args(read_args())
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    get_dataset(template, model_args, data_args, training_args, stage="sft", **tokenizer_module)


if __name__ == "__main__":
    main()
