"""One rank of a training that is started without `tunewright train`, by a launcher of the user's own.

    accelerate launch --num_processes 2 --multi_gpu -m tunewright.launch.rank train.epochs=1

Settings are those of `tunewright train`; the strategy is what the launcher started.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from tunewright.claims import Claim, check_inputs, claim, prepare_folder, run_dir, sole_user
from tunewright.config.compose import compose_config
from tunewright.config.deepspeed_file import deepspeed_path, read
from tunewright.config.schema import Dtype, Launcher
from tunewright.errors import ConfigError, PeerError, StorageError, TunewrightError
from tunewright.launch.asked import asked_of_accelerate, check_asked
from tunewright.launch.convert import ensure_readable
from tunewright.launch.prepare import ensure_prepared
from tunewright.launch.train import check_all
from tunewright.plan.auto import AUTO
from tunewright.plan.batch_plan import BatchPlan, batch_plan
from tunewright.plan.conversion import start_from
from tunewright.plan.devices import find_devices
from tunewright.ranks import LAUNCHED_BY, die_with_parent, leave, rank, world_size
from tunewright.redaction import redact, typed_secrets
from tunewright.restore import bring_back
from tunewright.threads import waiting
from tunewright.trainer.inputs import planned_inputs, prepared_inputs
from tunewright.trainer.prepared import Prepared
from tunewright.trainer.process_group import join
from tunewright.trainer.stopping import Stopping
from tunewright.trainer.train_rank import train_rank

if TYPE_CHECKING:
    from accelerate import PartialState

SHARED_SECONDS = 10.0  # after which a file is seen by all machines of a network file system


def main(argv: list[str]) -> int:
    """Run this rank and return its exit code."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    # By a signal that it hears: accelerate ends at once on one device, and saves are still to be made.
    die_with_parent(signal.SIGTERM)
    stopping = Stopping()
    stopping.listen()
    os.environ.pop(LAUNCHED_BY, None)  # left over: nobody reads this rank's error file
    if not find_devices().gpu:  # torch, which is not imported yet, reads it then
        os.environ.update(waiting())
    held = ExitStack()  # until this process ends, in whatever way
    try:
        config, claimed = _from_overrides(argv)
        prepared = ensure_prepared(config, quiet=rank() > 0)
        state, claimed = _join_and_prepare(config, claimed, prepared, held)
    except TunewrightError as error:
        # One rank of a machine says it for all, but each knows for itself whom it waits for.
        if _speaks() or isinstance(error, PeerError):
            told = redact(f"{type(error).__name__}: {error}", typed_secrets(argv))
            print(told, file=sys.stderr, flush=True)
        return error.exit_code
    if claimed.finished:
        _say(f"{claimed.run.path} is finished already; nothing to do.")
        leave(0)
    train_rank(config, claimed.run, claimed.checkpoint, lambda: prepared, stopping, state, held.close)


def _speaks() -> bool:
    return rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def _join_and_prepare(
    config: DictConfig, claimed: Claim, prepared: Prepared, held: ExitStack
) -> tuple[PartialState, Claim]:
    """Without the launcher, the first rank makes the run folder: after all joined, before any writes into it.

    What it decides is for all, and so is its refusal: the others wait for it, and on machines without a common disk
    they would find something else.

    Raises:
        TunewrightError: see `sole_user`, `prepare_folder` and `check_one_folder`.
    """
    state = join(config.strategy.launcher.name, config.train.timeout_minutes)
    mark = f".seen-{uuid.uuid4().hex}"
    decided: Claim | TunewrightError = claimed
    if state.is_main_process:
        try:
            decided = _decide(config, claimed, prepared, held)
            if not decided.finished:
                (decided.run.path / mark).touch()
        except TunewrightError as error:
            decided = error
    from accelerate.utils import broadcast_object_list

    decided, mark = broadcast_object_list([decided, mark])
    if isinstance(decided, TunewrightError):
        raise decided
    if not decided.finished:
        check_one_folder(config, decided, mark)
    return state, decided


