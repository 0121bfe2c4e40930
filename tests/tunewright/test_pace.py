"""Time is what is computed, sent and waited for; what was seen on this machine comes before what is listed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import DictConfig

from tunewright.config.compose import compose_config
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.footprint import Batch, Footprint, Pass, Weights
from tunewright.plan.held import Memory
from tunewright.plan.machine import Machine, parse_machine
from tunewright.plan.option import Pace
from tunewright.plan.pace import SHARES, pace_of
from tunewright.plan.reached import Known, Point, Reached, Way, keep, known_here, way_of, with_ratio
from tunewright.plan.traffic import gathered, traffic_of

# Qwen2.5-7B under LoRA r 8 on its seven projections: transformers' numbers of it, and the trained ones as published.
LAYER, HEAD, LORA = 233_057_792, 152_064 * 3584, 20_185_088
WEIGHTS = Weights(
    trained=LORA,
    frozen=28 * LAYER + 2 * HEAD + 3584,
    frozen_bytes=2 * (28 * LAYER + 2 * HEAD + 3584),
    itemsize=2,
    layers=[LAYER + LORA // 28] * 28,
    outside=2 * HEAD + 3584,
    small=57 * 3584,
    hidden=3584,
    shapes=[],
)
ROWS = 2030  # of the reference workflow
# What its padded micro-batches hold for each of its short rows, system message and template included; not published.
ROW = 110


def _footprint(*, recompute: bool = True) -> Footprint:
    flops = (4 * (28 * LAYER + HEAD) + 6 * LORA) * 4 * 1024
    return Footprint("cuda", WEIGHTS, [Pass(Batch(4, 1024, False, recompute), [], float(flops))])


def _pace(machine: Machine, *overrides: str, known: Known | None = None, recompute: bool = True) -> Pace:
    config, footprint = compose_config(["experiment=huanhuan_zero2", *overrides], None), _footprint(recompute=recompute)
    plan = batch_plan(config.train, machine.count)
    return pace_of(
        config, footprint, footprint.passes[0], plan, machine, rows=ROWS, tokens=ROWS * ROW, known=known, price=2.0
    )


def test_zero3_is_eleven_times_slower_on_the_reference_machine() -> None:
    """Published: 480 steps in 9:59 under ZeRO-2 with the optimiser in host memory, in 1:49:11 under ZeRO-3."""
    machine = parse_machine("8x4090")
    two, three = _pace(machine, "strategy=zero2_offload"), _pace(machine, "strategy=zero3")
    assert (two.steps, three.steps) == (480, 480)
    assert three.seconds == pytest.approx((3600 + 49 * 60 + 11) / 480, rel=0.25)
    assert two.seconds == pytest.approx((9 * 60 + 59) / 480, rel=0.25)
    assert three.seconds / two.seconds == pytest.approx(10.9, rel=0.25)


def test_one_device_of_the_reference_machine_is_as_fast_as_published() -> None:
    """Published: 3,810 steps of 16 rows in 1:07:57."""
    pace = _pace(parse_machine("4090"), "strategy=single", "cluster.num_processes=1")
    assert pace.steps == 3810
    assert pace.seconds == pytest.approx((3600 + 7 * 60 + 57) / 3810, rel=0.25)
    assert pace.hours == pytest.approx(pace.seconds * 3810 / 3600)
    assert pace.cost == pytest.approx(2.0 * (pace.hours or 0))


def test_a_faster_link_makes_zero3_cheaper_and_changes_little_else() -> None:
    slow, fast = parse_machine("8xA100-80GB-PCIe"), parse_machine("8xA100-80GB")
    for strategy, least in (("zero3", 1.8), ("ddp", 1.0), ("zero2", 1.0)):
        ratio = _pace(slow, f"strategy={strategy}").seconds / _pace(fast, f"strategy={strategy}").seconds
        assert ratio >= least
        assert strategy == "zero3" or ratio < 1.2


def test_each_weight_is_gathered_for_each_pass_but_what_is_kept_at_the_turn() -> None:
    whole = WEIGHTS.trained + WEIGHTS.frozen - WEIGHTS.small
    assert gathered(WEIGHTS, recompute=False) == 2 * whole - 0.5e9
    assert gathered(WEIGHTS, recompute=True) == 2 * whole - 1e9 / 3
    # DeepSpeed keeps nothing: what a layer gathers to recompute it gathers again for its backward pass.
    assert gathered(WEIGHTS, recompute=True, reuse=0) == 2 * whole + sum(WEIGHTS.layers)
    small = replace(WEIGHTS, frozen=40_000_000, layers=[4_000_000] * 10, small=0)
    assert gathered(small, recompute=False) == small.trained + small.frozen


def test_ranks_send_what_the_strategy_says() -> None:
    machine = parse_machine("8x4090")
    whole = 2 * LORA / 10e9 * 7 / 8  # bytes of the gradients, once around
    config = {name: compose_config([f"strategy={name}"], None) for name in ("ddp", "zero1", "zero2", "zero3")}
    sent = {name: traffic_of(one, WEIGHTS, machine, False).total(4) for name, one in config.items()}
    assert sent["ddp"] == pytest.approx(2 * whole)
    assert sent["zero1"] == pytest.approx(3 * whole)  # and an all-gather of what was updated
    assert sent["zero2"] == pytest.approx((4 * 2 + 1) * whole)  # for each micro-batch
    gathers = 4 * gathered(WEIGHTS, recompute=False) * 2 / 10e9 * 7 / 8
    assert sent["zero3"] == pytest.approx(gathers + 4 * whole)


def test_two_hosts_are_as_fast_as_the_network_between_them() -> None:
    slow, fast = parse_machine("2x8xH100@10Gb"), parse_machine("2x8xH100@3200Gb")
    sent = {one.network: _pace(one, "strategy=zero3", "cluster.num_processes=16") for one in (slow, fast)}
    assert sent[1.25e9].communication_seconds > 100 * sent[400e9].communication_seconds
    assert sent[1.25e9].seconds > sent[1.25e9].communication_seconds


def test_recomputing_costs_the_forward_pass_of_the_layers() -> None:
    machine = parse_machine("1xH100")
    overrides = ("strategy=single", "cluster.num_processes=1", "train.micro_batch_size=64")
    ratio = _pace(machine, *overrides).seconds / _pace(machine, *overrides, recompute=False).seconds
    assert 1.35 < ratio < 1.5


HERE = replace(parse_machine("1x4090"), here=True)


def _single(cache: Path) -> DictConfig:
    return compose_config(["experiment=huanhuan_single", "strategy=single", f"data.cache_dir={cache}"], None)


def test_what_was_seen_of_the_same_way_counts_and_of_a_like_one_its_share(tmp_path: Path) -> None:
    config, footprint = _single(tmp_path), _footprint()
    plan, found = batch_plan(config.train, 1), _footprint().passes[0]
    way = way_of(config, HERE, LORA, WEIGHTS.trained + WEIGHTS.frozen, recompute=True)
    points = [Point(4096.0, 1e14, 4.0), Point(440.0, 1.1e13, 0.5)]
    keep(str(tmp_path), Reached(way, points, 165.2e12, memory=1.1, measured=True))
    keep(str(tmp_path), Reached(way, [Point(440.0, 1.1e13, 9.0)], 165.2e12))  # of a run, which counts less
    known = known_here(config, HERE)
    assert len(known.records) == 2

    def pace(tokens: int, machine: Machine = HERE, recompute: bool = True) -> Pace:
        pass_ = replace(found, batch=replace(found.batch, recompute=recompute))
        return pace_of(config, footprint, pass_, plan, machine, rows=ROWS, tokens=ROWS * tokens)

    assert pace(110).seconds == pytest.approx(4 * 0.5)
    assert pace(1024).seconds == pytest.approx(4 * 4.0)
    assert pace(567).seconds == pytest.approx(4 * 2.25, rel=0.01)
    assert pace(110).reason == "measured here"
    assert "reached here" in pace(110, recompute=False).reason
    assert "docs/planning.md" in pace(110, replace(HERE, here=False)).reason
    assert known.memory_ratio(way) == 1.1
    assert known.memory_ratio(replace(way, strategy="ddp", ranks=2, recompute=False)) == 1.1
    assert known.memory_ratio(replace(way, total=way.total // 10)) is None
    assert known.memory_ratio(replace(way, method="full")) is None


def test_ranks_of_a_cpu_share_its_cores(tmp_path: Path) -> None:
    """What two ranks reached on one core each, one rank reaches on both together."""
    config, footprint = _single(tmp_path), _footprint()
    machine = Machine("cpu", "a CPU", 2, 2**40, rate=None, link=1e12, node=2, network=None, here=True)
    way = way_of(config, machine, LORA, WEIGHTS.trained + WEIGHTS.frozen, recompute=True)
    flops = footprint.passes[0].flops * 440 / 4096
    known = Known([Reached(way, [Point(440.0, flops, flops / 4e10)], 1e11)])

    def speed(ranks: int) -> float:
        plan, found = batch_plan(config.train, ranks), footprint.passes[0]
        return pace_of(config, footprint, found, plan, machine, rows=ROWS, known=known).tokens_per_second

    assert speed(1) == pytest.approx(speed(2), rel=0.05)


def test_a_slower_run_takes_the_place_of_no_faster_one(tmp_path: Path) -> None:
    config = _single(tmp_path)
    way = way_of(config, HERE, LORA, WEIGHTS.trained + WEIGHTS.frozen, recompute=True)
    for seconds in (2.0, 3.0, 1.0, 1.5):  # while other things ran, or not
        keep(str(tmp_path), Reached(way, [Point(440.0, 1e13, seconds)], 1e14))
    assert [record.points[0].seconds for record in known_here(config, HERE).records] == [1.0]
    for seconds in (1.0, 2.0):
        keep(str(tmp_path), Reached(way, [Point(440.0, 1e13, seconds)], 1e14, measured=True))
    seen = known_here(config, HERE).of(way)
    assert seen is not None
    assert seen.points[0].seconds == 2.0


def test_shares_without_a_run_are_those_of_the_benchmarks() -> None:
    """Short rows, one device; benchmarks that are made again differ by a tenth."""
    result = json.loads((Path(__file__).parents[2] / "bench" / "results" / "train.json").read_text(encoding="utf-8"))
    seen = {
        cell["method"]: row["of_gemm"]
        for cell in result["cells"]
        for row in cell["contenders"]
        if (cell["rows"], cell["strategy"], row["name"]) == ("short", "single", "tunewright")
    }
    planned = {method: SHARES["cpu"].get(method, SHARES["cpu"]["prompt"]) for method in seen}
    assert {"lora", "qlora", "full", "prompt_tuning"} <= set(seen)
    assert planned == pytest.approx(seen, rel=0.15)


def test_a_file_that_is_broken_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "reached").mkdir()
    (tmp_path / "reached" / "0.json").write_text('{"way": {"device"')
    empty = Reached(Way(HERE.name, 1, "lora", "single", "float32", False, False, False, 1, 10), [], 1e9)
    (tmp_path / "reached" / "1.json").write_text(json.dumps(asdict(empty)))
    (tmp_path / "peaks").mkdir()
    (tmp_path / "peaks" / "0.json").write_text('{"flops_per_second": 1.0}')
    assert known_here(_single(tmp_path), HERE) == Known()


def test_what_memory_was_seen_beside_what_was_planned_is_in_the_slack() -> None:
    planned = Memory(weights=1000, activations=500)
    assert with_ratio(planned, 1.1).needed == 1650
    assert with_ratio(planned, None) == planned
