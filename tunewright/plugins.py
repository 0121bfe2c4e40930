"""What is added from outside: tuning methods, data formats, metrics, losses, chat templates and callbacks.

A plug-in is a module with a function `register(plugins)`, which is given an empty `Plugins` to add to:

    def register(plugins):
        plugins.add_metric("length", lambda answer, expected: float(len(answer)))

It is found by an entry point of the group `tunewright.plugins`, which names the module or the function, or by
`imports=[my.module]` in the configuration. Every process that handles a configuration loads the same ones, before
anything is looked up by its name. docs/extending.md has an example of each kind.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass, make_dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig

from tunewright.config.method_schema import METHODS, MethodConfig
from tunewright.config.schema import STRATEGIES, option
from tunewright.errors import ConfigError, TunewrightError, did_you_mean
from tunewright.shipped import shipped

TEMPLATE_DIR = shipped("configs") / "templates"
GROUP = "tunewright.plugins"
REGISTER = "register"
SHIPPED = {
    "method": tuple(METHODS),
    "format": ("alpaca", "sharegpt", "openai", "prompt_completion", "text"),
    "metric": ("exact_match",),
    "loss": (),
    "template": tuple(sorted(path.stem for path in TEMPLATE_DIR.glob("*.jinja"))),
    "callback": (),
}
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Method:
    """A tuning method: its settings, and the model that `build` makes of a base model by them."""

    settings: type[MethodConfig]
    build: Callable[[Any, Any], Any]  # (model, settings) -> the model with what is trained ready to train
    check: Callable[[DictConfig], None] | None  # raises ConfigError for a configuration that cannot work
    strategies: tuple[str, ...]
    padding_free: bool  # whether rows may lie end to end in a batch
    help: str


@dataclass(frozen=True)
class Format:
    """What a row of a dataset means."""

    read: Callable[[Any, Any], Any]  # (row, entry) -> messages, or what trainer/data/formats.py makes of a row
    columns: Mapping[str, str]  # meaning -> column, unless an entry names others
    code: str  # a digest of the module: tokens that another version of it made are not used


@dataclass
class Plugins:
    """What was added, by kind and name."""

    methods: dict[str, Method] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)
    metrics: dict[str, Callable[[str, str], float]] = field(default_factory=dict)
    losses: dict[str, Callable[..., Any]] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    callbacks: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def add_method(
        self,
        name: str,
        build: Callable[[Any, Any], Any],
        *,
        settings: type | None = None,
        check: Callable[[DictConfig], None] | None = None,
        strategies: Iterable[str] = STRATEGIES,
        padding_free: bool = True,
        help: str = "",
    ) -> None:
        """Add the tuning method that `method=NAME` chooses.

        Args:
            build: takes the base model and `config.method`, and returns the model with `requires_grad` set.
            settings: a data class of the keys `method.KEY`, each with a type and a default.
            check: looks at the whole configuration before anything is started, and raises `ConfigError`.
            strategies: the shipped ones under which it can train.
            padding_free: False where it needs a batch with one row for each example.
        """
        strategies = tuple(strategies)
        for strategy in strategies:
            if strategy not in STRATEGIES:
                raise ConfigError(f"Method '{name}': there is no strategy '{strategy}'.")
        if settings is not None and not is_dataclass(settings):
            raise ConfigError(f"Method '{name}': `settings` must be a data class of its keys with their defaults.")
        named = ("name", str, option(name, help))
        schema = make_dataclass(f"{name.title().replace('_', '')}Config", [named], bases=(settings or MethodConfig,))
        self._add("method", name, Method(schema, build, check, strategies, padding_free, help))

    def add_format(
        self, name: str, read: Callable[[Any, Any], Any], *, columns: Mapping[str, str] | None = None
    ) -> None:
        """Add the data format that `"formatting": "NAME"` of a registry's entry chooses.

        Args:
            read: takes a row (a mapping) and its entry, and returns the row's messages, `[{"role", "content"}, ...]`,
                or a `Conversation` or `Plain`; it raises `Unusable` for a row that cannot be learnt from.
            columns: the names that an entry may give its columns, with their defaults: `entry.columns` has them.
        """
        self._add("format", name, Format(read, dict(columns or {}), _digest_of(read)))

    def add_metric(self, name: str, score: Callable[[str, str], float]) -> None:
        """Add a figure of `tunewright evaluate`: the mean of `score(answer, expected)` over the held-out rows."""
        self._add("metric", name, score)

    def add_loss(self, name: str, loss: Callable[..., Any]) -> None:
        """Add the loss that `train.loss=NAME` chooses."""
        self._add("loss", name, loss)

    def add_template(self, name: str, template: str | Path) -> None:
        """Add the chat template that `model.template=NAME` chooses: its Jinja text, or the path of a file."""
        text = template.read_text(encoding="utf-8") if isinstance(template, Path) else template
        self._add("template", name, text)

    def add_callback(self, name: str, make: Callable[[], Any]) -> None:
        """Add what `train.callbacks=[NAME]` calls for a `transformers.TrainerCallback`, for example its class."""
        self._add("callback", name, make)

    def names(self, kind: str) -> tuple[str, ...]:
        """Return what can be named of a kind: the shipped names and the added ones."""
        return (*SHIPPED[kind], *sorted(self._of(kind)))

    def method_settings(self) -> dict[str, type[MethodConfig]]:
        """Return the data class of each method's settings, of the shipped and the added ones."""
        return {**METHODS, **{name: method.settings for name, method in self.methods.items()}}

    def _of(self, kind: str) -> dict[str, Any]:
        return getattr(self, "losses" if kind == "loss" else f"{kind}s")  # type: ignore[no-any-return]

    def _add(self, kind: str, name: str, value: Any) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(f"A {kind} cannot be called {name!r}: write small letters, digits and _.")
        if name in SHIPPED[kind]:
            raise ConfigError(f"The {kind} '{name}' comes with tunewright: give yours another name.")
        if name in self._of(kind):
            raise ConfigError(f"The {kind} '{name}' is added twice.")
        if not (callable(value) or isinstance(value, (Method, Format, str))):
            raise ConfigError(f"The {kind} '{name}' is {type(value).__name__}, which cannot be called.")
        self._of(kind)[name] = value


