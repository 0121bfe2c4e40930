"""Held-out exact match, before and after tuning, from a fresh process that loads what the run saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.compose import load_config
from launch.errors import DataError
from launch.rundir import RunDir, write_json
from trainer.data.cache import TokenCache
from trainer.data.formats import Conversation, Plain, Unusable, to_conversation
from trainer.data.render import Renderer
from trainer.generate import Answerer, run_of
from trainer.prepare import prepare

BATCH = 16
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


def evaluate_runs(paths: list[Path], examples: int | None = None, say: Callable[[str], None] = print) -> None:
    """Write evaluation.json into each run: how often the base and the tuned model give the expected answer.

    Runs on the same base model share its answers and one copy of its weights.

    Raises:
        ConfigError: a folder is not a finished run.
        DataError: a run holds out no rows, or none that asks anything.
    """
    runs = [run_of(path) for path in paths]
    configs = [load_config(run.config) for run in runs]
    answerer, loaded, base_answers = None, None, {}
    for run, config in zip(runs, configs, strict=True):
        prepared = prepare(config, lambda line: None)
        questions, model_path = held_out(prepared.cache, examples), prepared.model_path
        base = (model_path, str(config.model.dtype), _quantization(config))
        if base != loaded:
            answerer, loaded = Answerer(config, model_path), base
        assert answerer is not None
        key = (base, tuple((question.text, question.expected) for question in questions))
        if key not in base_answers:
            base_answers[key] = _answers(answerer, questions, "base model", say)
        with answerer.tuned(run):
            tuned = _answers(answerer, questions, run.path.name, say)
        _write(run, questions, base_answers[key], tuned, say)


def held_out(cache: TokenCache, examples: int | None) -> list[Question]:
    """Return the evaluation rows of a configuration as questions.

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


def _quantization(config: DictConfig) -> tuple[Any, ...]:
    method = config.method
    return (method.bits, method.quant_type, method.double_quant, method.compute_dtype) if method.name == "qlora" else ()


def _answers(answerer: Answerer, questions: list[Question], name: str, say: Callable[[str], None]) -> list[str]:
    longest = max(len(answerer.tokenizer(question.expected)["input_ids"]) for question in questions)
    # Prompts of one length next to each other: less padding.
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].text))
    answers = [""] * len(questions)
    started = last = time.monotonic()
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        given = answerer.answer([questions[index].prompt(answerer.renderer) for index in batch], longest + SPARE_TOKENS)
        for index, text in zip(batch, given, strict=True):
            answers[index] = text
        now, done = time.monotonic(), start + len(batch)
        if now - last > 5:
            last = now
            say(f"  {name}: {done} of {len(order)} answers, {(now - started) / done * (len(order) - done):.0f} s left")
    return answers


def _write(
    run: RunDir, questions: list[Question], base: list[str], tuned: list[str], say: Callable[[str], None]
) -> None:
    rows = [
        {"prompt": question.text, "expected": question.expected, "base": before, "tuned": after}
        for question, before, after in zip(questions, base, tuned, strict=True)
    ]
    share = {key: sum(row[key] == row["expected"] for row in rows) / len(rows) for key in ("base", "tuned")}
    write_json(
        run.evaluation,
        {
            "examples": len(rows),
            "base": {"exact_match": share["base"]},
            "tuned": {"exact_match": share["tuned"]},
            "rows": rows,
        },
    )
    say(f"  {run.path.name}: exact match {share['base']:.1%} before, {share['tuned']:.1%} after, on {len(rows)} rows")
