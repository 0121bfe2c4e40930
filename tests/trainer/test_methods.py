"""What each method begins from, what it trains, and how many parameters that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, set_seed

from tests.conftest import losses, manifest
from tunewright.config.compose import compose_config, load_config
from tunewright.config.method_schema import PROMPT_LEARNING
from tunewright.trainer.data.build_cache import find_cache
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.methods import adapt, parameter_counts
from tunewright.trainer.model.load import load_model

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KEYS = 512, 32, 64, 2, 4, 16  # KEYS: width of keys and of values
RANK, TOKENS = 4, 5


def qwen2() -> Any:
    """Two layers with grouped queries, biases at q, k and v, and a head of its own."""
    set_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        tie_word_embeddings=False,
    )
    return loud(Qwen2ForCausalLM(config))


def gpt2() -> Any:
    """Two layers of Conv1D, whose weights lie the other way round, and a head tied to the embeddings."""
    set_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    return loud(GPT2LMHeadModel(config))


def loud(model: Any) -> Any:
    """Make the weights large enough for every one of them to show in the logits."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


MODELS = {"qwen2": qwen2, "gpt2": gpt2}


def method(name: str, *overrides: str) -> Any:
    small = [f"method.r={RANK}"] if name in ("lora", "qlora") else []
    prompt = [f"method.virtual_tokens={TOKENS}"] if name in PROMPT_LEARNING else []
    return compose_config([f"method={name}", *small, *prompt, *overrides]).method


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# What a method begins from


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [[], ["method.rslora=true"], ["method.init=gaussian"], ["method.dora=true"]], ids=str
)
def test_lora_begins_as_the_base(name: str, options: list[str]) -> None:
    expected = logits(MODELS[name]())
    adapted = adapt(MODELS[name](), method("lora", *options))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-4)
    for key, parameter in adapted.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            assert bool(parameter.any()) == ("lora_A" in key), key


