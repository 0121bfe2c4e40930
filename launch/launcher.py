"""`accelerate launch`, told on standard input what to launch: `python -m tunewright.launch.launcher`.

Importing it takes over a second, which passes while the data is prepared. Until it is told, it does nothing.
"""

from __future__ import annotations

import json
import os
import sys

from tunewright.ranks import interrupt_may_come


def main() -> None:
    """Read `{"arguments": [...], "env": {...}, "log": file}` and launch."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    text = sys.stdin.read()
    if not text:
        return  # whoever began this ended without an order
    told = json.loads(text)
    os.environ.update(told["env"])
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(nothing, 0)
    os.dup2(log, 2)
    interrupt_may_come()
    launch_command(launch_command_parser().parse_args(told["arguments"]))


if __name__ == "__main__":
    main()
