"""The type of every setting: one data class for each Hydra group, with what each key means.

The YAML files in `configs/hydra` hold the values; these classes say which keys exist, their types and their help.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Optional, Union, get_type_hints

from omegaconf import MISSING, SI


class Source(Enum):
    """Where model files come from."""

    embedded = "embedded"
    hub = "hub"
    modelscope = "modelscope"
    folder = "folder"


class Dtype(Enum):
    """Number format of the base weights and of the computation."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Resume(Enum):
    """What to do with an output folder that already holds a run."""

    never = "never"
    auto = "auto"
    must = "must"


class CrossEntropy(Enum):
    """What computes the head and the cross-entropy of a model."""

    auto = "auto"
    tunewright = "tunewright"
    trl = "trl"
    cut = "cut"
    cut_exact = "cut_exact"


class Launcher(Enum):
    """How ranks are started and kept in step."""

    auto = "auto"
    single = "single"
    ddp = "ddp"
    deepspeed = "deepspeed"


class FusedLayers(Enum):
    """Whose kernels compute RMSNorm, rotary embeddings and SwiGLU, each in one pass over memory."""

    none = "none"
    liger = "liger"
    kernels = "kernels"


class AttentionKernel(Enum):
    """Which kernel computes attention without padding on a GPU."""

    auto = "auto"
    torch = "torch"
    flash3 = "flash3"


def option(default: Any, help: str) -> Any:
    """A data-class field with its help text; lists get a fresh copy each time."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Compat(Enum):
    """Whose rules a registry is read by where tunewright's are more forgiving."""

    none = "none"
    llamafactory = "llamafactory"


class Overlong(Enum):
    """What to do with a row longer than `data.cutoff_len`."""

    truncate = "truncate"
    drop = "drop"


class Mix(Enum):
    """How several datasets become one; the names are LLaMA-Factory's."""

    concat = "concat"
    interleave_under = "interleave_under"
    interleave_over = "interleave_over"
    interleave_once = "interleave_once"


@dataclass
class ModelConfig:
    name: str = option(MISSING, "short name, used in run names")
    path: str = option(MISSING, "Hub id, ModelScope id, or folder; `tiny` is built on this machine")
    source: Source = option(Source.hub, "embedded, hub, modelscope or folder")
    revision: Optional[str] = option(None, "Hub branch, tag or commit")
    dtype: Dtype = option(Dtype.auto, "base weights and computation; auto: bfloat16 on a GPU, float32 on a CPU")
    trust_remote_code: bool = option(False, "run Python code that the model's repository brings")
    random_weights: bool = option(
        False, "draw the weights instead of reading them, config.json and tokenizer suffice: to measure a model's speed"
    )
    template: Optional[str] = option(
        None, "chat template instead of the tokenizer's own: a name in configs/templates, or a .jinja file"
    )
    # Any, because OmegaConf lets no key into a mapping that was empty.
    template_kwargs: Any = option(None, "variables for the chat template, for example {enable_thinking: false}")
    architecture: Any = option(
        None,
        "the few numbers of its config.json that give its shape: for --dry-run where the model is not at hand; `of` "
        "lists the paths that they are for",
    )