@pytest.mark.parametrize("name", MODELS)
def test_ia3_begins_as_the_base(name: str) -> None:
    adapted = adapt(MODELS[name](), method("ia3"))
    assert torch.equal(logits(adapted), logits(MODELS[name]()))
    assert all((p == 1).all() for p in adapted.parameters() if p.requires_grad)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    def scale(*options: str) -> float:
        adapted = adapt(qwen2(), method("lora", "method.alpha=8", *options))
        return float(adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"])

    assert scale() == pytest.approx(8 / RANK)
    assert scale("method.rslora=true") == pytest.approx(8 / RANK**0.5)


def test_pissa_moves_the_main_components_into_the_adapter() -> None:
    """B A is the best approximation of rank r, the base keeps the rest, and together they are the base as it was."""
    pristine = qwen2()
    adapted = adapt(qwen2(), method("lora", "method.init=pissa"))
    torch.testing.assert_close(logits(adapted), logits(pristine), rtol=1e-4, atol=1e-3)
    checked = 0
    for path, layer in adapted.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = pristine.get_submodule(path).weight.detach()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        main = left[:, :RANK] * values[:RANK] @ right[:RANK]  # the best approximation of rank r
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(layer.scaling["default"] * (b @ a), main, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.base_layer.weight, weight - main, rtol=1e-4, atol=1e-4)
        checked += 1
    assert checked == 7 * LAYERS


def test_a_pissa_result_is_plain_lora_for_the_base_as_it_was(
    train_here: Callable[..., Path], small_model: Path, trainers: list[Any]
) -> None:
    pissa = ["method.init=pissa", f"method.r={RANK}", "train.learning_rate=3e-3", "train.padding_free=false"]
    run = train_here("pissa", *quick(small_model), *pissa)
    config = LoraConfig.from_pretrained(run / "final")
    assert (config.r, config.init_lora_weights, config.use_dora) == (2 * RANK, True, False)
    base = AutoModelForCausalLM.from_pretrained(small_model)
    before = logits(base)
    reloaded = PeftModel.from_pretrained(base, run / "final")
    trained = logits(trainers[-1].model)
    torch.testing.assert_close(logits(reloaded), trained, rtol=1e-4, atol=1e-4)
    assert (trained - before).abs().max() > 0.1
    assert eval_loss(reloaded, run) == pytest.approx(manifest(run)["final"]["eval_loss"], rel=1e-5)


def quick(model: Path) -> list[str]:
    few = ["train.max_steps=4", "data.max_samples=8", "train.global_batch_size=4", "train.logging_steps=1"]
    return ["model=folder", f"model.path={model}", "train.scheduler=constant", *few]


def eval_loss(model: Any, run: Path) -> float:
    """The mean over the scored tokens of a run's held-out rows, each row alone."""
    config = load_config(run / "config.yaml")
    cache = find_cache(config, Path(config.model.path))
    assert cache
    total, scored = 0.0, 0
    for row in cache.open("eval").with_format("torch"):
        with torch.no_grad():
            predicted = model(input_ids=row["input_ids"].long()[None]).logits[0, :-1]
        labels = row["labels"].long()[1:]
        total += cross_entropy(predicted, labels, ignore_index=IGNORED, reduction="sum").item()
        scored += int((labels != IGNORED).sum())
    return total / scored


# How many parameters

LINEAR = {  # (in, out, bias) of each linear layer of a decoder layer
    "qwen2": [
        (WIDTH, WIDTH, True),
        (WIDTH, KEYS, True),
        (WIDTH, KEYS, True),
        (WIDTH, WIDTH, False),
        (WIDTH, INNER, False),
        (WIDTH, INNER, False),
        (INNER, WIDTH, False),
    ],
    "gpt2": [
        (WIDTH, 3 * WIDTH, True),
        (WIDTH, WIDTH, True),
        (WIDTH, 4 * WIDTH, True),
        (4 * WIDTH, WIDTH, True),
    ],
}
NORMS = {"qwen2": 2 * WIDTH, "gpt2": 4 * WIDTH}  # of a layer: RMSNorm has a weight, LayerNorm a bias too
LAYER = {name: sum(i * o + o * bias for i, o, bias in LINEAR[name]) + NORMS[name] for name in MODELS}
# Outside the layers: embeddings and head, or embeddings of tokens and positions; the last norm.
OUTSIDE = {"qwen2": 2 * VOCABULARY * WIDTH + WIDTH, "gpt2": (VOCABULARY + 64) * WIDTH + 2 * WIDTH}
BASE = {name: LAYERS * LAYER[name] + OUTSIDE[name] for name in MODELS}
LORA = {name: LAYERS * sum(RANK * (i + o) for i, o, _ in LINEAR[name]) for name in MODELS}
MAGNITUDES = {name: LAYERS * sum(o for _, o, _ in LINEAR[name]) for name in MODELS}
# PEFT's choice: outputs of q and v and the inputs of down_proj; outputs of c_attn and inputs of mlp.c_proj.
IA3 = {"qwen2": LAYERS * (WIDTH + KEYS + INNER), "gpt2": LAYERS * (3 * WIDTH + 4 * WIDTH)}
CACHE = {"qwen2": LAYERS * 2 * KEYS, "gpt2": LAYERS * 2 * WIDTH}  # keys and values of one virtual token
TOKEN = {"qwen2": KEYS, "gpt2": WIDTH}  # PEFT's own width of a virtual token before the projection to CACHE
HIDDEN = 24


def _mlp() -> int:
    return (WIDTH * HIDDEN + HIDDEN) + (HIDDEN * HIDDEN + HIDDEN) + (HIDDEN * WIDTH + WIDTH)


def _lstm() -> int:
    """Two layers in both directions, each with four gates and two biases, then an MLP of two layers."""
    first, second = 2 * 4 * HIDDEN * (WIDTH + HIDDEN + 2), 2 * 4 * HIDDEN * (2 * HIDDEN + HIDDEN + 2)
    return first + second + (2 * HIDDEN * 2 * HIDDEN + 2 * HIDDEN) + (2 * HIDDEN * WIDTH + WIDTH)


def _projection(name: str) -> int:
    width = TOKEN[name]
    return TOKENS * width + (width * HIDDEN + HIDDEN) + (HIDDEN * CACHE[name] + CACHE[name])


def trained_by_hand(name: str) -> dict[tuple[str, ...], int]:
    """{(method, option...): parameters that train}."""
    hidden = f"method.hidden_size={HIDDEN}"
    return {
        ("full",): BASE[name],
        ("freeze", "method.layers=1"): LAYER[name],
        ("lora",): LORA[name],
        ("lora", "method.rslora=true"): LORA[name],
        ("lora", "method.init=pissa"): LORA[name],
        ("lora", "method.dora=true"): LORA[name] + MAGNITUDES[name],
        ("prompt_tuning",): TOKENS * WIDTH,
        ("p_tuning", "method.encoder=mlp", hidden): TOKENS * WIDTH + _mlp(),
        ("p_tuning", "method.encoder=lstm", hidden): TOKENS * WIDTH + _lstm(),
        ("prefix_tuning",): TOKENS * CACHE[name],
        ("prefix_tuning", "method.projection=true", hidden): _projection(name),
        ("ia3",): IA3[name],
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", trained_by_hand("qwen2"), ids=str)
def test_parameters_are_counted_by_hand(name: str, options: tuple[str, ...]) -> None:
    expected = trained_by_hand(name)[options]
    added = 0 if options[0] in ("full", "freeze") else expected
    assert parameter_counts(adapt(MODELS[name](), method(*options))) == (expected, BASE[name] + added)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_parameters_of_a_quantised_base_are_counted_by_hand(name: str, bits: int, tmp_path: Path) -> None:
    """Two 4-bit weights lie in one byte, which counts as one number."""
    MODELS[name]().save_pretrained(tmp_path)
    chosen = method("qlora", f"method.bits={bits}")
    settings = compose_config(["model=folder", f"model.path={tmp_path}"]).model
    model = load_model(tmp_path, settings, torch.float32, method=chosen, device=torch.device("cpu"))
    adapted = adapt(model, chosen)
    assert parameter_counts(adapted) == (LORA[name], BASE[name] + LORA[name])
    halves = LAYERS * sum(i * o for i, o, _ in LINEAR[name]) // 2 if bits == 4 else 0
    assert sum(p.numel() for p in adapted.parameters()) == BASE[name] + LORA[name] - halves


# Freeze


def trained_names(name: str, **options: Any) -> set[str]:
    settings = {"layers": 0, "modules": [], "extra_modules": [], **options}
    model = adapt(MODELS[name](), SimpleNamespace(name="freeze", **settings))
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


def names_with(name: str, *parts: str) -> set[str]:
    return {key for key, _ in MODELS[name]().named_parameters() if any(part in key for part in parts)}


def test_freeze_trains_the_layers_and_modules_that_are_named() -> None:
    last, first = "model.layers.1.", "model.layers.0."
    assert trained_names("qwen2", layers=1) == names_with("qwen2", last)
    assert trained_names("qwen2", layers=-1) == names_with("qwen2", first)
    assert trained_names("qwen2", layers=2) == names_with("qwen2", first, last)
    assert trained_names("qwen2", layers=1, modules=["mlp"]) == names_with("qwen2", f"{last}mlp.")
    some = names_with("qwen2", f"{last}self_attn.q_proj", f"{last}mlp.down_proj")
    assert trained_names("qwen2", layers=1, modules=["q_proj", "mlp.down_proj"]) == some
    outside = ["embed_tokens", "norm", "lm_head"]
    expected = names_with("qwen2", "embed_tokens", "model.norm", "lm_head")
    assert trained_names("qwen2", extra_modules=outside) == expected
    assert trained_names("qwen2", layers=1, extra_modules=["norm"]) == names_with("qwen2", last, "model.norm")
    assert trained_names("gpt2", layers=1, extra_modules=["ln_f"]) == names_with("gpt2", ".h.1.", "ln_f")
    assert trained_names("gpt2", layers=-1, modules=["attn"]) == names_with("gpt2", ".h.0.attn.")


# LoRA+


def test_loraplus_gives_b_its_own_learning_rate(
    train_here: Callable[..., Path], small_model: Path, trainers: list[Any]
) -> None:
    rates = ["train.learning_rate=1e-3", "train.weight_decay=0.1", "method.loraplus_ratio=8"]
    run = train_here("loraplus", *quick(small_model), *rates, "data.eval_names=[]")
    trainer = trainers[-1]
    names = {parameter: key for key, parameter in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[parameter]] = (group["initial_lr"], group["weight_decay"])
    assert seen.keys() == {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    for key, found in seen.items():
        assert found == ((8e-3, 0.1) if "lora_B" in key else (1e-3, 0.1)), key
    assert losses(run)[-1] < losses(run)[0] - 0.02
