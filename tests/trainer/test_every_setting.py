"""Every setting at its extremes, and beside every other that mentions it: it works, or is refused with the reason.

What passes the checks of a launch trains for two steps on a small model in this process. Whatever then fails with
anything but an error of ours would have been exit code 70: a bug of ours that a rank found.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tests.conftest import REPOSITORY
from tunewright.claims import prepare_folder
from tunewright.config import schema
from tunewright.config.compose import compose_config
from tunewright.config.method_schema import METHODS
from tunewright.errors import TunewrightError
from tunewright.launch.forecast import steps
from tunewright.launch.row_counts import training_rows
from tunewright.launch.train import plan_job
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import OPTIMIZERS, SCHEDULERS
from tunewright.run_folder import RunDir
from tunewright.trainer.prepared import prepare

HUGE = 10**12
# Values that mean something, for settings whose type does not tell any.
SAMPLES: dict[str, list[Any]] = {
    "data.names": [["demo"], ["demo", "demo_eval"], ["demo", "demo"]],
    "data.eval_names": [[], ["demo_eval"], ["demo"]],
    "data.weights": [[], [0.5], [2.0], [0.5, 2.0]],
    "train.gradient_checkpointing": [False, True, "auto"],
    "train.micro_batch_size": [1, 3, "auto"],
    "train.optimizer": [*OPTIMIZERS[:1], "adamw_8bit", "sgd"],  # test_training_options.py trains with each of them
    "train.scheduler": list(SCHEDULERS),
    "method.modules_to_save": [[], ["lm_head"], ["embed_tokens"], ["norm"], ["q_proj"]],
    "method.target_modules": ["all-linear", "auto", ["q_proj"], ["lm_head"], ["embed_tokens"], ["k_proj", "down_proj"]],
    "method.feedforward_modules": [[], ["down_proj"]],
    "method.modules": [[], ["mlp"], ["norm"], ["q_proj"]],
    "method.extra_modules": [[], ["embed_tokens"], ["norm"], ["mlp"], ["lm_head"]],
}
GROUPS: dict[str, type] = {
    "": schema.Config,
    "model": schema.ModelConfig,
    "data": schema.DataConfig,
    "strategy": schema.StrategyConfig,
    "train": schema.TrainConfig,
    "cluster": schema.ClusterConfig,
}
# Settings that say where files lie: what is asked of them is in the tests of the modules that use them.
PLACES = {"name", "output_root", "data.cache_dir", "data.dir", "model.path", "train.mirror", "overwrite", "resume"}
# Not trained here: a run of so many steps has no end, ranks are processes, and a compiler takes minutes.
ENDLESS = {("train.max_steps", str(HUGE))}
ELSEWHERE = {"train.compile", "cluster.num_processes"}


def kinds(method: str) -> dict[str, Any]:
    """Return {dotted key: type} of every setting, with those of a method."""
    found = {}
    for group, cls in {**GROUPS, "method": METHODS[method]}.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            key = f"{group}.{item.name}" if group else item.name
            if key not in PLACES and item.name != "name" and key not in (*GROUPS, "method"):
                found[key] = hints[item.name]
    return found


def extremes(kind: Any) -> list[Any]:
    """Return values of a type that are as far out as it lets them be, and some of the wrong kind."""
    if get_origin(kind) is Union:
        return [value for one in get_args(kind) for value in extremes(one)]
    if get_origin(kind) is list:
        return [[], *([value] for value in extremes(get_args(kind)[0]) if value is not None)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return list(kind)
    known: dict[Any, list[Any]] = {
        type(None): [None],
        bool: [True, False],
        int: [-1, 0, 1, 7, HUGE],
        float: [math.nan, math.inf, -1.0, 0.0, 1e-300, 0.5, 1.0, 1e300],
        str: ["", " ", "nonsense"],
    }
    return known.get(kind, [None, 3, "nonsense", "", [], ["nonsense"], [""], [3], {}, {"a": 1}])


def mentions(method: str) -> list[tuple[str, str]]:
    """Return the pairs of settings that one help text of the schema speaks of, or one statement that refuses."""
    known = kinds(method)
    bare = {key.rpartition(".")[2]: key for key in known}
    pairs = set()

    def keys_in(text: str) -> set[str]:
        found = set(re.findall(r"\b(?:model|data|method|strategy|train|cluster)\.\w+", text))
        found |= {bare[name] for name in re.findall(r"`(\w+)`", text) if name in bare}
        return found & set(known)

    for group, cls in {**GROUPS, "method": METHODS[method]}.items():
        for item in fields(cls):
            own = f"{group}.{item.name}" if group else item.name
            if own in known:
                pairs |= {(own, other) for other in keys_in(str(item.metadata.get("help", "")))}
    for module in sorted((REPOSITORY / "launch").glob("*.py")):
        text = module.read_text(encoding="utf-8")
        for function in filter(lambda node: isinstance(node, ast.FunctionDef), ast.walk(ast.parse(text))):
            for statement in function.body:  # type: ignore[attr-defined]
                if any(isinstance(node, ast.Raise) for node in ast.walk(statement)):
                    spoken_of = keys_in(ast.get_source_segment(text, statement) or "")
                    pairs |= set(itertools.combinations(sorted(spoken_of), 2))
    return sorted({tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1]})  # type: ignore[misc]


@pytest.fixture(scope="module")
def base(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DictConfig]:
    """A configuration of two steps on the small model, by method."""
    root = tmp_path_factory.mktemp("walk")
    few = ["train.max_steps=2", "train.logging_steps=1", "data.max_samples=4", "train.global_batch_size=2"]
    few += ["model=folder", f"model.path={small_model}", f"output_root={root}/runs", "name=x", "overwrite=true"]
    made: dict[str, DictConfig] = {}

    def of(method: str) -> DictConfig:
        if method not in made:
            made[method] = compose_config([*few, f"method={method}"])
        return made[method].copy()

    return of


def outcome(config: DictConfig, changes: dict[str, Any], *, train: bool) -> str:
    """Return "refused" or "works", or else what went wrong."""
    try:
        for key, value in changes.items():
            OmegaConf.update(config, key, value, merge=False)
        job = plan_job(config, find_devices())
        list(steps(config, job.plan, training_rows(config)))
        if train:
            from tunewright.trainer.console import Printer
            from tunewright.trainer.training import train as run_rank

            folder = RunDir(Path(config.output_root) / config.name)
            prepared = prepare(config, lambda line: None)
            prepare_folder(config, job.claimed)
            run_rank(config, folder, prepared, PartialState(cpu=True), Printer(lambda line: None))
    except OmegaConfBaseException:
        return "refused"  # by its type, as compose_config would
    except TunewrightError as error:
        return "refused" if error.exit_code != 70 else repr(error)
    except Exception:
        said = ", ".join(f"{key}={value!r}" for key, value in changes.items())
        return f"{said}: {traceback.format_exc(limit=-4)}"
    return "works"


def fails(results: Iterator[str]) -> list[str]:
    return [result for result in results if result not in ("refused", "works")]


def trainable(changes: dict[str, Any]) -> bool:
    return not any(key in ELSEWHERE or (key, str(value)) in ENDLESS for key, value in changes.items())


ALONE = [(method, key) for method in METHODS for key in kinds(method) if method == "lora" or "method." in key]
PAIRS = [("lora", *pair) for pair in mentions("lora")]
PAIRS += [(m, *p) for m in METHODS for p in mentions(m) if m != "lora" and "method." in "".join(p)]


# Values just inside their ranges, several at a time: the walk below trains every one alone, and takes minutes.
ON_THE_EDGE: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"data.eval_names": [], "data.eval_size": 1.0, "train.eval_steps": 1, "train.keep_best": True}),
    (
        "lora",
        {"data.eval_names": [], "train.learning_rate": 1e-300, "train.warmup_ratio": 0.0, "train.seed": 2**32 - 1},
    ),
    ("lora", {"train.scheduler": "polynomial", "train.learning_rate": 1.1e-7, "train.max_grad_norm": 0.0}),
    ("lora", {"data.max_samples": 1, "train.global_batch_size": 7, "train.micro_batch_size": HUGE}),
    ("lora", {"method.r": 1, "method.dropout": 0.99, "method.loraplus_ratio": 1.0, "method.modules_to_save": ["norm"]}),
    ("freeze", {"method.layers": 0, "method.extra_modules": ["norm"]}),
    ("p_tuning", {"method.virtual_tokens": 1, "method.hidden_size": 1}),
    ("ia3", {"method.target_modules": ["k_proj", "down_proj"], "method.feedforward_modules": []}),
]


def alone(method: str, key: str) -> Iterator[dict[str, Any]]:
    for value in [*extremes(kinds(method)[key]), *SAMPLES.get(key, [])]:
        yield {key: value}


def together(method: str, *keys: str) -> Iterator[dict[str, Any]]:
    choices = [SAMPLES[key] if key in SAMPLES else plausible(kinds(method)[key]) for key in keys]
    for values in itertools.product(*choices):
        yield dict(zip(keys, values, strict=True))


def plausible(kind: Any) -> list[Any]:
    """Return a few of the extremes: those that are not refused by themselves are worth meeting others."""
    if get_origin(kind) is Union:
        return [value for one in get_args(kind) for value in plausible(one)]
    few = {int: [0, 1, 7], float: [0.0, 0.5, 1.0], str: [""]}
    return few.get(kind, extremes(kind))


@pytest.mark.parametrize(("method", "key"), ALONE, ids=str)
def test_a_setting_at_its_extremes_is_refused_or_passes_the_checks(
    method: str, key: str, base: Callable[[str], DictConfig]
) -> None:
    assert not fails(outcome(base(method), changes, train=False) for changes in alone(method, key))


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_settings_that_are_spoken_of_together_are_refused_or_pass_the_checks(
    names: tuple[str, str, str], base: Callable[[str], DictConfig]
) -> None:
    assert not fails(outcome(base(names[0]), changes, train=False) for changes in together(*names))


@pytest.mark.parametrize(
    ("method", "changes"), ON_THE_EDGE, ids=[f"{m}-{'-'.join(changes)}" for m, changes in ON_THE_EDGE]
)
def test_settings_on_the_edge_train(method: str, changes: dict[str, Any], base: Callable[[str], DictConfig]) -> None:
    assert outcome(base(method), changes, train=True) == "works"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "key"), ALONE, ids=str)
def test_a_setting_at_its_extremes_trains_if_it_passes(
    method: str, key: str, base: Callable[[str], DictConfig]
) -> None:
    tried = (changes for changes in alone(method, key) if trainable(changes))
    assert not fails(outcome(base(method), changes, train=True) for changes in tried)


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_settings_that_are_spoken_of_together_train_if_they_pass(
    names: tuple[str, str, str], base: Callable[[str], DictConfig]
) -> None:
    tried = (changes for changes in together(*names) if trainable(changes))
    assert not fails(outcome(base(names[0]), changes, train=True) for changes in tried)
