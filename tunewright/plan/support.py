"""The support table: which method runs under which strategy, batch layout and device, and why the others do not.

One function decides, `support_of`. `rules.check` asks it about a configuration, `docs/methods.md` is written from it
(`python -m tunewright.plan.support`), and the tests train whatever it allows on this machine's kind of device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.deepspeed_file import deepspeed_file
from tunewright.config.method_schema import METHODS, PROMPT_LEARNING
from tunewright.config.schema import STRATEGIES, Launcher
from tunewright.plan.devices import Devices
from tunewright.plugins import PLUGINS

PARTITIONED = ("zero3", "zero3_offload", "zeropp")
DEVICES = ("cpu", "cuda", "rocm")
LAYOUTS = ("padding-free", "padded")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- table: python -m tunewright.plan.support -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Combination:
    """One combination of choices."""

    method: str
    bits: int  # of the frozen base: 16 (its own format), 8 or 4
    strategy: str
    layout: str
    device: str
    init: str = "default"  # of LoRA's weights


@dataclass(frozen=True)
class Support:
    """What becomes of a combination: it trains, it trains in another layout, or it is refused."""

    outcome: str  # "trains", "padded" or "refused"
    reason: str = ""


def combination_of(config: DictConfig, devices: Devices) -> Combination:
    """Return the combination of the support table that a configuration falls into."""
    method = config.method
    return Combination(
        method=method.name,
        bits=method.bits if method.name == "qlora" else 16,
        strategy=known_strategy(config),
        layout="padding-free" if config.train.padding_free else "padded",
        device=devices.kind,
        init=method.init.value if "init" in method else "default",
    )


def known_strategy(config: DictConfig) -> str:
    """Return the shipped strategy that runs: its DeepSpeed JSON decides, whatever the strategy is called."""
    launcher = config.strategy.launcher
    return deepspeed_file(config).strategy if launcher is Launcher.deepspeed else str(launcher.value)


def support_of(chosen: Combination) -> Support:
    """Return what becomes of a combination, with the reason and the way out where it is refused."""
    if chosen.strategy == "zeropp" and chosen.device != "cuda":
        found = "AMD GPUs" if chosen.device == "rocm" else "no GPU"
        return Support(
            "refused",
            f"`strategy=zeropp` needs NVIDIA GPUs: its quantised collectives are CUDA kernels, and this machine has "
            f"{found}. Use strategy=zero3.",
        )
    if chosen.bits < 16 and chosen.strategy in PARTITIONED:
        return Support(
            "refused",
            f"`method={chosen.method}` cannot run under `strategy={chosen.strategy}`: ZeRO-3 splits weights over the "
            f"ranks, and weights quantised to {chosen.bits} bits cannot be split, so each rank would hold them whole. "
            f"Use strategy=zero2 or strategy=ddp with method={chosen.method}, or method=lora with "
            f"strategy={chosen.strategy}.",
        )
    if chosen.init.startswith("pissa") and chosen.bits < 16:
        return Support(
            "refused",
            f"`method.init={chosen.init}` takes the main components out of the base weights, which a base quantised to "
            f"{chosen.bits} bits cannot give. Use method=lora, or method.init=default.",
        )
    if chosen.init.startswith("pissa") and chosen.strategy in PARTITIONED:
        return Support(
            "refused",
            f"`method.init={chosen.init}` takes the main components of whole weights, and under "
            f"`strategy={chosen.strategy}` no rank has them whole. Use strategy=zero2, or method.init=default.",
        )
    if (added := PLUGINS.methods.get(chosen.method)) and chosen.strategy not in added.strategies:
        return Support(
            "refused",
            f"`method={chosen.method}` does not train under `strategy={chosen.strategy}`, says the plug-in that adds "
            f"it. Use strategy={' or strategy='.join(added.strategies)}.",
        )
    if added and not added.padding_free and chosen.layout == "padding-free":
        return Support("padded", f"Padded batches: `method={chosen.method}` needs one row for each example.")
    if chosen.method in PROMPT_LEARNING and chosen.layout == "padding-free":
        return Support(
            "padded",
            f"Padded batches: `method={chosen.method}` puts virtual tokens before every row, which rows that lie end "
            f"to end would share, and their tokens would see each other.",
        )
    return Support("trains")


def combinations(device: str) -> Iterator[Combination]:
    """Yield every combination on a kind of device."""
    for method, strategy, layout in itertools.product(METHODS, STRATEGIES, LAYOUTS):
        for bits in (4, 8) if method == "qlora" else (16,):
            for init in ("default", "pissa") if method in ("lora", "qlora") else ("default",):
                yield Combination(method, bits, strategy, layout, device, init)


def table() -> str:
    """Return the table of every combination as Markdown, with the reasons below it."""
    signs = {"trains": "yes", "padded": "padded"}
    reasons: dict[str, int] = {}
    lines = [
        f"| method | {' | '.join(f'`{strategy}`' for strategy in STRATEGIES)} |",
        f"|---|{'---|' * len(STRATEGIES)}",
    ]
    for method, bits, init in dict.fromkeys((it.method, it.bits, it.init) for it in combinations("cpu")):
        shown = []
        for strategy in STRATEGIES:
            by_device = {
                device: [support_of(Combination(method, bits, strategy, layout, device, init)) for layout in LAYOUTS]
                for device in DEVICES
            }
            parts: dict[str, list[str]] = {}
            for device, (flat, _) in by_device.items():
                text = signs.get(flat.outcome) or f"no [{reasons.setdefault(_general(flat), len(reasons) + 1)}]"
                parts.setdefault(text, []).append(device)
            shown.append(
                next(iter(parts)) if len(parts) == 1 else "; ".join(f"{'/'.join(d)}: {t}" for t, d in parts.items())
            )
        lines.append(f"| {_name(method, bits, init)} | {' | '.join(shown)} |")
    numbered = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *numbered])


def _name(method: str, bits: int, init: str) -> str:
    extra = [f"{bits} bits"] * (bits < 16) + [f"init={init}"] * (init != "default")
    return f"`{method}`" + (f" ({', '.join(extra)})" if extra else "")


def _general(support: Support) -> str:
    """Return the reason without the particulars of one combination, so that alike ones share a number."""
    text = support.reason
    for strategy in PARTITIONED:
        text = text.replace(f"strategy={strategy}", "strategy=zero3")
    if "needs NVIDIA" in text:
        return "`zeropp` needs NVIDIA GPUs: its quantised collectives are CUDA kernels. Use `strategy=zero3`."
    return text.replace("8 bits", "4 bits")


def main() -> None:
    """Write the table into its document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCUMENT.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
