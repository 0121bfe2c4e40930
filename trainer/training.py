"""One rank of a training run, from a checked configuration to the saved result."""

from __future__ import annotations

import json
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import DictConfig
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.schema import Launcher
from tunewright.errors import ConfigError, StorageError
from tunewright.launch.deepspeed_check import for_trainer
from tunewright.metrics import final_train_loss, mean_train_loss, read_metrics
from tunewright.plan.batch_plan import BatchPlan, batch_plan
from tunewright.ranks import launched
from tunewright.run_folder import RunDir
from tunewright.trainer.checkpoints import keep_pissa_start, plain_data_only, save_as_plain_lora, starts_as_pissa
from tunewright.trainer.console import Console
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.stream import TokenStream
from tunewright.trainer.data.token_cache import TokenCache, as_json
from tunewright.trainer.methods import adapt, parameter_counts
from tunewright.trainer.model import attention
from tunewright.trainer.model.gradient_checkpointing import FitCheckpointing
from tunewright.trainer.model.load import load_model, load_tokenizer, stop_tokens, torch_dtype
from tunewright.trainer.model.regional_compile import compile_layers
from tunewright.trainer.sft_trainer import MetricsFile, StepTimer, TunewrightTrainer
from tunewright.trainer.throughput import hardware, over_ranks, peak_memory

SHARE_BELOW_ONE = math.nextafter(1.0, 0.0)  # transformers reads 1.0 of all steps as one step, and this as all of them
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "datasets", "bitsandbytes", "hydra-core")


def train(
    config: DictConfig,
    run: RunDir,
    cache: TokenCache,
    model_path: Path,
    state: PartialState,
    console: Console,
    checkpoint: Path | None = None,
) -> None:
    """Train, save, verify what was saved, and write the result into the manifest.

    Raises:
        ConfigError: what runs is not what the strategy asks for.
        StorageError: what was saved cannot be read back.
        NumericError: a loss or gradient is not finite.
    """
    started = time.perf_counter()
    device = state.device
    dtype = torch_dtype(config.model.dtype, device.type)
    plan = batch_plan(config.train, state.num_processes, cutoff_len=config.data.cutoff_len, packing=config.data.packing)
    deepspeed = _deepspeed_config(config)
    args = _arguments(config, run, plan, device, deepspeed)
    if deepspeed is not None:
        # Trainer fills this from `args.bf16`, which would add autocast on top and is refused on a CPU.
        args.hf_deepspeed_config.config["bf16"]["enabled"] = dtype is torch.bfloat16
        args.hf_deepspeed_config._dtype = dtype

    tokenizer = load_tokenizer(model_path, config.model)
    implementation = attention.register() if config.train.padding_free else None
    model = load_model(model_path, config.model, dtype, attention=implementation, method=config.method, device=device)
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer)  # saved with the result, so serving stops too
    # Loading draws random numbers, differently under ZeRO-3: adapters must begin alike under every strategy.
    set_seed(config.train.seed)
    model = adapt(model, config.method, model_path)
    pissa = starts_as_pissa(config.method)
    if pissa and state.is_main_process:
        keep_pissa_start(model, run.path)
    trainer = TunewrightTrainer(
        model=model,
        args=args,
        train_dataset=cache.open("train"),
        eval_dataset=cache.open("eval"),
        processing_class=tokenizer,
        plan=plan,
        dtype=dtype,
        padding_free=config.train.padding_free,
        stream=_stream(config, cache, tokenizer) if config.data.streaming else None,
        group_by_length=config.train.group_by_length,
        pack_to=config.data.cutoff_len if config.data.packing else None,
        neftune_alpha=config.train.neftune_alpha,
        loraplus_ratio=config.method.get("loraplus_ratio"),
    )
    if config.train.compile:
        layers = compile_layers(trainer.model)
        console.say(f"Compiling the {layers} layers during the first step.")
    trainer.remove_callback(PrinterCallback)
    metrics = MetricsFile(run.metrics, trainer.meter, started)
    callbacks = [StepTimer(trainer.meter), metrics, Progress(console), Proof(config, run, trainer)]
    if state.is_main_process:
        callbacks.append(TensorBoardCallback(SummaryWriter(str(run.tensorboard))))
    if config.train.gradient_checkpointing == "auto":
        callbacks.append(FitCheckpointing(trainer, run, console))
    if config.train.early_stopping:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=config.train.early_stopping))
    for callback in callbacks:
        trainer.add_callback(callback)
    trainable, total = parameter_counts(trainer.model)
    if state.is_main_process:
        run.update_manifest(
            strategy=config.strategy.name,
            method=config.method.name,
            model=config.model.name,
            datasets=list(config.data.names),
            data=as_json(cache),
            parameters={"trainable": trainable, "total": total},
            hardware=hardware(device),
            versions={name: version(name) for name in PACKAGES},
            dtype=str(dtype).removeprefix("torch."),
        )
    console.say(
        f"Training {trainable:,} of {total:,} parameters ({trainable / total:.3%}) in "
        f"{str(dtype).removeprefix('torch.')} on {state.num_processes} x {device.type}: "
        f"{plan.describe()}"
    )
    with plain_data_only(deepspeed=deepspeed is not None, trusted=config.trust):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.eval_dataset is not None and not _evaluated_at(run, trainer.state.global_step):
        trainer.evaluate()
    trainer.save_model(str(run.final))
    if pissa and state.is_main_process:
        save_as_plain_lora(trainer.accelerator.unwrap_model(trainer.model), run.path, run.final)
    state.wait_for_everyone()
    memory = max(row[0] for row in over_ranks([peak_memory(device)], device))
    if state.is_main_process:
        verify_saved(run.final)
        _finish(run, trainer, metrics.wall_seconds(), memory)
    console.say(f"Saved to {run.final}")


