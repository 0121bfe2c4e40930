"""Does a merged model say what base and adapter say? Logits of the two on real rows, one model in memory at a time."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from tunewright.errors import StorageError
from tunewright.trainer.data.token_cache import TokenCache
from tunewright.trainer.model.load import load_model

ROWS = 16
LENGTH = 256  # tokens of a row; its last ones, where the answer is
POSITIONS = 32  # of each row, whose logits are kept: with 150,000 tokens in the vocabulary, 300 MB for 16 rows


@dataclass(frozen=True)
class Outputs:
    """What a model says on the rows."""

    logits: list[torch.Tensor]  # (P, V) float32 for each row, P <= POSITIONS, each position centred on its mean
    loss: float  # mean over the tokens that are learnt


@dataclass(frozen=True)
class Comparison:
    """How far a merged model is from its base and adapter, and how far the adapter is from the base."""

    rows: int
    difference: float  # root mean square of (merged - adapter), as a part of the adapter's root mean square
    largest: float  # of any logit
    effect: float  # the same as `difference`, of (base - adapter)
    adapter_loss: float
    merged_loss: float


def pick_rows(cache: TokenCache) -> list[dict[str, torch.Tensor]]:
    """Return up to ROWS rows with `input_ids` and `labels`, each (1, T): held out ones if there are any."""
    held_out = cache.open("eval")
    rows: Any = held_out if held_out is not None else cache.open("train")
    numbers = range(0, len(rows), max(1, len(rows) // ROWS))[:ROWS]
    return [
        {key: torch.tensor([rows[number][key][-LENGTH:]], dtype=torch.long) for key in ("input_ids", "labels")}
        for number in numbers
    ]


class Reference:
    """What base and adapter say on the rows, and how far a merged model is from it."""

    def __init__(
        self,
        config: DictConfig,
        model_path: Path,
        adapter: Path,
        rows: list[dict[str, torch.Tensor]],
        dtype: torch.dtype,
    ) -> None:
        """Load base and adapter, keep what they say, and let go of them."""
        from peft import PeftModel

        self.config, self.rows, self.dtype = config, rows, dtype
        device = _device(model_path)
        base = load_model(model_path, config.model, dtype)
        known = {id(parameter) for parameter in base.parameters()}
        adapted = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False, torch_device="cpu")
        for parameter in adapted.parameters():
            if id(parameter) not in known:
                parameter.data = parameter.data.to(dtype)
        # The base is in its format already, and not all of it in `dtype`: rotary frequencies lose by being rounded.
        adapted.to(device).eval()
        self.adapter = _outputs(adapted, rows, device)
        with adapted.disable_adapter():
            self.base = _outputs(adapted, rows, device)

    def compare(self, merged: Path) -> Comparison:
        """Load the merged model and compare it.

        Raises:
            StorageError: it cannot be loaded.
        """
        device = _device(merged)
        try:
            model: Any = load_model(merged, self.config.model, self.dtype)
        except Exception as error:  # what was just written is on trial: whatever stops it is the answer
            raise StorageError(f"The merged model cannot be loaded: {error}") from error
        outputs = _outputs(model.to(device).eval(), self.rows, device)
        pairs = list(zip(outputs.logits, self.adapter.logits, strict=True))
        return Comparison(
            rows=len(self.rows),
            difference=_relative(outputs.logits, self.adapter.logits),
            largest=max(float((one - other).abs().max()) for one, other in pairs),
            effect=_relative(self.base.logits, self.adapter.logits),
            adapter_loss=self.adapter.loss,
            merged_loss=outputs.loss,
        )


def _device(folder: Path) -> torch.device:
    """Return the GPU when a model of these files fits, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    gc.collect()
    torch.cuda.empty_cache()
    return torch.device("cuda" if size * 1.3 < torch.cuda.mem_get_info()[0] else "cpu")


@torch.no_grad()
def _outputs(model: Any, rows: list[dict[str, torch.Tensor]], device: torch.device) -> Outputs:
    logits, losses, count = [], 0.0, 0
    for row in rows:
        said = model(input_ids=row["input_ids"].to(device), use_cache=False).logits[0].float()  # (T, V)
        labels = row["labels"][0, 1:].to(device)
        losses += float(torch.nn.functional.cross_entropy(said[:-1], labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
        positions = torch.linspace(0, len(said) - 1, min(POSITIONS, len(said)), device=device).round().long()
        kept = said[positions]
        # What is added to all logits of a position changes no probability.
        logits.append((kept - kept.mean(-1, keepdim=True)).cpu())
    return Outputs(logits, losses / count if count else float("nan"))


def _relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    squares = sum(float((one - other).square().sum()) for one, other in zip(found, expected, strict=True))
    whole = sum(float(one.square().sum()) for one in expected)
    return float((squares / max(whole, 1e-30)) ** 0.5)