@dataclass
class DataConfig:
    names: list[str] = option(
        MISSING, "what to train on: entries of the registry, files or folders, hub:ORG/NAME, modelscope:ORG/NAME"
    )
    eval_names: list[str] = option([], "what to hold out for evaluation, named like `names`")
    eval_split: Optional[str] = option(None, "hold out this split of `names`, for example validation")
    eval_size: float = option(
        0.0, "held out of `names` when neither of the above is set: below 1 a share, from 1 a row count"
    )
    dir: str = option("data", "folder that holds dataset_info.json; in `data`, the datasets of the demo may be missing")
    root: Optional[str] = option(
        None, "folder that `dir` and the files of `names` are relative to; null: the working directory"
    )
    max_samples: Optional[int] = option(None, "use at most this many rows of each dataset, drawn under train.seed")
    mix: Mix = option(
        Mix.concat,
        "concat, interleave_under (until the first is used up), interleave_over (until all are), interleave_once",
    )
    weights: list[float] = option(
        [], "one for each of `names`: with concat how often its rows are used (0.5, 2), else its share of the draws"
    )
    cutoff_len: int = option(1024, "longest example in tokens")
    overlong: Overlong = option(
        Overlong.truncate, "rows above cutoff_len: truncate (oldest turns first, then the answer's end), or drop"
    )
    train_on_prompt: bool = option(False, "learn every token of a row, not the assistant's alone")
    mask_history: bool = option(False, "learn the last assistant turn of a row only")
    special_tokens_in_answers: bool = option(
        False,
        "strings of the model's special tokens in an answer are these tokens, not text, except those the template uses",
    )
    max_dropped: float = option(0.1, "stop when more than this share of a dataset's rows cannot be used")
    streaming: bool = option(False, "read rows while training instead of before it; needs train.max_steps")
    shuffle_buffer: int = option(16384, "rows held in memory for shuffling a stream")
    prefer_modelscope: bool = option(False, "where an entry is on both hubs, take ms_hub_url before hf_hub_url")
    compat: Compat = option(Compat.none, "llamafactory: its stricter rules, see docs/data.md")
    allow_outside: bool = option(False, "let the registry name files outside its own folder")
    packing: bool = option(
        False,
        "put rows together, unseen by each other, into packs of up to cutoff_len tokens; batch sizes then count packs",
    )
    workers: Optional[int] = option(None, "processes that tokenise; null: one for each core")
    cache_dir: str = option(
        SI("${oc.env:TUNEWRIGHT_CACHE,'~/.cache/tunewright'}"), "where token caches and the embedded model are kept"
    )


STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zeropp")


@dataclass
class StrategyConfig:
    name: str = option(MISSING, "auto, single, ddp, or a ZeRO stage")
    launcher: Launcher = option(MISSING, "single, ddp or deepspeed; auto: the fastest way that fits")
    deepspeed: Optional[str] = option(None, "DeepSpeed JSON: a name in configs/deepspeed, or a path")


