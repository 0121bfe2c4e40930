"""Memory that others have published, beside what the plan says of the same training.

The figures are of one 7B model on an MI250 (ROCm 6.1), one or two of its 64 GB devices: Llama 2 7B, guanaco-llama2-1k,
batches of 4 rows, LoRA of rank 8 on two projections. How long its rows were cut is not told: 1,024 is what TRL does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.footprint import Batch, Footprint
from tunewright.plan.held import Memory
from tunewright.plan.machine import Machine
from tunewright.plan.memory import memory_of
from tunewright.trainer.footprint.footprints import make_footprint

GB = 10**9
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# One device, or two with a half of the model on each: their memory in all.
MI250 = Machine("rocm", "MI250", 1, 64 * GB, None, None, 1, None, False)
Planned = Callable[..., tuple[Footprint, Memory]]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Plan for a 7B model, of which there is a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))

    def plan(*overrides: str, recompute: bool = False) -> tuple[Footprint, Memory]:
        shape = ["model=folder", f"model.path={tmp_path}", "model.random_weights=true", f"data.cache_dir={tmp_path}"]
        batches = ["train.padding_free=false", "train.global_batch_size=4", "train.micro_batch_size=4"]
        config = compose_config([*shape, "strategy=single", *batches, *overrides])
        batch = Batch(4, 1024, True, recompute)
        footprint = make_footprint(config, "rocm", [batch])
        return footprint, memory_of(config, footprint, footprint.of(batch), batch_plan(config.train, 1), MI250)

    return plan


ADAPTER = ("method.r=8", "method.alpha=8", "method.target_modules=[q_proj,v_proj]")


def test_qlora_of_7b_fits_where_its_source_says(planned: Planned) -> None:
    footprint, memory = planned("method=qlora", *ADAPTER, recompute=True)
    assert footprint.weights.trained == 4_194_304
    assert memory.needed <= 10.88 * GB


def test_lora_of_7b_explains_the_figure_of_its_source(planned: Planned) -> None:
    """In float32, as transformers loaded weights then; what its attention kept beside that is not known."""
    footprint, memory = planned("method=lora", *ADAPTER, "model.dtype=float32")
    assert footprint.weights.trained == 4_194_304
    assert memory.needed == pytest.approx(83.2 * GB, rel=0.25)


def test_full_training_of_7b_explains_the_figure_of_its_source(planned: Planned) -> None:
    footprint, memory = planned("method=full", "model.dtype=float32")
    assert footprint.weights.trained == 6_738_415_616
    assert memory.needed == pytest.approx(128 * GB, rel=0.25)
