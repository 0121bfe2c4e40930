"""Preprocessing speed: alpaca rows in a JSON file to token ids and labels on disk, tunewright beside what else is used.

    python bench/data.py --rows 100000 --peer ~/peer-lf     # PEER: a virtual environment with LLaMA-Factory
    python bench/data.py --memory                              # tunewright's peak memory at 25k, 50k and 100k rows

Contenders run one after the other, each in fresh processes with fresh caches, on the same file, tokenizer and template:
once on 16 rows (what starting costs), once on all rows, and once more with everything there (a second start). Their
token ids and labels are compared row by row, so that a time is only printed beside a proof of the same work.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import numpy as np
from measure import CORES, MIB, Memory, busy_seconds, machine
from omegaconf import OmegaConf

from tunewright.config.compose import compose_config, load_config
from tunewright.trainer.model.tiny import tiny_folder
from tunewright.trainer.prepared import find_prepared

if TYPE_CHECKING:
    from datasets import Dataset

BENCH = Path(__file__).resolve().parent
CUTOFF = 1024
STARTUP_ROWS = 16
PACKAGES = ("datasets", "transformers", "tokenizers", "pyarrow", "torch")


# --- the data ---------------------------------------------------------------------------------------------------------

ENGLISH_WORDS = """
about account address after again all amount and animal another answer are ask bag baker bank because bed before best
big bill book bread bring broken brother buy cake call camera cannot card chair change cheap city clean clock coat
coffee cold colour company cook cost could count coupon courier cup customer damaged data day deliver dinner discount
doctor door drink early easy eight email empty error evening every exchange family fast find first fish five for
forget four friend from fruit garden gift give glad good green happy have help her home hotel hour house how if
immediately install into invoice jacket keep key keyboard kitchen know label lamp large late learn letter library
light list little look lost lunch machine make market message milk minutes model money month morning mother music
name need neighbour new night number of offer office old open order other paper parcel password pay person phone
picture place plan plane possible post price printed problem profile program question quick quiet rain read receipt
refund repair replacement reply reset return river road room route sale salt school second sell send sentence seven
shelf shipment shoes shop short show sister sleep slow small software soup speaker spring station stay stolen story
street student summer sun table tablet take teacher technical tell thank that the them thing three ticket time to
today together total train turn umbrella until update urgent use wait wall warehouse warm wash watch water weather
website week white window winter with without word work write wrong year yellow you
"""
CHINESE_WORDS = """
一个 什么 我们 他们 你好 请问 怎么 可以 因为 所以 然后 以后 以前 今天 明天 早上 晚上 下午 北京 上海 杭州 学校 老师
学生 朋友 家里 店里 书店 银行 邮局 图书馆 办公室 厨房 公园 市场 手机 电脑 相机 水壶 雨伞 毛衣 帽子 包裹 快递 发票
账单 优惠 密码 登录 价格 颜色 蓝色 红色 绿色 白色 买了 卖了 修好 坏了 忘了 找到 回家 吃饭 喝茶 写信 画画 读书 走路
下雨 下雪 高兴 着急 便宜 漂亮
"""
ENGLISH, CHINESE = ENGLISH_WORDS.split(), CHINESE_WORDS.split()


def write_registry(folder: Path, rows: int, seed: int = 0) -> Path:
    """Write `bench.json` with so many rows, the same ones each time, and the registry that both trainers read."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    with (folder / "bench.json").open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write("[\n" if number == 0 else ",\n")
            json.dump(_row(rng), file, ensure_ascii=False)
        file.write("\n]\n")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    registry = {"bench": {"file_name": "bench.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    return folder


def _row(rng: random.Random) -> dict[str, str]:
    text = _chinese if rng.random() < 0.1 else _english
    return {
        "instruction": text(rng, rng.randint(5, 30)),
        "input": text(rng, rng.randint(10, 60)) if rng.random() < 0.5 else "",
        "output": text(rng, rng.randint(20, 120)),
    }


def _english(rng: random.Random, words: int) -> str:
    """Sentences of at most 24 words, a number among them now and then."""
    picked = [str(rng.randint(2, 99999)) if rng.random() < 0.01 else word for word in rng.choices(ENGLISH, k=words)]
    sentences = [" ".join(part).capitalize() for part in _cut(rng, picked)]
    return ". ".join(sentences) + "."


def _chinese(rng: random.Random, words: int) -> str:
    return "，".join("".join(part) for part in _cut(rng, rng.choices(CHINESE, k=words))) + "。"


def _cut(rng: random.Random, words: list[str]) -> Iterator[list[str]]:
    while words:
        length = rng.randint(6, 24)
        yield words[:length]
        words = words[length:]


# --- the contenders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Tokenise the registry's dataset `bench` with the tokenizer of `model`; write into `out` and nowhere else."""

    registry: Path
    model: Path
    out: Path


@dataclass(frozen=True)
class Command:
    argv: list[str]
    stdin: str = ""


@dataclass(frozen=True)
class Contender:
    """How to start it, how to start it again when all is done already, and how to open what it made."""

    name: str
    start: Callable[[Task], Command]
    start_again: Callable[[Task], Command]
    result: Callable[[Task], Dataset]
    python: str = sys.executable


def saved(task: Task) -> Dataset:
    """Open what `save_to_disk` wrote: a dataset, or splits of which `train` is meant."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(task.out / "tokens"))
    return dataset["train"] if isinstance(dataset, DatasetDict) else dataset


def map_contender(processes: int | None = None) -> Contender:
    def start(task: Task) -> Command:
        argv = [BENCH / "map_script.py", task.registry / "bench.json", task.model, task.out / "tokens"]
        return Command([sys.executable, *map(str, argv), *([str(processes)] if processes else [])])

    return Contender(f"datasets.map, {_processes(processes)}", start, start, saved)


def llamafactory_contender(peer: Path, workers: int | None = None) -> Contender:
    """LLaMA-Factory 0.9.5. An empty `default_system`, because its `qwen` template brings a system turn by default."""
    python = str(peer / "bin" / "python")

    def start(task: Task) -> Command:
        config = {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "model_name_or_path": str(task.model),
            "dataset_dir": str(task.registry),
            "dataset": "bench",
            "template": "qwen",
            "default_system": "",
            "cutoff_len": CUTOFF,
            "preprocessing_num_workers": workers,
            "tokenized_path": str(task.out / "tokens"),
            "output_dir": str(task.out / "run"),
            "report_to": "none",
        }
        path = task.out / "train.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        return Command([python, str(BENCH / "llamafactory_script.py"), str(path)])

    name = f"LLaMA-Factory, {_processes(workers)}"
    return Contender(name, start, start, saved, python)


MAKE_TOKENS = """
import os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tunewright.config.compose import load_config
from tunewright.trainer.prepared import prepare
prepare(load_config(sys.stdin))
"""


def tunewright_contender(*, report: bool) -> Contender:
    """The preparing process as a launch starts it, or up to where its report begins; again, what a next launch does."""

    def start(task: Task) -> Command:
        argv = ["-m", "tunewright.launch.prepare", "make"] if report else ["-c", MAKE_TOKENS]
        return Command([sys.executable, *argv], _tunewright_config(task))

    def start_again(task: Task) -> Command:
        found = "import sys; from tunewright.config.compose import load_config; "
        found += "from tunewright.trainer.prepared import find_prepared; "
        found += "assert find_prepared(load_config(sys.stdin))"
        return Command([sys.executable, "-c", found], _tunewright_config(task))

    def result(task: Task) -> Dataset:
        prepared = find_prepared(load_config(io.StringIO(_tunewright_config(task))))
        dataset = prepared and prepared.cache.open("train")
        assert dataset is not None
        return dataset

    return Contender("tunewright, with its report" if report else "tunewright", start, start_again, result)


def _tunewright_config(task: Task) -> str:
    overrides = ["model=folder", f"model.path={task.model}", "data=registry", "data.names=[bench]"]
    overrides += [f"data.dir={task.registry}", f"data.cache_dir={task.out}", f"data.cutoff_len={CUTOFF}"]
    return OmegaConf.to_yaml(compose_config(overrides))


def _processes(number: int | None) -> str:
    return f"{number} workers" if number else "one process"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Usage:
    """What a process and its children took.

    RSS counts a page that two processes share twice, and mapped files, which the system may drop and read again;
    `private` does neither. `others_cpu_s` is what the rest of the machine took meanwhile: much of it spoils a time.
    """

    wall_s: float
    cpu_s: float
    others_cpu_s: float
    peak_rss_mib: float
    peak_private_mib: float


def run(command: Command, task: Task) -> Usage:
    """Run to the end with caches of its own, offline; raises with the tail of what it printed where it fails."""
    env = {**os.environ, "HF_HOME": str(task.out / "hf"), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    log = task.out / "log.txt"
    with log.open("a") as output, tempfile.TemporaryFile("w+") as stdin:
        stdin.write(command.stdin)
        stdin.seek(0)
        busy, started = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(
            command.argv, cwd=BENCH.parent, env=env, stdin=stdin, stdout=output, stderr=subprocess.STDOUT
        )
        memory = Memory(process.pid)
        _, status, used = os.wait4(process.pid, 0)  # with it, what its children used
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    memory.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command.argv)} exited with {process.returncode}:\n{log.read_text()[-3000:]}")
    cpu = used.ru_utime + used.ru_stime
    rss = max(memory.rss, used.ru_maxrss * 1024)  # the kernel's mark misses no moment, but is of one process
    return Usage(wall, cpu, max(busy_seconds() - busy - cpu, 0.0), rss / MIB, memory.private / MIB)


@dataclass
class Tokens:
    """Every row's ids and labels, flat (tokens,), with where each row ends (rows,)."""

    ids: np.ndarray
    labels: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> Tokens:
        table = dataset.with_format("arrow")[:]
        ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        flat = (column.flatten().to_numpy(zero_copy_only=False).astype(np.int32) for column in (ids, labels))
        return cls(next(flat), next(flat), np.cumsum(ids.value_lengths().to_numpy(zero_copy_only=False)))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = self.ends[index - 1] if index else 0
        return self.ids[start : self.ends[index]], self.labels[start : self.ends[index]]

    def counts(self) -> dict[str, int]:
        longest = np.diff(self.ends, prepend=0).max()
        return {
            "rows": len(self.ends),
            "tokens": len(self.ids),
            "labelled_tokens": int((self.labels >= 0).sum()),
            "longest": int(longest),
        }


def difference(mine: Tokens, other: Tokens) -> str:
    """Say in which rows ids or labels are not the same, the first one with the tokens around the place; or nothing."""
    if len(mine.ends) != len(other.ends):
        return f"{len(mine.ends)} rows instead of {len(other.ends)}"
    unequal = [
        index
        for index in range(len(mine.ends))
        if not all(np.array_equal(a, b) for a, b in zip(mine.row(index), other.row(index), strict=True))
    ]
    if not unequal:
        return ""
    shown = []
    for name, a, b in zip(("ids", "labels"), mine.row(unequal[0]), other.row(unequal[0]), strict=True):
        length = min(len(a), len(b))
        where = next((i for i in range(length) if a[i] != b[i]), length)
        around = slice(max(where - 2, 0), where + 4)
        shown.append(f"{name} at {where}: {a[around].tolist()} instead of {b[around].tolist()}")
    return f"{len(unequal)} rows differ; row {unequal[0]}: {'; '.join(shown)}"


@dataclass
class Result:
    """One contender: `startup` on a few rows, `cold` on all, `again` when all is there."""

    name: str
    startup: Usage
    cold: Usage
    again: Usage
    rows_per_s: float
    disk_mib: float
    counts: dict[str, int]
    differs: str = ""


def measure_contender(
    contender: Contender, small: Path, data: Path, model: Path, scratch: Path
) -> tuple[Result, Tokens]:
    """Run it thrice, on few rows, on all and again, and read what it made."""
    print(f"{contender.name} ...", file=sys.stderr, flush=True)
    with fresh_task(small, model, scratch) as task:
        startup = run(contender.start(task), task)
    with fresh_task(data, model, scratch) as task:
        cold = run(contender.start(task), task)
        disk = sum(file.stat().st_size for file in task.out.rglob("*") if file.is_file())
        again = run(contender.start_again(task), task)
        tokens = Tokens.of(contender.result(task))
    speed = (len(tokens.ends) - STARTUP_ROWS) / max(cold.wall_s - startup.wall_s, 1e-3)
    return Result(contender.name, startup, cold, again, speed, disk / MIB, tokens.counts()), tokens


@contextmanager
def fresh_task(data: Path, model: Path, scratch: Path) -> Iterator[Task]:
    """A task with an empty folder for its output, which is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        yield Task(data, model, Path(out))


# --- reporting --------------------------------------------------------------------------------------------------------


def speed_table(results: list[Result]) -> str:
    columns = [
        "",
        "wall",
        "start-up",
        "rows/s after it",
        "CPU",
        "CPU of others",
        "second start",
        "peak RSS",
        "private",
        "on disk",
    ]
    lines = [f"| {' | '.join([*columns, 'same tokens'])} |", "|---" + "|---:" * 9 + "|---|"]
    for result in results:
        cold = result.cold
        cells = [
            result.name,
            f"{cold.wall_s:.1f} s",
            f"{result.startup.wall_s:.1f} s",
            f"{result.rows_per_s:,.0f}",
            f"{cold.cpu_s:.1f} s",
            f"{cold.others_cpu_s:.1f} s",
            f"{result.again.wall_s:.1f} s",
            f"{cold.peak_rss_mib:,.0f} MiB",
            f"{cold.peak_private_mib:,.0f} MiB",
            f"{result.disk_mib:,.0f} MiB",
            "reference" if result is results[0] else result.differs or "yes, every row",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(results: dict[int, Usage]) -> str:
    lines = ["| rows | peak RSS | private | wall |", "|---:|---:|---:|---:|"]
    for rows, usage in results.items():
        memory = f"{usage.peak_rss_mib:,.0f} MiB | {usage.peak_private_mib:,.0f} MiB"
        lines.append(f"| {rows:,} | {memory} | {usage.wall_s:.1f} s |")
    return "\n".join(lines)


def versions(peer: Path | None) -> dict[str, dict[str, str]]:
    """Return Python's and the packages' versions in this environment and in the peer's."""
    found = {"tunewright": measure.versions(sys.executable, PACKAGES)}
    if peer:
        found["LLaMA-Factory"] = measure.versions(str(peer / "bin" / "python"), ("llamafactory", *PACKAGES))
    return found


# --- the two questions ------------------------------------------------------------------------------------------------


def compare_speed(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    registry = write_registry(scratch / "data", args.rows)
    small = write_registry(scratch / "small", STARTUP_ROWS)
    contenders = [map_contender(), map_contender(CORES)]
    if args.peer:
        contenders += [llamafactory_contender(args.peer), llamafactory_contender(args.peer, CORES)]
    contenders += [tunewright_contender(report=False), tunewright_contender(report=True)]
    results: list[Result] = []
    reference: Tokens | None = None
    for contender in contenders:
        if args.only in contender.name:
            result, tokens = measure_contender(contender, small, registry, args.model, scratch)
            reference = tokens if reference is None else reference
            result.differs = difference(tokens, reference)
            results.append(result)
    counts = results[0].counts
    size = (registry / "bench.json").stat().st_size / MIB
    print(f"{args.rows:,} rows, {size:.0f} MiB of JSON, {counts['tokens'] / counts['rows']:.0f} tokens a row, ", end="")
    print(f"{counts['labelled_tokens'] / counts['tokens']:.0%} of them labelled, longest {counts['longest']}\n")
    print(speed_table(results))
    return {"rows": args.rows, "json_mib": size, "results": [asdict(result) for result in results]}


def measure_memory(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    contender, results = tunewright_contender(report=True), {}
    for rows in (args.rows // 4, args.rows // 2, args.rows):
        print(f"{rows:,} rows ...", file=sys.stderr, flush=True)
        registry = write_registry(scratch / f"data-{rows}", rows)
        with fresh_task(registry, args.model, scratch) as task:
            results[rows] = run(contender.start(task), task)
    print(memory_table(results))
    return {"memory": {rows: asdict(usage) for rows, usage in results.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--peer", type=Path, help="virtual environment with LLaMA-Factory")
    parser.add_argument("--model", type=Path, help="folder of a ChatML model; otherwise the built `tiny`")
    parser.add_argument("--only", default="", help="contenders whose name has this in it")
    parser.add_argument("--memory", action="store_true", help="tunewright's peak memory at 1/4, 1/2 and all rows")
    parser.add_argument("--out", type=Path, help="JSON to write; otherwise bench/results/data.json or data_memory.json")
    args = parser.parse_args()
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
    args.model = (args.model or tiny_folder(cache)).resolve()
    if not (args.model / "tokenizer.json").is_file():
        parser.error(f"there is no tokenizer in {args.model}: run `tunewright train` once, or give --model")
    report: dict[str, Any] = {"machine": machine(), "versions": versions(args.peer), "model": args.model.name}
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as scratch:
        question = measure_memory if args.memory else compare_speed
        report |= question(args, Path(scratch))
    print()
    print("{cpu}, {cores} cores, {memory_gib} GiB, {system}".format(**report["machine"]))
    for name, packages in report["versions"].items():
        print(f"{name}: {', '.join(f'{package} {number}' for package, number in packages.items())}")
    out = args.out or BENCH / "results" / ("data_memory.json" if args.memory else "data.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
