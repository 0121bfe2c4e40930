"""Merging: what is written is what base and adapter are together, or nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from tunewright.claims import Claim, prepare_folder
from tunewright.config.compose import compose_config, load_config
from tunewright.deliver.merge import merge_run
from tunewright.deliver.merge_check import Reference, pick_rows
from tunewright.errors import ConfigError, StorageError
from tunewright.launch.cli import main
from tunewright.run_folder import RunDir
from tunewright.trainer.prepared import prepare

VOCABULARY = 4096  # of the embedded model's tokenizer
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
DEEPSEEK = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
BASES = {
    "deepseek": lambda: DeepseekV3Config(**SMALL, **DEEPSEEK),
    "llama": lambda: LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL, **HEADS, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(**GPT2),
    "neox": lambda: GPTNeoXConfig(**SMALL, num_attention_heads=4),
    "mixtral": lambda: MixtralConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1),
}
ATTENTION = ["q_proj", "v_proj", "o_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **options})


def ia3(*targets: str, feedforward: list[str]) -> IA3Config:
    return IA3Config(task_type="CAUSAL_LM", target_modules=list(targets), feedforward_modules=feedforward)


# name -> (base, adapter, whether head and embeddings stay one tensor)
KINDS: dict[str, tuple[str, Callable[[], Any], bool]] = {
    "lora": ("llama", lora, False),
    "rslora": ("llama", lambda: lora(use_rslora=True), False),
    "dora": ("llama", lambda: lora(use_dora=True), False),
    "all linear": ("qwen2", lambda: lora(target_modules="all-linear"), False),
    "lora bias": ("qwen2", lambda: lora(target_modules=["q_proj"], lora_bias=True), False),
    "every bias": ("qwen2", lambda: lora(bias="all"), False),
    "ia3": ("llama", lambda: ia3("k_proj", "v_proj", "down_proj", feedforward=["down_proj"]), False),
    "ia3 with bias": ("qwen2", lambda: ia3("k_proj", "v_proj", "down_proj", feedforward=["down_proj"]), False),
    "embeddings": ("llama", lambda: lora(target_modules=["q_proj", "embed_tokens"]), False),
    "embeddings and head": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head"]), False),
    "head replaced": ("llama", lambda: lora(modules_to_save=["lm_head"]), False),
    "block replaced": ("qwen2", lambda: lora(target_modules=["down_proj"], modules_to_save=["self_attn"]), False),
    "tied, untouched": ("llama_tied", lora, True),
    "tied, embeddings": ("llama_tied", lambda: lora(target_modules=["embed_tokens"]), False),
    "tied, head": ("llama_tied", lambda: lora(target_modules=["lm_head"]), False),
    "tied, embeddings replaced": ("llama_tied", lambda: lora(modules_to_save=["embed_tokens"]), False),
    "tied, head replaced": ("llama_tied", lambda: lora(modules_to_save=["lm_head"]), False),
    "tied, kept tied": (
        "llama_tied",
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
    ),
    "some tokens": ("llama", lambda: lora(trainable_token_indices=[5, 6, 7]), False),
    "gpt2": ("gpt2", lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), True),
    "gpt2 ia3": ("gpt2", lambda: ia3("c_attn", "mlp.c_proj", feedforward=["mlp.c_proj"]), True),
    "gpt2 embeddings": ("gpt2", lambda: lora(target_modules=["wte"], fan_in_fan_out=False), False),
    "neox": ("neox", lambda: lora(target_modules=["query_key_value"]), False),
    "attention of experts": ("mixtral", lora, False),
}
# Adapters that PEFT's own merge gets wrong or refuses: it changes a tied head along with its embeddings.
PEFT_DIFFERS = {"tied, embeddings", "tied, head", "gpt2 embeddings"}


class Made:
    """A finished run that was not trained: a small random base, and an adapter whose weights are random."""

    def __init__(self, root: Path, tokenizer: Any, base: str, adapter: Any, **save: Any) -> None:
        torch.manual_seed(0)
        self.base = root / "base"
        model = AutoModelForCausalLM.from_config(BASES[base]())
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(tensor, std=0.1)
        model.save_pretrained(self.base, **save)
        tokenizer.save_pretrained(self.base)
        config = compose_config(
            ["model=folder", f"model.path={self.base}", f"output_root={root}", "name=run", "data.cutoff_len=128"]
        )
        self.run = RunDir(root / "run")
        prepare_folder(config, Claim(self.run))
        self.run.update_manifest(status="done")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(self.base), adapter)
        for name, tensor in adapted.named_parameters():
            if tensor.requires_grad:
                with torch.no_grad():
                    noise = torch.randn_like(tensor)
                    tensor.copy_(1 + 0.3 * noise if "ia3" in name or "magnitude" in name else tensor + 0.1 * noise)
        adapted.save_pretrained(self.run.final)
        tokenizer.save_pretrained(self.run.final)

    def adapted(self) -> Any:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), self.run.final).eval()

    def change_adapter(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        file = self.run.final / "adapter_model.safetensors"
        save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)


@pytest.fixture
def made(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Made]:
    return lambda base="llama", adapter=None, **save: Made(tmp_path, tiny_tokenizer, base, adapter or lora(), **save)


def silent(text: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60).reshape(3, 19)).logits


def left_behind(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.path.iterdir() if "merge" in path.name)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_and_adapter(kind: str, made: Callable[..., Made]) -> None:
    base, adapter, stays_tied = KINDS[kind]
    run = made(base, adapter())
    out = merge_run(run.run.path, dtype="fp32", say=silent)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    expected = logits(run.adapted())
    assert (logits(AutoModelForCausalLM.from_pretrained(run.base).eval()) - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == stays_tied == merged.config.tie_word_embeddings
    if kind not in PEFT_DIFFERS:
        reference = run.adapted().merge_and_unload(safe_merge=True).state_dict()
        found = merged.state_dict()
        assert found.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name} {text}"
            )


@pytest.mark.parametrize(
    ("dtype", "stored", "trained"),
    [
        (None, torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("fp32", torch.float32, torch.bfloat16),  # as adapters are on a GPU
    ],
)
def test_weights_are_merged_in_float32_and_rounded_once(
    dtype: str | None, stored: torch.dtype, trained: torch.dtype, made: Callable[..., Made]
) -> None:
    run = made()
    run.change_adapter(lambda name, tensor: tensor.to(trained))
    out = merge_run(run.run.path, dtype=dtype, say=silent)
    expected = run.adapted().merge_and_unload().state_dict()
    found = weights(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.to(stored), rtol=0, atol=0)
    assert AutoModelForCausalLM.from_pretrained(out).dtype is stored
    record = json.loads((out / "merge.json").read_text())
    assert (record["adapted_layers"], record["changed_layers"], record["changed_tensors"]) == (6, 6, 6)


def test_what_a_model_keeps_in_float32_is_not_rounded(made: Callable[..., Made]) -> None:
    """The biases by which a router balances its experts."""
    run = made("deepseek", lora(target_modules=["o_proj"]))
    stored, bias = weights(run.base), "model.layers.1.mlp.gate.e_score_correction_bias"
    stored[bias] = torch.rand(4)
    save_file(stored, run.base / "model.safetensors", metadata={"format": "pt"})
    found = weights(merge_run(run.run.path, dtype="bf16", say=silent))
    assert found.keys() == stored.keys()
    loaded = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16).state_dict()
    kept = {name for name, tensor in loaded.items() if tensor.dtype is torch.float32}
    assert bias in kept  # from transformers 5.24 on the router's weight too
    assert {name for name, tensor in found.items() if tensor.dtype is not torch.bfloat16} == kept
    assert torch.equal(found[bias], stored[bias])


def test_base_and_adapter_are_heard_with_the_rotary_frequencies_that_a_loaded_model_has(
    made: Callable[..., Made],
) -> None:
    """An adapter of zeros is the base: in bfloat16 too, to the last bit."""
    run = made()
    run.change_adapter(lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    config = load_config(run.run.config)
    rows = pick_rows(prepare(config, silent).cache)
    compared = Reference(config, run.base, run.run.final, rows, torch.bfloat16).compare(run.base)
    assert (compared.difference, compared.largest, compared.effect) == (0, 0, 0)


def test_a_float16_base_stays_float16(made: Callable[..., Made]) -> None:
    run = made()
    AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float16).save_pretrained(run.base)
    assert {tensor.dtype for tensor in weights(merge_run(run.run.path, say=silent)).values()} == {torch.float16}


def test_several_files_in_and_out(made: Callable[..., Made]) -> None:
    run = made(max_shard_size="100KB")
    assert len(list(run.base.glob("*.safetensors"))) > 2
    out = merge_run(run.run.path, dtype="fp32", max_shard="0.6MB", say=silent)
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    # The embeddings alone are 0.5 MB.
    assert len(files) > 1
    assert all(file.stat().st_size < 6e5 + 5000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(out).values())
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not list(out.glob("*.part"))
    assert files[0].stat().st_mode == (out / "config.json").stat().st_mode
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(run.adapted()), rtol=1e-4, atol=1e-5
    )


def test_torch_files(made: Callable[..., Made]) -> None:
    """pytorch_model.bin holds a tied head twice."""
    run = made("llama_tied", lora(modules_to_save=["embed_tokens"]))
    state = AutoModelForCausalLM.from_pretrained(run.base).state_dict()
    assert "lm_head.weight" in state
    (run.base / "model.safetensors").unlink()
    torch.save(state, run.base / "pytorch_model.bin")
    out = merge_run(run.run.path, dtype="fp32", say=silent)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(run.adapted()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("targets", [["c_attn"], ["wte", "c_attn"]])
def test_files_without_the_prefix_of_the_model(targets: list[str], made: Callable[..., Made]) -> None:
    """GPT-2's own files name `h.0.attn.c_attn.weight` what is `transformer.h.0.attn.c_attn.weight` in the model."""
    run = made("gpt2", lora(target_modules=targets, fan_in_fan_out="wte" not in targets))
    file = run.base / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors, file, metadata={"format": "pt"})
    out = merge_run(run.run.path, dtype="fp32", say=silent)
    assert "h.0.attn.c_attn.weight" in weights(out)
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), logits(run.adapted()), rtol=1e-4, atol=1e-5)


