"""What is in the tokens of a configuration: `tunewright data check` as data, as text and as JSON.

Everything comes from the token cache, as arrays: no row is rendered again, and a report on 100,000 rows takes seconds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from tunewright.plan.batch_plan import BatchPlan, Steps, planned_steps
from tunewright.plan.method_rules import longest_row
from tunewright.trainer.data.formats import OLDER_TOOLS
from tunewright.trainer.data.minhash import PERMUTATIONS, similar_pairs
from tunewright.trainer.data.token_cache import SAMPLE, SPLITS, CachedDataset, TokenCache, epoch_size
from tunewright.trainer.model.config_json import model_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (5, 25, 50, 75, 95, 99)
SHORT = 3  # characters: an answer with fewer is pointed out
LISTED = 1000  # rows and pairs of one kind that a report holds; all are counted
LONGEST = 5  # longest examples that are named
LANGUAGE_ROWS = 200  # examples whose language is guessed
LANGUAGE_TOKENS = 1000  # of each of them, from the beginning
LEAST_TEXT = 20  # characters: what is shorter is guessed wrongly too often
BARS = 30


@dataclass(frozen=True)
class Found:
    """Rows that have something in common: how many there are, and the numbers of the first `LISTED` of them."""

    count: int
    rows: list[int]


@dataclass(frozen=True)
class Dropped:
    """Rows that cannot be used for one reason, and the beginning of the first of them as JSON."""

    reason: str
    count: int
    rows: list[int]
    excerpt: str


@dataclass(frozen=True)
class Pair:
    """A row and the other row that it repeats, which comes earlier or is a training row."""

    dataset: str
    row: int
    other_dataset: str
    other_row: int


@dataclass(frozen=True)
class Repeats:
    """Rows that repeat another: how many there are, and the first `LISTED` of them."""

    count: int
    pairs: list[Pair]


@dataclass(frozen=True)
class Languages:
    """Languages of what is learnt: `classified` of `sampled` examples were long enough to guess."""

    sampled: int
    classified: int
    shares: dict[str, float]  # ISO 639 code, or "JSON" -> share of the classified, largest first


@dataclass(frozen=True)
class Histogram:
    """Counts (bars,) between edges (bars + 1,), and how many values lie above the last edge."""

    edges: list[float]
    counts: list[int]
    above: int


@dataclass(frozen=True)
class DatasetReport:
    """One dataset, all rows of it that were read. An example is what the model sees at once: mostly, a row is one."""

    name: str
    split: str  # "train" for `data.names`, "eval" for `data.eval_names` and `data.eval_split`
    read: int
    kept: int
    examples: int
    tokens: int
    scored: int  # tokens that are learnt
    dropped: list[Dropped]
    truncated: Found
    lengths: dict[str, int]  # percentiles and max of the tokens of an example; empty when nothing was kept
    longest: list[tuple[int, int]]  # (row, tokens)
    exact: Repeats
    near: Repeats
    short: Found
    unended: Found
    special: Found
    specials: dict[str, int]  # special token's string that is learnt as text -> rows
    beyond: Found  # longer than the model has positions
    unread: dict[str, int]  # key of a turn that nobody reads -> rows
    unread_columns: list[str]
    languages: Languages
    length_histogram: Histogram
    trained_histogram: Histogram  # of the share of a row's tokens that is learnt
    answer_histogram: Histogram  # of the characters of a row's last answer


@dataclass(frozen=True)
class Overlap:
    """Held-out rows that are known from training; each is counted once, under the first that is true of it."""

    rows: int  # held out
    same: Repeats
    question: Repeats  # the same conversation up to the last answer, which differs
    near: Repeats


@dataclass(frozen=True)
class Split:
    """What is used of all datasets together, after sampling, splitting and mixing."""

    examples: int
    tokens: int
    scored: int


@dataclass(frozen=True)
class Report:
    """Everything that `tunewright data check` says."""

    model: str
    cutoff_len: int
    positions: int | None  # that the model knows, where its configuration says it
    sample: int | None  # rows looked at of each streamed dataset
    datasets: list[DatasetReport]
    splits: dict[str, Split]
    overlap: Overlap | None  # None when nothing is held out
    steps: Steps


# ---- making it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Kept rows of several datasets behind one another."""

    names: list[str]
    dataset: np.ndarray  # (rows,) index into names
    row: np.ndarray  # (rows,) number in its dataset
    digest: np.ndarray  # (rows,) uint64
    question: np.ndarray  # (rows,) uint64
    sketch: np.ndarray  # (rows, PERMUTATIONS) uint32

    def repeats(self, rows: np.ndarray, others: np.ndarray, of: _Group | None = None) -> Repeats:
        """Name positions (n,) of this group and positions (n,) of another, by default of this one too."""
        of = of or self
        pairs = zip(rows[:LISTED].tolist(), others[:LISTED].tolist(), strict=True)
        named = [Pair(*self._place(row), *of._place(other)) for row, other in pairs]
        return Repeats(len(rows), named)

    def _place(self, position: int) -> tuple[str, int]:
        return self.names[self.dataset[position]], int(self.row[position])


