"""What a rank holds in memory at most: as `tunewright plan` works it out, beside real runs on this machine's CPU.

    python bench/memory.py                       # every cell that has not been measured yet, or differs
    python bench/memory.py --only tiny,lora      # cells whose name has all of these in it
    python bench/memory.py --plan                # the planned side alone, again
    python bench/memory.py --docs                # the table of docs/planning.md, from the JSON

A cell is a model's shape, a method, a strategy, a layout of the batch, with recomputation or without. It trains two
steps on rows that are all as long as can be; PyTorch's own allocator counts (bench/count_cpu.cpp) what it has given out
at most in the second one, from before the model was made. Interpreter and libraries are not in it. The resident memory
of the process, as Linux counts it, is beside it: gloo's, oneDNN's and the tokeniser's buffers are in that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
RESULT = BENCH / "results" / "memory.json"
PAGE = BENCH.parent / "docs" / "planning.md"
BEGIN, END = "<!-- made by bench/memory.py: begin -->", "<!-- made by bench/memory.py: end -->"
WITHIN = 0.1
RANKS = 2
VIRTUAL = 20

# (width, of the MLP, layers, heads, of keys and values, vocabulary), then rows and their length.
SIZES: dict[str, tuple[tuple[int, int, int, int, int, int], int, int]] = {
    "tiny": ((64, 128, 2, 4, 2, 4096), 4, 128),
    "39m": ((512, 1472, 10, 8, 4, 16384), 4, 256),
    "300m": ((1024, 2816, 22, 16, 8, 32768), 2, 256),
}
ARCHITECTURES = ("qwen2", "llama", "gemma", "gpt2")
METHODS = ("lora", "qlora", "qlora8", "full", "freeze", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3")
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    size: str
    method: str = "lora"
    strategy: str = "single"
    padded: bool = False
    recompute: bool = False
    dtype: str = "bfloat16"
    optimizer: str = "adamw_torch_fused"
    accumulation: int = 1

    @property
    def id(self) -> str:
        words = [self.model, self.size, self.method, self.strategy]
        words += ["padded"] * self.padded + ["recomputed"] * self.recompute
        words += [self.dtype] * (self.dtype != "bfloat16") + [self.optimizer] * (self.optimizer != "adamw_torch_fused")
        return " ".join([*words, *([f"x{self.accumulation}"] if self.accumulation > 1 else [])])

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "single" else RANKS

    @property
    def rows(self) -> int:
        return SIZES[self.size][1]

    @property
    def length(self) -> int:
        return SIZES[self.size][2]


USUAL = Cell("", "")


def grid() -> Iterator[Cell]:
    """Yield every cell that trains at all, and those that differ by optimiser, format or accumulation."""
    for size, strategy, model, method in itertools.product(SIZES, STRATEGIES, ARCHITECTURES, METHODS):
        if method.startswith("qlora") and strategy.startswith("zero3"):
            continue
        for padded in (True,) if method in PROMPTS else (False, True):
            yield Cell(model, size, method, strategy, padded)
            if method != "prefix_tuning":  # whose keys and values recomputed layers do not get
                yield Cell(model, size, method, strategy, padded, recompute=True)
    for size in ("tiny", "39m"):
        for strategy in STRATEGIES:
            for method in ("lora", "full"):
                yield Cell("qwen2", size, method, strategy, accumulation=3)
                yield Cell("qwen2", size, method, strategy, dtype="float32")
                yield Cell("qwen2", size, method, strategy, dtype="float32", accumulation=3)
        for optimizer in ("adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "ademamix"):
            yield Cell("qwen2", size, "full", optimizer=optimizer)
        for optimizer in ("ademamix_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit"):
            yield Cell("qwen2", size, "full", optimizer=optimizer)


def model_folder(root: Path, model: str, size: str) -> Path:
    """Write a model's config.json and tokenizer; its weights are drawn by the run."""
    import transformers as hf

    from tunewright.trainer.model.tiny import train_tokenizer

    folder = root / f"{model}-{size}"
    if (folder / "config.json").is_file():
        return folder
    width, inner, layers, heads, kv, vocabulary = SIZES[size][0]
    tokenizer = train_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    usual: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, **ends}
    usual |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    usual |= {"max_position_embeddings": 2048}
    config: Any
    if model == "qwen2":
        config = hf.Qwen2Config(**usual, tie_word_embeddings=True)
    elif model == "llama":
        config = hf.LlamaConfig(**usual, tie_word_embeddings=False)
    elif model == "gemma":
        config = hf.GemmaConfig(**usual, head_dim=width // heads)
    else:
        shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 2048, "n_inner": inner}
        config = hf.GPT2Config(vocab_size=vocabulary, **shape, **ends)
    names = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "gemma": "GemmaForCausalLM"}
    config.architectures = [names.get(model, "GPT2LMHeadModel")]
    config.save_pretrained(folder)
    return folder