MEASURE = """
import re, sys
from pathlib import Path
import torch
from tunewright.deliver.merge import _base_config, _without_weights
from tunewright.config.compose import load_config
from tunewright.deliver.base_tensors import Checkpoint
from tunewright.deliver.merge_layers import Adapted
from tunewright.deliver.merge_weights import write_merged
run, base, out = map(Path, sys.argv[1:])
config = load_config(run / "config.yaml")
adapted = Adapted(run / "final", _without_weights(_base_config(base, config), config), Checkpoint(base))
def peak():  # getrusage would give the parent's, when that was larger
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
(torch.ones(300, 300) @ torch.ones(300, 300)).sum()  # libraries that load at the first use
before = peak()
write_merged(adapted, out, torch.float32, 5_000_000)
print(peak() - before)
"""


def test_never_the_whole_model_in_memory(
    made: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 MB of layers of 4 MB each: what is added to the process at its worst is far less."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    monkeypatch.setitem(BASES, "llama", lambda: LlamaConfig(**{**SMALL, **HEADS, **wide}, tie_word_embeddings=False))
    run = made(max_shard_size="5MB", adapter=lora(target_modules="all-linear", r=1))
    size = sum(file.stat().st_size for file in run.base.glob("*.safetensors"))
    assert size > 100e6
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, run.run.path, run.base, out], capture_output=True, text=True, check=True
    )
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) > 100e6
    peak = int(done.stdout.split()[-1])  # after a line of progress where the machine is busy
    assert 1e6 < peak * 1024 < size / 3