@dataclass
class TrainConfig:
    epochs: float = option(3.0, "passes over the training rows")
    max_steps: Optional[int] = option(None, "stop after this many optimiser steps instead of `epochs`")
    learning_rate: float = option(2e-4, "peak learning rate")
    scheduler: str = option("cosine", "transformers' schedule names: cosine, linear, constant_with_warmup, ...")
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises")
    global_batch_size: Optional[int] = option(16, "rows per optimiser step, over all ranks")
    gradient_accumulation_steps: Optional[int] = option(
        None, "instead of global_batch_size: micro-batches per rank and optimiser step"
    )
    tokens_per_batch: Optional[int] = option(
        None,
        "instead of global_batch_size: about this many tokens per optimiser step, over all ranks, in any number of "
        "rows",
    )
    micro_batch_size: Union[int, str] = option(
        "auto",
        "at most this many rows at once on a device: a memory bound, not a hyper-parameter; auto: as many as fit and "
        "are fast, 4 on a CPU",
    )
    optimizer: str = option("adamw_torch_fused", "transformers' optimiser names")
    grad_accum_dtype: Dtype = option(
        Dtype.auto,
        "format in which gradients of bfloat16 weights are summed over a step's micro-batches; auto: float32, except "
        "under strategy=zero1 and zero2_offload",
    )
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 turns it off")
    seed: int = option(42, "seed of row order, splits, adapters and dropout")
    logging_steps: int = option(5, "optimiser steps between two log lines")
    eval_steps: Optional[int] = option(None, "optimiser steps between evaluations; null: once at the end")
    save_steps: Optional[int] = option(
        None,
        "optimiser steps between checkpoints; null: every 10 minutes and 10 of a run, in 3 % of its time at most; "
        "0: none",
    )
    save_total_limit: int = option(2, "whole checkpoints kept, newest first, at least 2: one may turn out damaged")
    mirror: Optional[str] = option(
        None,
        "a second place for checkpoints and the result, copied while training goes on: a folder that is there, "
        "s3://..., gs://...",
    )
    neftune_alpha: Optional[float] = option(None, "noise on the embeddings while training (NEFTune), for example 5")
    group_by_length: bool = option(False, "rows of like length in one batch: less padding, a less random order")
    keep_best: bool = option(False, "the result is the checkpoint with the lowest eval loss, not the last one")
    early_stopping: Optional[int] = option(None, "stop after this many evaluations without a lower eval loss")
    padding_free: bool = option(True, "one flat row of tokens per batch; false pads, for comparison")
    compile: bool = option(False, "compile the layers with torch.compile: a longer start, faster steps")
    fused_layers: FusedLayers = option(
        FusedLayers.none,
        "on a GPU, one kernel each for RMSNorm, rotary embeddings and SwiGLU: liger, of the package liger-kernel; "
        "kernels, of the Hub (RMSNorm alone)",
    )
    attention_kernel: AttentionKernel = option(
        AttentionKernel.auto,
        "on a GPU: torch, what PyTorch chooses; flash3, FlashAttention 3; auto, the latter on Hopper where it is "
        "installed",
    )
    gradient_checkpointing: Union[bool, str] = option(
        "auto",
        "trade time for memory: recompute activations; auto: of as few layers as the memory of the device allows",
    )
    cross_entropy: CrossEntropy = option(
        CrossEntropy.auto,
        "what computes head and loss: tunewright, trl (makes logits again in the backward pass), cut or cut_exact (the "
        "package cut-cross-entropy, on a GPU); auto: tunewright, where the model's head allows it",
    )
    router_aux_loss: Optional[float] = option(
        None,
        "of a mixture of experts: weight of the loss that keeps experts equally busy; null: the model's own; 0: off",
    )
    loss: Optional[str] = option(
        None, "a plug-in's loss instead of the mean cross-entropy of the tokens that are learnt"
    )
    callbacks: list[str] = option([], "plug-ins' callbacks, called while training")
    timeout_minutes: float = option(10.0, "a rank that is silent this long ends the run")
    grace_seconds: Optional[float] = option(
        None, "between a request to stop and the kill, where known: said when a checkpoint takes longer"
    )


@dataclass
class ClusterConfig:
    num_processes: Optional[int] = option(
        None, "ranks on this machine; null: every visible GPU, or 2 CPU ranks for a distributed strategy"
    )
    threads_per_process: Optional[int] = option(
        None, "CPU threads of each rank; null: an exported OMP_NUM_THREADS, else cores / ranks"
    )


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    # Any, because each choice of the group brings its own keys: see method_schema.py.
    method: Any = MISSING
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    name: str = option(
        SI("${model.name}-${short:${data.names.0}}-${method.name}-${strategy.name}"),
        "run folder in output_root, one plain name",
    )
    output_root: str = option("runs", "folder that holds run folders")
    offline: bool = option(False, "never use the network: what is not on this machine already is an error")
    resume: Resume = option(Resume.never, "auto continues this run if it was begun; must fails when there is none")
    resume_allow: list[str] = option(
        [],
        "what may differ when a run continues: data, model, adapter, batch, or keys of settings; also typed as "
        "resume.allow=[...]",
    )
    trust: bool = option(
        False, "continue a run that somebody else made, also where its checkpoint would run code that it brings"
    )
    imports: list[str] = option(
        [], "Python modules of yours that add methods, formats, metrics, templates or callbacks: docs/extending.md"
    )
    automatic: list[str] = option([], "the settings that were `auto`, which tunewright has chosen and may choose anew")
    overwrite: bool = option(False, "move what the run made before to OUTPUT_ROOT/.trash and start anew")


GROUPS = ("model", "data", "method", "strategy", "train", "cluster", "experiment")


def help_of(cls: type) -> dict[str, tuple[str, str, Any]]:
    """Return {key: (type, help, default)} of a configuration class."""
    hints = get_type_hints(cls)
    table = {}
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            continue
        kind = hints[item.name]
        shown = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        default = item.default_factory() if callable(item.default_factory) else item.default
        table[item.name] = (shown.replace("typing.", ""), item.metadata.get("help", ""), default)
    return table
