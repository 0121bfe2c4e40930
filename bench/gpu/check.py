"""The GPU kit: one command for a machine with a GPU, without network, under eight minutes.

    python bench/gpu/check.py                   # `make gpu-check`
    python bench/gpu/check.py --parts levers    # what a setting wins or loses, one by one
    python bench/gpu/check.py --tiny     # small shapes, as `make gpu-rehearsal` runs it on a CPU

Parts run one after the other, most valuable first, each in a process of its own with a time limit of its own. After
each, its results lie in $OUT (otherwise gpu-check/): PART.jsonl or .json as measured, report.md to read. A part that is
cut, or that the device takes along, still leaves what it had done. Wheels in .gpu-kit/wheels, which `make
gpu-rehearsal` puts there, are used for what the machine lacks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from rooms import make_rooms

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
KIT = REPOSITORY / ".gpu-kit"
LIMIT = 470.0  # seconds, of all parts together
TRIES = 4  # of a part that a crash ended: each goes on behind the cell that crashed
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "bitsandbytes", "deepspeed", "triton")
PARITY_REFERENCES = ("TRL, defaults", "loop by hand", "tunewright")


@dataclass(frozen=True)
class Part:
    name: str
    script: str
    arguments: tuple[str, ...]
    result: str
    seconds: float


PARTS = (
    Part("doctor", "doctor.py", (), "doctor.json", 60),
    Part("smoke", "smoke.py", (), "smoke.jsonl", 100),
    Part("speed", "worker.py", ("speed",), "speed.jsonl", 230),
    Part("others", "worker.py", ("others",), "others.jsonl", 130),
    Part("timeline", "timeline.py", (), "timeline.json", 60),
    Part("levers", "worker.py", ("levers",), "levers.jsonl", LIMIT),
)
USUAL = PARTS[:-1]  # the levers that promise less take a run of their own
TRAININGS = ("speed", "others", "levers")


def run_part(part: Part, out: Path, env: dict[str, str], seconds: float, *, tiny: bool) -> str:
    """Run a part until it is done or its time is up; return what became of it."""
    deadline = time.monotonic() + seconds
    command = [sys.executable, str(HERE / part.script), *part.arguments, str(out / part.result)]
    for attempt in range(1, TRIES + 1):
        with (out / f"{part.name}.log").open("a") as log:
            # A session of its own, so that what it started ends with it.
            process = subprocess.Popen(
                [*command, *(["--tiny"] if tiny else [])],
                cwd=REPOSITORY,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                return f"cut after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code == 0:
            return "done" if attempt == 1 else f"done, after {attempt - 1} crashes"
        if time.monotonic() > deadline - 20:
            break
    return f"ended with exit code {code}"


def environment(site: Path | None = None) -> dict[str, str]:
    """Return the environment of the parts: no network, our packages, and those that were carried along."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(make_rooms(KIT / "rooms")), *env.get("PYTHONPATH", "").split(os.pathsep)]
    if site is None and importlib.util.find_spec("trl") is None and any((KIT / "wheels").glob("*.whl")):
        site = KIT / f"site-{sys.version_info.major}.{sys.version_info.minor}"
        if not site.exists():
            install(site, sys.executable)
    if site is not None:
        paths.insert(1, str(site))
    return {**env, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def install(site: Path, python: str) -> None:
    """Unpack the carried wheels where this Python finds them, beside what the machine has."""
    pip = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    wheels = sorted(str(path) for path in (KIT / "wheels").glob("*.whl"))
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(site), *wheels], check=True)


def has_gpu(env: dict[str, str]) -> bool:
    script = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", script], env=env).returncode == 0


