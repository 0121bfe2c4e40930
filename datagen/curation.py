"""Which replies of a log become rows, in the order of the cells. A pure function of log, settings, plan and sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tunewright.datagen.documents import Chunk
from tunewright.datagen.filtering import Filter, Rules
from tunewright.datagen.grid import Cell, cell, cell_count, sequential_cell
from tunewright.datagen.plan import Plan
from tunewright.datagen.prompts import score_prompt
from tunewright.datagen.replies import Row, row_of, score_of
from tunewright.datagen.reply_log import Record, ReplyLog
from tunewright.datagen.settings import DatagenConfig, Mode
from tunewright.trees import digest

REJECTS_SHOWN = 200  # kept for the preview


@dataclass(frozen=True)
class Rejected:
    """A reply that did not become a row."""

    reason: str
    text: str
    cell: str


@dataclass
class Curation:
    """Rows in the order of their cells, as far as the log goes without a gap.

    Whether a row is a near-copy depends on those before it, so the order is the cells' and not that of arrival: a run
    that was killed ends with the same rows as one that was not.
    """

    config: DatagenConfig
    plan: Plan
    chunks: Sequence[Chunk]
    rows: list[Row] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    rejected: list[Rejected] = field(default_factory=list)
    by_topic: dict[str, Counter[str]] = field(default_factory=dict)
    scores: Counter[int] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)  # raw replies that can be read, for the sequential mode
    replies: int = 0  # rows and rejects
    next: int = 0  # the first cell that has not been looked at

    def __post_init__(self) -> None:
        config = self.config
        self._cells: dict[int, Cell] = {}
        self._last = cell_count(config)
        rules = Rules(config.similarity, config.language, config.min_output, config.max_output)
        self._filter = Filter(rules)

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.config.examples

    def cell_at(self, index: int) -> Cell | None:
        """Return the cell of a number; in the sequential mode only the next one is known."""
        if index >= self._last:
            return None
        if self.config.mode is Mode.sequential:
            return sequential_cell(self.config, self.plan, index, self.shown)
        found = self._cells.get(index)
        if found is None:
            # Each is looked at when it is asked for and when its reply is: half the work.
            found = self._cells[index] = cell(self.config, self.plan, self.chunks, index)
        return found

    def advance(self, log: ReplyLog, *, gaps: bool = False) -> None:
        """Look at every further cell that the log is complete for, until there are rows enough.

        With `gaps` it goes past those that it is not complete for: for a run that cannot ask for them.
        """
        gaps = gaps and self.config.mode is not Mode.sequential
        while not self.full and (found := self.cell_at(self.next)) is not None:
            record = log.records.get(found.id)
            if record is not None and self._take(found, record, log):
                self.replies += 1
            elif not gaps:
                return
            self._cells.pop(self.next, None)
            self.next += 1

    def _take(self, found: Cell, record: Record, log: ReplyLog) -> bool:
        """Keep or reject the reply of a cell; false when its score is missing."""
        row = row_of(record, self.config.turns)
        score = None
        if not isinstance(row, str) and self.config.judge.threshold is not None:
            judged = log.records.get(score_id(self.config, self.plan, row))
            if judged is None:
                return False
            score = score_of(judged)
        if not isinstance(row, str):
            # Whatever the rules say of it, so that other rules need no other requests.
            self.shown.append(str(record["content"]))
        reason = self._reason(row, score)
        topic = self.by_topic.setdefault(found.topic, Counter(accepted=0, rejected=0))
        topic["rejected" if reason else "accepted"] += 1
        if reason or isinstance(row, str):
            self.rejects[str(reason)] += 1
            if len(self.rejected) < REJECTS_SHOWN:
                self.rejected.append(Rejected(str(reason), str(record.get("content") or record.get("error")), found.id))
            return True
        place = {**found.place, "score": score}
        self.rows.append({**row, **{key: value for key, value in place.items() if value}})
        return True

    def _reason(self, row: Row | str, score: int | None) -> str | None:
        if isinstance(row, str):
            return row
        threshold = self.config.judge.threshold
        if threshold is not None:
            if score is None:
                return "no score"
            self.scores[score] += 1
            if score < threshold:
                return f"score below {threshold}"
        return self._filter.take(row)

    def reasons(self, shown: int | None = None) -> str:
        named = [f"{reason} {count:,}" for reason, count in self.rejects.most_common(shown)] or ["none"]
        return ", ".join([*named, "..."] if len(self.rejects) > len(named) else named)


def score_id(config: DatagenConfig, plan: Plan, row: Row) -> str:
    """Return under which name the score of a row is logged."""
    return "score-" + digest([config.judge.model or config.model, score_prompt(config, plan, row)])
