"""The settings of each tuning method: what `method=NAME` brings; plan/method_rules.py tells what cannot work."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from tunewright.config.schema import option


class LoraInit(Enum):
    """First values of LoRA's weights; the names are PEFT's."""

    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    pissa_niter_16 = "pissa_niter_16"


class QuantType(Enum):
    """4-bit formats of bitsandbytes."""

    nf4 = "nf4"
    fp4 = "fp4"


class ComputeDtype(Enum):
    """Number format in which 4-bit layers multiply."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class PromptEncoder(Enum):
    """The network that makes P-tuning's virtual tokens."""

    mlp = "mlp"
    lstm = "lstm"


@dataclass
class MethodConfig:
    name: str = MISSING


@dataclass
class FullConfig(MethodConfig):
    name: str = option("full", "every weight is trained")


@dataclass
class FreezeConfig(MethodConfig):
    name: str = option("freeze", "some layers are trained whole, the rest is frozen")
    layers: int = option(2, "train the last n layers; -n: the first n; 0: none, only extra_modules")
    modules: list[str] = option([], "train only these modules of the layers, for example [mlp]; empty: all of them")
    extra_modules: list[str] = option([], "train these outside the layers too, for example [embed_tokens,norm,lm_head]")


@dataclass
class LoraConfig(MethodConfig):
    name: str = option("lora", "low-rank adapters on frozen weights")
    r: int = option(16, "rank: higher learns more and costs more")
    alpha: float = option(32, "scale of the adapter's output is alpha / r")
    dropout: float = option(0.0, "share of adapter inputs dropped while training")
    target_modules: Any = option("all-linear", "`all-linear` or a list of module names")
    modules_to_save: list[str] = option([], "train these whole beside the adapters, for example [embed_tokens,lm_head]")
    rslora: bool = option(False, "scale by alpha / sqrt(r) (rsLoRA): for high ranks")
    dora: bool = option(False, "learn the weights' magnitude apart from their direction (DoRA)")
    init: LoraInit = option(
        LoraInit.default, "first values: default, gaussian, pissa (the base's main components), pissa_niter_16 (faster)"
    )
    loraplus_ratio: Optional[float] = option(None, "learning rate of B / learning rate of A (LoRA+), for example 16")
    adapter: Optional[str] = option(
        None, "go on training this adapter: its folder, or a finished run; it brings r etc."
    )


@dataclass
class QLoraConfig(LoraConfig):
    name: str = option("qlora", "LoRA on a base quantised to 4 or 8 bits by bitsandbytes")
    bits: int = option(4, "4 or 8")
    quant_type: QuantType = option(QuantType.nf4, "nf4 or fp4, with 4 bits")
    double_quant: bool = option(True, "quantise the quantisation constants too, with 4 bits")
    compute_dtype: ComputeDtype = option(
        ComputeDtype.auto, "format of the 4-bit layers' matmuls; auto: the model's; float16 for GPUs without bfloat16"
    )


@dataclass
class PromptTuningConfig(MethodConfig):
    name: str = option("prompt_tuning", "virtual tokens before every row are learnt, the model is frozen")
    virtual_tokens: int = option(20, "how many; they count towards data.cutoff_len")
    init_text: Optional[str] = option(
        None, "begin with this text's embeddings (a hard prompt); null: random (a soft one)"
    )


@dataclass
class PTuningConfig(MethodConfig):
    name: str = option("p_tuning", "virtual tokens that a small network makes are learnt")
    virtual_tokens: int = option(20, "how many; they count towards data.cutoff_len")
    encoder: PromptEncoder = option(PromptEncoder.mlp, "the network: mlp or lstm")
    hidden_size: Optional[int] = option(None, "its width; null: the model's hidden size")


@dataclass
class PrefixTuningConfig(MethodConfig):
    name: str = option("prefix_tuning", "keys and values before every row are learnt in every layer")
    virtual_tokens: int = option(20, "how many; they count towards data.cutoff_len")
    projection: bool = option(False, "make them with a small network")
    hidden_size: Optional[int] = option(None, "its width; null: the model's hidden size")


@dataclass
class Ia3Config(MethodConfig):
    name: str = option("ia3", "one learnt factor for each output of keys and values and each input of the MLP's end")
    target_modules: Any = option("auto", "`auto` (what PEFT knows for the architecture) or a list of module names")
    feedforward_modules: list[str] = option([], "those of target_modules whose inputs are scaled, not their outputs")


METHODS: dict[str, type[MethodConfig]] = {
    "full": FullConfig,
    "freeze": FreezeConfig,
    "lora": LoraConfig,
    "qlora": QLoraConfig,
    "prompt_tuning": PromptTuningConfig,
    "p_tuning": PTuningConfig,
    "prefix_tuning": PrefixTuningConfig,
    "ia3": Ia3Config,
}
# They put virtual tokens before a row, so rows cannot lie end to end.
PROMPT_LEARNING = ("prompt_tuning", "p_tuning", "prefix_tuning")
