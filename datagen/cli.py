"""`tunewright datagen`; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import shlex
import sys

HELP = """\
Make a dataset from the description of a task, through OpenAI or any server that speaks its API.

  export OPENAI_API_KEY=...
  tunewright datagen task="Given a riddle, answer with a single word." name=riddles examples=500 temperature=0.4
  tunewright datagen task="..." name=riddles --plan-only                 topics, personas, system message: look and edit
  tunewright datagen task="..." name=riddles plan=data/riddles.plan.json source=handbook/ budget.usd=5 judge.threshold=4
  tunewright datagen task="..." name=riddles provider=openai_compatible base_url=http://localhost:8000/v1 model=qwen2.5

The same command continues a run that was stopped, and pays only for what is missing. `--keys` lists the settings.
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
    command.add_argument("--dry-run", action="store_true", help="check everything; estimate requests, tokens and cost")
    command.add_argument("--plan-only", action="store_true", help="make the plan, show and save it, and stop")
    command.add_argument("--push", metavar="ORG/NAME", help="upload the result to this dataset repository of the Hub")
    command.add_argument("--keys", action="store_true", help="every setting with its default and meaning")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    from tunewright.datagen.endpoint import find_endpoint
    from tunewright.datagen.settings import keys, load_settings

    if args.keys:
        for key, _, text, default in keys():
            _say(f"  {key:<18} {text} [{getattr(default, 'name', default)}]")
        return 0

    config = load_settings([*args.overrides, *([f"push={args.push}"] if args.push else [])])
    endpoint = find_endpoint(config)
    from tunewright.datagen.make_dataset import make_dataset

    try:
        return make_dataset(config, endpoint, dry_run=args.dry_run, plan_only=args.plan_only, say=_say)
    except KeyboardInterrupt:
        command = endpoint.scrub(shlex.join(["tunewright", "datagen", *args.overrides]))
        print(f"Stopped. Every reply so far is kept; this continues it:\n  {command}", file=sys.stderr)
        return 130


def _say(text: str) -> None:
    print(text, flush=True)
