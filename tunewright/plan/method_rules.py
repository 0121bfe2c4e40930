"""What cannot work of a tuning method's settings; config/method_schema.py has the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig

from tunewright.config.method_schema import LoraInit
from tunewright.errors import ConfigError
from tunewright.plugins import PLUGINS

SHORTEST = 16  # tokens of a row: with fewer no question has an answer


def check_method(config: DictConfig) -> None:
    """Check the settings of the method, of a shipped one or a plug-in's.

    Raises:
        ConfigError: they cannot work.
    """
    name = config.method.name
    added = PLUGINS.methods.get(name)
    for check in CHECKS.get(name, [added.check] if added and added.check else []):
        check(config)


def longest_row(config: DictConfig) -> int:
    """Return the most tokens a row may have: `data.cutoff_len` less the virtual tokens before it."""
    return int(config.data.cutoff_len) - int(config.method.get("virtual_tokens", 0))


def _are_names(value: Any) -> bool:
    return isinstance(value, ListConfig) and all(isinstance(name, str) and name for name in value)


def _check_lora(config: DictConfig) -> None:
    method = config.method
    targets = method.target_modules
    if targets != "all-linear" and not _are_names(targets):
        raise ConfigError(
            f"`method.target_modules` is '{targets}': write all-linear or a list such as [q_proj,v_proj]."
        )
    if not targets:
        raise ConfigError("`method.target_modules` is empty: nothing would be trained. Write all-linear or a list.")
    if method.dora and method.init.value.startswith("pissa"):
        raise ConfigError(
            f"`method.dora` and `method.init={method.init.value}` both begin from a split of the base weights: choose "
            f"one."
        )
    if method.adapter and method.init is not LoraInit.default:
        raise ConfigError(
            f"`method.adapter` brings its own values, and `method.init={method.init.value}` would replace them: leave "
            f"method.init out."
        )


def _check_bits(config: DictConfig) -> None:
    if config.method.bits not in (4, 8):
        raise ConfigError(f"`method.bits` is {config.method.bits}: write 4 or 8.")


def _check_ia3(config: DictConfig) -> None:
    method = config.method
    if method.target_modules != "auto" and not (_are_names(method.target_modules) and method.target_modules):
        raise ConfigError(
            f"`method.target_modules` is '{method.target_modules}': write auto or a list such as "
            f"[k_proj,v_proj,down_proj]."
        )
    if method.feedforward_modules and isinstance(method.target_modules, str):
        raise ConfigError("`method.feedforward_modules` needs `method.target_modules` as a list that has them too.")


def _check_freeze(config: DictConfig) -> None:
    if config.method.layers == 0 and not config.method.extra_modules:
        raise ConfigError(
            "`method.layers` is 0 and `method.extra_modules` is empty: nothing would be trained. Write a number of "
            "layers, or name modules."
        )


def _check_row_length(config: DictConfig) -> None:
    method = config.method
    if longest_row(config) < SHORTEST:
        raise ConfigError(
            f"`method.virtual_tokens` is {method.virtual_tokens} and `data.cutoff_len` {config.data.cutoff_len}: the "
            f"virtual tokens count, and {longest_row(config)} are left to a row. Write data.cutoff_len="
            f"{method.virtual_tokens + 256} or fewer virtual tokens."
        )


def _check_init_text(config: DictConfig) -> None:
    text = config.method.init_text
    if text is not None and not text.strip():
        raise ConfigError(
            "`method.init_text` is empty: write the text that the prompt begins as, or null for a random one."
        )


def _check_recomputation(config: DictConfig) -> None:
    if config.train.gradient_checkpointing:
        raise ConfigError(
            "`train.gradient_checkpointing` recomputes layers without the keys and values that `method=prefix_tuning` "
            "learns. Turn it off, or use method=prompt_tuning."
        )


CHECKS: dict[str, list[Callable[[DictConfig], None]]] = {
    "freeze": [_check_freeze],
    "lora": [_check_lora],
    "qlora": [_check_lora, _check_bits],
    "ia3": [_check_ia3],
    "prompt_tuning": [_check_row_length, _check_init_text],
    "p_tuning": [_check_row_length],
    "prefix_tuning": [_check_row_length, _check_recomputation],
}
