"""Applies a plan of faults in every process that has this folder on its PYTHONPATH; `tests/faults.py` writes the plan.

Python imports a module of this name when it starts. What is wrapped is wrapped when its module has been imported, so
that nothing is imported earlier than without.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

PLAN: list[dict[str, Any]] = json.loads(os.environ.get("FAULTS", "[]"))
LOG = os.environ.get("FAULTS_LOG")  # gets a line for each fault that strikes
SLOW = float(os.environ.get("FAULTS_STEP_SECONDS", "0"))  # added to each step
WRITES = os.O_WRONLY | os.O_RDWR
EVENTS = {
    "on_train_begin": "train_begin",
    "on_step_begin": "before_step",
    "on_pre_optimizer_step": "before_optimizer",
    "on_step_end": "after_step",
    "on_save": "save:after_commit",
    "on_train_end": "train_end",
}
PLACES = {"/.part/checkpoint-": "save", "/.final.part": "final"}
reached: list[str] = []  # phases of this process, in the order in which it came to them
state: Any = None  # of the trainer


def at(phase: str) -> None:
    """Come to a phase, and have what is planned for it."""
    reached.append(phase)
    step = state.global_step if state else 0
    for fault in PLAN:
        here = fault["rank"] in (None, int(os.environ.get("RANK", "0"))) and fault["step"] in (None, step)
        if here and fnmatchcase(phase, fault["phase"]):
            fault["skip"] -= 1
            if fault["skip"] == -1:
                strike(fault, phase, step)


def strike(fault: dict[str, Any], phase: str, step: int) -> None:
    if LOG:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{fault['kind']} at {phase}, step {step}, rank {os.environ.get('RANK', '0')}\n".encode())
        os.close(log)
    kind = fault["kind"]
    if kind.startswith("SIG"):
        launcher = int(os.environ.get("TUNEWRIGHT_LAUNCHER_PID", "0"))
        os.kill(launcher if fault["target"] == "launcher" else os.getpid(), signal.Signals[kind])
        if fault["target"] == "launcher" and kind == "SIGKILL":
            time.sleep(60)  # which ends this process as well
    elif kind == "exception":
        raise RuntimeError("a planned fault")
    else:
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))


# Files: what Python opens and renames says so to an audit hook; torch and safetensors open theirs in C++ and Rust.


def written(path: object) -> None:
    name = os.path.basename(str(path))
    for file in ("manifest.json", "config.yaml"):  # written aside, as .manifest.json.1234.part
        if name.startswith(f".{file}."):
            at(f"run:{file}")
    place = next((PLACES[one] for one in PLACES if one in str(path)), None)
    if place and not os.path.isdir(str(path)):
        at(f"{place}:{name}")


def audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
        written(args[0])
    elif event == "os.rename" and os.path.isdir(args[0]):
        if "/.part/old-" in str(args[1]):
            at("save:before_discard")
        for part, place in PLACES.items():
            if part in str(args[0]):
                at(f"{place}:before_commit")


# Functions


def before(owner: Any, name: str, phase: str) -> None:
    """Come to `phase` whenever a function is called."""
    whole = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        at(phase)
        return whole(*args, **kwargs)

    setattr(owner, name, wrapped)


def transformers_events(module: ModuleType) -> None:
    whole = module.CallbackHandler.call_event

    def wrapped(self: Any, event: str, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> Any:
        global state
        state = trainer_state
        result = whole(self, event, args, trainer_state, control, **kwargs)
        if event == "on_step_begin":
            time.sleep(SLOW)
        if event in EVENTS:
            at(EVENTS[event])
        return result

    module.CallbackHandler.call_event = wrapped


def torch_files(module: ModuleType) -> None:
    whole = module.save

    def wrapped(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(f, (str, os.PathLike)):
            written(f)
        return whole(obj, f, *args, **kwargs)

    module.save = wrapped


def safetensors_files(module: ModuleType) -> None:
    whole = module.serialize_file

    def wrapped(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        written(filename)
        return whole(tensors, filename, *args, **kwargs)

    module.serialize_file = wrapped


WRAPPED: dict[str, Callable[[ModuleType], None]] = {
    "transformers.trainer_callback": transformers_events,
    "torch.serialization": torch_files,
    "safetensors.torch": safetensors_files,
    "tunewright.trainer.saving": lambda module: before(module, "save_result", "before_final"),
    "tunewright.trainer.data.tokenization": lambda module: before(module, "tokenize", "tokenize"),
    "tunewright.trainer.sft_trainer": lambda module: before(module.TunewrightTrainer, "evaluate", "eval"),
}


class Wrapping(importlib.abc.MetaPathFinder):
    """Finds the modules of WRAPPED where others do, and wraps them once they have been executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in WRAPPED:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec and spec.loader:
            whole = spec.loader.exec_module

            def execute(module: ModuleType) -> None:
                whole(module)
                WRAPPED[fullname](module)

            spec.loader.exec_module = execute
        return spec


if "FAULTS" in os.environ:
    sys.meta_path.insert(0, Wrapping())
    sys.addaudithook(audit)
