"""From a command line to one checked configuration, with errors that name the key, the value and where it came from.

Hydra composes; the data classes of `schema` give every group its types. What goes wrong is said in the user's terms
and as a `ConfigError`; nothing here starts a process or imports torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, TextIO

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from tunewright.config import schema
from tunewright.config.choices import CONFIG_DIR, check_extra_dir
from tunewright.config.deepspeed_file import follow_file
from tunewright.config.mistakes import explain, known_keys, unknown_key
from tunewright.config.untrusted import check_trust, refuse_secrets, typed_imports
from tunewright.errors import ConfigError, first_line
from tunewright.plan.auto import Choose, plain_choice, settle
from tunewright.plugins import PLUGINS
from tunewright.trees import flatten
from tunewright.trust import check_ours


def _register_schema() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=schema.Config)
    for name, cls in PLUGINS.method_settings().items():
        store.store(group="schema/method", name=name, node=cls)
    for name, method in PLUGINS.methods.items():  # which have no file of their own
        store.store(group="method", name=name, node=method.settings)


# `${short:hub:org/name}` is "name", `${short:data/mine.jsonl}` is "mine": datasets in run names.
OmegaConf.register_new_resolver("short", lambda name: PurePath(name.rpartition(":")[2]).stem, replace=True)


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
    PLUGINS.load(typed_imports(parsed))
    _register_schema()
    return parsed


def compose_config(
    overrides: Sequence[str] = (),
    extra_dir: Path | None = None,
    choose: Choose | None = plain_choice,
) -> DictConfig:
    """Compose, type-check and resolve a configuration.

    Args:
        overrides: Hydra overrides such as `strategy=zero2` or `train.epochs=1`.
        extra_dir: a folder with groups of the user's own, searched after the shipped ones.
        choose: what to put in the place of settings that are `auto`; None leaves them so.

    Raises:
        ConfigError: unknown key or choice, wrong type, missing value or bad syntax; or what `choose` raises.
    """
    check_extra_dir(extra_dir)
    # `resume=auto` is a value, so hydra knows no key below it; what goes with it is typed like one all the same.
    overrides = [item.replace("resume.allow=", "resume_allow=", 1) for item in overrides]
    parsed = load_plugins(overrides)
    for item in parsed:
        if item.key_or_group.startswith("resume."):
            raise ConfigError(
                f"There is no setting `{item.key_or_group}`: write resume=auto, and resume_allow=[data] for what may "
                f"differ."
            )
        if item.is_sweep_override():
            raise ConfigError(
                f"`{item.input_line}` gives several values. Use --multirun to train one run for each, "
                f"or write a list as {item.get_key_element()}=[...]."
            )
        if (item.is_add() or item.is_force_add()) and item.key_or_group not in known_keys(parsed):
            # Hydra's `+key=value` would add a key that nothing reads.
            raise unknown_key(item.key_or_group, parsed, extra_dir)
    search = [f"hydra.searchpath=[file://{extra_dir.resolve()}]"] if extra_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            config = compose("config", overrides=[*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, parsed, extra_dir) from error
    _check_missing(config)
    if not config.data.names:
        raise ConfigError("`data.names` is empty: name at least one dataset, for example data.names=[demo].")
    if config.strategy.launcher is schema.Launcher.deepspeed:
        follow_file(config)  # before the run is named after its strategy
    if config.strategy.launcher is schema.Launcher.auto and config.strategy.deepspeed:
        raise ConfigError(
            f"`strategy.deepspeed` is '{config.strategy.deepspeed}', and `strategy=auto` may choose without it: write "
            f"strategy.launcher=deepspeed too, or leave it out."
        )
    if choose:
        _resolved(config.copy(), parsed)  # `choose` may ask other processes, and they get nothing that is refused
        settle(config, choose)  # before the run is named after what is chosen
    return _resolved(config, parsed)


def _resolved(config: DictConfig, overrides: list[Override]) -> DictConfig:
    """Resolve a configuration, and refuse what would show a secret, run others' code, or judge other data.

    Raises:
        ConfigError: so it is, or a value refers to a setting that is not there, or to a home that nobody has.
    """
    try:
        OmegaConf.resolve(config)
    except InterpolationResolutionError as error:
        raise ConfigError(f"A value refers to a setting that is not there: {first_line(error)}.") from error
    cache = config.data.cache_dir
    try:
        Path(cache).expanduser()
    except RuntimeError as error:  # a container's user number that no account has
        raise ConfigError(
            f"`data.cache_dir` is {cache}, and there is no such home folder: export HOME, or name a folder with "
            f"TUNEWRIGHT_CACHE or data.cache_dir."
        ) from error
    _check_preset(config, overrides)
    refuse_secrets(config)
    check_trust(config, overrides)
    return config


def _check_preset(config: DictConfig, overrides: list[Override]) -> None:
    """Refuse other data under what is set for the shipped task, which would be judged by the rows of that task."""
    typed = {item.key_or_group for item in overrides}
    if "data.names" in typed and not typed & {"data", "data.eval_names", "experiment"}:
        held_out = [name for name in config.data.eval_names if f"{name}".removesuffix("_eval") not in config.data.names]
        if held_out:
            raise ConfigError(
                f"`data.names` is {list(config.data.names)}, and `data.eval_names` is still {held_out}, of data=demo: "
                f"write data=registry before data.names for data of your own, or say what is held out "
                f"(data.eval_names=[])."
            )


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
        raise ConfigError(f"{source} refers to what is not set here: {first_line(error)}.") from error
    except (OmegaConfBaseException, yaml.YAMLError, KeyError) as error:
        raise ConfigError(f"{source} does not fit this version's settings: {first_line(error)}") from error
    return config


def _manifest_beside(config_file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((config_file.parent / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        key, _, value = (error.override or "").partition("=")
        hint = f" Text with other letters or signs goes into quotes: '{key}=\"{value}\"'." if value else ""
        raise ConfigError(
            f"Cannot read `{error.override}`: {first_line(error)}. Write overrides as key=value, "
            f"for example train.learning_rate=1e-4 or data.names=[demo].{hint}"
        ) from error


def _check_missing(config: DictConfig) -> None:
    missing = [key for key, value in flatten(OmegaConf.to_container(config)) if value == "???"]
    if missing:
        examples = {"data.names": "data.names=[demo]", "model.path": "model.path=/models/mine"}
        parts = [f"`{key}` (for example {examples.get(key, key + '=...')})" for key in missing]
        raise ConfigError(f"No value for {' and '.join(parts)}.")