def _decide(config: DictConfig, claimed: Claim, prepared: Prepared, held: ExitStack) -> Claim:
    """Claim the run folder for all ranks, and make it ready."""
    plan = batch_plan(config.train, world_size(), cutoff_len=config.data.cutoff_len, packing=config.data.packing)
    inputs = {**planned_inputs(plan), **prepared_inputs(config, prepared)}
    allowed = check_inputs(claimed, inputs, config.resume_allow)
    if allowed:
        _say(allowed)
    if claimed.finished:
        return claimed
    if claimed.checkpoint:
        start_from(claimed.checkpoint, config, world_size())  # what cannot be gone on from is refused now
    told = claimed.remarks
    claimed = held.enter_context(sole_user(config, claimed))
    for text in claimed.remarks:
        if text not in told:
            _say(text)
    aside = prepare_folder(config, claimed, inputs)
    if aside:
        _say(f"What was in {claimed.run.path} before is in {aside} now.")
    if not claimed.checkpoint:
        return claimed
    _say(f"Continuing {claimed.run.path} from {claimed.checkpoint.name}")
    start = start_from(claimed.checkpoint, config, world_size())
    if start.remark:
        _say(start.remark)
    return replace(claimed, checkpoint=ensure_readable(start, config))


def check_one_folder(config: DictConfig, claimed: Claim, mark: str) -> None:
    """Find out whether all ranks see one run folder: what the first has put there, the others look for.

    Raises:
        StorageError: some do not, and checkpoints, to which every rank adds its part, are to be read or written.
    """
    from accelerate.utils import gather_object

    file, deadline = claimed.run.path / mark, time.monotonic() + SHARED_SECONDS
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    answers: list[tuple[str, bool]] = gather_object([(socket.gethostname(), seen)])
    file.unlink(missing_ok=True)
    blind = sorted({host for host, saw in answers if not saw})
    if not blind:
        return
    told = f"{', '.join(blind)} {'does' if len(blind) == 1 else 'do'} not see {claimed.run.path} of {answers[0][0]}"
    if claimed.checkpoint or config.train.save_steps != 0:
        what = f"go on from {claimed.checkpoint.name}" if claimed.checkpoint else "write checkpoints"
        raise StorageError(
            f"{told}. To {what}, all ranks need one folder: write an `output_root` on a disk that all machines share"
            f"{'' if claimed.checkpoint else ', or train.save_steps=0 to train without checkpoints'}."
        )
    _say(f"{told}: its logs are there, in a folder of the same name.")


def _from_overrides(argv: list[str]) -> tuple[DictConfig, Claim]:
    """Compose from the command line; the strategy is what the launcher around this process started."""
    config = compose_config(overrides_of(argv))
    plan, decided = check_all(config, find_devices())
    decided += overruled(config, plan)
    if config.strategy.launcher is Launcher.deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        raise ConfigError(
            f"`strategy={config.strategy.name}` is not what runs: this process was started without DeepSpeed. Use "
            f"`tunewright train`, or `accelerate launch --use_deepspeed` without --cpu, which turns DeepSpeed off."
        )
    check_asked(asked_of_accelerate())
    if rank() == 0:
        decided += bring_back(config)
    claimed = claim(config) if rank() == 0 else Claim(run_dir(config))
    for text in (*decided, *claimed.remarks):
        _say(redact(text))
    return config, claimed


def overrides_of(argv: list[str]) -> list[str]:
    """Return what is typed, with what the launcher has decided."""
    typed = [item for item in argv if item != f"strategy={AUTO}"]
    return [*_strategy_of_environment(typed), *typed, f"cluster.num_processes={world_size()}"]


def overruled(config: DictConfig, plan: BatchPlan) -> list[str]:
    """Say which values of an accelerate configuration of the user's own do not count, and what does."""
    told = []
    for name, found, setting in (
        ("mixed_precision", "bf16" if config.model.dtype is Dtype.bfloat16 else "no", "model.dtype"),
        ("gradient_accumulation_steps", str(plan.accumulation), "train.gradient_accumulation_steps"),
        ("gradient_clipping", str(config.train.max_grad_norm), "train.max_grad_norm"),
    ):
        value = os.environ.get(f"ACCELERATE_{name.upper()}")
        if value not in (None, "no", "none", "1", "auto", found):
            told.append(f"accelerate's {name}={value} does not count: {setting} decides.")
    return told


def _strategy_of_environment(argv: list[str]) -> list[str]:
    if any(item.startswith("strategy=") for item in argv):
        return []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file:
            quoted = file.replace("\\", "\\\\").replace("'", "\\'")
            return [f"strategy={read(deepspeed_path(file)).strategy}", f"strategy.deepspeed='{quoted}'"]
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2", "3"):
            raise ConfigError(f"`zero_stage` of the accelerate configuration is {stage}: write 1, 2 or 3.")
        return [f"strategy=zero{stage}"]
    return ["strategy=ddp" if world_size() > 1 else "strategy=single"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
