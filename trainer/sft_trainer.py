"""The one supervised fine-tuning trainer, for every strategy: TRL's, with three things of its own.

1. Batches: the same rows per optimiser step for any number of ranks (`batches.MicroBatches`), without padding.
2. Loss: the head runs on the positions that carry a label. The sum over scored tokens is divided by the scored tokens
   of the global batch, so that the figure is the same for any split into ranks and micro-batches.
3. Log: real tokens per second, MFU and peak memory beside the loss, in TensorBoard and in metrics.jsonl.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTTrainer

from tunewright.errors import NumericError
from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.checkpoints import (
    in_format,
    learns_prompt,
    load_prompt_encoder,
    prompt_for_saving,
    save_prompt_encoder,
)
from tunewright.trainer.data.batches import (
    Batch,
    EpochDataLoader,
    FlatCollator,
    MicroBatches,
    PaddedCollator,
    TokenRows,
    token_counts,
)
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.data.stream import StreamDataLoader, StreamedMicroBatches, TokenStream
from tunewright.trainer.master_weights import attach_master_weights
from tunewright.trainer.model.linear_cross_entropy import add_linear_cross_entropy
from tunewright.trainer.model.neftune import EmbeddingNoise
from tunewright.trainer.throughput import Meter, device_peak_flops, matmul_parameters, over_ranks, peak_memory


class TunewrightTrainer(SFTTrainer):
    """See the module's text.

    `plan` is the batch plan of this world, `dtype` the format of weights and computation. A `stream` trains in place of
    `train_dataset`, which is then a sample of it. The rest are settings of the groups `train` and `method`.
    """

    control: Any  # what callbacks ask for; transformers sets it
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        plan: BatchPlan,
        dtype: torch.dtype,
        padding_free: bool,
        stream: TokenStream | None = None,
        group_by_length: bool = False,
        pack_to: int | None = None,
        neftune_alpha: float | None = None,
        loraplus_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        pad_token_id = kwargs["processing_class"].pad_token_id
        collator = FlatCollator(pad_token_id) if padding_free else PaddedCollator(pad_token_id)
        super().__init__(*args, data_collator=collator, **kwargs)
        self.plan, self.stream = plan, stream
        # The loss below is divided by `num_items_in_batch` whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True
        self.dtype, self.loraplus_ratio = dtype, loraplus_ratio
        self.group_by_length, self.pack_to = group_by_length, pack_to
        in_format(self.model, dtype)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.linear_cross_entropy = self.args.device.type == "cpu" and add_linear_cross_entropy(base)
        self.neftune = EmbeddingNoise(self.model, neftune_alpha) if neftune_alpha else None
        self.meter = Meter()
        self.matmuls = matmul_parameters(self.model)
        peaks = over_ranks([device_peak_flops(self.args.device, dtype) or math.nan], self.args.device)
        self.peak_flops = sum(peak for (peak,) in peaks)  # of all ranks together; not a number when one is unknown

    # Batches

    def get_train_dataloader(self) -> EpochDataLoader | StreamDataLoader:
        if self.stream is None:
            return self._loader(self.train_dataset, shuffle=True)
        on_gpu = self.args.device.type == "cuda"
        return StreamDataLoader(
            StreamedMicroBatches(self.stream, self.plan, self.args.process_index),
            batch_size=None,  # these are micro-batches already
            collate_fn=self.data_collator,
            pin_memory=on_gpu,
            num_workers=1 if on_gpu else 0,  # a process of its own renders while the GPU works
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochDataLoader:
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset, shuffle=False)

    def _loader(self, dataset: Any, *, shuffle: bool) -> EpochDataLoader:
        rows, plan = TokenRows(dataset), self.plan
        if not shuffle:  # nothing is accumulated or packed
            plan = BatchPlan(plan.micro_batch * plan.world_size, plan.world_size, plan.micro_batch, 1)
        batches = MicroBatches(
            rows.lengths(),
            plan,
            self.args.process_index,
            shuffle=shuffle,
            seed=self.args.data_seed or self.args.seed,
            group_by_length=shuffle and self.group_by_length,
            pack_to=self.pack_to if shuffle else None,
        )
        return EpochDataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )

    def largest_batch(self) -> Batch:
        """Return a micro-batch of as many tokens as any of the training can have."""
        loader = self._loader(self.train_dataset, shuffle=True)
        return self.data_collator(loader.dataset.__getitems__(loader.batch_sampler.largest()))  # type: ignore

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.meter.add_loss(loss.detach())
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        self.meter.start_step()  # fetching batches is part of a step
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self.meter.add(*token_counts(batch))
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if self.neftune is not None:
            self.neftune.see(inputs)
        if "scored" not in inputs and not self.linear_cross_entropy:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total = cross_entropy_sum(model, inputs, linear_cross_entropy=self.linear_cross_entropy)
        if num_items_in_batch is None:
            return total / (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        # Ranks average their gradients, `num_items_in_batch` counts the tokens of all of them.
        return total * self.accelerator.num_processes / num_items_in_batch

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:  # type: ignore[type-arg]
        """Return {"eval_loss"}: the mean over every scored token, the same for any number of ranks.

        Trainer's own mean is over batches, and so depends on how rows fall into them.
        """
        model = self.model_wrapped if self.is_deepspeed_enabled and self.model_wrapped is not self.model else self.model
        model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                scored = int((batch["labels"][..., 1:] != IGNORED).sum())
                batch = self._prepare_inputs(batch)
                if "scored" in batch or self.linear_cross_entropy:
                    total += float(cross_entropy_sum(model, batch, linear_cross_entropy=self.linear_cross_entropy))
                else:
                    total += float(super().compute_loss(model, batch, num_items_in_batch=1)) / self.args.world_size
                tokens += scored
        model.train()
        sums = over_ranks([total, tokens], self.args.device)
        metrics = {f"{metric_key_prefix}_loss": sum(row[0] for row in sums) / max(sum(row[1] for row in sums), 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Optimiser

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.loraplus_ratio and self.optimizer is None:
            self.optimizer = self._loraplus(self.loraplus_ratio)
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # DeepSpeed keeps its own float32 copies
            attach_master_weights(optimizer)
        return optimizer

    def _loraplus(self, ratio: float) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        return create_loraplus_optimizer(
            self.model,
            optimizer_cls,
            loraplus_lr_ratio=ratio,
            loraplus_lr_embedding=options["lr"],
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        split = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        with prompt_for_saving(self.model) if split and learns_prompt(self.model) else nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and not self.is_deepspeed_enabled:  # DeepSpeed saves the whole module
            save_prompt_encoder(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_prompt_encoder(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        in_format(self.model, self.dtype)

    def _load_best_model(self) -> None:
        if not load_prompt_encoder(self.model, Path(self.state.best_model_checkpoint)):
            super()._load_best_model()
        in_format(self.model, self.dtype)

    # Log

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint continues the log up to its step, and evaluation may be what ends the training: nothing that was
        # trained may be missing in the log then, whatever `logging_steps` is.
        control = self.control
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def floating_point_ops(self, inputs: Batch) -> float:
        """Return the FLOPs of a batch. transformers walks through all parameters for it, in every step."""
        tokens = inputs["input_ids"].numel()
        return self.matmuls.flops(tokens, inputs["targets"].numel() if "targets" in inputs else tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._figures())
            _refuse_non_finite(logs, self.state.global_step)
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        """Return speed and memory since the last log line. Every rank has to call it."""
        tokens, scored, seconds = self.meter.take()
        losses = over_ranks(self.meter.take_losses(), self.args.device)
        self.meter.logged_losses = [sum(step) / len(step) for step in zip(*losses, strict=True)]
        ranks = over_ranks([tokens, scored, seconds, peak_memory(self.args.device)], self.args.device)
        all_tokens, all_scored = sum(row[0] for row in ranks), sum(row[1] for row in ranks)
        elapsed = max(row[2] for row in ranks) or math.inf
        figures = {
            "tokens_per_second": all_tokens / elapsed,
            "peak_memory_bytes": max(row[3] for row in ranks),
            "step_seconds": elapsed,
            "step_tokens": all_tokens,
        }
        if math.isfinite(self.peak_flops):
            figures["mfu"] = self.matmuls.flops(int(all_tokens), int(all_scored)) / elapsed / self.peak_flops
        return figures


def cross_entropy_sum(model: Any, batch: Batch, *, linear_cross_entropy: bool = False) -> torch.Tensor:
    """Return the cross-entropy summed over the scored positions of a batch, flat, or padded with ours.

    On a GPU through TRL's fused head, on a CPU through ours: neither makes the (S, vocabulary) logits. For heads that
    ours does not take, the model's own `logits_to_keep` picks the scored positions before its head.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "scored", "targets")}
    if linear_cross_entropy:
        output = model(**inputs, labels=batch["labels"], loss_sum=True, use_cache=False)
        return output.loss_sum  # type: ignore[no-any-return]
    if batch["input_ids"].device.type == "cuda":
        outputs = model(**inputs, labels=batch["labels"], fused_lm_head=True, use_cache=False)
        return -outputs.log_probs.sum()
    logits = model(**inputs, logits_to_keep=batch["scored"], use_cache=False).logits[0]  # (S, vocabulary)
    return cross_entropy(logits.float(), batch["targets"], reduction="sum")


