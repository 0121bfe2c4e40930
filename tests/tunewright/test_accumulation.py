"""Where gradients are summed in float32, and where that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.config.schema import STRATEGIES
from tunewright.errors import ConfigError
from tunewright.plan.accumulation import check_accumulation, sums_in_float32


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_auto_is_float32_except_where_deepspeed_would_hold_more_on_the_device(strategy: str) -> None:
    assert sums_in_float32(compose_config([f"strategy={strategy}"])) == (strategy not in ("zero1", "zero2_offload"))
    assert not sums_in_float32(compose_config([f"strategy={strategy}", "train.grad_accum_dtype=bfloat16"]))


def test_float32_can_be_asked_for_except_at_stage_1() -> None:
    asked = ["train.grad_accum_dtype=float32"]
    offloaded = compose_config(["strategy=zero2_offload", *asked])
    check_accumulation(offloaded)
    assert sums_in_float32(offloaded)
    with pytest.raises(ConfigError, match="as DeepSpeed does at ZeRO stage 1: write strategy=zero2, or leave it out"):
        check_accumulation(compose_config(["strategy=zero1", *asked]))


def test_a_deepspeed_file_that_says_it_itself_counts(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}))
    mine = ["strategy=zero2", f"strategy.deepspeed={file}"]
    check_accumulation(compose_config(mine))
    assert not sums_in_float32(compose_config(mine))
    with pytest.raises(ConfigError, match=r"of .*mine.json is 'bf16': leave one of them out"):
        check_accumulation(compose_config([*mine, "train.grad_accum_dtype=float32"]))