def facts(env: dict[str, str]) -> dict[str, Any]:
    """Return the machine, in the words of nvidia-smi or rocm-smi where there is one, and the packages."""
    script = "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
    script += "for name in sys.argv[1:]:\n try: found[name] = version(name)\n"
    script += " except PackageNotFoundError: found[name] = None\nprint(json.dumps(found))"
    versions = subprocess.run([sys.executable, "-c", script, *PACKAGES], env=env, capture_output=True, text=True)
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        gpu = ""
    return {
        "when": time.strftime("%Y-%m-%d"),
        "gpu": gpu or "none that nvidia-smi knows",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": json.loads(versions.stdout or "{}"),
        "command": "make gpu-check",
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Return what a part wrote: ended lines, and for a line that only began that it did not end."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    ended = [line for line in lines if not line.get("begun")]
    names = [(line.get("number"), line["name"]) for line in ended]
    cut = [line for line in lines if line.get("begun") and (line.get("number"), line["name"]) not in names]
    return ended + [{**line, "error": "did not end: a crash, or its time was up"} for line in cut]


def judged(rows: list[dict[str, Any]]) -> None:
    """Write into each row of a group why it does not count, or None."""
    from judge import Step, void_reason

    def steps(row: dict[str, Any]) -> list[Step]:
        return [Step(*pair) for pair in zip(row["losses"], row["grad_norms"], strict=True)]

    good = [row for row in rows if "error" not in row and "skipped" not in row]
    for group in {row["group"] for row in good}:
        members = [row for row in good if row["group"] == group]
        same_model = [row for row in members if row["method"] == members[0]["method"] and not row["packed"]]
        reference = min(
            same_model or members,
            key=lambda row: PARITY_REFERENCES.index(row["name"]) if row["name"] in PARITY_REFERENCES else 9,
        )
        for row in members:
            against = reference if row["method"] == reference["method"] else row
            row["void"] = void_reason(
                steps(row), steps(against), len(against["losses"]), sum(row["tokens"]), same_rows=not row["packed"]
            )


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
    judged(rows)
    lines = [
        "| | tokens/s | TFLOP/s | MFU | allocated | reserved | tunewright is | counts |",
        "|---|" + "---:|" * 6 + "---|",
    ]
    last = None
    for row in sorted(rows, key=lambda row: (row["group"] != rows[0]["group"], row["group"], row["number"])):
        if row["group"] != last:
            last = row["group"]
            lines.append(f"| **{last}** |" + " |" * 7)
        if "tokens_per_second" not in row:
            why = row.get("error") or f"not measured: {row['skipped']}"
            lines.append(f"| {row['name']} |" + " |" * 6 + f" {why.splitlines()[0][:160]} |")
            continue
        ours = next((one for one in rows if one["group"] == last and one["name"] == "tunewright"), None)
        times = ours["tokens_per_second"] / row["tokens_per_second"] if ours and "error" not in ours else None
        cells = [
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tflops']:,.1f}",
            f"{row['mfu']:.1%}" if row["mfu"] else "-",
            *(f"{row[key]:.1f} GiB" if key in row else "-" for key in ("peak_allocated_gib", "peak_reserved_gib")),
            f"{times:.2f} x" if times and row is not ours else "",
            f"void: {row['void']}" if row["void"] else "yes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        planned, allocated = row.get("planned_gib"), row.get("peak_allocated_gib")
        if planned and allocated:
            sizes = f"{planned:.1f} GiB planned, {allocated:.1f} allocated, {planned / allocated - 1:+.0%}"
            rate, seen = row["planned_tokens_per_second"], row["tokens_per_second"]
            rates = f"{rate:,.0f} tokens/s planned from lists, {seen:,.0f} seen, {rate / seen - 1:+.0%}"
            lines.append(f"\n{row['group']}, {row['name']}: {sizes}; {rates}")
    return lines + [f"\n{row['name']}: {row['said']}" for row in rows if row.get("said")]


def report(out: Path, told: dict[str, Any], became: dict[str, str]) -> str:
    """Return report.md from what lies in the folder."""
    lines = ["# GPU check", "", "```", json.dumps(told, indent=1), "```", ""]
    lines += [f"- {name}: {what}" for name, what in became.items()]
    if (out / "doctor.json").exists():
        told = json.loads((out / "doctor.json").read_text())
        lines += ["", "## Doctor", "", f"{told['to_fix']} to fix, {told['seconds']} s.", ""]
        lines += [f"- {one['state']}, {one['group']}: {one['found']} {one['do']}".rstrip() for one in told["findings"]]
    smoke = read(out / "smoke.jsonl")
    if smoke:
        bad = [line for line in smoke if not line.get("ok")]
        lines += ["", "## Smoke", "", f"{len(smoke) - len(bad)} of {len(smoke)} checks hold.", ""]
        for line in bad:
            what = line.get("problem") or line.get("output") or line.get("error")
            lines.append(f"- **{line['name']}**: {str(what)[:400]} {line.get('errors') or line.get('losses') or ''}")
        for part in ("kernel", "training"):
            errors = [line["error"] for line in smoke if line["name"].startswith(part) and line.get("ok")]
            if errors:
                lines.append(f"- largest difference, {part}: {max(errors):.2%}")
    for part in TRAININGS:
        rows = read(out / f"{part}.jsonl")
        if rows:
            lines += ["", f"## {part.capitalize()}", "", *speed_table(rows)]
    if (out / "timeline.json").exists():
        found = json.loads((out / "timeline.json").read_text())
        lines += ["", "## Timeline", ""]
        lines.append(
            f"{found['steps']} steps in {found['wall_s']:.3f} s: the device worked {found['device_busy']:.1%} of the "
            f"time; longest gaps {', '.join(f'{gap:.2f}' for gap in found['longest_gaps_ms'][:5])} ms."
        )
        lines += ["", "| kernels | s |", "|---|---:|"]
        lines += [f"| {name} | {seconds:.4f} |" for name, seconds in found["by_group_s"].items()]
        lines += ["", "| kernel | s | calls |", "|---|---:|---:|"]
        lines += [f"| `{one['name'][:90]}` | {one['s']:.4f} | {one['calls']} |" for one in found["by_kernel"][:25]]
    return "\n".join(lines) + "\n"


def holds(out: Path) -> bool:
    """Whether every smoke check holds and no measured row of ours is void or missing, of what lies in the folder."""
    rows = [row for part in TRAININGS for row in read(out / f"{part}.jsonl")]
    judged(rows)
    ours = [row for row in rows if row["contender"] == "tunewright"]
    sound = all(line.get("ok") for line in read(out / "smoke.jsonl"))
    return sound and not any(row.get("error") or row.get("void") for row in ours)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal on a CPU")
    parser.add_argument("--parts", default=",".join(part.name for part in USUAL), help="which of them, comma-separated")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-check"))
    args = parser.parse_args()
    chosen = [part for part in PARTS if part.name in args.parts.split(",")]
    if not chosen:
        parser.error(f"--parts {args.parts}: choose from {', '.join(part.name for part in PARTS)}")
    env = environment()
    if not args.tiny and not has_gpu(env):
        print(
            f"The torch of {sys.executable} sees no GPU here, so there is nothing to check. Without one, `make "
            f"gpu-rehearsal` tries everything with small shapes on the CPU."
        )
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for part in chosen:  # results of another day would be taken for those of cells that this run skips
        (out / part.result).unlink(missing_ok=True)
        (out / f"{part.name}.log").unlink(missing_ok=True)
    started = time.monotonic()
    told = facts(env)
    print(json.dumps(told), flush=True)
    became: dict[str, str] = {}
    for part in chosen:
        left = args.limit - (time.monotonic() - started)
        if left < 15:
            became[part.name] = "not begun: no time was left"
            continue
        begun = time.monotonic()
        seconds = left if args.limit > LIMIT else min(part.seconds, left)
        became[part.name] = run_part(part, out, env, seconds, tiny=args.tiny)
        became[part.name] += f" ({time.monotonic() - begun:.0f} s)"
        (out / "facts.json").write_text(json.dumps({**told, "parts": became}, indent=1) + "\n")
        (out / "report.md").write_text(report(out, told, became))
        print(f"{part.name}: {became[part.name]}", flush=True)
    print((out / "report.md").read_text())
    return 0 if holds(out) and all(what.startswith("done") for what in became.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