def make_report(cache: TokenCache, config: DictConfig, plan: BatchPlan, tokenizer: PreTrainedTokenizerBase) -> Report:
    """Look at everything in the cache of a configuration.

    Raises:
        ConfigError, DataError: the rows cannot be split or mixed as the configuration asks for, see `select`.
    """
    counts = {split: Split(*cache.counts(split)) for split in SPLITS}
    known = known_positions(model_numbers(config))
    positions = known - int(config.method.get("virtual_tokens", 0)) if known else None
    reports = []
    for split, datasets in (("train", cache.train), ("eval", cache.held_out)):
        tables = [_table(cached) for cached in datasets]
        kept = [np.flatnonzero(table["reason"] < 0) for table in tables]
        exact, near = _repeats(_stacked(datasets, tables, kept))
        for number, cached in enumerate(datasets):
            languages = _languages(cached, tokenizer)
            beyond = _beyond(cached, positions)
            reports.append(_of_dataset(cached, split, tables[number], exact[number], near[number], languages, beyond))
    return Report(
        model=config.model.name,
        cutoff_len=longest_row(config),
        positions=known,
        sample=SAMPLE if config.data.streaming else None,
        datasets=reports,
        splits=counts,
        overlap=_overlap(_used(cache, "train"), _used(cache, "eval")) if counts["eval"].examples else None,
        steps=planned_steps(config, plan, *epoch_size(cache, config)),
    )


def _table(cached: CachedDataset) -> dict[str, np.ndarray]:
    """Return the columns of `tokenization.ROWS` as arrays (rows,), the sketches as (rows, PERMUTATIONS)."""
    table = cached.table()
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "sketch"}
    sketches = [
        np.frombuffer(chunk.buffers()[1], np.uint32).reshape(-1, PERMUTATIONS)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in table["sketch"].chunks
    ]
    columns["sketch"] = np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *sketches])
    return columns


def _label(cached: CachedDataset) -> str:
    """Return the dataset's name, with the split that `data.eval_split` or the registry picks of it."""
    entry = cached.rows.entry
    return f"{entry.name} ({entry.split})" if entry.split else entry.name


