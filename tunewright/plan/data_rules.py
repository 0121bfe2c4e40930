"""Which settings of the data, of what is held out, and of batches counted in tokens do not go together."""

from __future__ import annotations

import math

from omegaconf import DictConfig

from tunewright.config.method_schema import PROMPT_LEARNING
from tunewright.config.schema import Mix
from tunewright.errors import ConfigError
from tunewright.plan.method_rules import SHORTEST

MOST_COPIES = 10_000  # of a row in an epoch


def check_data(config: DictConfig) -> None:
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


def needs_held_out(config: DictConfig) -> str | None:
    """Return a setting that looks at held-out rows, or None."""
    wanted = {key: config.train[key] for key in ("keep_best", "early_stopping", "eval_steps")}
    return next((f"train.{key}" for key, value in wanted.items() if value), None)


def check_held_out(config: DictConfig) -> None:
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


def check_flat_rows(config: DictConfig) -> None:
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
