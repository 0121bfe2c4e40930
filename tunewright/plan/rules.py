"""Which combinations of settings cannot work, with the reason and what to choose instead.

Every check looks at the configuration and the devices alone, so that all of them run before a rank is started.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sysconfig
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.chat_templates import template_text
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.method_schema import PROMPT_LEARNING
from tunewright.config.ranges import check_ranges
from tunewright.config.schema import STRATEGIES, Launcher, Mix, Source
from tunewright.errors import ConfigError, did_you_mean
from tunewright.plan.batch_plan import BatchPlan, batch_plan
from tunewright.plan.deepspeed_rules import check_deepspeed
from tunewright.plan.devices import Devices
from tunewright.plan.method_rules import SHORTEST, check_method
from tunewright.plan.support import PARTITIONED, Combination, support_of
from tunewright.plugins import chosen

CPU_RANKS = 2
MOST_COPIES = 10_000  # of a row in an epoch
EMBEDDED = "tiny"  # the model that is built here
HUB_ID = r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w([\w.-]{0,94}\w)?"  # of a model
# transformers' names that need no settings or packages beyond ours; kept here to be checked without importing it.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit",
    "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
)  # fmt: skip


def world_size(config: DictConfig, devices: Devices) -> int:
    """Return how many ranks the configuration starts on this machine."""
    if config.cluster.num_processes is not None:
        return int(config.cluster.num_processes)
    if config.strategy.launcher is Launcher.single:
        return 1
    return devices.count if devices.gpu else CPU_RANKS


def check(config: DictConfig, devices: Devices) -> BatchPlan:
    """Refuse what cannot work and return the batch plan of what can.

    Raises:
        ConfigError: with the reason and the alternative.
    """
    check_ranges(config)
    ranks = world_size(config, devices)
    _check_strategy(config, devices, ranks)
    support = support_of(combination_of(config, devices))
    if support.outcome == "refused":
        raise ConfigError(support.reason + _whose_strategy(config))
    check_method(config)
    _check_checkpointing(config)
    _check_compile(config, devices)
    _check_names(config)
    _check_held_out(config)
    _check_model(config)
    _check_data(config)
    _check_flat_rows(config)
    plan = batch_plan(config.train, ranks, cutoff_len=config.data.cutoff_len, packing=config.data.packing)
    if config.strategy.launcher is Launcher.deepspeed:
        check_deepspeed(config, plan, devices.gpu)
    return plan


def _whose_strategy(config: DictConfig) -> str:
    """Say which file makes the strategy that a refusal speaks of, where it is not the shipped one."""
    if config.strategy.launcher is not Launcher.deepspeed:
        return ""
    file = deepspeed_file(config)
    return "" if file.shipped else f" ({file.path} makes it {file.strategy}.)"


def _check_flat_rows(config: DictConfig) -> None:
    """What decides by their tokens which rows train together needs rows without padding whose lengths are known."""
    keys = counted_in_tokens(config)
    for key in keys:
        if config.method.name in PROMPT_LEARNING:
            raise ConfigError(
                f"`{key}` does not go with method={config.method.name}: its virtual tokens go before each row of a "
                f"padded batch. Leave {key} out."
            )
        for other, set_ in (
            ("train.padding_free=false", not config.train.padding_free),
            ("data.streaming=true", config.data.streaming),
            ("train.group_by_length=true", config.train.group_by_length),
        ):
            if set_:
                raise ConfigError(f"`{key}` does not go with `{other}`: choose one.")
    if len(keys) > 1:
        raise ConfigError(
            "`data.packing` and `train.tokens_per_batch` both fill batches with tokens: choose one. Packing counts "
            "packs of data.cutoff_len tokens, so train.global_batch_size says how many tokens a step has."
        )


def counted_in_tokens(config: DictConfig) -> list[str]:
    """Return the settings that are on and let tokens decide which rows train together."""
    on = {"data.packing": config.data.packing, "train.tokens_per_batch": config.train.tokens_per_batch}
    return [key for key, value in on.items() if value]


def combination_of(config: DictConfig, devices: Devices) -> Combination:
    """Return the combination of the support table that a configuration falls into."""
    method = config.method
    return Combination(
        method=method.name,
        bits=method.bits if method.name == "qlora" else 16,
        strategy=_known_strategy(config),
        layout="padding-free" if config.train.padding_free else "padded",
        device=devices.kind,
        init=method.init.value if "init" in method else "default",
    )


def _known_strategy(config: DictConfig) -> str:
    """Return the shipped strategy that runs: its DeepSpeed JSON decides, whatever the strategy is called."""
    launcher = config.strategy.launcher
    return deepspeed_file(config).strategy if launcher is Launcher.deepspeed else str(launcher.value)


def _check_strategy(config: DictConfig, devices: Devices, ranks: int) -> None:
    strategy = config.strategy
    if strategy.launcher is Launcher.single and ranks != 1:
        raise ConfigError(
            f"`strategy=single` runs one process, but `cluster.num_processes` is {ranks}. Use strategy=ddp or "
            f"strategy=zero2 for {ranks} ranks."
        )
    if devices.gpu and ranks > devices.count:
        raise ConfigError(
            f"`cluster.num_processes` is {ranks}, but {devices.count} GPUs are visible. Write {devices.count} or less, "
            f"or check CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES."
        )
    if strategy.launcher is not Launcher.deepspeed and strategy.deepspeed is not None:
        raise ConfigError(
            f"`strategy.deepspeed` is '{strategy.deepspeed}', and `strategy={strategy.name}` starts no DeepSpeed: use "
            f"strategy=zero2, or leave strategy.deepspeed out."
        )
    if strategy.name in STRATEGIES and strategy.name != _known_strategy(config):
        raise ConfigError(
            f"`strategy.name` is '{strategy.name}', and `strategy.launcher={strategy.launcher.value}` starts another: "
            f"write strategy={_known_strategy(config)}, or a name of your own."
        )


def _check_checkpointing(config: DictConfig) -> None:
    value = config.train.gradient_checkpointing
    if value not in (True, False, "auto"):
        raise ConfigError(f"`train.gradient_checkpointing` is '{value}': write true, false or auto.")
    if value == "auto" and config.data.streaming:
        raise ConfigError(
            "`train.gradient_checkpointing=auto` looks at the longest rows, which nobody knows of a stream "
            "(`data.streaming=true`): write true or false."
        )


def _check_compile(config: DictConfig, devices: Devices) -> None:
    """torch.compile writes C++ for a CPU, and for a GPU the code that starts kernels: both need a compiler."""
    if not config.train.compile:
        return
    if _known_strategy(config) in PARTITIONED:
        raise ConfigError(
            f"`train.compile` compiles a layer as a whole, and under `strategy={config.strategy.name}` DeepSpeed "
            f"gathers the weights of its parts one by one. Use strategy=zero2 or strategy=ddp, or leave train.compile "
            f"out."
        )
    variable, usual = ("CC", ["gcc", "clang"]) if devices.gpu else ("CXX", ["g++"])
    names = os.environ.get(variable, "").split()[:1] or usual
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"`train.compile` needs a compiler, and {' or '.join(names)} is not on this machine: install it, name one "
            f"with the variable {variable}, or leave train.compile out."
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise ConfigError(
            "`train.compile` needs Python's header files, and this Python has none: install them (python3-dev), or "
            "leave train.compile out."
        )


def _check_names(config: DictConfig) -> None:
    train = config.train
    for key, value, names in (
        ("train.scheduler", train.scheduler, SCHEDULERS),
        ("train.optimizer", train.optimizer, OPTIMIZERS),
    ):
        if value not in names:
            raise ConfigError(f"`{key}` is '{value}'.{did_you_mean(value, names)} Choices: {', '.join(names)}.")
    if train.loss is not None:
        chosen("loss", "train.loss", train.loss)
    for name in train.callbacks:
        chosen("callback", "train.callbacks", name)
    if train.scheduler == "polynomial" and train.learning_rate <= POLYNOMIAL_END:
        raise ConfigError(
            f"`train.learning_rate` is {train.learning_rate:g}, and `train.scheduler=polynomial` falls to "
            f"{POLYNOMIAL_END:g}: write a higher rate, or train.scheduler=linear."
        )


def needs_held_out(config: DictConfig) -> str | None:
    """Return a setting that looks at held-out rows, or None."""
    wanted = {key: config.train[key] for key in ("keep_best", "early_stopping", "eval_steps")}
    return next((f"train.{key}" for key, value in wanted.items() if value), None)


def _check_held_out(config: DictConfig) -> None:
    train, data = config.train, config.data
    key = needs_held_out(config)
    if key and not (data.eval_names or data.eval_split or data.eval_size):
        raise ConfigError(
            f"`{key}` looks at the eval loss, and nothing is held out: set data.eval_size, data.eval_names or "
            f"data.eval_split, or write {key}={'false' if train[key.rpartition('.')[2]] is True else 'null'}."
        )
    for key, on in (("keep_best", train.keep_best), ("early_stopping", train.early_stopping)):
        if on and train.eval_steps is None:
            raise ConfigError(f"`train.{key}` compares evaluations: set train.eval_steps.")
    if train.keep_best and train.save_steps and train.save_steps != train.eval_steps:
        raise ConfigError(
            f"`train.save_steps` is {train.save_steps} and `train.eval_steps` {train.eval_steps}: `train.keep_best` "
            f"needs a checkpoint of each evaluation. Write the same number, or leave train.save_steps out."
        )


def _check_model(config: DictConfig) -> None:
    model = config.model
    if model.source is Source.embedded and model.path != EMBEDDED:
        raise ConfigError(
            f"`model.path` is '{model.path}', and `model.source=embedded` builds {EMBEDDED} on this machine: write "
            f"model=folder model.path=... for a folder, with model.source=hub for a model of the Hub."
        )
    if model.revision is not None and model.source in (Source.embedded, Source.folder):
        raise ConfigError(
            f"`model.revision` is '{model.revision}', and `model.source={model.source.value}` has no revisions: leave "
            f"it out."
        )
    if model.template:
        template_text(model.template)
    if model.source in (Source.hub, Source.modelscope) and not re.fullmatch(HUB_ID, model.path):
        raise ConfigError(
            f"`model.path` is '{model.path}', which is no name on a hub (ORG/NAME): for a folder write model=folder "
            f"model.path=..., or model.source=folder."
        )
    for key, example in (("template_kwargs", "{enable_thinking: false}"), ("architecture", "{model_type: qwen2}")):
        if not isinstance(model[key], (DictConfig, type(None))):
            raise ConfigError(f"`model.{key}` is {model[key]!r}: write a mapping such as {example}.")


def _check_data(config: DictConfig) -> None:
    data, train = config.data, config.train
    if not data.cache_dir.strip():
        raise ConfigError("`data.cache_dir` is empty: write a folder, for example ~/.cache/tunewright.")
    if data.cutoff_len < SHORTEST:
        raise ConfigError(f"`data.cutoff_len` is {data.cutoff_len}: write a number of tokens from {SHORTEST}.")
    if data.train_on_prompt and data.mask_history:
        raise ConfigError(
            "`data.train_on_prompt` and `data.mask_history` are both true: one learns every token, the other only the "
            "last answer. Set one of them to false."
        )
    held = [key for key in ("eval_names", "eval_split", "eval_size") if data[key]]
    if len(held) > 1:
        raise ConfigError(
            f"{' and '.join(f'`data.{key}`' for key in held)} each say what is held out: keep one of them."
        )
    most = MOST_COPIES if data.mix is Mix.concat else math.inf
    right = all(0 < weight <= most and math.isfinite(weight) for weight in data.weights)
    if data.weights and not (right and len(data.weights) == len(data.names)):
        raise ConfigError(
            f"`data.weights` is {list(data.weights)}: write one positive number for each of the {len(data.names)} "
            f"datasets of `data.names`" + (f", at most {most:,} with data.mix=concat." if most < math.inf else ".")
        )
    if not data.streaming:
        return
    if train.max_steps is None:
        raise ConfigError("`data.streaming` is true, so nobody knows how long an epoch is: set train.max_steps.")
    for key in ("eval_size", "max_samples"):
        if data[key]:
            raise ConfigError(
                f"`data.{key}` counts rows, which `data.streaming=true` does not do before training: leave it out"
                + (", and hold rows out with data.eval_names or data.eval_split." if key == "eval_size" else ".")
            )
    if len(data.names) > 1 and data.mix is Mix.concat:
        raise ConfigError(
            "`data.mix` is concat, which would stream one dataset after the other: choose interleave_under, "
            "interleave_over or interleave_once."
        )
