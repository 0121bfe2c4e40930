"""One training, from a checked configuration and prepared data to the saved result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from omegaconf import DictConfig
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from tunewright.checkpoints import read_record
from tunewright.errors import Preempted
from tunewright.metrics import read_metrics
from tunewright.mirror import mirror_of
from tunewright.plan.auto import RECOMPUTE
from tunewright.plan.batch_plan import batch_plan
from tunewright.plugins import PLUGINS
from tunewright.run_folder import RunDir, copy_of
from tunewright.space import storing
from tunewright.trainer.arguments import sft_config
from tunewright.trainer.callbacks import FirstStep, MetricsWriter, ProgressReport
from tunewright.trainer.checkpoint_loading import plain_data_only
from tunewright.trainer.checkpointing import Checkpoints, KeepPatience
from tunewright.trainer.console import Output, Printer
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.stream import TokenStream
from tunewright.trainer.disk_room import DiskRoom
from tunewright.trainer.divergence import Watch
from tunewright.trainer.grace import Grace
from tunewright.trainer.hardware import peak_memory
from tunewright.trainer.keeping import keep_reached
from tunewright.trainer.loss import Loss
from tunewright.trainer.methods import adapt, parameter_counts
from tunewright.trainer.methods.lora import keep_pissa_start, starts_as_pissa
from tunewright.trainer.mirroring import MirrorCheckpoints, finished
from tunewright.trainer.model import attention
from tunewright.trainer.model.fused_layers import fused_layers
from tunewright.trainer.model.gradient_checkpointing import FitCheckpointing, can_fit
from tunewright.trainer.model.load import load_model, quiet_libraries, torch_dtype
from tunewright.trainer.model.regional_compile import compile_layers
from tunewright.trainer.model.tokenizer import load_tokenizer, stop_tokens
from tunewright.trainer.model.weights_check import check_weights
from tunewright.trainer.process_group import all_gather, join
from tunewright.trainer.results import describe_result, describe_training, name_of, write_hyperparameters
from tunewright.trainer.save_schedule import SaveSchedule
from tunewright.trainer.saving import save_result
from tunewright.trainer.sft_trainer import TunewrightTrainer
from tunewright.trainer.shortage import held, told_shortage
from tunewright.trainer.stopping import Stopping
from tunewright.trainer.strategy_check import VerifyStrategy
from tunewright.trainer.universal import is_universal

if TYPE_CHECKING:
    from tunewright.trainer.prepared import Prepared


def train(
    config: DictConfig,
    run: RunDir,
    prepared: Prepared,
    state: PartialState | None = None,
    output: Output | None = None,
    checkpoint: Path | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    loss: Loss | None = None,
    stopping: Stopping | None = None,
) -> TunewrightTrainer:
    """Train, save, verify what was saved, and write the result into the manifest.

    A rank calls it once, or a program or notebook for each training on its own device: nothing is redirected, and what
    goes wrong is raised. The run's folder has been made (`prepare_folder`) and the configuration checked (`check_all`).
    Metrics of answers belong to `tunewright.deliver.evaluate`, which generates them: a training step sees no answers.

    Args:
        prepared: the model's folder and the token cache.
        state: of the process group that this rank has joined; None: of this process, which is joined here.
        output: None: lines are printed.
        checkpoint: the folder of the run's checkpoint that is continued.
        callbacks: called beside our own and those of `train.callbacks`, after them.
        loss: in place of `train.loss`, in training and evaluation; see `tunewright.trainer.loss.Loss`.
        stopping: hears who asks this process to stop.

    Returns:
        The trainer, with the trained model.

    Raises:
        ConfigError: what runs is not what the strategy asks for.
        StorageError: the disk has no room or refuses, or what was saved cannot be read back.
        NumericError: a loss or gradient is not finite.
        Preempted: it was asked to stop, and all ranks have done so at the same step, with a checkpoint.
    """
    started = time.perf_counter()
    stopping = stopping or Stopping()
    if state is None:
        quiet_libraries()
        state = join(config.strategy.launcher.name, config.train.timeout_minutes)
    output = output or Printer()
    if loss is None and config.train.loss is not None:
        loss = PLUGINS.losses[config.train.loss]
    universal = checkpoint is not None and is_universal(checkpoint)
    trainer = _build(config, run, prepared, state, loss, universal=universal)
    device, dtype, plan = state.device, trainer.dtype, trainer.plan
    metrics, progress = MetricsWriter(run.metrics, trainer.meter, started), ProgressReport(output)
    room = DiskRoom(trainer, run, prepared.model_path, trainer.agreement, config.train)
    trainer.checkpoints = checkpoints = Checkpoints(
        config, run, trainer.agreement, room, copy_of(run) if state.is_main_process else None
    )
    trainer.agreement.questions.append(stopping)
    trainable, total = parameter_counts(trainer.model)
    if config.train.save_steps is None:
        trainer.agreement.questions.append(SaveSchedule(checkpoints, trainable, main=state.is_main_process))
    verify, watch = VerifyStrategy(config, run, trainer, output), Watch(config, run, trainer, output)
    first = FirstStep(stopping.begin)
    before = read_record(checkpoint) if checkpoint else {}
    grace = Grace(config, checkpoints, output, before.get("seconds"))
    with _writing(run, room):
        chosen = _chosen(config, run, trainer, output)
        if state.is_main_process:
            described = describe_training(config, prepared.cache, (trainable, total), device, dtype)
            run.update_manifest(**described, cross_entropy=trainer.head)
    ours = [room, metrics, progress, checkpoints, watch, verify, first, grace, *chosen]
    mirror = mirror_of(config) if state.is_main_process else None
    mirroring = checkpoints.mirroring = MirrorCheckpoints(mirror, run, config.train, output) if mirror else None
    added = [PLUGINS.callbacks[name]() for name in config.train.callbacks]
    for callback in (*ours, *([mirroring] if mirroring else []), *added, *callbacks):
        trainer.add_callback(callback)
    output.say(
        f"Training {trainable:,} of {total:,} parameters ({trainable / total:.3%}) in {name_of(dtype)} on "
        f"{state.num_processes} x {device.type}: {plan.describe()}"
    )
    with (
        told_shortage(config, partial(held, trainer)),
        fused_layers(trainer.model, config.train.fused_layers),
        _leaving_together(trainer, stopping),
        _writing(run, room),
        finished(mirroring),
        closing(progress.progress),
        plain_data_only(deepspeed=trainer.is_deepspeed_enabled, trusted=config.trust),
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        _end_if_stopped(run, trainer, stopping)
        if trainer.eval_dataset is not None and not _evaluated_at(run, trainer.state.global_step):
            if (run.checkpoints / f"checkpoint-{trainer.state.global_step}").is_dir():
                trainer.after_eval_batch = partial(_stop_evaluating, run, trainer, stopping)
            trainer.evaluate()
        stopping.end()
        warnings = watch.warnings()
        save_result(trainer, config.method, run, room)
        memory = max(row[0] for row in all_gather([peak_memory(device)], device))
        peak = trainer.meter.peak.at_end()
        if state.is_main_process:
            result = describe_result(run, trainer, metrics.wall_seconds(), memory, peak, warnings)
            write_hyperparameters(run, result["final"])
            run.update_manifest(**result)
            if checkpoint is None and loss is None:
                lines = read_metrics(run.metrics)
                keep_reached(config, plan, (trainable, total), device, dtype, lines, peak)
    output.say(". ".join([f"Saved to {run.final}", *(f"Warning: {text}" for text in warnings)]))
    return trainer


def _writing(run: RunDir, room: DiskRoom) -> AbstractContextManager[None]:
    return storing(run.path, "What this run writes", advice=room.advice, ask_disk=False)


def _stop_evaluating(run: RunDir, trainer: TunewrightTrainer, stopping: Stopping) -> None:
    """Leave the evaluation at the end where a rank is asked to stop: training has ended, and a checkpoint holds it."""
    if trainer.agreement.largest([stopping.asked(trainer.state)])[0] > 0:
        stopping.stopped_at = trainer.state.global_step
        _end_if_stopped(run, trainer, stopping)


def _end_if_stopped(run: RunDir, trainer: TunewrightTrainer, stopping: Stopping) -> None:
    if stopping.stopped_at is None:
        return
    if trainer.is_world_process_zero():
        run.update_manifest(status="stopped")
    raise stopping.stopped()


@contextmanager
def _leaving_together(trainer: TunewrightTrainer, stopping: Stopping) -> Iterator[None]:
    """Have ranks that are stopped wait for each other: torchrun ends those that are left when one has ended."""
    try:
        yield
    except Preempted:
        if stopping.stopped_at is not None:  # which is of all ranks
            trainer.agreement.gather(None)
        raise


def _build(
    config: DictConfig, run: RunDir, prepared: Prepared, state: PartialState, loss: Loss | None, *, universal: bool
) -> TunewrightTrainer:
    """Load the model, let the method adapt it, and make the trainer."""
    dtype = torch_dtype(config.model.dtype, state.device.type)
    plan = batch_plan(config.train, state.num_processes, cutoff_len=config.data.cutoff_len, packing=config.data.packing)
    args = sft_config(config, run, plan, state.device, dtype, universal=universal)
    tokenizer = load_tokenizer(prepared.model_path, config.model)
    implementation = attention.register() if config.train.padding_free else None
    model = load_model(
        prepared.model_path,
        config.model,
        dtype,
        attention=implementation,
        method=config.method,
        device=state.device,
    )
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer)  # saved with the result, so serving stops too
    # Loading draws random numbers, differently under ZeRO-3: adapters must begin alike under every strategy.
    set_seed(config.train.seed)
    model = adapt(model, config.method, prepared.model_path)
    if config.method.get("adapter"):
        check_weights(model, Path(config.method.adapter), state.device)
    if starts_as_pissa(config.method) and state.is_main_process:
        keep_pissa_start(model, run.path)
    trainer = TunewrightTrainer(
        model=model,
        args=args,
        train_dataset=prepared.cache.open("train"),
        eval_dataset=prepared.cache.open("eval"),
        processing_class=tokenizer,
        config=config,
        plan=plan,
        dtype=dtype,
        stream=_stream(config, prepared, tokenizer) if config.data.streaming else None,
        loss=loss,
        cache=prepared.cache,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _chosen(config: DictConfig, run: RunDir, trainer: TunewrightTrainer, output: Output) -> list[TrainerCallback]:
    """Return the callbacks that settings ask for; choose attention's kernel, and have layers compiled, as they do."""
    chosen: list[TrainerCallback] = []
    dropout = attention.dropout_of(trainer.model.config)
    if attention.choose_kernel(config.train.attention_kernel, trainer.args.device, dropout):
        output.say("Attention runs on FlashAttention 3.")
    if config.train.compile:
        output.say(f"Compiling the {compile_layers(trainer.model)} layers behind the first micro-batch.")
    if trainer.is_world_process_zero():
        chosen.append(TensorBoardCallback(SummaryWriter(str(run.tensorboard))))
    if config.train.gradient_checkpointing and RECOMPUTE in config.automatic and can_fit(trainer):
        chosen.append(FitCheckpointing(trainer, run, output))
    if config.train.early_stopping:
        chosen.append(KeepPatience(early_stopping_patience=config.train.early_stopping))
    return chosen


def _stream(config: DictConfig, prepared: Prepared, tokenizer: Any) -> TokenStream:
    renderer = Renderer.of(config, tokenizer)
    return TokenStream([cached.rows for cached in prepared.cache.train], config.data, renderer, config.train.seed)


def _evaluated_at(run: RunDir, step: int) -> bool:
    if not run.metrics.is_file():
        return False
    lines = read_metrics(run.metrics)
    return any(line["step"] == step and "eval_loss" in line for line in lines)
