"""`tunewright datagen`; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import shlex
import sys

HELP = """\
Make a dataset from the description of a task, through OpenAI or any server that speaks its API.

  export OPENAI_API_KEY=...
  tunewright datagen task="Given a riddle, answer with a single word." name=riddles examples=50 temperature=0.4

The same command continues a run that was stopped, and pays only for what is missing. Settings:
task, name, examples, temperature, model, out, concurrency, base_url, seed, max_tokens, timeout (see docs/datagen.md).
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "datagen",
        help="make a dataset from the description of a task",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings; task and name are needed")
    command.add_argument("--dry-run", action="store_true", help="check everything and show what would be asked")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    from datagen.settings import find_endpoint, load_settings

    config = load_settings(args.overrides)
    endpoint = find_endpoint(config)
    from datagen.generate import generate

    try:
        return generate(config, endpoint, dry_run=args.dry_run, say=_say)
    except KeyboardInterrupt:
        command = endpoint.scrub(shlex.join(["tunewright", "datagen", *args.overrides]))
        print(f"Stopped. Every reply so far is kept; this continues it:\n  {command}", file=sys.stderr)
        return 130


def _say(text: str) -> None:
    print(text, flush=True)
