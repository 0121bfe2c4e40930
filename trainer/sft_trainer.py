"""The one supervised fine-tuning trainer, for every strategy: TRL's, with three things of its own.

1. Batches: the same rows per optimiser step for any number of ranks (`batches.MicroBatches`), without padding.
2. Loss (`loss.py`): the head runs on the positions that carry a label. The sum over scored tokens is divided by the
   scored tokens of the global batch, so that the figure is the same for any split into ranks and micro-batches.
3. Log: real tokens per second, FLOP/s, MFU and peak memory beside the loss, in TensorBoard and in metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from peft import PeftModel
from torch.utils.data import DataLoader
from trl import SFTTrainer

from tunewright.plan.accumulation import sums_in_float32
from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.agreement import Agreement
from tunewright.trainer.checkpointing import Checkpoints
from tunewright.trainer.data.batches import (
    Batch,
    EpochDataLoader,
    FlatCollator,
    MicroBatches,
    PaddedCollator,
    TokenRows,
    on_device,
    rows_in,
)
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.data.stream import StreamedMicroBatches, TokenStream
from tunewright.trainer.data.token_cache import TokenCache
from tunewright.trainer.deepspeed_settings import fill_bucket_size
from tunewright.trainer.finiteness import Finiteness
from tunewright.trainer.loss import Loss, Sums, loss_sums
from tunewright.trainer.master_weights import MasterWeights, SumInFloat32, attach_master_weights
from tunewright.trainer.methods import parameter_counts
from tunewright.trainer.methods.prompt_learning import (
    learns_prompt,
    load_prompt_encoder,
    prompt_for_saving,
    save_prompt_encoder,
)
from tunewright.trainer.model.model_folder import cache_folder
from tunewright.trainer.model.ready import cast_trained, make_ready
from tunewright.trainer.process_group import all_gather
from tunewright.trainer.rates import put_back, rates_of
from tunewright.trainer.throughput import Meter
from tunewright.trainer.universal import RemoveConversion, after_loading, is_universal, name_parameters


class TunewrightTrainer(SFTTrainer):
    """See the module's text.

    Args:
        config: the whole configuration; what `TrainingArguments` has no name for is read from it.
        plan: the batch plan of this world.
        dtype: the format of weights and computation.
        stream: trains in place of `train_dataset`, which is then a sample of it.
        loss: in place of the cross-entropy, in training and evaluation.
        cache: where the rows come from, to tell which they are.
    """

    control: Any  # what callbacks ask for; transformers sets it
    optimizer: Any
    checkpoints: Checkpoints  # set before the training begins
    checkpoint_root: Path | None = None  # where the folder of the checkpoint is that is being written
    batch_size = 0, 0  # rows and tokens of the micro-batch that was begun last
    masters: MasterWeights | None = None  # None with DeepSpeed, which keeps its own float32 copies

    def __init__(
        self,
        *args: Any,
        config: DictConfig,
        plan: BatchPlan,
        dtype: torch.dtype,
        stream: TokenStream | None = None,
        loss: Loss | None = None,
        cache: TokenCache | None = None,
        **kwargs: Any,
    ) -> None:
        pad_token_id = kwargs["processing_class"].pad_token_id
        collator = FlatCollator(pad_token_id) if config.train.padding_free else PaddedCollator(pad_token_id)
        text = kwargs["model"].config.get_text_config()
        router_logits = getattr(text, "output_router_logits", None)
        super().__init__(*args, data_collator=collator, **kwargs)
        if router_logits is not None:  # TRL (1.16) turns them on in the configuration, which is saved with the result
            text.output_router_logits = router_logits
        self.plan, self.stream, self.dtype, self.loss, self.cache = plan, stream, dtype, loss, cache
        # The loss below is divided by `num_items_in_batch` whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True
        self.loraplus_ratio = config.method.get("loraplus_ratio")
        self.group_by_length = config.train.group_by_length
        self.pack_to = config.data.cutoff_len if config.data.packing else None
        if plan.accumulation > 1 and not self.is_deepspeed_enabled and sums_in_float32(config):
            self.add_callback(SumInFloat32(self))
        self.accelerator.ddp_handler.gradient_as_bucket_view = True  # transformers has no argument for it
        on_gpu = self.args.device.type == "cuda"
        ready = make_ready(self.model, config, dtype, gpu=on_gpu, own_loss=loss is not None)
        self.head, self.router_loss, self.neftune = ready.head, ready.router_loss, ready.neftune
        if self.is_deepspeed_enabled:
            fill_bucket_size(self.args.hf_deepspeed_config.config, parameter_counts(self.model)[0])
        self.after_eval_batch: Callable[[], None] = lambda: None
        cache_dir = cache_folder(config.data.cache_dir)
        self.meter = Meter(self.model, self.args.device, dtype, cache_dir, compiled=config.train.compile)
        self.add_callback(self.meter)
        self.add_callback(RemoveConversion())
        self.finiteness = Finiteness(self, config, cache)
        self.agreement = Agreement([self.finiteness], config.train.timeout_minutes)
        self.add_callback(self.agreement)

    def _send_telemetry(self) -> None:
        """Tell nobody: TRL sends its authors a note of each training, with the model's architecture in it."""

    # Batches

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        if self.stream is None:
            return self._loader(self.train_dataset, shuffle=True)
        on_gpu = self.args.device.type == "cuda"
        return DataLoader(
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
        scored = self.cache.scored("train") if shuffle and self.cache is not None else None
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
            scored=scored,
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

    def rows_of(self, step: int, number: int, *, shuffle: bool = True) -> list[int]:
        """Return the rows of this rank's micro-batch `number`, from 0, of `step`, from 1; of a stream none.

        Without `shuffle` those of an evaluation.
        """
        if shuffle and self.stream is not None:
            return []
        loader = self._loader(self.train_dataset if shuffle else self.eval_dataset, shuffle=shuffle)
        return loader.batch_sampler.rows_of(step, number)  # type: ignore[union-attr,no-any-return]

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.meter.watching():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.meter.add_loss(loss.detach())
        self.finiteness.add_loss(loss.detach())
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self._stepped(model))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(self._stepped(model), grad_norm)
        self.finiteness.see_norm(norm)
        return norm

    def _stepped(self, model: Any) -> Any:
        """Return what the optimiser steps, with its gradients, in place of the model."""
        if self.masters is None:
            return model
        self.masters.take_gradients()
        return self.stepped

    def summed_in(self) -> torch.dtype:
        """Return the format in which the gradients of a step's micro-batches are added up."""
        if self.masters is None:
            return self.model_wrapped.get_data_types()[1]  # type: ignore[no-any-return]
        return torch.float32 if self.masters.summing else self.dtype

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        self.meter.fetch()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.meter.add_batches(batches)
        return [on_device(batch, self.args.device) for batch in batches], num_items

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """Return the scored tokens of a step on all ranks. Of a stream's, ranks have to tell each other."""
        known = [batch.pop("step_scored", None) for batch in batch_samples]
        return known[0] if known and known[0] else super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if self.neftune is not None:
            self.neftune.see(inputs)
        sums = self._loss_sums(model, inputs, router=self.router_loss is not None)
        scored = (inputs["labels"][:, 1:] != IGNORED).sum()
        if num_items_in_batch is None:
            return sums.loss / scored.clamp(min=1)
        # Ranks average their gradients, `num_items_in_batch` counts the tokens of all of them.
        share = self.accelerator.num_processes / num_items_in_batch
        loss = sums.loss * share
        if self.router_loss is None or sums.router is None:
            return loss
        return self.router_loss.add(loss, sums.router, scored * share)

    def _loss_sums(self, model: Any, batch: Batch, *, router: bool = False) -> Sums:
        self.batch_size = rows_in(batch), batch["input_ids"].numel()
        return loss_sums(model, batch, self.head, loss=self.loss, router=router)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:  # type: ignore[type-arg]
        """Return {"eval_loss"}: the mean over every scored token, the same for any number of ranks.

        Trainer's own mean is over batches, and so depends on how rows fall into them.
        """
        model = self.model_wrapped if self.is_deepspeed_enabled and self.model_wrapped is not self.model else self.model
        model.eval()
        total, tokens, odd = 0.0, 0, []
        with torch.no_grad():
            for number, batch in enumerate(self.get_eval_dataloader(eval_dataset)):
                tokens += int((batch["labels"][..., 1:] != IGNORED).sum())
                batch = on_device(batch, self.args.device)
                loss = float(self._loss_sums(model, batch).loss)
                total += loss
                odd += [] if math.isfinite(loss) else [number]
                self.after_eval_batch()
        model.train()
        sums = all_gather([total, tokens], self.args.device)
        mean = sum(row[0] for row in sums) / max(sum(row[1] for row in sums), 1)
        if not math.isfinite(mean):
            self.finiteness.judge_evaluation(mean, odd)
        metrics = {f"{metric_key_prefix}_loss": mean}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Optimiser

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.loraplus_ratio and self.optimizer is None:
            self.optimizer = self._loraplus(self.loraplus_ratio)
        optimizer = super().create_optimizer(*args, **kwargs)
        name_parameters(optimizer, self.model)
        self.rates = rates_of(optimizer)
        if not self.is_deepspeed_enabled:
            self.masters = attach_master_weights(optimizer)
            self.stepped = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, or none of it where a run goes on that was at its end: transformers would add a step."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save(self, lambda: super(TunewrightTrainer, self)._save_checkpoint(model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_root or super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:
            return super().save_model(output_dir, _internal_call)
        if self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            with prompt_for_saving(self.model) if learns_prompt(self.model) else nullcontext():
                return super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # transformers (5.23) has each rank copy the whole model into the host's memory, frozen base included.
            adapter = isinstance(self.model, PeftModel)
            self._save(output_dir, state_dict=None if adapter else self.accelerator.get_state_dict(self.deepspeed))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and not self.is_deepspeed_enabled:  # DeepSpeed saves the whole module
            save_prompt_encoder(self.model, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and self.is_deepspeed_enabled and is_universal(Path(checkpoint)):
            after_loading(self.model_wrapped, Path(checkpoint))
        if checkpoint:
            put_back(self.rates, self.optimizer, self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_prompt_encoder(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        cast_trained(self.model, self.dtype)

    def _load_best_model(self) -> None:
        if not load_prompt_encoder(self.model, Path(self.state.best_model_checkpoint)):
            super()._load_best_model()
        cast_trained(self.model, self.dtype)

    # Log

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint continues the log up to its step, and evaluation may be what ends the training: nothing that was
        # trained may be missing in the log then, whatever `logging_steps` is.
        control = self.control
        pauses = control.should_save or control.should_evaluate
        if pauses or control.should_training_stop:
            control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if pauses:
            self.meter.start()

    def floating_point_ops(self, inputs: Batch) -> float:
        """Return the FLOPs of the batch that was just trained on. transformers walks through all parameters for it."""
        return self.meter.trained()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.meter.take())
            if self.router_loss is not None:
                logs["router_aux_loss"] = self.router_loss.take(len(self.meter.step_losses), self.args.device)
            if not all(map(math.isfinite, (logs["loss"], logs.get("grad_norm", 0.0)))):
                self.finiteness.stop()
        super().log(logs, start_time)
