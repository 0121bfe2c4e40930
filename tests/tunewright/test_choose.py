"""Which ways to run a configuration are looked at, what is refused of them, and which one is taken, with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config
from tunewright.config.method_schema import METHODS
from tunewright.plan.architecture import Architecture
from tunewright.plan.choose import chosen, options, ranked
from tunewright.plan.footprint import Footprint, Moment, Pass, Weights
from tunewright.plan.further import deeper
from tunewright.plan.held import Memory
from tunewright.plan.machine import Machine, parse_machine
from tunewright.plan.option import Option, Pace
from tunewright.plan.reasons import described, nearest, reason, settings, shortage
from tunewright.plan.ways import at, batches, devices_of, micro_batches, other_methods, strategies, with_method

GIB = 2**30
LLAMA = Architecture(
    "llama", {"model.layers.0.q_proj": "linear"}, {}, "lm_head", "embed_tokens", 512, "model.layers", 2, False, None,
    None, None, True, ["tunewright", "trl"], None, 7_000_000_000,
)  # fmt: skip
OPEN = ("strategy=auto", "train.micro_batch_size=auto", "train.gradient_checkpointing=auto")


def composed(*overrides: str) -> Any:
    return compose_config(overrides, choose=None)


def footprint(
    config: Any, machine: Machine, *, weights: float, frozen_bytes: float = 2.0, a_token: float = 2e6
) -> Footprint:
    """Of a model of so many weights; its activations take so many bytes a token, or a tenth where layers recompute."""
    whole = int(weights)
    trained = whole if config.method.name == "full" else whole // 200
    looked_at = batches(config, devices_of(machine, 8), LLAMA)
    passes = [
        Pass(
            batch,
            [Moment(int(batch.rows * batch.length * a_token * (0.1 if batch.recompute else 1)), 0)],
            4.0 * weights * batch.rows * batch.length,
        )
        for batch in looked_at
    ]
    frozen = whole - trained
    layers = [int(0.03 * weights)] * 32
    made = Weights(
        trained, frozen, int(frozen * frozen_bytes), 2, layers, whole - sum(layers), 0, 4096, [([trained], 1)]
    )
    return Footprint(machine.kind, made, passes)


def ways_of(machine: str, *overrides: str, **model: float) -> list[Option]:
    config, target = composed(*overrides), parse_machine(machine)
    return options([config], target, devices_of(target, 8), LLAMA, [footprint(config, target, **model)])


def way(**changes: Any) -> Option:
    """A way that needs 10 of 80 GiB and a second for a step."""
    seconds = changes.pop("seconds", 1.0)
    pace = Pace(100, 1000.0, 1e15, seconds, 0.0, seconds, "listed")
    made = Option(
        method="lora",
        strategy="ddp",
        ranks=8,
        micro_batch=2,
        recompute=False,
        refusal=None,
        memory=Memory(weights=int(changes.pop("gib", 10) * GIB)),
        room=80 * GIB,
        pace=pace,
        configured=True,
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("overrides", "ranks", "sizes"),
    [
        ((), 1, [1, 2, 4, 8, 16]),
        ((), 8, [1, 2]),
        (("train.global_batch_size=20",), 8, [1, 2, 3]),
        (("train.micro_batch_size=4",), 8, [1, 2, 4]),
        (("train.global_batch_size=1000", "data.cutoff_len=8192"), 1, [1, 2, 4, 8]),
        (("train.global_batch_size=null", "train.gradient_accumulation_steps=4"), 1, [4]),
        (
            ("train.global_batch_size=null", "train.gradient_accumulation_steps=4", "train.micro_batch_size=2"),
            8,
            [2],
        ),
        (("train.global_batch_size=null", "train.tokens_per_batch=16384", "data.cutoff_len=1024"), 4, [1, 2, 4]),
    ],
)
def test_the_sizes_of_micro_batches_leave_the_global_batch_as_it_is(
    overrides: tuple[str, ...], ranks: int, sizes: list[int]
) -> None:
    assert micro_batches(composed(OPEN[1], *overrides), devices_of(parse_machine("4090"), 8), ranks) == sizes


@pytest.mark.parametrize(
    ("machine", "overrides", "names"),
    [
        ("8xH100-80GB", (), "single ddp zero1 zero2 zero2_offload zero3 zero3_offload"),
        ("8xH100-80GB", ("cluster.num_processes=4",), "ddp zero1 zero2 zero2_offload zero3 zero3_offload"),
        ("4090", (), "single zero2_offload zero3_offload"),
        ("4090", ("strategy=zero3",), "single zero2_offload zero3 zero3_offload"),
        ("8xH100-80GB", ("strategy=zeropp", "cluster.num_processes=1"), "single zero2_offload zero3_offload zeropp"),
    ],
)
def test_strategies_that_make_a_difference_are_looked_at(machine: str, overrides: tuple[str, ...], names: str) -> None:
    config = composed("strategy=auto", *overrides)
    assert strategies(config, devices_of(parse_machine(machine), 8)) == names.split()


def test_on_a_cpu_nothing_is_offloaded() -> None:
    machine = Machine("cpu", "EPYC", 2, 8 * GIB, 1e11, 1e9, 2, None, here=False)
    names = strategies(composed("strategy=auto"), devices_of(machine, 2))
    assert names == ["single", "ddp", "zero1", "zero2", "zero3"]
    assert micro_batches(composed(OPEN[1]), devices_of(machine, 2), 1) == [1, 2, 4]


def test_a_way_is_what_the_support_table_and_the_rules_say_of_it() -> None:
    ways = ways_of("8xH100-80GB", *OPEN, "method=qlora", weights=7e9, frozen_bytes=0.55)
    refused = {way.strategy: way.refusal for way in ways if way.refusal}
    assert set(refused) == {"zero3", "zero3_offload"}
    assert all("cannot be split" in str(text) for text in refused.values())
    assert all(way.memory is None and not way.fits for way in ways if way.refusal)


def test_other_methods_keep_what_they_have_in_common() -> None:
    config = composed("method=lora", "method.r=64", "method.target_modules=[q_proj]")
    other = with_method(config, "qlora")
    assert (other.method.name, other.method.r, list(other.method.target_modules)) == ("qlora", 64, ["q_proj"])
    assert other.method.double_quant is True
    assert config.method.name == "lora"
    plain = with_method(other, "lora")
    assert set(plain.method) == set(config.method)
    devices = devices_of(parse_machine("4090"), 8)
    names = {
        name: [one.method.name for one in other_methods(composed(f"method={name}"), devices, LLAMA)] for name in METHODS
    }
    assert {name: others for name, others in names.items() if others} == {
        "full": ["lora", "qlora"], "freeze": ["lora", "qlora"], "lora": ["qlora"], "qlora": ["lora"],
    }  # fmt: skip


def test_another_method_that_nothing_can_run_is_not_looked_at() -> None:
    config = composed("method=lora", "method.init=pissa")
    assert other_methods(config, devices_of(parse_machine("4090"), 8), LLAMA) == []


def test_an_option_is_written_into_a_configuration(tmp_path: Path) -> None:
    config = composed(*OPEN)
    settled = at(config, way(strategy="zero3", micro_batch=2, recompute=True, method="full"))
    strategy, train = settled.strategy, settled.train
    assert (strategy.name, strategy.launcher.value, strategy.deepspeed) == ("zero3", "deepspeed", "zero3")
    assert (train.micro_batch_size, train.gradient_checkpointing, settled.method.name) == (2, True, "full")
    assert at(config, way(strategy="single")).strategy.deepspeed is None
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2}}')
    mine = composed("strategy=zero2", f"strategy.deepspeed={own}")
    assert at(mine, way(strategy="zero2")).strategy.deepspeed == str(own)
    assert at(mine, way(strategy="zero3")).strategy.deepspeed == "zero3"


def test_the_fastest_that_fits_is_taken() -> None:
    fast, slow, large = (
        way(seconds=1.0),
        way(strategy="zero3", seconds=2.0),
        way(strategy="single", seconds=0.5, gib=81),
    )
    assert chosen([large, slow, fast]) is fast
    assert chosen([large, slow]) is slow
    assert chosen([large]) is None
    assert chosen([replace(fast, configured=False), slow]) is slow
    assert chosen([replace(fast, refusal="no", memory=None), slow]) is slow


def test_ways_are_compared_by_tokens_where_more_ranks_make_larger_steps() -> None:
    steps = ("train.global_batch_size=null", "train.gradient_accumulation_steps=4", "data.cutoff_len=1024")
    best = chosen(ways_of("8xH100-80GB", *OPEN, *steps, weights=7e9))
    assert best
    assert (best.strategy, best.ranks, best.micro_batch) == ("ddp", 8, 4)


def test_of_ways_that_are_as_fast_the_simplest_is_taken() -> None:
    ways = [way(strategy=name, gib=gib) for name, gib in (("zero2", 9), ("ddp", 10), ("zero1", 9.5))]
    assert chosen([*ways, way(recompute=True, gib=2), way(micro_batch=1)]) is ways[1]


def test_of_micro_batches_that_are_as_fast_the_largest_is_taken_while_much_memory_stays_free() -> None:
    sizes = [way(micro_batch=rows, gib=gib) for rows, gib in ((1, 20), (2, 35), (4, 63), (8, 75))]
    assert chosen(sizes) is sizes[2]
    tight = [way(micro_batch=4, gib=74), way(micro_batch=2, gib=70)]
    assert chosen(tight) is tight[1]


def test_some_memory_stays_free_where_it_can() -> None:
    tight, roomy = way(seconds=1.0, gib=79), way(seconds=1.2, micro_batch=1, gib=60)
    assert chosen([tight, roomy]) is roomy
    assert chosen([tight]) is tight


def test_what_is_offloaded_has_to_fit_into_host_memory() -> None:
    offloaded = way(memory=Memory(weights=GIB, host=30 * GIB), host_room=20 * GIB)
    assert not offloaded.fits
    assert replace(offloaded, host_room=40 * GIB).fits
    assert replace(offloaded, host_room=None).fits  # of a machine elsewhere nobody knows it


def test_what_is_shown_is_the_best_of_each_strategy_and_of_each_other_method() -> None:
    best = way(micro_batch=1, seconds=1.01)
    ways = [
        best,
        way(seconds=1.0),
        way(strategy="zero3", seconds=3.0),
        way(strategy="zero3", seconds=2.0, gib=90),
        way(strategy="single", gib=100, micro_batch=1),
        way(strategy="single", gib=120),
        way(strategy="zero1", refusal="no", memory=None),
        way(method="qlora", seconds=0.9, configured=False),
        way(method="qlora", strategy="zero2", seconds=0.8, configured=False),
        way(method="qlora", strategy="zero3", refusal="no", memory=None, configured=False),
    ]
    shown = [(one.method, one.strategy, one.micro_batch) for one in ranked(ways, best)]
    assert shown == [
        ("qlora", "zero2", 2), ("lora", "ddp", 1), ("lora", "zero3", 2), ("lora", "single", 1), ("lora", "zero1", 2),
    ]  # fmt: skip


def test_the_reason_names_what_would_be_simpler_and_how_much_slower_the_next_is() -> None:
    ways = [
        way(strategy="single", gib=140),
        way(strategy="ddp", gib=150),
        way(strategy="zero3", seconds=2.0),
        way(strategy="zero3_offload", seconds=5.0),
    ]
    assert reason(ways, ways[2]) == (
        "the fastest of 2 ways that fit; single, ddp would need 140.00 GiB or more of 80.00 GiB; the next, "
        "zero3_offload, takes 2.5 times as long."
    )
    assert reason([way(), way(strategy="zero2")], way()).endswith("zero2 is as fast and does more than is needed.")
    both = [way(gib=90), way(recompute=True)]
    beside = replace(way(), memory=Memory(weights=GIB, host=8 * GIB))
    told = "the only way that fits; each rank needs 8.00 GiB of host memory beside, if the host has that."
    assert reason([beside, way(gib=90)], beside) == told
    assert reason(both, both[1]) == "the only way that fits; without recomputation it would need 90.00 GiB or more."


def test_what_is_configured_is_told_what_would_be_faster() -> None:
    asked, other = way(strategy="zero3", seconds=11.0), way(seconds=1.0, configured=False)
    assert reason([asked, other], asked) == f"as configured; {settings(other)} would take 9% of the time."
    assert reason([asked, way(seconds=10.9, configured=False)], asked) == "as configured."


def test_where_nothing_fits_the_least_is_told_and_what_is_nearest() -> None:
    asked = [way(gib=100), way(gib=90, micro_batch=1)]
    others = [
        way(strategy="zero3", configured=False, seconds=0.1),
        way(recompute=True, micro_batch=1, configured=False),
        way(method="qlora", configured=False, seconds=0.1),
    ]
    assert nearest([*asked, *others], asked[1]) is others[1]
    assert shortage([*asked, *others]) == (
        "lora under ddp on 8 ranks, 1 row at a time needs 90.00 GiB a rank, of 80.00 GiB. What is nearest and fits: "
        "strategy=ddp train.micro_batch_size=1 train.gradient_checkpointing=true, with 10.00 GiB."
    )
    assert shortage([*asked, others[2]]).split("fits: ")[1].startswith("method=qlora strategy=ddp")
    assert shortage(asked).endswith("Nothing else that was looked at fits either.")
    assert shortage([way(refusal="It is refused.", memory=None)]) == "It is refused."


def test_a_deeper_model_needs_more_of_what_lies_in_layers() -> None:
    config, machine = composed(*OPEN), parse_machine("8xH100-80GB")
    one = footprint(config, machine, weights=7e9)
    twice = deeper(one, 2)
    assert len(twice.weights.layers) == 64
    whole = twice.weights.trained + twice.weights.frozen
    assert whole == pytest.approx(2 * sum(one.weights.layers) + one.weights.outside, rel=0.01)
    assert twice.passes[0].moments[0].activations == 2 * one.passes[0].moments[0].activations


def test_ddp_is_taken_before_zero2_for_adapters_and_zero3_only_for_what_does_not_fit_otherwise() -> None:
    small = chosen(ways_of("8xH100-80GB", *OPEN, "data.cutoff_len=1024", weights=7e9))
    assert small
    assert (small.strategy, small.recompute) == ("ddp", False)
    large = chosen(ways_of("8xH100-80GB", *OPEN, "data.cutoff_len=1024", weights=70e9))
    assert large
    assert large.strategy == "zero3"


def test_as_few_layers_recompute_as_have_to() -> None:
    """21 of 79.6 GiB where all of 32 recompute, and 90 where none does: a tenth stays free."""
    fixed = ("strategy=single", "train.micro_batch_size=8", "train.global_batch_size=8", "data.cutoff_len=1024")
    ways = ways_of("H100-80GB", *fixed, OPEN[2], weights=7e9, a_token=1e7)
    found = {(way.recompute, way.layers): way for way in ways if way.strategy == "single" and way.micro_batch == 8}
    assert len(found) == 3
    (every,) = (way for (recompute, layers), way in found.items() if recompute and layers is None)
    (some,) = (way for (_, layers), way in found.items() if layers is not None)
    none = found[False, None]
    assert every.fits
    assert not none.fits
    assert some.memory
    assert none.memory
    assert every.memory
    assert some.layers
    assert every.seconds > some.seconds > none.seconds
    assert some.memory.needed <= 0.9 * some.room < some.memory.needed + (none.memory.needed - every.memory.needed) / 32
    assert "train.gradient_checkpointing=auto" in settings(some)
    assert f"{some.layers} layers recompute" in described(some)
