"""From the settings to `SFTConfig`, which is transformers' `TrainingArguments` and a few fields of TRL's."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from omegaconf import DictConfig
from trl import SFTConfig

from tunewright.config.schema import Launcher
from tunewright.plan.accumulation import sums_in_float32
from tunewright.plan.batch_plan import BatchPlan
from tunewright.run_folder import RunDir
from tunewright.trainer.deepspeed_settings import for_trainer

SHARE_BELOW_ONE = math.nextafter(1.0, 0.0)  # transformers reads 1.0 of all steps as one step, and this as all of them


def sft_config(
    config: DictConfig,
    run: RunDir,
    plan: BatchPlan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    universal: bool = False,
) -> SFTConfig:
    """Return the arguments of the trainer; under DeepSpeed they have to exist before the model is loaded.

    `universal` says that DeepSpeed is to read a universal checkpoint.
    """
    train, deepspeed = config.train, deepspeed_settings(config, universal=universal)
    if deepspeed is not None and dtype is torch.bfloat16 and plan.accumulation > 1 and sums_in_float32(config):
        deepspeed.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
    args = SFTConfig(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=min(train.warmup_ratio, SHARE_BELOW_ONE),
        optim=train.optimizer,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_strategy="steps",
        logging_steps=train.logging_steps,
        logging_first_step=True,
        # Trainer's filter reports a loss that is not a number as 0.0.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if train.eval_steps else "no",
        eval_steps=train.eval_steps,
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        load_best_model_at_end=train.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        gradient_checkpointing=bool(train.gradient_checkpointing),
        report_to="none",  # TensorBoard is added by hand, for its folder
        disable_tqdm=True,
        use_cpu=device.type == "cpu" and deepspeed is None,
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": True},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # no training changes any
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        # Base and adapters are in the computation's format already; see `master_weights.py` for what keeps precision.
        bf16=False,
        fp16=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if deepspeed is not None:
        # Trainer fills this from `args.bf16`, which would add autocast on top and is refused on a CPU.
        args.hf_deepspeed_config.config["bf16"]["enabled"] = dtype is torch.bfloat16
        args.hf_deepspeed_config._dtype = dtype
    return args


def deepspeed_settings(config: DictConfig, *, universal: bool) -> dict[str, Any] | None:
    """Return the DeepSpeed settings that the launcher put into the environment, or None without DeepSpeed."""
    if config.strategy.launcher is not Launcher.deepspeed:
        return None
    from accelerate.utils import DeepSpeedPlugin

    settings = DeepSpeedPlugin().deepspeed_config
    # The fields of an accelerate YAML are in `settings` now. accelerate would refuse them beside settings of ours.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    return for_trainer(settings, universal=universal)
