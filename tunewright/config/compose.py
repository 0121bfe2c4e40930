"""From a command line to one checked configuration, with errors that name the key, the value and where it came from.

Hydra composes; the data classes of `schema` give every group its types. What goes wrong is said in the user's terms
and as a `ConfigError`; nothing here starts a process or imports torch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, TextIO

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException, ValidationError

from tunewright.config import schema
from tunewright.config.deepspeed_file import follow_file
from tunewright.config.method_schema import LoraConfig
from tunewright.errors import ConfigError, closest, did_you_mean
from tunewright.plugins import PLUGINS
from tunewright.redaction import hide_credentials, name_variables, redact
from tunewright.shipped import shipped
from tunewright.trust import check_ours

CONFIG_DIR = shipped("configs") / "hydra"


def _register_schema() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=schema.Config)
    for name, cls in PLUGINS.method_settings().items():
        store.store(group="schema/method", name=name, node=cls)
    for name, method in PLUGINS.methods.items():  # which have no file of their own
        store.store(group="method", name=name, node=method.settings)


# `${short:hub:org/name}` is "name", `${short:data/mine.jsonl}` is "mine": datasets in run names.
OmegaConf.register_new_resolver("short", lambda name: PurePath(name.rpartition(":")[2]).stem, replace=True)


def choices(group: str, config_dir: Path = CONFIG_DIR) -> list[str]:
    """Return the names that can be chosen in a group, sorted."""
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def check_extra_dir(extra_dir: Path | None) -> None:
    """Raise ConfigError where `--config-dir` is no folder, or holds a choice that Hydra would never read."""
    if extra_dir is None:
        return
    if not extra_dir.is_dir():
        found = "a file" if extra_dir.is_file() else "not there"
        raise ConfigError(
            f"`--config-dir` is {extra_dir}, which is {found}: write a folder with groups of your own, for example "
            f"{extra_dir.with_suffix('')}/train/mine.yaml, and choose from it with train=mine."
        )
    for group in schema.GROUPS:
        for name in sorted({*choices(group, extra_dir)} & {*choices(group)}):
            raise ConfigError(
                f"{extra_dir / group / name}.yaml has the name of a shipped choice, which `{group}={name}` means: give "
                f"it another name."
            )


def expand_sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield one list of overrides for each point of a sweep: `a=1,2 b=x` gives `a=1 b=x` and `a=2 b=x`."""
    axes = []
    for parsed in _parse_overrides(overrides):
        if parsed.is_sweep_override():
            axes.append([f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()])
        else:
            axes.append([parsed.input_line or ""])
    for point in itertools.product(*axes):
        yield list(point)


def load_plugins(overrides: Sequence[str]) -> list[Override]:
    """Load the plug-ins that are installed and those that are typed as `imports=[...]`; return the overrides, parsed.

    Raises:
        ConfigError: see `Plugins.load`; or bad syntax.
    """
    parsed = _parse_overrides(overrides)
    PLUGINS.load(_typed_imports(parsed))
    _register_schema()
    return parsed