def test_a_zero_adapter_is_refused(made: Callable[..., Made]) -> None:
    run = made()
    run.change_adapter(lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    with pytest.raises(StorageError, match="No tensor changed"):
        merge_run(run.run.path, say=silent)
    assert left_behind(run.run) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_merge_that_says_something_else_is_refused(dtype: str, made: Callable[..., Made]) -> None:
    """One adapted matrix is spoilt on the disk, after it was written and before it is looked at."""
    run = made()

    def spoil(text: str) -> None:
        if text.startswith("Comparing"):
            (file,) = run.run.path.glob(".merged.*.part/model.safetensors")
            tensors = load_file(file)
            tensors["model.layers.1.self_attn.v_proj.weight"].neg_()
            save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(StorageError, match="differs from base and adapter by"):
        merge_run(run.run.path, dtype=dtype, say=spoil)
    assert left_behind(run.run) == []


def test_a_third_of_a_merge_is_refused_although_the_adapter_moves_little(made: Callable[..., Made]) -> None:
    """The adapter moves the logits by 11%, so that with most of it missing the difference is below bf16's tolerance."""
    run = made("neox", lora(target_modules=["query_key_value"]))

    def undo(text: str) -> None:
        if text.startswith("Comparing"):
            (file,) = run.run.path.glob(".merged.*.part/model.safetensors")
            base = load_file(run.base / "model.safetensors")
            third = {name: tensor.float().lerp(base[name], 0.65).bfloat16() for name, tensor in load_file(file).items()}
            save_file(third, file, metadata={"format": "pt"})

    with pytest.raises(StorageError, match=r"differs from base and adapter by 7\..% .* more than the 5\..*%"):
        merge_run(run.run.path, dtype="bf16", say=undo)


def test_an_adapter_of_another_model_is_refused(made: Callable[..., Made]) -> None:
    run = made()
    file = run.run.final / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers.1", "layers.9"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(StorageError, match=r"nothing of the base takes .*layers\.9"):
        merge_run(run.run.path, say=silent)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name}, file)
    with pytest.raises(StorageError, match=r"no model\.layers\.1\.self_attn\.q_proj\.lora_A"):
        merge_run(run.run.path, say=silent)
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(StorageError, match="does not fit the base model: size mismatch"):
        merge_run(run.run.path, say=silent)
    assert left_behind(run.run) == []


