"""The settings of `tunewright datagen`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tunewright.config.choices import CONFIG_DIR, choices
from tunewright.config.ranges import POSITIVE, Range, check_ranges
from tunewright.config.schema import option
from tunewright.errors import ConfigError, did_you_mean

EXAMPLE = (
    'tunewright datagen task="Given a riddle, answer with a single word and explain it in one sentence." name=riddles'
)
PRICES = CONFIG_DIR.parent / "prices.yaml"


class Mode(Enum):
    """How examples are asked for."""

    parallel = "parallel"
    batch = "batch"
    sequential = "sequential"


class Format(Enum):
    """Shape of the rows that are written."""

    alpaca = "alpaca"
    sharegpt = "sharegpt"


@dataclass
class BudgetConfig:
    usd: Optional[float] = option(None, "spend at most this many dollars")
    tokens: Optional[int] = option(None, "use at most this many tokens, of prompts and replies")
    requests: Optional[int] = option(None, "send at most this many requests, repeated ones included")
    minutes: Optional[float] = option(None, "send nothing more after this time")


@dataclass
class PriceConfig:
    input: Optional[float] = option(None, "dollars for a million prompt tokens; null: configs/prices.yaml")
    output: Optional[float] = option(None, "dollars for a million reply tokens; null: configs/prices.yaml")


@dataclass
class JudgeConfig:
    threshold: Optional[int] = option(
        None, "have each example scored from 1 to 5 and keep those from here; null: do not"
    )
    model: Optional[str] = option(None, "model that scores; null: the one that writes")
    rubric: str = option(
        "The answer is correct, complete and follows the task and the system message; the request is one that a real "
        "user could make.",
        "what a 5 means",
    )


@dataclass
class DatagenConfig:
    task: str = option("", "what the model shall learn, in a sentence or a paragraph")
    name: str = option("", "name of the dataset: its files and its registry entries")
    examples: int = option(50, "accepted rows to make, held-out ones included")
    provider: str = option("openai", "openai, azure or openai_compatible: a file of configs/hydra/datagen")
    model: str = option("gpt-4.1", "model that writes the examples; for azure its deployment")
    temperature: Optional[float] = option(0.4, "sampling temperature; null: the server's own")
    turns: int = option(1, "exchanges of user and assistant in each example")
    plan: Optional[str] = option(None, "a plan file, written by --plan-only and edited; null: the model makes one")
    source: Optional[str] = option(
        None, "documents or seed examples to build on: files, folders or globs, with commas between"
    )
    mode: Mode = option(
        Mode.parallel, "parallel; batch: OpenAI's Batch API; sequential: one by one, earlier ones shown"
    )
    format: Format = option(Format.alpaca, "alpaca or sharegpt")
    out: str = option("data", "folder of the files and of dataset_info.json")
    seed: int = option(42, "seed of the cells and of the held-out split")
    eval_share: float = option(0.1, "share of the rows that is held out")
    similarity: float = option(0.7, "prompts this alike (ROUGE-L) to an earlier one are dropped; 1: only equal ones")
    language: Optional[str] = option(None, "keep answers in this language only: a code such as zh or en")
    min_output: int = option(1, "shortest answer in characters")
    max_output: Optional[int] = option(None, "longest answer in characters")
    attempts: float = option(3.0, "give up after this many requests for each row that was asked for")
    concurrency: int = option(64, "most requests in flight at once; a rate limit lowers it")
    max_tokens: int = option(2048, "longest reply; a reply cut there is rejected")
    timeout: float = option(120.0, "seconds to wait for one reply")
    base_url: Optional[str] = option(None, "address of the server; null: OPENAI_BASE_URL, else OpenAI")
    api_version: Optional[str] = option(None, "of Azure's API")
    push: Optional[str] = option(None, "upload the result to this dataset repository of the Hub: org/name")
    public: bool = option(False, "make that repository public")
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    price: PriceConfig = field(default_factory=PriceConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


RANGES = {
    "examples": Range(2),
    **dict.fromkeys(
        ("concurrency", "max_tokens", "timeout", "turns", "attempts", "min_output", "max_output"), Range(1)
    ),
    "temperature": Range(0, 2),
    "eval_share": Range(0, 0.5),
    "similarity": Range(0.1, 1),
    "judge.threshold": Range(1, 5),
    **dict.fromkeys(("budget.usd", "budget.tokens", "budget.requests", "budget.minutes"), POSITIVE),
    **dict.fromkeys(("price.input", "price.output"), Range(0, hint=": dollars for a million tokens")),
}
# What decides the requests. Everything else says where, how fast, how much, or what is kept of the replies.
ASKED = ("task", "model", "temperature", "turns", "plan", "source", "seed", "max_tokens")


def keys(cls: type = DatagenConfig, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Yield (dotted key, type, help, default) of every setting."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        kind = hints[item.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from keys(kind, f"{item.name}.")
        else:
            yield f"{prefix}{item.name}", kind, item.metadata["help"], item.default


def load_settings(overrides: Sequence[str]) -> DatagenConfig:
    """Read key=value settings. Text is taken as it stands: a task may hold commas, quotes and `${`.

    Raises:
        ConfigError: unknown key, wrong type, or a value that is missing or cannot be used.
    """
    types = {key: kind for key, kind, _, _ in keys()}
    given: list[tuple[str, str, str]] = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"`{item}` is not key=value. Put a task into quotes, for example {EXAMPLE}")
        if key not in types:
            secret = " A key is never a setting: export OPENAI_API_KEY=..." if "key" in key.lower() else ""
            hint = secret or did_you_mean(key, types) or f" There are: {', '.join(types)}."
            raise ConfigError(f"There is no setting `{key}`.{hint}")
        given.append((item, key, value))
    provider = next((value for _, key, value in reversed(given) if key == "provider"), "openai")
    typed = OmegaConf.structured(DatagenConfig)
    typed.merge_with(OmegaConf.load(_provider_file(provider)))
    text: dict[str, str | None] = {}
    for item, key, value in given:
        if types[key] in (str, Optional[str]):
            text[key] = None if types[key] is not str and value in ("", "null") else value
            continue
        try:
            OmegaConf.update(typed, key, None if value == "null" else value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"`{key}` is {value!r} (command line: {item}): write {_wanted(types[key])}.") from error
    check_ranges(typed, RANGES)
    config = OmegaConf.to_object(typed)
    assert isinstance(config, DatagenConfig)
    for key, words in text.items():
        group, _, leaf = key.rpartition(".")
        setattr(getattr(config, group) if group else config, leaf, words)
    _check(config)
    return config


def _provider_file(name: str) -> Path:
    known = choices("datagen")
    if name not in known:
        raise ConfigError(f"`provider` is '{name}'.{did_you_mean(name, known)} Choices: {', '.join(known)}.")
    return CONFIG_DIR / "datagen" / f"{name}.yaml"


def _wanted(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(member.name for member in kind)}"
    if kind is bool:
        return "true or false"
    return "a whole number such as 8" if kind in (int, Optional[int]) else "a number such as 0.4"


def _check(config: DatagenConfig) -> None:
    for key in ("task", "name", "out"):
        if not getattr(config, key).strip():
            raise ConfigError(f"No value for `{key}`. For example: {EXAMPLE}")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", config.name) or config.name.endswith("_eval"):
        raise ConfigError(f"`name` is {config.name!r}: write letters, digits, - and _ only, and not _eval at the end.")
    if config.task.encode(errors="ignore").decode() != config.task:
        raise ConfigError("`task` holds bytes that are not UTF-8.")
    if not config.model:
        raise ConfigError(f"`provider={config.provider}` needs `model`: for example model=qwen2.5:7b.")
    if config.max_output is not None and config.max_output < config.min_output:
        raise ConfigError(f"`max_output` is {config.max_output}: write at least `min_output`, {config.min_output}.")
    if config.mode is Mode.sequential and config.turns > 1:
        raise ConfigError("`mode=sequential` makes single exchanges: leave out turns, or use mode=parallel.")
    threshold = config.judge.threshold
    if config.mode is Mode.batch and threshold is not None:
        raise ConfigError("`mode=batch` does not score: leave out judge.threshold, or use mode=parallel.")
    if config.budget.usd is not None and prices(config) is None:
        raise ConfigError(
            f"`budget.usd` is {config.budget.usd:g}, but the price of '{config.model}' is not known: write "
            "price.input= and price.output= in dollars for a million tokens, or budget.tokens= instead."
        )
    if config.budget.usd is not None and threshold is not None and prices(config, config.judge.model) is None:
        raise ConfigError(
            f"`budget.usd` is {config.budget.usd:g}, but the price of '{config.judge.model}', which scores, is not "
            "known: write budget.tokens= instead."
        )
    if config.language is not None and not re.fullmatch(r"[a-z]{2,3}", config.language):
        raise ConfigError(f"`language` is {config.language!r}: write a code such as zh or en.")
    if config.plan is not None and not Path(config.plan).is_file():
        raise ConfigError(f"`plan` is '{config.plan}', and there is no such file. --plan-only writes one.")


def prices(config: DatagenConfig, judge: str | None = None) -> tuple[float, float] | None:
    """Return dollars for a million tokens of prompt and reply, or None where they are not known.

    `price.input` and `price.output` are those of `model`; a judge that is another one has its own.
    """
    model = judge or config.model
    # The name of a deployment or of a server's model may be anything.
    known = _listed_prices().get(model, {}) if config.provider == "openai" else {}
    own = config.price if model == config.model else PriceConfig()
    found = [
        given if given is not None else known.get(key) for key, given in (("input", own.input), ("output", own.output))
    ]
    return None if found[0] is None or found[1] is None else (float(found[0]), float(found[1]))


@lru_cache
def _listed_prices() -> Mapping[str, Any]:
    listed: Mapping[str, Any] = yaml.safe_load(PRICES.read_text(encoding="utf-8"))["models"]
    return listed


def identity(config: DatagenConfig) -> dict[str, Any]:
    """Return the settings that decide what is asked; replies for other ones must not share a log."""
    values = asdict(config)
    return {key: values[key] for key in ASKED}


def as_plain(config: DatagenConfig) -> dict[str, Any]:
    """Return the settings for the manifest."""
    tree = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
