"""The `tunewright` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright import __version__
from tunewright.datagen.cli import add_parser as add_datagen
from tunewright.errors import Preempted, StorageError, TunewrightError, did_you_mean
from tunewright.importing import uncollected
from tunewright.launch.data.cli import add_parser as add_data
from tunewright.redaction import redact, typed_secrets
from tunewright.space import refused
from tunewright.stop_signals import StopAsked, heard_by, ignore, interrupt
from tunewright.terminal import tell
from tunewright.threads import waiting

if TYPE_CHECKING:
    from omegaconf import DictConfig

EPILOG = """\
examples:
  tunewright train                                          tiny model, shipped data, LoRA, one device
  tunewright train strategy=zero2 model=qwen2_5_7b data=registry data.names=[huanhuan] train.learning_rate=1e-4
  tunewright train experiment=demo strategy=zero3 --dry-run
  tunewright train --multirun method.r=4,16,64              one run for each value
  tunewright plan model=qwen2_5_7b --devices 8xH100-80GB    what it needs there, how long it takes, what is best
  tunewright data check demo data.cutoff_len=512            what is in the data: lengths, copies, dropped rows
  tunewright resume runs/first                              go on with what was stopped or killed
  tunewright doctor --ranks 2                               is this machine fit to train on?
  tunewright runs                                           how far each run is
  tunewright compare runs/demo/*
  tunewright chat runs/demo/zero2                           after `tunewright demo`
  tunewright merge runs/demo/zero2                          one model folder, without an adapter

exit codes: 0 done, 2 configuration, 3 data, 4 storage, 5 numeric, 6 peer or network, 7 memory, 70 a bug of ours,
75 stopped and resumable, 130 stopped at once; of `doctor`, how many things must be fixed
"""

TRAIN_HELP = """\
Settings are Hydra overrides: GROUP=CHOICE picks a file of configs/hydra, key=value sets one value.
`tunewright config` lists groups and choices, `tunewright config --keys` every key.
"""


DOCTOR_HELP = """\
Look at packages, compiler, GPUs, memory, disks, limits, network, environment, clock and ports, and try what the devices
compute; each finding says what to do. Overrides say what is needed: a hub, a compiler, ranks.

  tunewright doctor
  tunewright doctor --ranks 2
  tunewright doctor model=qwen2_5_7b strategy=zero3_offload

The exit code is the number of things that must be fixed, at most 100.
"""

PLAN_HELP = """\
Says what a configuration needs on each rank, part by part, how long it takes, and which strategy, micro-batch and
recomputation are the fastest that fit; from the model's config.json alone, without weights and without the devices.

  tunewright plan model=qwen2_5_7b --devices 8xH100-80GB
  tunewright plan model=qwen2_5_7b method=qlora --devices 1x4090 --html plan.html

Exit code 7 when nothing fits that the settings leave open.
"""


class ExactParser(argparse.ArgumentParser):
    """Takes options by their whole names, and so do its subcommands.

    argparse would take `--config my.yaml` for `--config-dir my.yaml`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of every subcommand."""
    top: argparse.ArgumentParser = ExactParser(
        prog="tunewright",
        description="Fine-tune language models: one configuration, one GPU or a cluster.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tunewright {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="compose a configuration and train",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_overrides(train)
    train.add_argument("--multirun", "-m", action="store_true", help="one run for each combination of a=1,2 values")
    train.add_argument("--cfg", choices=["job"], help="print the composed configuration and stop")
    train.add_argument("--dry-run", action="store_true", help="check everything and print what would be started")
    train.set_defaults(run=_train)

    plan = commands.add_parser(
        "plan",
        help="memory, time and the best strategy of a configuration, before a device is booked",
        description=PLAN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_overrides(plan)
    plan.add_argument("--devices", metavar="MACHINE", help="other devices than those here: 8xH100-80GB, 1x4090, ...")
    plan.add_argument("--price", type=float, metavar="P", help="of a device for an hour, in any currency")
    plan.add_argument("--measure", action="store_true", help="train some steps here first: later plans go by them too")
    plan.add_argument("--json", action="store_true", help="print every way that was looked at, as JSON")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write the plan as a page as well")
    plan.set_defaults(run=_plan)

    resume = commands.add_parser(
        "resume",
        help="go on with a run that was stopped, failed or was killed",
        description="Goes on from the newest checkpoint that is whole, with the run's own settings. More of them, such "
        "as train.max_steps=200 or strategy=zero3, say what is to be otherwise now.",
    )
    resume.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, for example runs/first")
    resume.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="what is to be otherwise")
    resume.add_argument("--dry-run", action="store_true", help="say from where it would go on, and start nothing")
    _add_trust(resume)
    resume.set_defaults(run=_resume)

    runs = commands.add_parser("runs", help="how far each run is, and from where it would go on")
    runs.add_argument("root", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    runs.set_defaults(run=_runs)

    doctor = commands.add_parser(
        "doctor",
        help="look at this machine before anything is trained on it",
        description=DOCTOR_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_overrides(doctor)
    doctor.add_argument("--ranks", type=int, metavar="N", help="start so many ranks here, and have them meet and sum")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)

    config = commands.add_parser("config", help="show groups, choices, keys, or a composed configuration")
    _add_overrides(config)
    config.add_argument("--keys", action="store_true", help="every key with its type, default and meaning")
    config.set_defaults(run=_config)

    compare = commands.add_parser("compare", help="table, loss curves and HTML page of several runs")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, for example runs/demo/*")
    compare.add_argument("--out", type=_folder, default=Path("runs/comparison"), help="folder for the results")
    compare.set_defaults(run=_compare)

    evaluate = commands.add_parser("evaluate", help="held-out exact match of base and tuned model")
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    evaluate.add_argument("--examples", type=int, default=None, help="at most this many held-out rows")
    _add_trust(evaluate)
    evaluate.set_defaults(run=_evaluate)

    chat = commands.add_parser("chat", help="ask the base and the tuned model the same questions")
    chat.add_argument("tuned", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints")
    chat.add_argument("--prompt", action="append", help="ask this and stop; can be given several times")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=int, default=256)
    _add_trust(chat)
    chat.set_defaults(run=_chat)

    merge = commands.add_parser("merge", help="put a run's adapter into its base model's weights, and check the result")
    merge.add_argument("tuned", type=Path, metavar="RUN", help="a finished run, or a checkpoint folder of a run")
    merge.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the base's own 16 bits")
    merge.add_argument("--out", type=_folder, metavar="FOLDER", help="default: RUN/merged")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    merge.add_argument("--max-shard", default="2GB", metavar="SIZE", help="largest weight file (default: 2GB)")
    _add_trust(merge)
    merge.set_defaults(run=_merge)

    demo = commands.add_parser("demo", help="train the shipped task three ways, compare, and ask")
    demo.add_argument("--root", type=_folder, default=Path("runs/demo"), help="folder for the runs")
    demo.set_defaults(run=_demo)
    add_data(commands)
    add_datagen(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; the user's mistakes end without a traceback."""
    # While it is imported, it reports optional kernels that nobody here asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal whose encoding lacks a sign shows a question mark
    top = parser()
    given = sys.argv[1:] if argv is None else list(argv)
    args, rest = top.parse_known_args(given)
    if args.command is None:
        top.print_help()
        return 0
    unknown = [item for item in rest if item.startswith("-")]
    if unknown or (rest and not hasattr(args, "overrides")):
        meant = did_you_mean(unknown[0].partition("=")[0], _options(top)) if unknown else ""
        told = f"unrecognised arguments: {' '.join(unknown or rest)}{meant and '.'}{meant}"
        top.error(redact(told, typed_secrets(given)))
    if hasattr(args, "overrides"):
        args.overrides += rest
    if args.run in (_evaluate, _chat, _merge):  # torch runs in this process, and reads it while it is imported
        os.environ.update(waiting())
    try:
        return int(args.run(args))
    except TunewrightError as error:
        tell(redact(f"{type(error).__name__}: {error}", typed_secrets(given)), sys.stderr)
        return error.exit_code
    except StopAsked as asked:
        ignore()  # a process below may have heard the same request first
        tell(f"Stopped by {asked.name} while nothing was trained: the same command begins here again.", sys.stderr)
        return Preempted.exit_code
    except KeyboardInterrupt:
        tell("Stopped.", sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # the reader of our output went away
    except Exception as error:
        refusal = refused(error)
        if refusal:
            tell(redact(f"StorageError: {refusal}", typed_secrets(given)), sys.stderr)
            return StorageError.exit_code
        # A bug: shown whole, and told apart from the user's mistakes.
        tell(redact(traceback.format_exc(), typed_secrets(given)), sys.stderr)
        return TunewrightError.exit_code


def _folder(text: str) -> Path:
    """Read the name of a folder to write to; an unset variable is not the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the folder's name is empty (an unset variable?)")
    return Path(text)


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser and its subcommands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(_options, action.choices.values()))
    return found


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    command.add_argument("--config-dir", type=Path, help="a folder with configuration groups of your own")


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument("--trust", action="store_true", help="open a run that somebody else made, run code it brings")


def _train(args: argparse.Namespace) -> int:
    from tunewright.launch.train import sweep_jobs, train

    if args.cfg:
        return _print_configs(sweep_jobs(args.overrides, args.config_dir, multirun=args.multirun))
    with _stoppable():
        return train(args.overrides, extra_dir=args.config_dir, multirun=args.multirun, dry_run=args.dry_run, say=_tell)


def _plan(args: argparse.Namespace) -> int:
    from tunewright.launch.plan_command import run

    return run(args, _say)


def _resume(args: argparse.Namespace) -> int:
    from tunewright.launch.resume import resume

    with _stoppable():
        return resume(args.run_folder, args.overrides, trusted=args.trust, dry_run=args.dry_run, say=_tell)


def _runs(args: argparse.Namespace) -> int:
    from tunewright.launch.runs import runs_text

    _say(runs_text(args.root))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from tunewright.launch.doctor.examine import run

    return run(args)


def _config(args: argparse.Namespace) -> int:
    from tunewright.config.compose import load_plugins
    from tunewright.config.describe import choices_text, keys_text

    asked = [item for item in load_plugins(args.overrides) if item.key_or_group != "imports"]
    if args.keys:
        _say(keys_text())
    elif asked:
        from tunewright.launch.train import sweep_jobs

        return _print_configs(sweep_jobs(args.overrides, args.config_dir, multirun=False))
    else:
        _say(choices_text(args.config_dir))
    return 0


def _print_configs(configs: list[DictConfig]) -> int:
    from tunewright.run_folder import redacted_yaml

    _say("---\n".join(redacted_yaml(config) for config in configs))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from tunewright.deliver.compare import compare

    compare(args.runs, args.out)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    with uncollected():
        from tunewright.deliver.evaluate import evaluate_runs

    evaluate_runs(args.runs, args.examples, _say, trusted=args.trust)
    return 0


def _chat(args: argparse.Namespace) -> int:
    with uncollected():
        from tunewright.deliver.chat import chat

    return chat(args.tuned, args.prompt, args.system, args.max_new_tokens, trusted=args.trust)


def _merge(args: argparse.Namespace) -> int:
    with uncollected():
        from tunewright.deliver.merge import merge_run

    merge_run(
        args.tuned,
        dtype=args.dtype,
        out=args.out,
        overwrite=args.overwrite,
        max_shard=args.max_shard,
        trusted=args.trust,
        say=_say,
    )
    return 0


def _demo(args: argparse.Namespace) -> int:
    from tunewright.launch.demo import demo

    with _stoppable():
        return demo(args.root, _tell)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Have a signal stop the command, and none change the exit code once it is known."""
    with heard_by(interrupt):
        yield
    ignore()


def _say(text: str) -> None:
    print(redact(text), flush=True)


def _tell(text: str) -> None:
    """Say a line of what goes on to its end, whether anybody reads it or not."""
    tell(redact(text))


if __name__ == "__main__":
    sys.exit(main())