def _refuse_non_finite(logs: dict[str, float], step: int) -> None:
    for key in ("loss", "grad_norm"):
        value = logs.get(key)
        if value is not None and not math.isfinite(value):
            raise NumericError(
                f"{key} is {value} at step {step}. Lower `train.learning_rate`, set `train.max_grad_norm` to 1.0, or "
                f"use model.dtype=float32 to see whether the number format is the cause."
            )


class MetricsFile(TrainerCallback):
    """metrics.jsonl: what goes to TensorBoard, one JSON object for each log line, and the loss of each of its steps.

    Tokens and seconds go on counting where a run is continued. `started` is when this process was, on the clock of
    `time.perf_counter`.
    """

    def __init__(self, path: Path, meter: Meter, started: float) -> None:
        self.path, self.meter, self.started = path, meter, started
        self.tokens_seen = 0.0
        self.seconds_before = 0.0  # of the run before this process, up to the checkpoint that it continues

    def wall_seconds(self) -> float:
        """Return the seconds of the run until now, over all its processes."""
        return self.seconds_before + time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._forget_after(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        self.tokens_seen += logs.get("step_tokens", 0)
        counted = {"tokens_seen": int(self.tokens_seen), "wall_seconds": self.wall_seconds()}
        line = {"step": state.global_step, "epoch": state.epoch, **counted, **logs}
        if "loss" in logs:
            line["step_losses"] = self.meter.logged_losses
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is about to repeat."""
        if not self.path.is_file():
            return
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["step"] <= step]
        self.tokens_seen = max((line["tokens_seen"] for line in kept), default=0)
        self.seconds_before = max((line.get("wall_seconds", 0.0) for line in kept), default=0.0)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


class StepTimer(TrainerCallback):
    """Tells the trainer's meter when an optimiser step ends."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.end_step()
