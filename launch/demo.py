"""`tunewright demo`: the shipped task trained three ways, compared, and asked, in a few minutes on two CPU cores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunewright.deliver.compare import compare
from tunewright.errors import TunewrightError
from tunewright.folders import check_name
from tunewright.launch.train import train
from tunewright.run_folder import RunDir


@dataclass(frozen=True)
class Stage:
    """One part of the demo; `share` is how long it takes beside the others, in no unit of time."""

    title: str
    share: float
    overrides: tuple[str, ...] = ()


WAYS = {
    "zero2": Stage("ZeRO-2 on two ranks", 45, ("strategy=zero2",)),
    "zero3": Stage("ZeRO-3 on two ranks", 95, ("strategy=zero3",)),
    "qlora": Stage("QLoRA on one device", 50, ("strategy=single", "method=qlora")),
}
EVALUATE = Stage("held-out answers of base and tuned models", 20)


def demo(root: Path, say: Callable[[str], None] = print) -> int:
    """Train, evaluate and compare; runs that are there already are used again.

    Raises:
        ConfigError: `root` does not end in a plain name.
        TunewrightError: the tuned models are not better than the base model.
    """
    check_name(root.name, "--root")
    started = time.monotonic()
    seconds = {name: taken for name in WAYS if (taken := _finished_in(RunDir(root / name)))}
    evaluated = all(RunDir(root / name).evaluation.is_file() for name in WAYS)
    for number, (name, stage) in enumerate(WAYS.items(), 1):
        say(f"\n[{number}/{len(WAYS) + 1}] {stage.title}{time_left(seconds, evaluated=evaluated)}")
        begun = time.monotonic()
        code = train(
            ["experiment=demo", *stage.overrides, f"name={name}", f"output_root={root}", "resume=auto"], say=say
        )
        if code:
            return code
        seconds.setdefault(name, time.monotonic() - begun)
    say(f"\n[{len(WAYS) + 1}/{len(WAYS) + 1}] {EVALUATE.title}")
    paths = [root / name for name in WAYS]
    missing = [path for path in paths if not RunDir(path).evaluation.is_file()]
    if missing:
        from tunewright.deliver.evaluate import evaluate_runs

        evaluate_runs(missing, None, say)
    say("")
    # Beside the runs, so that `tunewright compare runs/demo/*` finds runs only.
    compare(paths, root.with_name(f"{root.name}-comparison"), echo=say)
    _require_improvement(paths)
    took = time.monotonic() - started
    say(f"\nThe demo took {took:.0f} s. Next: `tunewright chat {paths[0]}`, `tensorboard --logdir {root}`.")
    return 0


def _finished_in(run: RunDir) -> float | None:
    """Return the seconds that a run took which is there already, or None."""
    manifest = run.read_manifest()
    return manifest.get("wall_seconds") if manifest.get("status") == "done" else None


def time_left(seconds: Mapping[str, float], *, evaluated: bool = False) -> str:
    """Return what to say of the time left, from the seconds that parts took on this machine; nothing before one did."""
    waiting = [stage for name, stage in WAYS.items() if name not in seconds] + ([] if evaluated else [EVALUATE])
    if not seconds or not waiting:
        return ""
    pace = sum(seconds.values()) / sum(WAYS[name].share for name in seconds)
    left = sum(stage.share for stage in waiting)
    return f" (about {pace * left / 60:.1f} min left for the whole demo, at the pace so far)"


def _require_improvement(paths: list[Path]) -> None:
    for path in paths:
        result = json.loads(RunDir(path).evaluation.read_text(encoding="utf-8"))
        before, after = result["base"]["exact_match"], result["tuned"]["exact_match"]
        if after <= before:
            raise TunewrightError(
                f"{path}: held-out exact match did not rise ({before:.1%} before, {after:.1%} after)."
            )
