"""Held-out exact match, before and after tuning, from a fresh process that loads what the run saved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from tunewright.deliver.generate import Answerer, open_run, weights_of
from tunewright.deliver.scores import score_text, wilson
from tunewright.errors import ConfigError, DataError
from tunewright.files import write_json
from tunewright.plugins import PLUGINS
from tunewright.run_folder import RunDir
from tunewright.terminal import Progress
from tunewright.trainer.data.formats import Conversation, Plain, to_conversation
from tunewright.trainer.data.messages import Unusable
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.token_cache import TokenCache
from tunewright.trainer.inputs import check_base, other_held_out
from tunewright.trainer.prepared import prepare

BATCH = 16
Metric = Callable[[str, str], float]  # (answer, expected)
SPARE_TOKENS = 8  # an answer may be this much longer than the longest expected one before it is cut


@dataclass(frozen=True)
class Question:
    """A held-out row: what the model is asked, and the answer that is expected."""

    source: Conversation | Plain

    @property
    def asks(self) -> bool:
        """Whether there is anything before the answer: plain text may be all answer."""
        return bool(self.source.prompt.strip() if isinstance(self.source, Plain) else self.source.question)

    @property
    def text(self) -> str:
        """What the user says last."""
        if isinstance(self.source, Plain):
            return self.source.prompt
        return str(self.source.question[-1]["content"])

    @property
    def expected(self) -> str:
        return self.source.answer.strip()

    def prompt(self, renderer: Renderer) -> str:
        if isinstance(self.source, Plain):
            return self.source.prompt
        return renderer.prompt(self.source.question, self.source.tools)


@dataclass(frozen=True)
class Asked:
    """What a model is given: it decides the answers, together with the weights."""

    prompts: tuple[str, ...]
    max_new_tokens: int
    stops: tuple[int, ...]

    @classmethod
    def of(cls, questions: list[Question], answerer: Answerer) -> Asked:
        longest = max(len(answerer.tokenizer(question.expected)["input_ids"]) for question in questions)
        prompts = tuple(question.prompt(answerer.renderer) for question in questions)
        return cls(prompts, longest + SPARE_TOKENS, tuple(answerer.stops))


def evaluate_runs(
    paths: list[Path],
    examples: int | None = None,
    say: Callable[[str], None] = print,
    *,
    trusted: bool = False,
    metrics: Mapping[str, Metric] | None = None,
) -> list[dict[str, Any]]:
    """Write evaluation.json into each run, and return what is in them: how often the base and the tuned model give the
    expected answer, and the mean of each of the `metrics` and of the plug-ins' ones.

    With `examples` fewer than a run holds out, evaluation-N.json takes what the first N rows gave, and a result on all
    of them stays. Runs on the same base model share one copy of its weights, and its answers where they ask the same.

    Raises:
        ConfigError: a folder is not a finished run, or one that is not `trusted`, see `open_run`; or its base model is
            another one now.
        DataError: a run holds out no rows, or none that asks anything.
    """
    if examples is not None and examples < 1:
        raise ConfigError(f"`--examples` is {examples}: write a whole number from 1, or leave it out for all rows.")
    runs = [open_run(path, trusted=trusted) for path in paths]
    known = {**PLUGINS.metrics, **(metrics or {})}
    weights: Any = None
    loaded: tuple[Any, ...] = ()
    base_answers: dict[tuple[Any, ...], list[str]] = {}
    evaluations = []
    for run, config in runs:
        prepared = prepare(config, lambda line: None)
        check_base(run, prepared.model_path)
        if remark := other_held_out(run, config, prepared):
            say(remark)
        questions = held_out(prepared.cache, examples)
        wanted = weights_of(config, prepared.model_path)
        if wanted != loaded:
            weights = None  # before the next one is loaded: two may not fit
        answerer = Answerer(config, prepared.model_path, weights)
        asked = Asked.of(questions, answerer)
        if (wanted, asked) not in base_answers:
            base_answers[wanted, asked] = _answers(answerer, asked, "base model", say)
        with answerer.tuned(run):
            tuned = _answers(answerer, asked, run.path.name, say)
        weights, loaded = answerer.model, wanted
        del answerer  # which would keep the weights while the next ones are loaded
        evaluation = _scored(questions, count_held_out(prepared.cache), base_answers[wanted, asked], tuned, known)
        _write(run, evaluation, say)
        evaluations.append(evaluation)
    return evaluations


def count_held_out(cache: TokenCache) -> int:
    """Return how many rows a configuration holds out."""
    return sum(len(set(cached.part.rows[chosen].tolist())) for cached, chosen in cache.chosen("eval"))


def held_out(cache: TokenCache, examples: int | None) -> list[Question]:
    """Return the evaluation rows of a configuration as questions, or the first `examples` of them.

    Raises:
        DataError: there are none, or none has a question: of plain text there is nothing to answer.
    """
    questions: list[Question] = []
    rows = 0
    for cached, chosen in cache.chosen("eval"):
        wanted = set(cached.part.rows[chosen].tolist())
        for number, row in enumerate(cached.rows if wanted else ()):
            if number in wanted:
                try:
                    question = Question(to_conversation(row, cached.rows.entry))
                except Unusable as error:  # its tokens are in the cache, so it was usable
                    raise DataError(f"{cached.name}, row {number} has changed: {error}.") from error
                rows += 1
                if question.asks:
                    questions.append(question)
            if len(questions) == examples:
                return questions
    if rows and not questions:
        raise DataError(
            "The held-out rows of this run are plain text without a question: there is no answer to compare. "
            "`tunewright compare` shows their loss."
        )
    if not questions:
        raise DataError("The run holds out no rows: set `data.eval_names`, `data.eval_split` or `data.eval_size`.")
    return questions


def _answers(answerer: Answerer, asked: Asked, name: str, say: Callable[[str], None]) -> list[str]:
    # Prompts of one length next to each other: less padding.
    order = sorted(range(len(asked.prompts)), key=lambda index: len(asked.prompts[index]))
    answers = [""] * len(order)
    with Progress(say, sys.stdout, leave=False) as progress:
        for start in range(0, len(order), BATCH):
            progress.update(f"{name}: answers", start, len(order))
            batch = order[start : start + BATCH]
            given = answerer.answer([asked.prompts[index] for index in batch], asked.max_new_tokens)
            for index, text in zip(batch, given, strict=True):
                answers[index] = text
    return answers


def _scored(
    questions: list[Question], available: int, base: list[str], tuned: list[str], metrics: Mapping[str, Metric]
) -> dict[str, Any]:
    """Return what evaluation.json holds."""
    rows = [
        {"prompt": question.text, "expected": question.expected, "base": before, "tuned": after}
        for question, before, after in zip(questions, base, tuned, strict=True)
    ]
    scores: dict[str, dict[str, Any]] = {}
    for key in ("base", "tuned"):
        right = sum(row[key] == row["expected"] for row in rows)
        scores[key] = {"exact_match": right / len(rows), "interval_95": wilson(right, len(rows))}
        if metrics:
            pairs = [(row[key], row["expected"]) for row in rows]
            scores[key]["metrics"] = {name: _mean(name, score, pairs) for name, score in metrics.items()}
    return {"examples": len(rows), "held_out": available, **scores, "rows": rows}


def _mean(name: str, score: Metric, pairs: list[tuple[str, str]]) -> float:
    try:
        mean = fmean(float(score(answer, expected)) for answer, expected in pairs)
    except Exception as error:  # somebody else's code
        raise ConfigError(f"The metric '{name}' failed: {type(error).__name__}: {error}.") from error
    if not isfinite(mean):  # nothing that JSON or a comparison has
        raise ConfigError(f"The metric '{name}' is {mean} on average: it has to return a finite number for each row.")
    return mean


def _write(run: RunDir, evaluation: dict[str, Any], say: Callable[[str], None]) -> None:
    rows, available = evaluation["examples"], evaluation["held_out"]
    whole = rows == available
    file = run.evaluation if whole else run.partial_evaluation(rows)
    write_json(file, evaluation)
    base, tuned = evaluation["base"], evaluation["tuned"]
    before, after = (score_text(round(one["exact_match"] * rows), rows) for one in (base, tuned))
    part = "" if whole else f", the first of {available} held-out rows: {file.name}"
    say(f"  {run.path.name}: exact match {before} before, {after} after, on {rows} rows{part}")
    for name, value in tuned.get("metrics", {}).items():
        say(f"  {run.path.name}: {name} {base['metrics'][name]:.4g} before, {value:.4g} after")
