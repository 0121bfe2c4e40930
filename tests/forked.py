"""Trainings on one device, each in a process of its own that has everything imported already: about a second each.

python -m tests.forked, which reads one JSON object a line, {"overrides", "faults"}, and answers each with one:
{"code", "reached", "told"}. `Forked` starts it and asks it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY
from tests.faults import Fault, planned


@dataclass(frozen=True)
class Attempt:
    """How one training ended.

    Args:
        code: 0, the exit code of an error of ours, 70 for others, or the negative of the signal that ended it.
        reached: the phases that it came to, of one that was not killed.
        told: what it said: remarks on where it goes on from, and its error.
    """

    code: int
    reached: list[str]
    told: str


class Forked:
    """The process that others are forked from."""

    def __init__(self) -> None:
        env = {**os.environ, **planned(), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=REPOSITORY,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, *overrides: str, faults: tuple[Fault, ...] = ()) -> Attempt:
        """Train as `tunewright train resume=auto` would."""
        assert self.process.stdin
        assert self.process.stdout
        asked = {"overrides": ["resume=auto", *overrides], "faults": [asdict(fault) for fault in faults]}
        self.process.stdin.write(f"{json.dumps(asked)}\n")
        self.process.stdin.flush()
        return Attempt(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _train(overrides: list[str]) -> None:
    from accelerate import PartialState

    from tunewright.claims import check_inputs, claim, prepare_folder, sole_user
    from tunewright.config.compose import compose_config
    from tunewright.launch.train import check_all
    from tunewright.plan.devices import find_devices
    from tunewright.trainer.console import Printer
    from tunewright.trainer.inputs import planned_inputs, prepared_inputs
    from tunewright.trainer.prepared import prepare
    from tunewright.trainer.training import train

    config = compose_config(overrides)
    plan, _ = check_all(config, find_devices())
    prepared = prepare(config, lambda line: None)
    inputs = {**planned_inputs(plan), **prepared_inputs(config, prepared)}
    claimed = claim(config)
    check_inputs(claimed, inputs, config.resume_allow)
    with sole_user(config, claimed) as found:
        print(*found.remarks, sep="\n")
        if found.finished:
            return
        prepare_folder(config, found, inputs)
        output = Printer(lambda line: print(line, flush=True))
        train(config, found.run, prepared, PartialState(cpu=True), output, checkpoint=found.checkpoint)


def _child(asked: dict[str, Any], answer: Path, told: Path) -> int:
    """Train, and return the exit code; in the process that was forked."""
    import sitecustomize

    from tunewright.errors import TunewrightError

    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sitecustomize.PLAN[:] = asked["faults"]
    code = 0
    try:
        _train(asked["overrides"])
    except TunewrightError as error:
        print(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except Exception:
        traceback.print_exc()
        code = 70
    answer.write_text(json.dumps(sitecustomize.reached))
    sys.stdout.flush()
    return code


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print while they are imported
    import deepspeed  # noqa: F401

    import tunewright.launch.train
    import tunewright.trainer.prepared
    import tunewright.trainer.training  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            answer, told = Path(folder, "answer"), Path(folder, "told")
            child = os.fork()
            if not child:
                os._exit(_child(json.loads(line), answer, told))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            reached = json.loads(answer.read_text()) if answer.is_file() else []
            print(json.dumps(asdict(Attempt(code, reached, told.read_text()))), file=answers, flush=True)


if __name__ == "__main__":
    main()
