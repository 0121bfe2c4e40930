"""What the `accelerate launch` above a rank was asked for, against what runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.launch.asked import Asked, check_asked, launch_arguments, read
from tunewright.launch.rank import overrides_of


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["/bin/python", "/bin/accelerate", "launch", "--cpu", "x.py"], ["--cpu", "x.py"]),
        (["accelerate", "launch", "x.py"], ["x.py"]),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "x.py"], ["x.py"]),
        (["python", "-m", "accelerate.commands.launch", "x.py"], ["x.py"]),
        (["python", "/bin/accelerate-launch", "x.py"], ["x.py"]),
        (["accelerate", "env"], None),
        (["torchrun", "--nproc_per_node", "2", "launch"], None),
        ([], None),
    ],
)
def test_a_launch_is_known_by_its_command(command: list[str], arguments: list[str] | None) -> None:
    assert launch_arguments(command) == arguments


def test_what_was_asked_for_is_in_arguments_and_in_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 2\nnum_processes: 4\n"
        "machine_rank: 0\n"
    )
    rank = ["-m", "tunewright.launch.rank", "train.epochs=1"]
    assert read(["--config_file", str(file), *rank]) == Asked(2, 4)
    assert read(["--config_file", str(file), "--num_processes=8", *rank]) == Asked(2, 8)


@pytest.mark.parametrize(
    ("asked", "world", "machines", "refused"),
    [
        (None, 1, None, None),
        (Asked(None, None), 1, None, None),
        (Asked(1, 1), 1, None, None),
        (Asked(2, 4), 4, 2, None),
        (Asked(2, 2), 1, None, "2 processes on 2 machines, and this is rank 0 of 1 on 1 machine"),
        (Asked(2, None), 2, 1, "2 machines, and this is rank 0 of 2 on 1 machine"),
        (Asked(None, 2), 1, None, "2 processes, and this is rank 0 of 1"),
    ],
)
def test_ranks_that_would_train_alone_are_refused(
    asked: Asked | None, world: int, machines: int | None, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for name in ("RANK", "GROUP_WORLD_SIZE", "CROSS_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    if machines:
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(machines))
    if refused is None:
        check_asked(asked)
        return
    with pytest.raises(ConfigError, match=refused):
        check_asked(asked)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="--deepspeed_multinode_launcher standard"):
        check_asked(asked)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "single"), (2, "ddp")])
@pytest.mark.parametrize("typed", [[], ["strategy=auto"]])
def test_a_launcher_of_ones_own_has_chosen_the_strategy(
    ranks: int, strategy: str, typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    config = compose_config(overrides_of([*typed, "train.epochs=1"]))
    assert config.name == f"tiny-demo-lora-{strategy}"
    assert config.train.micro_batch_size == 4