def test_an_adapter_that_is_not_finite_is_refused(made: Callable[..., Made]) -> None:
    run = made()
    run.change_adapter(lambda name, tensor: tensor * float("inf") if "layers.1.self_attn.o_proj" in name else tensor)
    with pytest.raises(StorageError, match=r"layers\.1\.self_attn\.o_proj cannot be merged: NaNs"):
        merge_run(run.run.path, say=silent)
    assert left_behind(run.run) == []


def test_weights_that_fp16_cannot_hold_are_refused(made: Callable[..., Made]) -> None:
    run = made()
    tensors = load_file(run.base / "model.safetensors")
    tensors["model.norm.weight"] *= 1e5
    save_file(tensors, run.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values that are too large for fp16"):
        merge_run(run.run.path, dtype="fp16", say=silent)


def test_weights_of_the_base_that_are_not_there(made: Callable[..., Made]) -> None:
    run = made(max_shard_size="100KB")
    index = json.loads((run.base / "model.safetensors.index.json").read_text())
    gone = run.base / index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    held = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ConfigError, match="holds no model weights"):
        merge_run(run.run.path, say=silent)
    gone.write_bytes(held[: len(held) // 2])
    with pytest.raises(StorageError, match=f"{gone.name} has .* bytes where its tensors need"):
        merge_run(run.run.path, say=silent)


def test_an_adapted_layer_that_the_files_do_not_name(made: Callable[..., Made]) -> None:
    run = made()
    file, name = run.base / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    save_file({("fused" if one == name else one): tensor for one, tensor in load_file(file).items()}, file)
    with pytest.raises(
        StorageError, match=rf"The adapter changes {name}, and the files .* have no tensor of that name"
    ):
        merge_run(run.run.path, say=silent)


def test_fused_weights_are_refused(made: Callable[..., Made]) -> None:
    """The files of a mixture of experts hold each expert, the model all of them in one tensor."""
    run = made("mixtral", lora(target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.0))
    with pytest.raises(ConfigError, match="fused weights"):
        merge_run(run.run.path, say=silent)


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt tuning"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prefix tuning"),
    ],
)
def test_prompt_learning_says_that_it_cannot_be_merged(adapter: Any, name: str, made: Callable[..., Made]) -> None:
    run = made(adapter=adapter)
    with pytest.raises(ConfigError, match=f"^{name} adds virtual tokens .* cannot be merged"):
        merge_run(run.run.path, say=silent)


