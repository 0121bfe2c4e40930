"""Checkpoints that nobody asked for: often enough, and never dear, whatever a step and a save take."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

from tunewright.trainer.save_schedule import EVERY_SECONDS, SHARE, SaveSchedule


def saves(steps: int, step_seconds: float, save_seconds: float, parameters: int = 1_000_000) -> tuple[list[int], float]:
    """Return the steps after which a run saves, and how long it takes in all."""
    clock = 0.0
    checkpoints = SimpleNamespace(seconds=None, saved_at=0.0)
    schedule = SaveSchedule(checkpoints, parameters, main=True, now=lambda: clock)
    saved = []
    for step in range(1, steps + 1):
        clock += step_seconds * (1 if step > 1 else 8)  # the first compiles something
        control = SimpleNamespace(should_save=False)
        state = SimpleNamespace(global_step=step, max_steps=steps)
        if schedule.asked(state) > 0:
            schedule.answered(1.0, None, state, control)
        if control.should_save:
            clock += save_seconds
            checkpoints.seconds, checkpoints.saved_at = save_seconds, clock
            saved.append(step)
    return saved, clock


@pytest.mark.parametrize("steps", [40, 100, 5_000])
@pytest.mark.parametrize("step_seconds", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("save_seconds", [0.1, 5.0, 120.0])
def test_ten_a_run_one_in_ten_minutes_and_three_percent_at_most(
    steps: int, step_seconds: float, save_seconds: float
) -> None:
    saved, seconds = saves(steps, step_seconds, save_seconds, int(save_seconds * 3e8 / 16))
    assert len(saved) * save_seconds <= SHARE * seconds
    if 16 * save_seconds <= SHARE * seconds:  # a step more or less counts where runs have few of them
        assert len(saved) >= 10
        longest = max(later - before for before, later in pairwise([0, *saved])) * step_seconds
        assert longest <= max(EVERY_SECONDS, save_seconds / SHARE) + 9 * step_seconds
    if 2 * save_seconds <= SHARE * seconds:
        assert saved


def test_a_run_of_seconds_saves_nothing_and_an_hour_loses_no_more_than_ten_minutes() -> None:
    assert saves(20, 0.2, 0.3)[0] == []
    saved, _ = saves(1_800, 2.0, 1.0)
    assert saved[-1] >= 1_780
    assert max(later - before for before, later in pairwise([0, *saved])) <= 301


def test_only_the_first_ranks_clock_decides() -> None:
    checkpoints = SimpleNamespace(seconds=0.1, saved_at=-1e6)
    other = SaveSchedule(checkpoints, 1, main=False)
    for step in (1, 2, 3):
        assert other.asked(SimpleNamespace(global_step=step, max_steps=3)) == 0.0