def _of_dataset(
    cached: CachedDataset,
    split: str,
    table: dict[str, np.ndarray],
    exact: Repeats,
    near: Repeats,
    languages: Languages,
    beyond: Found,
) -> DatasetReport:
    outcome, lengths = cached.outcome, cached.lengths()
    kept = table["reason"] < 0
    read = {*cached.rows.entry.columns.values(), OLDER_TOOLS}
    order = np.argsort(-lengths, kind="stable")[:LONGEST]
    figures = np.percentile(lengths, PERCENTILES, method="inverted_cdf") if len(lengths) else []
    percentiles = {f"{percent}%": int(figure) for percent, figure in zip(PERCENTILES, figures, strict=False)}
    return DatasetReport(
        name=_label(cached),
        split=split,
        read=outcome.read,
        kept=outcome.kept,
        examples=outcome.examples,
        tokens=outcome.tokens,
        scored=outcome.scored,
        dropped=[_dropped(cached, table["reason"], int(index)) for index in np.argsort(outcome.dropped)[::-1]],
        truncated=_found(table["truncated"] & kept),
        lengths={**percentiles, "max": int(lengths.max())} if len(lengths) else {},
        longest=[(int(cached.part.rows[index]), int(lengths[index])) for index in order],
        exact=exact,
        near=near,
        # Rows with an empty last answer are dropped, unless the answer is a tool call or is not learnt.
        short=_found((table["answer"] > 0) & (table["answer"] < SHORT) & kept),
        unended=_found(table["unended"] & kept),
        special=_found(table["special"] & kept),
        specials=outcome.specials,
        beyond=beyond,
        unread=outcome.unread,
        unread_columns=[name for name in outcome.columns if name not in read],
        languages=languages,
        length_histogram=_histogram(lengths),
        trained_histogram=_shares(table["scored"][kept] / np.maximum(table["tokens"][kept], 1)),
        answer_histogram=_histogram(table["answer"][kept]),
    )


def _found(mask: np.ndarray) -> Found:
    rows = np.flatnonzero(mask)
    return Found(len(rows), rows[:LISTED].tolist())


def known_positions(numbers: dict[str, Any]) -> int | None:
    """Return up to how many tokens a model was made for, from its config.json, or None where that does not say it."""
    numbers = numbers.get("text_config") or numbers
    known = numbers.get("max_position_embeddings")
    scaling = numbers.get("rope_parameters") or numbers.get("rope_scaling") or {}
    if not isinstance(known, int) or known < 1:
        return None
    original, factor = scaling.get("original_max_position_embeddings") or known, scaling.get("factor") or 1
    return max(known, int(original * factor))


def _beyond(cached: CachedDataset, positions: int | None) -> Found:
    rows = cached.part.rows[cached.lengths() > positions] if positions else cached.part.rows[:0]
    return Found(len(np.unique(rows)), np.unique(rows)[:LISTED].tolist())


def _dropped(cached: CachedDataset, reasons: np.ndarray, index: int) -> Dropped:
    outcome, found = cached.outcome, _found(reasons == index)
    return Dropped(outcome.reasons[index], found.count, found.rows, str(outcome.excerpts[index][0]["text"]))


def _histogram(values: np.ndarray) -> Histogram:
    """Bars of a whole width from the smallest value on; a long tail is counted and not drawn."""
    if not len(values):
        return Histogram([0, 1], [0], 0)
    low, high = int(values.min()), int(values.max())
    usual = int(np.percentile(values, 99, method="inverted_cdf"))
    end = high if high - low <= 2 * (usual - low) else usual
    width = max(1, math.ceil((end - low + 1) / BARS))
    edges = np.arange(low, end + 1 + width, width)
    counts, _ = np.histogram(values, np.append(edges[:-1], edges[-1] - 0.5))  # the last bar is half open as well
    return Histogram(edges.tolist(), counts.tolist(), int((values >= edges[-1]).sum()))


def _shares(values: np.ndarray) -> Histogram:
    counts, edges = np.histogram(values, 20, (0, 1))
    return Histogram(edges.round(2).tolist(), counts.tolist(), 0)