def compose_config(overrides: Sequence[str] = (), extra_dir: Path | None = None) -> DictConfig:
    """Compose, type-check and resolve a configuration.

    Args:
        overrides: Hydra overrides such as `strategy=zero2` or `train.epochs=1`.
        extra_dir: a folder with groups of the user's own, searched after the shipped ones.

    Raises:
        ConfigError: unknown key or choice, wrong type, missing value or bad syntax.
    """
    check_extra_dir(extra_dir)
    parsed = load_plugins(overrides)
    for item in parsed:
        if item.is_sweep_override():
            raise ConfigError(
                f"`{item.input_line}` gives several values. Use --multirun to train one run for each, "
                f"or write a list as {item.get_key_element()}=[...]."
            )
        if (item.is_add() or item.is_force_add()) and item.key_or_group not in _known_keys(parsed):
            # Hydra's `+key=value` would add a key that nothing reads.
            raise _unknown_key(item.key_or_group, parsed, extra_dir)
    search = [f"hydra.searchpath=[file://{extra_dir.resolve()}]"] if extra_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            config = compose("config", overrides=[*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, parsed, extra_dir) from error
    _check_missing(config)
    if not config.data.names:
        raise ConfigError("`data.names` is empty: name at least one dataset, for example data.names=[demo].")
    if config.strategy.launcher is schema.Launcher.deepspeed:
        follow_file(config)  # before the run is named after its strategy
    try:
        OmegaConf.resolve(config)
    except InterpolationResolutionError as error:
        raise ConfigError(f"A value refers to a setting that is not there: {_first_line(error)}.") from error
    _refuse_secrets(config)
    _check_trust(config, parsed)
    return config


def _manifest_beside(config_file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((config_file.parent / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _typed_imports(overrides: list[Override]) -> list[str]:
    """Return the modules to load before anything is composed, for a plug-in's names are choices of groups."""
    value = next((item.value() for item in reversed(overrides) if item.key_or_group == "imports"), None)
    return [str(name) for name in value] if isinstance(value, list) else []


def _check_trust(config: DictConfig, overrides: list[Override]) -> None:
    """What runs code of others is typed each time: a file of settings may come from anywhere."""
    if list(config.imports) != _typed_imports(overrides):
        origin, _ = _origin("imports", overrides, None)
        raise ConfigError(
            f"`imports` is {list(config.imports)} ({origin}): Python code that would be run. Write imports=[...] on "
            f"the command line; in a file of settings it does not count."
        )
    typed = {item.key_or_group for item in overrides}
    for item in overrides:
        if isinstance(value := item.value(), dict):
            typed |= {f"{item.key_or_group}.{key}" for key in value}
    for key, on in (("model.trust_remote_code", config.model.trust_remote_code), ("trust", config.trust)):
        if on and key not in typed:
            origin, _ = _origin(key, overrides, None)
            raise ConfigError(
                f"`{key}` is true ({origin}): code that comes with a model or checkpoint would be run here. Write "
                f"{key}=true on the command line if that is what you want; in a file of settings it does not count."
            )


def _refuse_secrets(config: DictConfig) -> None:
    """Refuse a secret as such in a setting: config.yaml could not both be read by the ranks and be shown to others."""
    for key, value in flatten(OmegaConf.to_container(config)):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and hide_credentials(text := name_variables(text)) != text:
                raise ConfigError(
                    f"`{key}` holds a password or key, {hide_credentials(text)!r}, and settings are written down. Put "
                    f"it into an environment variable, for example MY_TOKEN, and write ${{oc.env:MY_TOKEN}} in its "
                    f"place."
                )
    if redact(config.name) != config.name:
        raise ConfigError("`name` holds the value of a secret variable, and a folder's name is seen by everyone.")


def load_config(source: Path | TextIO, *, trusted: bool = False) -> DictConfig:
    """Read a resolved configuration, a run's config.yaml for example, and give it its types back.

    Secrets are references to environment variables in it, and take their values here. Modules that it imports are
    loaded, those of a run's folder only where it is this user's own or `trusted`.

    Raises:
        ConfigError: no such file, it does not fit this version's settings, or it refers to a variable that is not set.
    """
    try:
        raw = OmegaConf.load(source)
        config = OmegaConf.merge(OmegaConf.structured(schema.Config), raw)
        assert isinstance(config, DictConfig)
        if config.imports and isinstance(source, Path):
            check_ours(source, _manifest_beside(source), trusted=trusted, how="--trust")
        PLUGINS.load(config.imports)
        settings = PLUGINS.method_settings()[config.method.name]
        config.method = OmegaConf.merge(OmegaConf.structured(settings), config.method)
        OmegaConf.resolve(config)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no run configuration at {source}.") from error
    except InterpolationResolutionError as error:
        raise ConfigError(f"{source} refers to what is not set here: {_first_line(error)}.") from error
    except (OmegaConfBaseException, yaml.YAMLError, KeyError) as error:
        raise ConfigError(f"{source} does not fit this version's settings: {_first_line(error)}") from error
    return config


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        key, _, value = (error.override or "").partition("=")
        hint = f" Text with other letters or signs goes into quotes: '{key}=\"{value}\"'." if value else ""
        raise ConfigError(
            f"Cannot read `{error.override}`: {_first_line(error)} Write overrides as key=value, "
            f"for example train.learning_rate=1e-4 or data.names=[demo].{hint}"
        ) from error


def _explain(error: Exception, overrides: list[Override], extra_dir: Path | None) -> ConfigError:
    """Turn an error of Hydra or OmegaConf into one that names key, value, origin and the closest valid name."""
    # Hydra names OmegaConf's error as the cause for an override, and raises "from None" for a file.
    chain = (error.__cause__, error.__context__)
    cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), error)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error, overrides)
    key = str(getattr(cause, "full_key", None) or "")
    if isinstance(cause, ConfigKeyError) or "Could not override" in str(error) or "Could not append" in str(error):
        quoted = re.search(r"Could not (?:override|append to config\.) '([^']+)'", str(error))
        return _unknown_key(key or (quoted.group(1) if quoted else ""), overrides, extra_dir)
    if isinstance(cause, ValidationError):
        origin, value = _origin(key, overrides, extra_dir)
        return ConfigError(f"`{key}` is {value!r} ({origin}): {_expected(cause, key)}")
    return ConfigError(_first_line(error))


def _unknown_choice(error: MissingConfigException, overrides: list[Override]) -> ConfigError:
    missing = error.missing_cfg_file or ""
    group, _, name = missing.rpartition("/")
    if not group:
        return ConfigError(_first_line(error))
    options = [option for option in error.options or choices(group) if not option.startswith("schema")]
    origin, _ = _origin(group, overrides, None)
    return ConfigError(
        f"`{group}` has no choice '{name}' ({origin}).{did_you_mean(name, options)} Choices: {', '.join(options)}."
    )


def _unknown_key(key: str, overrides: list[Override], extra_dir: Path | None) -> ConfigError:
    top, _, rest = key.partition(".")
    origin, value = _origin(key, overrides, extra_dir)
    shown = "" if value is None else f" = {value!r}"
    known = _known_keys(overrides)
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


def _known_keys(overrides: list[Override]) -> list[str]:
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
    text = _first_line(cause)
    enum = re.search(r"expected one of \[([^\]]*)\]", text)
    if enum:
        valid = [name.strip() for name in enum.group(1).split(",")]
        found = re.search(r"Invalid value '([^']*)'", text)
        return f"write one of {', '.join(valid)}.{did_you_mean(found.group(1), valid) if found else ''}"
    wanted = re.search(r"could not be converted to (\w+)", text)
    if wanted:
        example = {"Float": "a number such as 1e-4", "Integer": "a whole number such as 8", "Boolean": "true or false"}
        return f"write {example.get(wanted.group(1), wanted.group(1))}."
    if "not a list" in text or "ListConfig" in text:
        return f"write a list such as {key}=[one,two]."
    return text


def _origin(key: str, overrides: list[Override], extra_dir: Path | None) -> tuple[str, Any]:
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


def _check_missing(config: DictConfig) -> None:
    missing = [key for key, value in flatten(OmegaConf.to_container(config)) if value == "???"]
    if missing:
        examples = {"data.names": "data.names=[demo]", "model.path": "model.path=/models/mine"}
        parts = [f"`{key}` (for example {examples.get(key, key + '=...')})" for key in missing]
        raise ConfigError(f"No value for {' and '.join(parts)}.")


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each leaf of nested mappings; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
