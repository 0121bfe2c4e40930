"""The answers of several models to the same held-out questions, and what their scores do not say by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.deliver.run_record import Run, run_labels
from tunewright.deliver.scores import CONFIDENCE, score_text, told_apart

Question = tuple[str, str]  # prompt, expected answer
MARKS = {True: "✓", False: "✗"}


@dataclass(frozen=True)
class AnswerColumn:
    """The answers one model (a base model or a tuned run) gave, by (prompt, expected)."""

    header: str
    answers: Mapping[Question, str]

    def judged(self, question: Question) -> tuple[str, bool] | None:
        """Return the answer and whether it is right, or None when this model was not asked."""
        answer = self.answers.get(question)
        return None if answer is None else (answer, is_correct(answer, question[1]))


@dataclass(frozen=True)
class HeldOutAnswers:
    """Held-out questions and the answers of every model, ready to be laid out side by side."""

    questions: tuple[Question, ...]
    columns: tuple[AnswerColumn, ...]
    available: int


def is_correct(answer: str, expected: str) -> bool:
    """Exact match, forgiving only surrounding white space."""
    return answer.strip() == expected.strip()


def held_out_answers(runs: Sequence[Run], limit: int) -> HeldOutAnswers:
    """Line up the held-out answers of all runs for up to ``limit`` questions.

    Questions that every run answered come first: they are the ones that can be compared.
    """
    rows = [_evaluation_rows(run) for run in runs]
    counts = Counter(question for answered in rows for question in answered)
    questions = tuple(sorted(counts, key=lambda question: -counts[question])[:limit])
    labelled = [(label, answered) for label, answered in zip(run_labels(runs), rows, strict=True) if answered]
    tuned = [_answer_column(label, answered, "tuned") for label, answered in labelled]
    return HeldOutAnswers(questions, tuple(_base_columns(labelled, questions) + tuned), len(counts))


def score_notes(runs: Sequence[Run]) -> list[str]:
    """Say what the shares of right answers of several runs do not say by themselves, one sentence each."""
    asked = [(label, rows) for label, run in zip(run_labels(runs), runs, strict=True) if (rows := _right_answers(run))]
    if len(asked) < 2:
        return []
    shared = set.intersection(*(set(rows) for _, rows in asked))
    notes = []
    if any(set(rows) != shared for _, rows in asked):
        counts = ", ".join(f"{label} {len(rows)}" for label, rows in asked)
        notes.append(f"The runs were not asked the same held-out rows ({counts}): their shares do not compare.")
        if not shared:
            return notes
        on_shared = (f"{label} {score_text(sum(rows[row] for row in shared), len(shared))}" for label, rows in asked)
        notes.append(f"On the {len(shared)} rows that all were asked, exact match after: {', '.join(on_shared)}.")
    ranked = sorted(asked, key=lambda one: -sum(one[1][row] for row in shared))
    best, best_rows = ranked[0]
    alike = [
        label for label, rows in ranked[1:] if not told_apart([(best_rows[row], rows[row]) for row in sorted(shared)])
    ]
    if alike:
        names = f"{', '.join(alike[:6])}{' and others' if len(alike) > 6 else ''}"
        notes.append(
            f"{len(shared)} rows do not tell {names} from the best, {best} (McNemar's exact test, {CONFIDENCE:.0%})."
        )
    return notes


def _right_answers(run: Run) -> dict[tuple[str, str, int], bool]:
    """Return whether the tuned model answered each held-out row right; the number tells rows that are alike apart."""
    right: dict[tuple[str, str, int], bool] = {}
    times: Counter[Question] = Counter()
    for question, row in _asked(run):
        if row.get("tuned") is not None:
            times[question] += 1
            right[(question[0], question[1], times[question])] = is_correct(str(row["tuned"]), question[1])
    return right


def _evaluation_rows(run: Run) -> dict[Question, Mapping[str, Any]]:
    """Return the evaluation rows of a run by question, the first of any repeats."""
    answered: dict[Question, Mapping[str, Any]] = {}
    for question, row in _asked(run):
        answered.setdefault(question, row)
    return answered


def _asked(run: Run) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    rows = run.evaluation.get("rows")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and "prompt" in row:
            yield (str(row["prompt"]), str(row.get("expected", ""))), row


def _answer_column(header: str, answered: Mapping[Question, Mapping[str, Any]], key: str) -> AnswerColumn:
    answers = {question: str(row[key]) for question, row in answered.items() if row.get(key) is not None}
    return AnswerColumn(header, answers)


def _base_columns(
    labelled: Sequence[tuple[str, Mapping[Question, Mapping[str, Any]]]],
    questions: Sequence[Question],
) -> list[AnswerColumn]:
    """Return one column for the base model, or one per run when the runs' base answers differ."""
    columns = [_answer_column(f"base of {label}", answered, "base") for label, answered in labelled]
    columns = [column for column in columns if column.answers]
    merged: dict[Question, str] = {}
    for column in columns:
        for question in questions:
            answer = column.answers.get(question)
            if answer is not None and merged.setdefault(question, answer) != answer:
                return columns
    return [AnswerColumn("base", merged)] if merged else []
