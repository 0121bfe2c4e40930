"""What the `accelerate launch` above a rank was asked for, which it tells its ranks only in part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tunewright.errors import ConfigError
from tunewright.ranks import machines, rank, world_size


@dataclass(frozen=True)
class Asked:
    """How many processes on how many machines; None where that was left to accelerate."""

    machines: int | None
    processes: int | None


def asked_of_accelerate() -> Asked | None:
    """Return what the `accelerate launch` that started this process was asked for, or None where there is none."""
    for process in psutil.Process().parents():
        try:
            arguments = launch_arguments(process.cmdline())
        except psutil.Error:  # it has ended, or is somebody else's
            continue
        if arguments is not None:
            return read(arguments)
    return None


def launch_arguments(command: Sequence[str]) -> list[str] | None:
    """Return the arguments of an `accelerate launch`, or None where a command is none."""
    for number, word in enumerate(command[:4]):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return list(command[number + 1 :])
        if name == "accelerate" or word == "accelerate.commands.accelerate_cli":
            return list(command[number + 2 :]) if list(command[number + 1 : number + 2]) == ["launch"] else None
    return None


def read(arguments: Sequence[str]) -> Asked:
    """Read what accelerate reads: its command line, and what that leaves open from its configuration file."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(arguments)
    count, processes = given.num_machines, given.num_processes
    file = given.config_file or default_config_file
    if os.path.isfile(file):
        config = load_config_from_file(file)
        count = count or getattr(config, "num_machines", None)
        processes = processes or getattr(config, "num_processes", None)
    return Asked(count, processes)


def check_asked(asked: Asked | None) -> None:
    """Compare what was asked for with the ranks that there are, by what their launcher told them.

    accelerate 1.15 starts several machines under DeepSpeed by DeepSpeed's launcher over pdsh unless told otherwise,
    which without a hostfile starts this machine's ranks alone; and with `--cpu` one process, whatever its number.

    Raises:
        ConfigError: each machine, or one process alone, would train for itself.
    """
    if asked is None:
        return
    here = machines() or 1
    wanted = [f"{asked.processes} processes"] if asked.processes and asked.processes != world_size() else []
    wanted += [f"{asked.machines} machines"] if asked.machines and asked.machines != here else []
    if not wanted:
        return
    advice = "Start without `--cpu`: on a machine without GPUs, `--multi_gpu` starts ranks over gloo."
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        advice = (
            "Add `--deepspeed_multinode_launcher standard` (in a configuration file: `deepspeed_multinode_launcher: "
            "standard` under `deepspeed_config`) on each of them, with `--machine_rank` and `--main_process_ip`."
        )
    raise ConfigError(
        f"`accelerate launch` was asked for {' on '.join(wanted)}, and this is rank {rank()} of {world_size()} on "
        f"{here} machine{'s' if here > 1 else ''}: it is not what runs, and each would train alone. {advice}"
    )
