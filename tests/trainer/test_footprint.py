"""What a pass holds by its footprint is what PyTorch's profiler sees allocated in the real one, on a CPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tunewright.config.compose import compose_config
from tunewright.launch.ask_torch import ensure_footprints
from tunewright.plan.footprint import Batch, Footprint
from tunewright.trainer.data.batches import FlatCollator, PaddedCollator
from tunewright.trainer.footprint import footprints
from tunewright.trainer.footprint.footprints import find_footprint, make_footprint, work_out
from tunewright.trainer.footprint.repetition import Repeated, kept_layers
from tunewright.trainer.loss import loss_sums
from tunewright.trainer.methods import adapt, parameter_counts
from tunewright.trainer.model import attention
from tunewright.trainer.model.load import load_model, torch_dtype
from tunewright.trainer.model.ready import make_ready

ROWS, LENGTH = 3, 96
SHAPE = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 256}
MLP = {**SHAPE, "intermediate_size": 352}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **MLP},
    "qwen2": {"model_type": "qwen2", **MLP},
    "gemma": {"model_type": "gemma", **MLP, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **MLP, "head_dim": 32, "sliding_window": 32},
    "gpt2": {"model_type": "gpt2", "vocab_size": 512, "n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 256},
    "mixtral": {"model_type": "mixtral", **MLP, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return the configuration of a model that has a shape and no weights."""
    root = tmp_path_factory.mktemp("shapes")

    def compose(name: str, *overrides: str) -> Any:
        folder = root / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(MODELS[name]))
        model = ["model=folder", f"model.path={folder}", f"model.name={name}", "model.random_weights=true"]
        return compose_config([*model, f"data.cache_dir={root / 'cache'}", *overrides])

    return compose


