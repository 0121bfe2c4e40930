"""`tunewright data`: look at data before training on it. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

CHECK_HELP = """\
Make the tokens of some datasets and report on them: dropped rows and why, lengths, copies, overlap with held-out rows.
It needs no GPU and no weights, and what it makes is what training uses.

  tunewright data check                                        the shipped data
  tunewright data check huanhuan model=qwen2_5_7b data.cutoff_len=512
  tunewright data check my/rows.jsonl data.eval_size=0.1 --html report.html

Exit code 3 when more rows than data.max_dropped cannot be used.
"""

SHOW_HELP = """\
Print a row as the model sees it, token by token, and which tokens are learnt.

  tunewright data show huanhuan --row 17 model=qwen2_5_7b data.cutoff_len=512
  tunewright data show my/rows.jsonl --dump tokens.jsonl
"""

ADD_HELP = """\
Propose a registry entry for a file or a folder, and add it to dataset_info.json; what is there stays as it is.

  tunewright data add data/riddles.jsonl
  tunewright data add ~/downloads/riddles.jsonl --copy --name riddles
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the group of subcommands."""
    group = commands.add_parser("data", help="check, show and register datasets")
    group.set_defaults(run=lambda args: _print_help(group))
    kinds = group.add_subparsers(metavar="COMMAND")

    check = _command(kinds, "check", "report on datasets before training", CHECK_HELP)
    check.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="NAME|key=value",
        help="datasets as in data.names (entries, paths, hub:ORG/NAME), and Hydra overrides as in `tunewright train`",
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page as well")
    _add_dir(check)
    _add_config_dir(check)
    check.set_defaults(run=_run("check"))

    show = _command(kinds, "show", "print a row as the model sees it", SHOW_HELP)
    show.add_argument("name", metavar="NAME", help="a dataset as in data.names")
    show.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="Hydra overrides")
    show.add_argument("--row", type=int, metavar="N", help="which row, counted from 0 (the default)")
    show.add_argument("--ids", action="store_true", help="a line for each token: index, id, label, text")
    show.add_argument("--dump", type=Path, metavar="FILE", help="write all examples as JSONL: row, input_ids, labels")
    _add_dir(show)
    _add_config_dir(show)
    show.set_defaults(run=_run("show"))

    add = _command(kinds, "add", "add a file to a registry", ADD_HELP)
    add.add_argument("file", type=Path, metavar="FILE", help="a data file or folder")
    add.add_argument("overrides", nargs="*", default=[], metavar="data.dir=DIR", help="the same as --dir DIR")
    add.add_argument("--name", help="name of the entry; default: the file's name without its suffix")
    _add_dir(add)
    add.add_argument("--copy", action="store_true", help="copy the file into that folder first")
    add.add_argument("--dry-run", action="store_true", help="show the entry and write nothing")
    add.set_defaults(run=_run("add"))


def _command(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, text: str
) -> argparse.ArgumentParser:
    return kinds.add_parser(name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dir", type=Path, help="folder of dataset_info.json, the same as data.dir=DIR [data]")


def _add_config_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config-dir", type=Path, help="a folder with configuration groups of your own")


def _print_help(group: argparse.ArgumentParser) -> int:
    group.print_help()
    return 0


def _run(module: str) -> Callable[[argparse.Namespace], int]:
    """Return what runs a subcommand: the function `run` of its module, imported then."""
    return lambda args: int(import_module(f"tunewright.launch.data.{module}").run(args))
