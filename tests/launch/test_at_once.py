"""The same command, started several times at the same moment."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import losses, manifest


def test_of_several_starts_with_one_name_one_trains(
    tunewright: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    settings = ("train.max_steps=3", "train.logging_steps=1", "data.eval_names=[]", "train.save_steps=0")
    command = ("train", f"output_root={tmp_path}", "name=same", *settings)
    with ThreadPoolExecutor(2) as threads:
        done = [started.result() for started in [threads.submit(tunewright, *command) for _ in range(2)]]
    assert sorted(one.returncode for one in done) == [0, 2], [one.stdout + one.stderr for one in done]
    who = manifest(tmp_path / "same")["process"]
    for refused in (one for one in done if one.returncode):
        told = refused.stdout + refused.stderr
        assert f"is in use: process {who['pid']} on {who['host']}" in told or "holds this run already" in told
    assert len(losses(tmp_path / "same")) == 3