def _languages(cached: CachedDataset, tokenizer: PreTrainedTokenizerBase) -> Languages:
    """Guess the language of what is learnt in an evenly spaced sample of the examples."""
    import py3langid

    from tunewright.trainer.data.render import IGNORED

    count = len(cached.part.rows)
    chosen = np.unique(np.linspace(0, count - 1, min(count, LANGUAGE_ROWS)).astype(int))
    found: Counter[str] = Counter()
    for labels in cached.examples().with_format("numpy")[chosen]["labels"] if count else []:
        learnt = labels[labels != IGNORED][:LANGUAGE_TOKENS]
        text = str(tokenizer.decode(learnt.tolist(), skip_special_tokens=True)).strip()
        if len(text) >= LEAST_TEXT:
            found["JSON" if _is_json(text) else py3langid.classify(text)[0]] += 1
    shares = {code: times / found.total() for code, times in found.most_common()}
    return Languages(len(chosen), found.total(), shares)


def _is_json(text: str) -> bool:
    """Tell whether a text is a JSON object or list: its marks would be taken for Latin."""
    if text[0] not in "{[":
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _stacked(
    datasets: Sequence[CachedDataset], tables: Sequence[dict[str, np.ndarray]], rows: Sequence[np.ndarray]
) -> _Group:
    """Put the given rows of several datasets behind one another."""

    def joined(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(table[name][chosen] for table, chosen in zip(tables, rows, strict=True))])

    return _Group(
        names=[_label(cached) for cached in datasets],
        dataset=np.repeat(np.arange(len(rows)), [len(chosen) for chosen in rows]),
        row=np.concatenate([np.zeros(0, np.int64), *rows]),
        digest=joined("digest", np.zeros(0, np.uint64)),
        question=joined("question", np.zeros(0, np.uint64)),
        sketch=joined("sketch", np.zeros((0, PERMUTATIONS), np.uint32)),
    )


def _used(cache: TokenCache, split: str) -> _Group:
    """Return the rows that a split uses, each of them once."""
    chosen = cache.chosen(split)
    rows = [np.unique(cached.part.rows[examples]) for cached, examples in chosen]
    datasets = [cached for cached, _ in chosen]
    return _stacked(datasets, [_table(cached) for cached in datasets], rows)


def _repeats(group: _Group) -> tuple[list[Repeats], list[Repeats]]:
    """Return for each dataset of a group the rows that repeat an earlier one of any of them: exactly, and nearly."""
    _, first, which = np.unique(group.digest, return_index=True, return_inverse=True)
    earlier = first[which]
    exact = np.flatnonzero(earlier != np.arange(len(earlier)))
    single = np.sort(first)  # rows that are exact copies are not counted again
    pairs = np.array(similar_pairs(group.sketch[single]), np.int64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 1])]
    near, originals = single[pairs[:, 1]], single[pairs[:, 0]]

    def by_dataset(rows: np.ndarray, others: np.ndarray) -> list[Repeats]:
        owners = group.dataset[rows]
        return [group.repeats(rows[owners == number], others[owners == number]) for number in range(len(group.names))]

    return by_dataset(exact, earlier[exact]), by_dataset(near, originals)


def _overlap(train: _Group, held: _Group) -> Overlap:
    left = np.arange(len(held.row))
    found = []
    for learnt, asked in ((train.digest, held.digest), (train.question, held.question)):
        values, first = np.unique(learnt, return_index=True)
        if not len(values):
            break
        places = np.searchsorted(values, asked[left]).clip(max=len(values) - 1)
        known = values[places] == asked[left]
        found.append(held.repeats(left[known], first[places[known]], train))
        left = left[~known]
    rows, others = _near_training(train.sketch, held.sketch[left])
    none = Repeats(0, [])
    same, question = found or (none, none)
    return Overlap(len(held.row), same, question, held.repeats(left[rows], others, train))


def _near_training(train: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of held-out sketches and of the training sketches that they are like."""
    like = {later: earlier for earlier, later in similar_pairs(np.concatenate([train, held]))}
    rows, others = [], []
    for row in range(len(train), len(train) + len(held)):
        other = like.get(row)
        # A held-out row may be paired with another held-out row, which is like a training row in turn.
        while other is not None and other >= len(train):
            other = like.get(other)
        if other is not None:
            rows.append(row - len(train))
            others.append(other)
    return np.array(rows, np.int64), np.array(others, np.int64)
