"""Which combinations of settings cannot work, with the reason and what to choose instead.

Every check looks at the configuration and the devices alone, so that all of them run before a rank is started.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.chat_templates import template_text
from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.ranges import check_ranges
from tunewright.config.schema import STRATEGIES, Launcher, Source
from tunewright.errors import ConfigError, did_you_mean
from tunewright.mirror import mirror_of
from tunewright.plan.accumulation import check_accumulation
from tunewright.plan.batch_plan import BatchPlan, batch_plan
from tunewright.plan.data_rules import check_data, check_flat_rows, check_held_out
from tunewright.plan.deepspeed_rules import check_deepspeed
from tunewright.plan.devices import Devices
from tunewright.plan.kernel_rules import check_kernels
from tunewright.plan.method_rules import check_method
from tunewright.plan.support import PARTITIONED, combination_of, known_strategy, support_of
from tunewright.plugins import chosen

CPU_RANKS = 2
EMBEDDED = "tiny"  # the model that is built here
HUB_ID = r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w([\w.-]{0,94}\w)?"  # of a model
# transformers' names that need no settings or packages beyond ours; kept here to be checked without importing it.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends
OPTIMIZERS = (
    "adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit",
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
    check_kernels(config, devices)
    _check_names(config)
    check_held_out(config)
    _check_model(config)
    check_data(config)
    check_flat_rows(config)
    mirror_of(config)
    check_accumulation(config)
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
    if strategy.name in STRATEGIES and strategy.name != known_strategy(config):
        raise ConfigError(
            f"`strategy.name` is '{strategy.name}', and `strategy.launcher={strategy.launcher.value}` starts another: "
            f"write strategy={known_strategy(config)}, or a name of your own."
        )


def _check_checkpointing(config: DictConfig) -> None:
    value = config.train.gradient_checkpointing
    if value not in (True, False):
        raise ConfigError(f"`train.gradient_checkpointing` is '{value}': write true, false or auto.")


def _check_compile(config: DictConfig, devices: Devices) -> None:
    """torch.compile writes C++ for a CPU, and for a GPU the code that starts kernels: both need a compiler."""
    if not config.train.compile:
        return
    if known_strategy(config) in PARTITIONED:
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