class Loaded(Plugins):
    """The plug-ins of this process, and where each came from."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[tuple[str, str], str] = {}
        self.found = False  # whether the entry points were loaded

    def load(self, imports: Iterable[str] = ()) -> None:
        """Load the installed plug-ins, and the modules of `imports`.

        The working directory is searched last: nothing in it can stand in the place of an installed module.

        Raises:
            ConfigError: a module cannot be imported, or adds nothing, or a name that there is already.
        """
        if not self.found:
            for point in entry_points(group=GROUP):
                self._register(point.value, f"entry point '{point.name}' of {GROUP}", point.load)
            self.found = True
        for name in imports:
            if not MODULE.fullmatch(str(name)):
                raise ConfigError(
                    f"`imports` names {name!r}: write a module as `import` would, such as my_package.sub."
                )
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
            self._register(name, "`imports`", partial(importlib.import_module, name))

    def _register(self, origin: str, who: str, load: Callable[[], Any]) -> None:
        added = Plugins()
        try:
            loaded = load()
        except Exception as error:
            raise ConfigError(f"{who} names {origin}, which cannot be imported: {_told(error)}.") from error
        register = getattr(loaded, REGISTER, None) if isinstance(loaded, ModuleType) else loaded
        if not callable(register):
            raise ConfigError(
                f"{who} names {origin}, which has no function {REGISTER}(plugins): that is where a plug-in adds "
                f"something (docs/extending.md)."
            )
        try:
            register(added)
        except TunewrightError as error:
            raise ConfigError(f"{who} names {origin}: {error}") from error
        except Exception as error:
            raise ConfigError(f"{who} names {origin}, whose {REGISTER} failed: {_told(error)}.") from error
        self._take(added, origin)

    def _take(self, added: Plugins, origin: str) -> None:
        items = [(kind, name, value) for kind in SHIPPED for name, value in added._of(kind).items()]
        for kind, name, _ in items:
            other = self.origins.get((kind, name), origin)
            if other != origin:
                raise ConfigError(f"The {kind} '{name}' is added by both {other} and {origin}: load one of them.")
        for kind, name, value in items:
            self._of(kind)[name] = value
            self.origins[kind, name] = origin


def chosen(kind: str, setting: str, name: str) -> Any:
    """Return what was added under a name.

    Raises:
        ConfigError: nothing was.
    """
    found = PLUGINS._of(kind)
    if name not in found:
        known = f"There is {', '.join(sorted(found))}." if found else f"No plug-in adds a {kind} (docs/extending.md)."
        raise ConfigError(f"`{setting}` names '{name}'.{did_you_mean(name, found)} {known}")
    return found[name]


def _digest_of(function: Callable[..., Any]) -> str:
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


def _told(error: Exception) -> str:
    """Return an error with the line that it came from, which is somebody else's to mend."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"


PLUGINS = Loaded()
