"""What is wrong with overrides, in the user's terms: key, value, where it was set, and the closest valid name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from tunewright.config import schema
from tunewright.config.choices import CONFIG_DIR, choices
from tunewright.config.method_schema import LoraConfig
from tunewright.errors import ConfigError, closest, did_you_mean, first_line
from tunewright.plugins import PLUGINS


def explain(error: Exception, overrides: list[Override], extra_dir: Path | None) -> ConfigError:
    """Turn an error of Hydra or OmegaConf into one that names key, value, origin and the closest valid name."""
    # Hydra names OmegaConf's error as the cause for an override, and raises "from None" for a file.
    chain = (error.__cause__, error.__context__)
    cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), error)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error, overrides)
    key = str(getattr(cause, "full_key", None) or "")
    if isinstance(cause, ConfigKeyError) or "Could not override" in str(error) or "Could not append" in str(error):
        quoted = re.search(r"Could not (?:override|append to config\.) '([^']+)'", str(error))
        return unknown_key(key or (quoted.group(1) if quoted else ""), overrides, extra_dir)
    if isinstance(cause, ValidationError):
        origin, value = origin_of(key, overrides, extra_dir)
        return ConfigError(f"`{key}` is {value!r} ({origin}): {_expected(cause, key)}")
    return ConfigError(first_line(error))


def _unknown_choice(error: MissingConfigException, overrides: list[Override]) -> ConfigError:
    missing = error.missing_cfg_file or ""
    group, _, name = missing.rpartition("/")
    if not group:
        return ConfigError(first_line(error))
    options = [option for option in error.options or choices(group) if not option.startswith("schema")]
    origin, _ = origin_of(group, overrides, None)
    return ConfigError(
        f"`{group}` has no choice '{name}' ({origin}).{did_you_mean(name, options)} Choices: {', '.join(options)}."
    )


def unknown_key(key: str, overrides: list[Override], extra_dir: Path | None) -> ConfigError:
    top, _, rest = key.partition(".")
    origin, value = origin_of(key, overrides, extra_dir)
    shown = "" if value is None else f" = {value!r}"
    known = known_keys(overrides)
    siblings = [name for name in known if name.startswith(f"{top}.")]
    # A right key in a wrong group (`learning_rate` for `train.learning_rate`) is closer than a similar spelling.
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    match = same_leaf[0] if same_leaf else closest(key, known)
    if not same_leaf and siblings:
        near = closest(rest, [name.partition(".")[2] for name in siblings])
        match = f"{top}.{near}" if near else None
    if match:
        hint = f" Did you mean '{match}'?"
    elif siblings:
        hint = f" `{top}` has: {', '.join(siblings)}."
    else:
        hint = " `tunewright config --keys` lists them."
    return ConfigError(f"There is no setting `{key}`{shown} ({origin}).{hint}")


def known_keys(overrides: list[Override]) -> list[str]:
    """Every settable key, with the keys of the chosen method."""
    chosen = next((str(item.value()) for item in overrides if item.key_or_group == "method"), "lora")
    groups: dict[str, type] = {
        "model": schema.ModelConfig,
        "data": schema.DataConfig,
        "method": PLUGINS.method_settings().get(chosen, LoraConfig),
        "strategy": schema.StrategyConfig,
        "train": schema.TrainConfig,
        "cluster": schema.ClusterConfig,
    }
    keys = [f"{group}.{key}" for group, cls in groups.items() for key in schema.help_of(cls)]
    keys += [key for key in schema.help_of(schema.Config) if key not in groups]
    return keys + list(schema.GROUPS)


def _expected(cause: ValidationError, key: str) -> str:
    text = first_line(cause)
    enum = re.search(r"expected one of \[([^\]]*)\]", text)
    if enum:
        valid = [name.strip() for name in enum.group(1).split(",")]
        found = re.search(r"Invalid value '([^']*)'", text)
        return f"write one of {', '.join(valid)}.{did_you_mean(found.group(1), valid) if found else ''}"
    wanted = re.search(r"could not be converted to (\w+)", text)
    if wanted:
        example = {"Float": "a number such as 1e-4", "Integer": "a whole number such as 8", "Boolean": "true or false"}
        return f"write {example.get(wanted.group(1), wanted.group(1))}."
    either = re.search(r"type hint 'Union\[(int|bool), str\]'", text)
    if either:
        return f"write {'true, false' if either.group(1) == 'bool' else 'a whole number such as 8,'} or auto."
    if "not a list" in text or "ListConfig" in text:
        return f"write a list such as {key}=[one,two]."
    return text


def origin_of(key: str, overrides: list[Override], extra_dir: Path | None) -> tuple[str, Any]:
    """Return where `key` was set ("command line" or a file) and the value found there."""
    for item in reversed(overrides):
        whole = item.key_or_group == key
        if whole or (key.startswith(f"{item.key_or_group}.") and isinstance(item.value(), dict)):
            return f"command line: {item.input_line}", item.value() if whole else None
    # Not on the command line: look into the chosen files, last one first, as Hydra merges them.
    chosen = {item.key_or_group: str(item.value()) for item in overrides if "." not in item.key_or_group}
    top, _, rest = key.partition(".")
    candidates = [("experiment", chosen["experiment"], key)] if "experiment" in chosen else []
    if top in schema.GROUPS:
        candidates.append((top, chosen.get(top, ""), rest))
    for group, choice, path in candidates:
        for root in filter(None, (extra_dir, CONFIG_DIR)):
            for file in sorted((root / group).glob(f"{choice or '*'}.yaml")):
                found, value = _lookup(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, path)
                if found:
                    return f"file {file}", value
    return "default", None


def _lookup(tree: Any, path: str) -> tuple[bool, Any]:
    for part in filter(None, path.split(".")):
        if not isinstance(tree, dict) or part not in tree:
            return False, None
        tree = tree[part]
    return True, tree
