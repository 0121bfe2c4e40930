"""What makes a run this run: the settings that decide what is trained, and those that may change when it continues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tunewright.config.schema import Config
from tunewright.plugins import PLUGINS
from tunewright.redaction import redact_tree
from tunewright.trees import flatten

# What may change when a run continues, in three kinds. Everything else decides what is trained, and is compared.
# Where and how to run; not written down.
OPERATIONAL = {
    "name",
    "output_root",
    "resume",
    "resume_allow",
    "automatic",
    "overwrite",
    "trust",
    "imports",
    "data.dir",
    "data.root",
    "data.cache_dir",
    "data.workers",
    "data.max_dropped",
    "data.allow_outside",
    "offline",
    "model.path",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.mirror",
    "train.timeout_minutes",
    "train.grace_seconds",
    "cluster.num_processes",
    "cluster.threads_per_process",
}
# How long, by which ranks, and with which memory; written down.
ADJUSTABLE = {
    "strategy.name",
    "strategy.launcher",
    "strategy.deepspeed",
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.compile",
    "train.fused_layers",
    "train.attention_kernel",
    "train.cross_entropy",
    "train.callbacks",
}
# What the model is called, where `inputs` has the digest of its files; written down.
CALLED = {"model.name", "model.source", "model.revision"}


def identity(config: DictConfig) -> dict[str, Any]:
    """Return the settings that decide what a run trains, flat; two runs with the same ones are the same run."""
    tree = redact_tree(OmegaConf.to_container(config, enum_to_str=True))
    return {key: value for key, value in flatten(tree) if key not in OPERATIONAL}


def differing_settings(manifest: Mapping[str, Any], config: DictConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, there, now) of each setting that makes another run of the one that wrote a manifest."""
    schema = OmegaConf.structured(Config)
    schema.method = OmegaConf.structured(PLUGINS.method_settings()[config.method.name])
    now = identity(config)
    # A setting that is newer than the manifest had its default value.
    defaults = {key: value for key, value in flatten(OmegaConf.to_container(schema, enum_to_str=True)) if key in now}
    before = {**defaults, **manifest["identity"]}
    changeable = OPERATIONAL | ADJUSTABLE | (CALLED if "inputs" in manifest else set())
    keys = sorted({*before, *now} - changeable)
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def table(differing: Iterable[tuple[str, Any, Any]]) -> str:
    """Return lines that say what is different."""
    return "\n".join(f"  {key}: there {_shown(there)}, now {_shown(now)}" for key, there, now in differing)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and " " in value else repr(value)
