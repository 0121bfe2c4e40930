"""What becomes of a bench's JSON: a table, the section of docs/benchmarks.md, and the comparison with the last one.

python bench/report.py docs      # writes the section between its markers, and the README's table
python bench/report.py check     # exits 1 where a ratio to a competitor fell by more than 15 %
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
RESULT = BENCH / "results" / "train.json"
PAGE = BENCH.parent / "docs" / "benchmarks.md"
README = BENCH.parent / "README.md"
BEGIN, END = "<!-- made by bench/report.py: begin -->", "<!-- made by bench/report.py: end -->"
ALLOWED_FALL = 0.15
NOTED_CPU_S = 10
Json = dict[str, Any]

# What the overview compares with; of several the fastest.
OTHERS = {
    "TRL, defaults": ("TRL, defaults",),
    "TRL, tuned": ("TRL, tuned",),
    "LLaMA-Factory, defaults": ("LLaMA-Factory, defaults",),
    "LLaMA-Factory, best": ("LLaMA-Factory, no checkpointing", "LLaMA-Factory, packing"),
}
SHOWN = "lora, short rows, single"
IN_README = {
    "tunewright": "tunewright",
    "LLaMA-Factory, defaults": "LLaMA-Factory {llamafactory}, defaults",
    "LLaMA-Factory, packing": "LLaMA-Factory {llamafactory}, packing",
    "TRL, defaults": "TRL {trl}, defaults",
    "TRL, tuned": "TRL {trl}, bfloat16 adapters and packing",
    "loop by hand": "a loop by hand, without padding",
}
COLUMNS = (
    "",
    "tokens/s",
    "spread",
    "tunewright is",
    "first step after",
    "private memory",
    "RSS",
    "GFLOP/s",
    "MFU",
    "of the GEMM rate",
    "counts",
)


def table(cell: Json) -> str:
    """One cell of the grid as Markdown, a contender a line."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|"]
    ours = next((row for row in cell["contenders"] if row["name"] == "tunewright"), None)
    for row in cell["contenders"]:
        if "tokens_per_second" not in row:
            reason = f"cannot: {row['cannot']}" if row.get("cannot") else f"void: {row['void']}"
            lines.append(f"| {row['name']} |" + " |" * (len(COLUMNS) - 2) + f" {reason} |")
            continue
        speed = row["tokens_per_second"]
        times = ours["tokens_per_second"]["median"] / speed["median"] if ours and _counts(ours) else None
        cells = [
            row["name"],
            f"{speed['median']:,.0f}",
            f"{speed['min']:,.0f} to {speed['max']:,.0f}",
            f"{times:.2f} x" if times and row is not ours and _counts(row) else "",
            f"{row['first_step_s']['median']:.1f} s",
            f"{row['peak_private_mib']['median']:,.0f} MiB",
            f"{row['peak_rss_mib']['median']:,.0f} MiB",
            f"{row['gflops']:,.0f}",
            f"{row['mfu']:.0%}" if row.get("mfu") else "-",
            f"{row['of_gemm']:.0%}",
            _verdict(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(row: Json) -> str:
    if row["void"]:
        return f"void: {row['void']}"
    return f"disturbed: {row['disturbed']}" if row.get("disturbed") else "yes"


def _counts(row: Json) -> bool:
    return "tokens_per_second" in row and not row["void"]


def marked(result: Json) -> list[str]:
    """A line for each row all of whose runs were disturbed."""
    return [
        f"{name_of(cell)}, {row['name']}: {row['disturbed']}"
        for cell in result["cells"]
        for row in cell["contenders"]
        if row.get("disturbed")
    ]


def name_of(cell: Json) -> str:
    return f"{cell['method']}, {cell['rows']} rows, {cell['strategy']}"


def title(cell: Json) -> str:
    rows, run = cell["workload"], cell["run"]
    tokens, count = sum(rows["tokens"]), cell["settings"]["batch"] * run["steps"]
    return (
        f"{cell['method']}, {cell['rows']} rows (mean {tokens / count:.0f} tokens, longest {rows['longest']:,}; padded "
        f"batches hold {rows['padded'] / tokens:.2f} times the tokens), {cell['strategy']}"
    )


def told(cell: Json) -> str:
    """How a cell was measured."""
    run = cell["run"]
    times = "one run" if run["repeats"] == 1 else f"{run['repeats']} interleaved repetitions"
    return (
        f"{times} of {run['steps']} steps, the first {run['warmup']} to warm up; seed {run['seed']}, learning rate "
        f"{cell['settings']['learning_rate']}; best {cell['gemm_dtype']} matrix product {cell['gemm'] / 1e9:,.0f} "
        f"GFLOP/s; {run['when']}, commit {run['commit']}, `{run['command']}`"
    )


def section(result: Json) -> str:
    """The text between the markers."""
    machine = result["machine"]
    versions = "; ".join(
        f"{where}: {', '.join(f'{name} {number}' for name, number in found.items())}"
        for where, found in result["versions"].items()
    )
    parts = [
        f"{result['model']}. {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        f"{', ' + machine['gpu'] if machine.get('gpu') else ', no GPU'}. {versions}.\n",
        f"A time is from the start of the process, caches of its own empty. GFLOP/s credits 4 a frozen and 6 a trained "
        f"weight and token, the head on scored positions. {result['parity']}\n",
    ]
    parts.append(f"{overview(result)}\n")
    for cell in result["cells"]:
        parts.append(f"### {title(cell)}\n\n{table(cell)}\n\n{told(cell)}.\n")
        parts += [f"{note}\n" for note in notes(cell)]
    return "\n".join(parts)


def overview(result: Json) -> str:
    """tunewright's rates, and how many times those of the others: a cell of the grid a line."""
    found = ratios(result)
    head = ["", "tokens/s", "of the GEMM rate", *(f"times {name}" for name in OTHERS), "memory beside TRL, tuned"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for cell in result["cells"]:
        rows = {row["name"]: row for row in cell["contenders"] if _counts(row)}
        if "tunewright" not in rows:
            continue
        ours, tuned = rows["tunewright"], rows.get("TRL, tuned")
        shown = [name_of(cell), f"{ours['tokens_per_second']['median']:,.0f}", f"{ours['of_gemm']:.0%}"]
        for names in OTHERS.values():
            times = [found[key] for name in names if (key := f"{name_of(cell)}, {name}") in found]
            shown.append(f"{min(times):.1f}" if times else "")
        memory = tuned and ours["peak_private_mib"]["median"] / tuned["peak_private_mib"]["median"]
        lines.append(f"| {' | '.join([*shown, f'{memory:.0%}' if memory else ''])} |")
    return "\n".join(lines)


def notes(cell: Json) -> list[str]:
    """What a reader has to know of rows whose runs other processes disturbed."""
    found = []
    for row in cell["contenders"]:
        others = row.get("others_cpu_s", {"max": 0.0})["max"]
        if row.get("disturbed_runs_left_out"):
            found.append(f"{row['name']}: {row['disturbed_runs_left_out']} disturbed runs are left out.")
        elif others > NOTED_CPU_S:
            found.append(f"{row['name']}: other processes took {others:.0f} s of CPU during its worst run.")
    return found


def readme_table(result: Json) -> str:
    """The cell that the README shows."""
    cell = next(one for one in result["cells"] if name_of(one) == SHOWN)
    rows = {row["name"]: row["tokens_per_second"]["median"] for row in cell["contenders"] if _counts(row)}
    numbers = {name: number for found in result["versions"].values() for name, number in found.items()}
    numbers["trl"] = result["versions"]["tunewright, TRL, Trainer"]["trl"]
    lines = ["| | tokens/s | tunewright is |", "|---|---:|---:|"]
    for name, text in IN_README.items():
        if name in rows:
            times = "" if name == "tunewright" else f"{rows['tunewright'] / rows[name]:.1f} x"
            lines.append(f"| {text.format(**numbers)} | {rows[name]:,.0f} | {times} |")
    return "\n".join(lines)


def between(page: Path, text: str) -> str:
    """Return a page with a text between its markers."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def write_docs(result: Json, page: Path = PAGE, readme: Path = README, *, anyway: bool = False) -> bool:
    """Write the result into both pages, unless something disturbed it; return whether they are written.

    The README shows one cell: nothing is written where it was not measured or tunewright's row there is void.
    """
    shown = [row for cell in result["cells"] if name_of(cell) == SHOWN for row in cell["contenders"]]
    if not any(row["name"] == "tunewright" and _counts(row) for row in shown) or (marked(result) and not anyway):
        return False
    for path, text in ((page, section(result)), (readme, readme_table(result))):
        path.write_text(between(path, text), encoding="utf-8")
    return True


def ratios(result: Json) -> dict[str, float]:
    """tunewright's rate / a competitor's, by cell and competitor, of rows that count and that nothing disturbed."""
    found = {}
    for cell in result["cells"]:
        rows = [row for row in cell["contenders"] if _counts(row) and not row.get("disturbed")]
        ours = next((row for row in rows if row["name"] == "tunewright"), None)
        if ours is None:
            continue
        for row in rows:
            if row is not ours:
                key = f"{name_of(cell)}, {row['name']}"
                found[key] = ours["tokens_per_second"]["median"] / row["tokens_per_second"]["median"]
    return found


def falls(new: Json, old: Json) -> list[str]:
    """A line for each ratio that fell by more than is allowed, or that could be had before and cannot now."""
    after, before = ratios(new), ratios(old)
    measured = {(cell["method"], cell["rows"], cell["strategy"]) for cell in new["cells"]}
    void = [
        f"{name_of(cell)}: tunewright's own row is void ({row['void']})"
        for cell in new["cells"]
        for row in cell["contenders"]
        if row["name"] == "tunewright" and row["void"]
    ]
    assert measured
    return void + [
        f"{key}: {after[key]:.2f} x now, {was:.2f} x before ({after[key] / was - 1:+.0%})"
        for key, was in before.items()
        if key in after and after[key] < was * (1 - ALLOWED_FALL)
    ]


def committed(path: Path = RESULT) -> Json | None:
    """The result as it was last committed; where the file has not changed since, the one committed before that."""
    name = path.relative_to(BENCH.parent).as_posix()
    log = _git("log", "--format=%H", "--", name).split()
    current = path.read_text(encoding="utf-8")
    for commit in log:
        text = _git("show", f"{commit}:{name}")
        if text and text != current:
            return dict(json.loads(text))
    return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=BENCH.parent, capture_output=True, text=True).stdout


def check() -> int:
    if not RESULT.exists():
        print("There is no bench/results/train.json: run `make bench` first.")
        return 2
    old, new = committed(), json.loads(RESULT.read_text(encoding="utf-8"))
    if old is None:
        print("Nothing to compare with: no other result of bench/train.py is committed yet.")
        return 0
    compared = sorted(ratios(new).keys() & ratios(old).keys())
    found = falls(new, old)
    for line in found:
        print(f"FELL {line}")
    print(
        f"{len(compared)} ratios compared with the committed result, {len(found)} fell by more than 15 % or are void."
    )
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["docs", "check"])
    parser.add_argument("--anyway", action="store_true", help="write docs although something disturbed the runs")
    args = parser.parse_args()
    if args.what == "check":
        return check()
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    if write_docs(result, anyway=args.anyway):
        return 0
    print("\n".join([*marked(result), "The docs are as they were: measure these again, or add --anyway."]))
    return 1


if __name__ == "__main__":
    sys.exit(main())