def seen(config: Any, batch: Batch) -> int:
    """Return the bytes that the profiler sees held at most in a real pass, beside weights."""
    dtype, padded = torch_dtype(config.model.dtype, "cpu"), batch.padded
    path, cpu = Path(config.model.path), torch.device("cpu")
    implementation = None if padded else attention.register()
    model: Any = load_model(path, config.model, dtype, attention=implementation, method=config.method, device=cpu)
    model = adapt(model, config.method, path)
    ready = make_ready(model, config, dtype, gpu=False)
    if ready.head == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    if batch.recompute:
        if hasattr(model, "get_base_model"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    # A row that is shorter has the batch masked.
    lengths = [batch.length - (padded and row == 1) for row in range(batch.rows)]
    rows = [{"input_ids": np.arange(length) % 500, "labels": np.arange(length) % 500} for length in lengths]
    inputs = (PaddedCollator(0) if padded else FlatCollator(0))(rows)
    gc.collect()  # nothing that was before may end meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if ready.neftune is not None:
            ready.neftune.see(inputs)
        sums = loss_sums(model, inputs, ready.head, router=ready.router_loss is not None)
        loss = sums.loss / 100
        if ready.router_loss is not None and sums.router is not None:
            loss = ready.router_loss.add(loss, sums.router, torch.ones(()))
        del sums
        loss.backward()
    told = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in told if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def planned(footprint: Footprint, batch: Batch) -> int:
    assert footprint.problem is None, footprint.problem
    itemsize = footprint.weights.itemsize
    return max(moment.activations + itemsize * moment.gradients for moment in footprint.of(batch).moments)


CELLS = {
    "full": ("llama", ["method=full"], False, False),
    "full, recomputed": ("qwen2", ["method=full"], False, True),
    "LoRA": ("llama", [], False, False),
    "LoRA, recomputed": ("llama", [], False, True),
    "LoRA, padded": ("qwen2", ["train.padding_free=false"], True, False),
    "LoRA, bfloat16": ("qwen2", ["model.dtype=bfloat16"], False, False),
    "LoRA, dropout": ("llama", ["method.dropout=0.1"], False, False),
    "DoRA": ("llama", ["method.dora=true"], False, False),
    "QLoRA": ("llama", ["method=qlora"], False, False),
    "QLoRA, DoRA": ("qwen2", ["method=qlora", "method.dora=true"], False, False),
    "QLoRA, 8 bits": ("llama", ["method=qlora", "method.bits=8"], False, False),
    "QLoRA, recomputed": ("gemma", ["method=qlora"], False, True),
    "freeze": ("gemma", ["method=freeze"], False, False),
    "IA3": ("llama", ["method=ia3"], False, False),
    "prompt": ("llama", ["method=prompt_tuning", "train.padding_free=false"], True, False),
    "P-tuning": ("llama", ["method=p_tuning", "train.padding_free=false"], True, False),
    "prefix": ("llama", ["method=prefix_tuning", "train.padding_free=false"], True, False),
    "Gemma 2": ("gemma2", ["train.padding_free=false"], True, False),
    "GPT-2": ("gpt2", [], False, False),
    "GPT-2, padded, recomputed": ("gpt2", ["method=full", "train.padding_free=false"], True, True),
    "experts": ("mixtral", [], False, False),
    "NEFTune": ("llama", ["train.neftune_alpha=5"], False, False),
}


@pytest.mark.parametrize("cell", CELLS)
def test_it_is_what_the_profiler_sees(cell: str, shape: Callable[..., Any]) -> None:
    name, overrides, padded, recompute = CELLS[cell]
    config, batch = shape(name, *overrides), Batch(ROWS, LENGTH, padded, recompute)
    assert planned(work_out(config, "cpu", [batch]), batch) == pytest.approx(seen(config, batch), rel=0.06)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_of_loops_two_rounds_are_enough(
    method: str, shape: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, the head and attention of long rows go through their blocks one after the other."""
    monkeypatch.setattr("tunewright.trainer.model.cpu_norms.BLOCK", 2**13)
    monkeypatch.setattr("tunewright.trainer.model.linear_cross_entropy.CHUNK", {"cpu": 2**16})
    monkeypatch.setattr("tunewright.trainer.model.linear_cross_entropy.CHUNK_TRAINED", {"cpu": 2**16})
    config, batch = shape("llama", f"method={method}"), Batch(3, 520, False, True)
    assert planned(work_out(config, "cpu", [batch]), batch) == pytest.approx(seen(config, batch), rel=0.01)


@pytest.mark.parametrize(
    ("name", "overrides", "kind", "recompute"),
    [
        ("llama", [], "cpu", False),
        ("llama", ["method=full"], "cuda", True),
        ("gemma2", [], "cpu", True),  # every other layer has a window
        ("gemma2", [], "cuda", False),
        ("llama", ["method=freeze", "method.layers=-5"], "cuda", False),
        ("gpt2", ["method=qlora"], "cuda", True),
        ("mixtral", [], "cuda", False),
    ],
)
def test_a_few_layers_stand_for_all(
    name: str, overrides: list[str], kind: str, recompute: bool, shape: Callable[..., Any]
) -> None:
    padded = name == "gemma2"
    config = shape(name, "train.padding_free=" + str(not padded).lower(), *overrides)
    batch = Batch(ROWS, LENGTH, padded, recompute)
    few, every = work_out(config, kind, [batch]), work_out(config, kind, [batch], every_layer=True)
    assert few.problem is None
    assert replace(few, passes=[]) == replace(every, passes=[])
    (mine,), (theirs,) = few.passes, every.passes
    # Where layers are left out, the gradients of their routers' logits add up.
    assert [moment.head for moment in mine.moments] == pytest.approx([m.head for m in theirs.moments], rel=0.15)
    told = [replace(one, moments=[replace(moment, head=0) for moment in one.moments]) for one in (mine, theirs)]
    assert told[0] == told[1]


def test_which_layers_stand_for_which() -> None:
    assert kept_layers("AAAAAAAA") == ([0, 1, 7], [Repeated(1, 2, 5)])
    assert kept_layers("AAA") == ([0, 1, 2], [])
    assert kept_layers("ABABABABA") == ([0, 1, 2, 3, 8], [Repeated(2, 4, 2)])
    # Three dense layers before those of experts, and two that are trained behind those that are frozen.
    assert kept_layers("DDDEEEEEE") == ([0, 1, 2, 3, 4, 8], [Repeated(4, 5, 3)])
    assert kept_layers("FFFFFFTT") == ([0, 1, 5, 6, 7], [Repeated(1, 2, 3)])
    assert kept_layers("FFFFFTTTTT") == ([0, 1, 4, 5, 6, 9], [Repeated(1, 2, 2), Repeated(4, 5, 2)])


@pytest.mark.parametrize("overrides", [["method=full"], [], ["method=qlora"], ["method=qlora", "method.bits=8"]])
def test_weights_are_those_of_the_real_model(overrides: list[str], shape: Callable[..., Any]) -> None:
    config = shape("qwen2", *overrides)
    weights = work_out(config, "cpu", []).weights
    model: Any = load_model(Path(config.model.path), config.model, torch.float32, method=config.method)
    model = adapt(model, config.method)
    trained, total = parameter_counts(model)
    assert (weights.trained, weights.trained + weights.frozen) == (trained, total)
    assert sum(weights.layers) + weights.outside == total
    held = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held_by(model)}
    assert weights.frozen_bytes == pytest.approx(sum(held.values()), rel=0.01)
    assert sum(int(np.prod(shape)) * count for shape, count in weights.shapes) == trained


def held_by(model: Any) -> list[torch.Tensor]:
    """Return the tensors that hold what is frozen, with the scales of what is quantised."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    states = [state for parameter in frozen if (state := getattr(parameter, "quant_state", None)) is not None]
    states += [state.state2 for state in states if state.state2 is not None]
    scales = [tensor for state in states for tensor in (state.absmax, state.code, state.offset) if tensor is not None]
    eight = [getattr(parameter, "SCB", None) for parameter in frozen]
    return [*frozen, *model.buffers(), *scales, *(tensor for tensor in eight if tensor is not None)]


def test_it_is_kept(shape: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A process of its own works it out, also of a GPU that is not here; what libraries say meanwhile is not shown."""
    config, other, batches = shape("gpt2"), shape("gpt2", "method.r=4"), [Batch(1, 32, False, False)]
    assert find_footprint(config, "cuda", batches) is None
    made = ensure_footprints([config, other], "cuda", batches)
    assert capsys.readouterr() == ("", "")
    assert [find_footprint(one, "cuda", batches) for one in (config, other)] == made
    assert made[0].weights.trained == 4 * made[1].weights.trained
    more = [*batches, Batch(2, 32, False, True)]
    assert find_footprint(config, "cuda", more) is None
    assert find_footprint(config, "cpu", batches) is None
    added = make_footprint(config, "cuda", more)
    assert added.passes[0] == made[0].passes[0]
    assert find_footprint(config, "cuda", more) == added
    kept = footprints._file(config, "cuda")
    kept.write_bytes(kept.read_bytes()[:300])
    assert find_footprint(config, "cuda", batches) is None, "half a file is none"
    assert make_footprint(config, "cuda", batches) == made[0]


def test_a_pass_that_needs_values_is_missing(shape: Callable[..., Any]) -> None:
    """Keys and values before a row cannot be had again where layers recompute."""
    config = shape("qwen2", "method=prefix_tuning", "train.padding_free=false")
    runs, fails = Batch(1, 32, True, False), Batch(1, 32, True, True)
    footprint = make_footprint(config, "cpu", [fails, runs])
    assert [found.batch for found in footprint.passes] == [runs]
    assert footprint.failed == (fails,)
    assert "must match" in str(footprint.problem) or "broadcast" in str(footprint.problem)
    assert find_footprint(config, "cpu", [runs, fails]) == footprint
    alone = find_footprint(config, "cpu", [runs])
    assert alone
    assert alone.problem is None


def test_what_another_process_keeps_meanwhile_stays(shape: Callable[..., Any]) -> None:
    config, mine, theirs = shape("llama"), Batch(1, 16, False, False), Batch(1, 24, False, False)
    with pytest.MonkeyPatch.context() as patch:

        def meanwhile(*asked: Any) -> Any:
            patch.undo()
            make_footprint(config, "cpu", [theirs])
            return work_out(*asked)

        patch.setattr(footprints, "work_out", meanwhile)
        make_footprint(config, "cpu", [mine])
    assert find_footprint(config, "cpu", [mine, theirs])