def test_adapters_of_a_changed_base_are_refused(made: Callable[..., Made]) -> None:
    run = made()
    file = run.run.final / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ConfigError, match="pissa_niter_4, which changed the base"):
        merge_run(run.run.path, say=silent)


def test_a_damaged_adapter_configuration(made: Callable[..., Made]) -> None:
    run = made()
    (run.run.final / "adapter_config.json").write_text('{"peft_type": ')
    with pytest.raises(StorageError, match=r"adapter_config\.json cannot be read"):
        merge_run(run.run.path, say=silent)


def test_logits_that_are_not_finite_are_refused(made: Callable[..., Made]) -> None:
    """The weights fit into fp16, and what is computed from them does not."""
    run = made()
    tensors = load_file(run.base / "model.safetensors")
    tensors["model.norm.weight"] *= 6e4
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, run.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StorageError, match="logits are not finite in float16"):
        merge_run(run.run.path, dtype="fp16", say=silent)
    assert left_behind(run.run) == []


def test_a_quantised_base_is_refused(made: Callable[..., Made]) -> None:
    run = made()
    file = run.base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match=r"itself quantised \(fp8\)"):
        merge_run(run.run.path, say=silent)


def test_a_folder_that_is_there_is_kept(made: Callable[..., Made], tmp_path: Path) -> None:
    run = made()
    out = merge_run(run.run.path, dtype="fp32", say=silent)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"merged is there already\. Write --overwrite"):
        merge_run(run.run.path, say=silent)
    assert (out / "model.safetensors").read_bytes() == before
    (out / "notes.txt").write_text("mine")
    said: list[str] = []
    merge_run(run.run.path, overwrite=True, say=said.append)
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert left_behind(run.run) == ["merged"]
    (trashed,) = (run.run.path.parent / ".trash").iterdir()
    assert f"The earlier merge is in {trashed} now." in said
    assert (trashed / "merged" / "model.safetensors").read_bytes() == before
    assert (trashed / "merged" / "notes.txt").read_text() == "mine"
    for name in ("", ".", "..", "/"):
        with pytest.raises(ConfigError, match="`--out` is"):
            merge_run(run.run.path, out=Path(name), overwrite=True, say=silent)
    mine = tmp_path / "mine"
    mine.mkdir()
    for folder in (run.run.path, tmp_path):  # a merged model beside other things
        shutil.copy(out / "merge.json", folder)
    for wrong in (run.run.path, run.base, run.run.final, tmp_path, mine):
        with pytest.raises(ConfigError, match="holds no merged model, so --overwrite does not replace it"):
            merge_run(run.run.path, out=wrong, overwrite=True, say=silent)
        assert wrong.is_dir()
    assert run.adapted()


