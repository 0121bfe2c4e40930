"""A plug-in with one extension of each kind: what docs/extending.md shows, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from tunewright import ConfigError
from tunewright.config.schema import option


@dataclass
class NormsConfig:
    final_only: bool = option(False, "train the last normalisation alone")


def check_norms(config: DictConfig) -> None:
    if config.train.learning_rate > 1e-1:
        raise ConfigError(f"`train.learning_rate` is {config.train.learning_rate}: normalisations take 1e-1 at most.")


def train_norms(model: Any, settings: NormsConfig) -> Any:
    model.requires_grad_(False)
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    for norm in norms[-1:] if settings.final_only else norms:
        norm.requires_grad_(True)
    return model


def read_qa(row: dict[str, Any], entry: Any) -> list[dict[str, str]]:
    question, reply = row[entry.columns["question"]], row[entry.columns["reply"]]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def overlap(answer: str, expected: str) -> float:
    said, wanted = set(answer.split()), set(expected.split())
    return len(said & wanted) / max(len(said | wanted), 1)


def smooth_cross_entropy(logits: Any, labels: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")


TEMPLATE = r"""
{%- for message in messages %}
{{- message['role'] + '> ' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"""


def make_stopper() -> Any:
    from transformers import TrainerCallback

    class StopAtLoss(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and logs.get("loss", 1.0) < 0.01:
                control.should_training_stop = True

    return StopAtLoss()


def register(plugins: Any) -> None:
    plugins.add_method(
        "norms", train_norms, settings=NormsConfig, check=check_norms, strategies=("single", "ddp", "zero2"),
        help="the normalisations' weights are trained",
    )  # fmt: skip
    plugins.add_format("qa", read_qa, columns={"question": "q", "reply": "a"})
    plugins.add_metric("overlap", overlap)
    plugins.add_template("arrows", TEMPLATE)
    plugins.add_callback("stop_at_loss", make_stopper)
    plugins.add_loss("smooth", smooth_cross_entropy)
