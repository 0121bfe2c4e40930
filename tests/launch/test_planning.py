"""`tunewright plan` on the shapes of real models: what is known to fit and what is not, and what is printed of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config
from tunewright.launch.plan_page import plan_html
from tunewright.launch.plan_text import plan_json, plan_text, time_lines
from tunewright.launch.planning import Plan, headline, make_plan
from tunewright.launch.row_counts import Rows
from tunewright.plan.devices import Devices
from tunewright.plan.held import PARTS, Memory
from tunewright.plan.machine import parse_machine
from tunewright.plan.option import Option, Pace
from tunewright.plan.ways import batches, devices_of, largest_batch
from tunewright.trainer.footprint.footprints import make_footprint
from tunewright.trainer.model.meta_model import find_architecture, make_architecture

GIB = 2**30
SMALL = ("train.global_batch_size=1", "offline=true")  # few micro-batches to look at
OPEN = ("strategy=auto", "train.micro_batch_size=auto", "train.gradient_checkpointing=auto", "data.cutoff_len=1024")


def planned(machine: str, *overrides: str) -> Plan:
    """Plan for a machine; what needs torch is worked out in this process, and found by the plan."""
    config = compose_config([*OPEN, "offline=true", *overrides], choose=None)
    target = parse_machine(machine)
    devices = devices_of(target, 8)
    architecture = find_architecture(config) or make_architecture(config)
    make_footprint(config, target.kind, batches(config, devices, architecture))
    return make_plan(config, target, 8, whole=False)


def test_a_7b_with_lora_fits_a_card_of_24_gb_with_recomputation_and_not_without() -> None:
    usual = "train.micro_batch_size=4"
    for model in ("llama2_7b_chat", "qwen2_5_7b"):
        with_it = planned("RTX-4090", f"model={model}", usual, "train.gradient_checkpointing=true")
        without = planned("RTX-4090", f"model={model}", usual, "train.gradient_checkpointing=false")
        assert with_it.best
        assert without.best is None
        assert "train.gradient_checkpointing=true" in without.verdict or "train.micro_batch_size=" in without.verdict
        assert planned("RTX-4090", f"model={model}").best


def test_a_70b_with_qlora_fits_one_card_of_80_gb() -> None:
    plan = planned("H100-80GB", "model=llama3_1_70b", "method=qlora")
    assert plan.best
    assert plan.best.memory
    assert plan.best.memory.weights > 35 * GIB
    assert planned("H100-80GB", "model=llama3_1_70b", "method=lora", "strategy=single").best is None


def test_zero3_is_for_a_70b_on_eight_cards_of_80_gb_and_never_for_a_7b() -> None:
    large = planned("8xH100-80GB", "model=llama3_1_70b").best
    assert large
    assert large.strategy == "zero3"
    for machine, method, strategies in (
        ("8xH100-80GB", "lora", {"ddp"}),
        ("8xA100-80GB", "qlora", {"ddp"}),
        ("8xRTX-4090", "lora", {"ddp", "zero1", "zero2"}),
        ("8xH100-80GB", "full", {"zero1", "zero2"}),
    ):
        small = planned(machine, "model=qwen2_5_7b", f"method={method}").best
        assert small
        assert small.strategy in strategies


def test_a_line_is_told_of_what_is_known_and_nothing_is_asked(tmp_path: Path) -> None:
    config = compose_config([f"data.cache_dir={tmp_path}", "data.cutoff_len=64", "train.micro_batch_size=1"])
    devices = Devices("cpu", 0, 2)
    assert headline(config, devices) == []
    architecture = make_architecture(config)
    assert headline(config, devices) == []
    make_footprint(config, "cpu", [largest_batch(config, devices, architecture)])
    (line,) = headline(config, devices, Rows(100, 5000))
    told = r"Planned: [\d.]+ MiB of [\d.]+ GiB a rank \(.*activations .*\); [\d,]+ tokens/s, [\d:]+ for 21 steps: .*"
    assert re.fullmatch(told, line)


class Page(HTMLParser):
    """Tags that are open at the end, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_plan_is_the_same_as_text_as_json_and_as_a_page() -> None:
    plan = planned("8xH100-80GB", "model=qwen2_5_7b")
    assert plan.best
    assert plan.best.memory
    text = plan_text(plan)
    assert f"\n> {plan.best.strategy} " in text
    assert plan.verdict in text
    assert "40,370,176 of 7,655,986,688 weights are trained" in text
    told = json.loads(json.dumps(plan_json(plan)))
    chosen = told["ways"][told["chosen"]]
    assert chosen["memory"]["needed"] == plan.best.memory.needed
    assert sum(chosen["memory"][part] for part in PARTS) == plan.best.memory.needed
    page = Page()
    page.feed(plan_html(plan))
    assert (page.open, page.fetched) == ([], [])


@pytest.mark.parametrize(
    ("strategy", "rest"),
    [
        ("ddp", ""),
        ("zero2_offload", "; the rest is the optimiser"),
        ("zero3", "; the rest is the optimiser and what DeepSpeed does at each module"),
    ],
)
def test_what_takes_the_time_of_a_step_is_said(strategy: str, rest: str) -> None:
    compute = 1.0 if rest else 3.0
    pace = Pace(None, 4096.0, 1e12, compute_seconds=compute, communication_seconds=1.0, seconds=3.5, reason="listed")
    way = Option("full", strategy, 8, 2, False, None, None, 0, pace)
    assert time_lines(way)[0].endswith(f"which hide each other in part{rest}")


def test_every_part_of_memory_has_a_name() -> None:
    assert [*PARTS, "host"] == list(Memory.__dataclass_fields__)


def test_the_command_plans_for_a_machine_that_is_not_here(tunewright: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    asked = ("plan", "train.global_batch_size=2", "--devices", "2xH100-80GB", "--price", "3", "--html", page)
    done = tunewright(*asked)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^> \w+ +\d", done.stdout, flags=re.MULTILINE)
    assert "qlora" in done.stdout
    assert "What more would take\n  rows of 512 tokens: " in done.stdout
    assert page.is_file()
    assert "cost" in done.stdout
    again = tunewright(*asked[:-2], "--json")
    assert json.loads(again.stdout)["machine"]["name"] == "H100-80GB"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--devices", "8xNOTHING"), 2, "--devices"),
        (("--devices", ""), 2, "write a number and a device"),
        (("--price", "nan"), 2, "`--price` is nan"),
        (("cluster.num_processes=0",), 2, "`cluster.num_processes` is 0"),
        (("--devices", "4090", "train.micro_batch_size=many"), 2, "write a whole number from 1, or auto"),
        (("--devices", "4090", "strategy.deepspeed=own.json"), 2, "write strategy.launcher=deepspeed too"),
        (("--devices", "4090", "--measure"), 2, "`--measure` trains on the devices here"),
        (("--devices", "8xH100-80GB", "method=qlora", "strategy=zero3"), 2, "cannot be split"),
        (("--devices", "4090", "model=llama3_1_70b", "strategy=single", *SMALL), 7, "Nothing fits."),
    ],
)
def test_what_cannot_be_planned_is_told(
    tunewright: Callable[..., Any], arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = tunewright("plan", *arguments)
    assert done.returncode == code
    assert told in done.stdout + done.stderr