def _stream(config: DictConfig, cache: TokenCache, tokenizer: Any) -> TokenStream:
    renderer = Renderer.of(config, tokenizer)
    return TokenStream([cached.rows for cached in cache.train], config.data, renderer, config.train.seed)


def _deepspeed_config(config: DictConfig) -> dict[str, Any] | None:
    """Return the DeepSpeed settings that the launcher put into the environment, or None without DeepSpeed."""
    if config.strategy.launcher is not Launcher.deepspeed:
        return None
    from accelerate.utils import DeepSpeedPlugin

    settings = DeepSpeedPlugin().deepspeed_config
    # The fields of an accelerate YAML are in `settings` now. accelerate would refuse them beside settings of ours.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    return for_trainer(settings)


def _arguments(
    config: DictConfig, run: RunDir, plan: BatchPlan, device: torch.device, deepspeed: dict[str, Any] | None
) -> SFTConfig:
    train = config.train
    return SFTConfig(
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
        save_total_limit=train.save_total_limit,
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
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        # Base and adapters are in the computation's format already; see `master_weights.py` for what keeps precision.
        bf16=False,
        fp16=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


class Proof(TrainerCallback):
    """Writes down, once the model is prepared, what really runs, and ends the run if that is not what was asked for."""

    def __init__(self, config: DictConfig, run: RunDir, trainer: TunewrightTrainer) -> None:
        self.config, self.run, self.trainer = config, run, trainer
        self.first = 0  # the step that this process begins with

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.first:
            return
        facts = distributed_facts(self.trainer)
        check_facts(facts, self.config)
        if state.is_world_process_zero:
            self.run.update_manifest(distributed=facts)
            print("ranks:", json.dumps(facts))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = state.global_step
        if state.is_world_process_zero:
            self.run.update_manifest(steps_planned=state.max_steps)


def distributed_facts(trainer: TunewrightTrainer) -> dict[str, Any]:
    """Return what the trainer runs on, read from the live objects and not from the configuration."""
    accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
    parameters = list(trainer.model.parameters())
    facts: dict[str, Any] = {
        "world_size": accelerator.num_processes,
        "type": accelerator.distributed_type.name,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "device": accelerator.device.type,
        "engine": type(wrapped).__name__,
        "zero_stage": int(wrapped.zero_optimization_stage()) if hasattr(wrapped, "zero_optimization_stage") else None,
        "parameters_held_by_rank_0": sum(getattr(p, "ds_tensor", p).numel() for p in parameters),
        "parameters_partitioned": sum(1 for p in parameters if hasattr(p, "ds_id")),
        "process_ids": [int(row[0]) for row in over_ranks([os.getpid()], accelerator.device)],
    }
    return facts


def check_facts(facts: dict[str, Any], config: DictConfig) -> None:
    """Compare what runs with what the strategy promises.

    Raises:
        ConfigError: for example one process where two were asked for, or DDP in place of ZeRO.
    """
    launcher = config.strategy.launcher
    expected: dict[str, Any] = {"type": {Launcher.single: "NO", Launcher.deepspeed: "DEEPSPEED"}.get(launcher)}
    if launcher is Launcher.ddp:
        expected["type"] = "MULTI_CPU" if facts["device"] == "cpu" else "MULTI_GPU"
    if launcher is Launcher.deepspeed:
        expected |= {"engine": "DeepSpeedEngine", "zero_stage": deepspeed_file(config).stage}
    if config.cluster.num_processes is not None:
        expected["world_size"] = config.cluster.num_processes
    wrong = {key: (value, facts[key]) for key, value in expected.items() if facts[key] != value}
    if wrong:
        found = ", ".join(f"{key} {now!r} instead of {want!r}" for key, (want, now) in wrong.items())
        advice = (
            "Report this, please: what was started is not what was printed."
            if launched()
            else ("Start with `tunewright train`, or give `accelerate launch` what the strategy needs.")
        )
        raise ConfigError(f"`strategy={config.strategy.name}` is not what runs: {found}. {advice}")


class Progress(TrainerCallback):
    """A line for each log step, with the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.first: tuple[int, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.first is None:
            self.first = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            self.console.say(f"  step {state.global_step}/{state.max_steps}  eval loss {logs['eval_loss']:.4f}")
        if "loss" not in logs or self.first is None:
            return
        done = state.global_step - self.first[0]
        left = (time.monotonic() - self.first[1]) / max(done, 1) * (state.max_steps - state.global_step)
        mfu = f"  MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
        self.console.say(
            f"  step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"grad norm {logs['grad_norm']:.2f}  {logs['tokens_per_second']:,.0f} tokens/s{mfu}  {_clock(left)} left"
        )


def verify_saved(folder: Path) -> None:
    """Read back what was saved: weights are there, not empty, and finite.

    Raises:
        StorageError: otherwise. Under ZeRO-3 an adapter of empty tensors has been saved silently before.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StorageError(f"{folder} holds no weights.")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names:
                tensor = tensors.get_tensor(name)
                if tensor.numel() == 0 or not torch.isfinite(tensor.float()).all():
                    problem = "is empty" if tensor.numel() == 0 else "has values that are not finite"
                    raise StorageError(f"{file}: the saved tensor {name} {problem}.")
            if not names:
                raise StorageError(f"{file} holds no tensor.")


def _evaluated_at(run: RunDir, step: int) -> bool:
    if not run.metrics.is_file():
        return False
    lines = read_metrics(run.metrics)
    return any(line["step"] == step and "eval_loss" in line for line in lines)


def _finish(run: RunDir, trainer: TunewrightTrainer, seconds: float, memory: float) -> None:
    lines = read_metrics(run.metrics)
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    kept = trainer.state.best_metric if trainer.args.load_best_model_at_end else evals[-1] if evals else None
    trained = [line for line in lines if "step_seconds" in line]
    step_seconds = sum(line["step_seconds"] for line in trained)
    tokens = sum(line["step_tokens"] for line in trained)
    mfu = [line["mfu"] * line["step_seconds"] for line in trained if "mfu" in line]
    final = {
        "train_loss": final_train_loss(lines),
        "mean_train_loss": mean_train_loss(lines),
        "eval_loss": kept,
    }
    _write_hyperparameters(run, final)
    run.update_manifest(
        status="done",
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch,
        wall_seconds=seconds,
        step_seconds=step_seconds,
        tokens_seen=int(tokens),
        tokens_per_second=tokens / step_seconds if step_seconds else None,
        mfu=sum(mfu) / step_seconds if mfu and step_seconds else None,
        peak_memory_bytes=int(max([memory, *(line["peak_memory_bytes"] for line in trained)])),
        final=final,
    )


def _write_hyperparameters(run: RunDir, final: dict[str, Any]) -> None:
    """Put settings and final losses where TensorBoard's table of hyper-parameters finds them."""
    settings = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in run.read_manifest()["identity"].items()
    }
    results = {f"final/{key}": value for key, value in final.items() if value is not None}
    with SummaryWriter(str(run.tensorboard)) as writer:
        writer.add_hparams(settings, results, run_name=".")


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