def test_an_interrupted_merge_leaves_what_was_there(made: Callable[..., Made]) -> None:
    run = made()
    out = merge_run(run.run.path, dtype="fp32", say=silent)
    before = (out / "model.safetensors").read_bytes()

    def stop(text: str) -> None:
        if text.startswith("Comparing"):
            assert left_behind(run.run) == [f".merged.{os.getpid()}.part", "merged"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_run(run.run.path, overwrite=True, say=stop)
    assert left_behind(run.run) == ["merged"]
    assert (out / "model.safetensors").read_bytes() == before
    assert not (run.run.path.parent / ".trash").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_leaves_nothing(sent: signal.Signals, made: Callable[..., Made]) -> None:
    run = made()
    with subprocess.Popen(
        [sys.executable, "-m", "tunewright.launch.cli", "merge", run.run.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout
        for line in command.stdout:
            if line.startswith("Comparing"):
                command.send_signal(sent)
                break
        assert command.wait(60) == 130
    assert left_behind(run.run) == []


def test_a_disk_that_is_too_small(made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    run = made()
    usage = shutil.disk_usage(run.run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(StorageError, match=r"has 0\.0001 GB free, and the merged model takes 0\.0005"):
        merge_run(run.run.path, say=silent)
    assert left_behind(run.run) == []


def test_sizes_of_files() -> None:
    from tunewright.deliver.merge import parse_size

    assert [parse_size(text) for text in ("2GB", "500 mb", "1.5GB", "7")] == [2 * 10**9, 5 * 10**8, 15 * 10**8, 7]
    for wrong in ("", "big", "0", "0GB", "2 XB", "-1GB"):
        with pytest.raises(ConfigError, match="is no size"):
            parse_size(wrong)


def test_lora_from_training_to_an_answer(
    train_here: Callable[..., Path], tunewright: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here("merge-lora", "train.max_steps=6", "train.save_steps=3", "train.learning_rate=2e-3")
    done = tunewright("merge", run)
    assert done.returncode == 0, done.stderr
    assert "28 of 28 adapted layers changed, 28 tensors" in done.stdout
    out = run / "merged"
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    record = json.loads((out / "merge.json").read_text())
    assert record["rows"] == 16
    assert record["difference"] < record["effect"]
    assert record["merged_loss"] == pytest.approx(record["adapter_loss"], abs=0.05)

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    own = AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer.chat_template == own.chat_template
    chat = [{"role": "user", "content": "Route this ticket as JSON.\nMy parcel is missing."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert new.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert not (out / "adapter_config.json").exists()

    assert main(["merge", str(run)]) == 2  # it is there
    checkpoint = run / "checkpoints" / "checkpoint-3"
    assert main(["merge", str(checkpoint), "--dtype", "fp32"]) == 0
    early = weights(run / "merged-checkpoint-3")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(early.bfloat16(), weights(out)["model.layers.0.self_attn.q_proj.weight"])
    assert "merged-checkpoint-3" in capsys.readouterr().out


def test_qlora_is_merged_into_weights_of_16_bits(train_here: Callable[..., Path], tiny_model: Path) -> None:
    run = train_here("merge-qlora", "method=qlora", "train.max_steps=4", "train.learning_rate=2e-3")
    out = merge_run(run, say=silent)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        run / "final",
        autocast_adapter_dtype=False,
    )
    expected = expected.merge_and_unload().state_dict()
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor, expected[name].bfloat16(), rtol=0, atol=0)


def test_a_whole_model_needs_no_merge(made: Callable[..., Made], capsys: pytest.CaptureFixture[str]) -> None:
    run = made()
    shutil.rmtree(run.run.final)
    shutil.copytree(run.base, run.run.final)  # what method=full saves
    assert main(["merge", str(run.run.path)]) == 2
    assert "final is a whole model already, not an adapter: it needs no merge" in capsys.readouterr().err
    shutil.rmtree(run.run.final)
    assert main(["merge", str(run.run.path)]) == 2
    assert "has no result yet" in capsys.readouterr().err