def write_rows(root: Path) -> Path:
    """Write rows that are longer than any cell's cut-off, so that all are as long as can be."""
    from tunewright.trainer.model.tiny import CORPUS

    folder = root / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines() if line]
    text = " ".join(line.get("text") or line["messages"][-1]["content"] for line in lines)
    rows = [{"text": text[start * 500 : start * 500 + 6000]} for start in range(64)]
    (folder / "long.json").write_text(json.dumps(rows))
    entry = {"long": {"file_name": "long.json", "formatting": "text", "columns": {"text": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(entry))
    return folder


def overrides(cell: Cell, root: Path, rows: Path, number: int) -> list[str]:
    method = "qlora" if cell.method == "qlora8" else cell.method
    values: dict[str, Any] = {
        "model": "folder",
        "model.path": model_folder(root / "models", cell.model, cell.size),
        "model.dtype": cell.dtype,
        "model.random_weights": True,
        "data": "registry",
        "data.names": "[long]",
        "data.dir": rows,
        "data.cache_dir": root / "cache",
        "data.cutoff_len": cell.length,
        "method": method,
        "strategy": cell.strategy,
        "train.max_steps": 2,
        "train.global_batch_size": "null",
        "train.gradient_accumulation_steps": cell.accumulation,
        "train.micro_batch_size": cell.rows,
        "train.padding_free": not cell.padded,
        "train.gradient_checkpointing": cell.recompute,
        "train.optimizer": cell.optimizer,
        "train.logging_steps": 1,
        "train.save_steps": 0,
        "output_root": root / "runs",
        "name": f"cell{number}",
    }
    if cell.method == "qlora8":
        values["method.bits"] = 8
    if cell.ranks > 1:
        values |= {"cluster.num_processes": cell.ranks, "cluster.threads_per_process": 1}
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def measure(cells: list[Cell], root: Path, timeout: float) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train cells of one strategy, and yield what the rank with the most memory held."""
    rows = write_rows(root)
    left = dict(enumerate(cells))
    while left:
        jobs = [
            {"id": number, "overrides": overrides(cell, root, rows, number + 1000 * len(left))}
            for number, cell in left.items()
        ]
        folder = Path(tempfile.mkdtemp(dir=root))
        (folder / "cells.json").write_text(json.dumps(jobs))
        before = set(left)
        for number, figures in _ranks(folder, cells[0].ranks, timeout):
            yield left.pop(number), figures
        if before == set(left):  # the first one ended its ranks without a word
            number = min(left)
            log = (folder / "rank0.log").read_text(errors="replace")[-1500:]
            yield left.pop(number), {"failed": log}


def _ranks(folder: Path, ranks: int, timeout: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Start ranks on a list of cells, and yield each cell that all of them have done; end where one fails."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    env |= {"OMP_NUM_THREADS": "2" if ranks == 1 else "1", "DS_ACCELERATOR": "cpu"}
    # Large tensors go back to the system at once, so that its count is of what is there.
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    results, processes, port = folder / "results.jsonl", [], _free_port()
    for rank in range(ranks):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = (folder / f"rank{rank}.log").open("w")
        argv = [sys.executable, str(BENCH / "memory_rank.py"), str(folder / "cells.json"), str(results)]
        some = mine if ranks > 1 else {}
        processes.append(subprocess.Popen(argv, env={**env, **some}, stdout=log, stderr=subprocess.STDOUT))
    done: dict[int, list[dict[str, Any]]] = {}
    told, last = 0, time.monotonic()
    try:
        while True:
            running = all(process.poll() is None for process in processes)
            lines = results.read_text().splitlines() if results.exists() else []
            for line in lines[told:]:
                told, last = told + 1, time.monotonic()
                figures = json.loads(line)
                done.setdefault(figures["cell"], []).append(figures)
                failed = [found for found in done[figures["cell"]] if "failed" in found]
                if failed:
                    yield figures["cell"], {"failed": failed[0]["failed"]}
                    if ranks > 1:
                        return
                elif len(done[figures["cell"]]) == ranks:
                    keys = ("pass", "step", "rss")
                    yield figures["cell"], {key: max(found[key] for found in done[figures["cell"]]) for key in keys}
            if not running or time.monotonic() - last > timeout:
                return
            time.sleep(0.5)
    finally:
        for process in processes:
            if process.poll() is None and time.monotonic() - last <= timeout:
                time.sleep(1)
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def plan(cell: Cell, root: Path, rows: Path, number: int = 0) -> tuple[int, dict[str, int]]:
    """Return the bytes that are planned for a cell without interpreter and libraries, and its parts."""
    from tunewright.config.compose import compose_config
    from tunewright.launch.train import check_all
    from tunewright.plan.devices import find_devices
    from tunewright.plan.footprint import Batch
    from tunewright.plan.machine import Machine
    from tunewright.plan.memory import memory_of
    from tunewright.trainer.footprint.footprints import make_footprint

    config = compose_config(overrides(cell, root, rows, number))
    batches, _ = check_all(config, find_devices())
    length = cell.length - (VIRTUAL if cell.method in PROMPTS else 0)
    batch = Batch(cell.rows, length, cell.padded, cell.recompute)
    footprint = make_footprint(config, "cpu", [batch])
    machine = Machine("cpu", "", cell.ranks, 0, None, None, cell.ranks, None, True)
    memory = memory_of(config, footprint, footprint.of(batch), batches, machine)
    parts = {name: size for name, size in asdict(memory).items() if size and name != "context"}
    return memory.needed - memory.context, parts


def plan_all(chosen: list[Cell], root: Path, out: Path) -> None:
    """Work out the planned side of every measured cell again."""
    rows, result = write_rows(root), read(out)
    for number, cell in enumerate(chosen):
        found = result["cells"].get(cell.id)
        if found is None or "failed" in found:
            continue
        try:
            found["planned"], parts = plan(cell, root, rows, number)
        except Exception as error:
            found.pop("planned", None)
            print(f"{cell.id}: {type(error).__name__}: {error}", flush=True)
            continue
        off = off_by(found)
        if abs(off) > WITHIN:
            print(f"{cell.id}: {off:+.0%}, {found['planned']:,} for {measured(found):,}: {parts}", flush=True)
    write(result, out)


def measured(found: dict[str, Any]) -> int:
    """Return the most bytes that were held in a cell's second step."""
    return max(found["pass"], found["step"])


def off_by(found: dict[str, Any]) -> float:
    return float(found["planned"] / measured(found) - 1)


def section(result: dict[str, Any]) -> str:
    """Return the table of docs/planning.md."""
    known = [(cell_of(found), found) for found in result["cells"].values() if "planned" in found]
    near = sum(abs(off_by(found)) <= WITHIN for _, found in known)
    lines = [f"{near} of {len(known)} cells are within {WITHIN:.0%}. By method and strategy, off by (cells):"]
    for size in SIZES:
        here = [(cell, found) for cell, found in known if cell.size == size]
        strategies = [name for name in STRATEGIES if any(cell.strategy == name for cell, _ in here)]
        models = [model for model in ARCHITECTURES if any(cell.model == model for cell, _ in here)]
        lines += ["", f"| {size}: {', '.join(models)} | {' | '.join(f'`{name}`' for name in strategies)} |"]
        lines += ["|---|" + "---:|" * len(strategies)]
        for method in METHODS:
            shown = []
            for strategy in strategies:
                offs = [off_by(found) for cell, found in here if (cell.method, cell.strategy) == (method, strategy)]
                ends = dict.fromkeys(_percent(end) for end in (min(offs), max(offs))) if offs else {}
                shown.append(f"{' to '.join(ends)} ({len(offs)})" if offs else "")
            if any(shown):
                lines.append(f"| {_method(method)} | {' | '.join(shown)} |")
    large = [found["rss"] / measured(found) for cell, found in known if cell.size == "300m"]
    if large:
        lines += ["", f"What the process held of the machine's memory, in the cells of 300m: {min(large):.2f} to "]
        lines[-1] += f"{max(large):.2f} times what the allocator counted."
    outside = sorted((one for one in known if abs(off_by(one[1])) > WITHIN), key=lambda one: -abs(off_by(one[1])))
    if outside:
        lines += ["", "| outside | planned | measured | off by |", "|---|---:|---:|---:|"]
    for cell, found in outside:
        sizes = f"{found['planned'] / 2**20:,.1f} MiB | {measured(found) / 2**20:,.1f} MiB"
        lines.append(f"| {cell.id} | {sizes} | {off_by(found):+.0%} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:+.0%}" if round(100 * share) else "0%"


def _method(name: str) -> str:
    return "`qlora`, 8 bits" if name == "qlora8" else f"`{name}`"


def cell_of(found: dict[str, Any]) -> Cell:
    return Cell(**{item.name: found[item.name] for item in fields(Cell) if item.name in found})


def with_section(page: str, result: dict[str, Any]) -> str:
    """Return the page's text with the table in its place."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{section(result)}\n\n{END}{tail}"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {"cells": {}}


def write(result: dict[str, Any], path: Path) -> None:
    head = {key: value for key, value in result.items() if key != "cells"}
    cells = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(result["cells"].items()))
    text = json.dumps(head, indent=1)[:-2] if head else "{"
    path.write_text(f'{text}{"," if head else ""}\n "cells": {{\n{cells}\n }}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name has all of these in it, comma-separated")
    parser.add_argument("--without", default="", help="no cells whose name has one of these in it")
    parser.add_argument("--plan", action="store_true", help="the planned side of what has been measured, again")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/planning.md")
    parser.add_argument("--again", action="store_true", help="also what has been measured already")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one cell may take")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "tunewright-memory")
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    result = read(args.out)
    wanted = [part for part in args.only.split(",") if part]
    unwanted = [part for part in args.without.split(",") if part]
    chosen = [
        cell
        for cell in dict.fromkeys(grid())
        if all(part in cell.id.split() for part in wanted) and not any(part in cell.id.split() for part in unwanted)
    ]
    if args.plan:
        plan_all(chosen, args.root, args.out)
    if args.docs:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), read(args.out)), encoding="utf-8")
    if args.plan or args.docs:
        return
    chosen = [cell for cell in chosen if args.again or cell.id not in result["cells"]]
    print(f"{len(chosen)} cells", flush=True)
    if args.list:
        print("\n".join(cell.id for cell in chosen))
        return
    for strategy in STRATEGIES:
        cells = [cell for cell in chosen if cell.strategy == strategy]
        for cell, figures in measure(cells, args.root, args.timeout) if cells else ():
            print(cell.id, figures, flush=True)
            result = read(args.out)  # another one may have written meanwhile
            told = {key: value for key, value in asdict(cell).items() if value != getattr(USUAL, key)}
            result["cells"][cell.id] = {**told, **figures}
            write(result, args.out)


if __name__ == "__main__":
    main()
