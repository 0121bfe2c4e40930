"""What is in the tokens of a configuration: `tunewright data check` as data, as text and as JSON.

Everything comes from the token cache, as arrays: no row is rendered again, and a report on 100,000 rows takes seconds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from launch.batching import BatchPlan
from launch.compare import display_width
from trainer.data.cache import SAMPLE, SPLITS, CachedDataset, TokenCache
from trainer.data.similar import PERMUTATIONS, similar_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (5, 25, 50, 75, 95, 99)
SHORT = 3  # characters: an answer with fewer is pointed out
LISTED = 1000  # rows and pairs of one kind that a report holds; all are counted
SHOWN = 5  # of these, in the text
LONGEST = 5  # longest examples that are named
LANGUAGE_ROWS = 300  # examples whose language is guessed
LANGUAGE_TOKENS = 1000  # of each of them, from the beginning
LEAST_TEXT = 20  # characters: what is shorter is guessed wrongly too often
BARS = 30
NAME_WIDTH = 28  # terminal cells of a dataset's name in the text
REASONS_SHOWN = 5
ALL_WELL = "Nothing stands out: every row is used whole, and none repeats another."


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
class Steps:
    """Optimiser steps under this configuration."""

    total: int
    per_epoch: int | None  # None for a stream, whose length nobody knows
    epochs: float | None
    batch: str  # how the rows of a step are shared out


@dataclass(frozen=True)
class Report:
    """Everything that `tunewright data check` says."""

    model: str
    cutoff_len: int
    sample: int | None  # rows looked at of each streamed dataset
    datasets: list[DatasetReport]
    splits: dict[str, Split]
    overlap: Overlap | None  # None when nothing is held out
    steps: Steps


@dataclass(frozen=True)
class Remark:
    """Something to look at, in a line, with details below it."""

    text: str
    details: list[str]


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
    reports = []
    for split, datasets in (("train", cache.train), ("eval", cache.held_out)):
        tables = [_table(cached) for cached in datasets]
        kept = [np.flatnonzero(table["reason"] < 0) for table in tables]
        exact, near = _repeats(_stacked(datasets, tables, kept))
        for number, cached in enumerate(datasets):
            languages = _languages(cached, tokenizer)
            reports.append(_of_dataset(cached, split, tables[number], exact[number], near[number], languages))
    return Report(
        model=config.model.name,
        cutoff_len=config.data.cutoff_len,
        sample=SAMPLE if config.data.streaming else None,
        datasets=reports,
        splits=counts,
        overlap=_overlap(_used(cache, "train"), _used(cache, "eval")) if counts["eval"].examples else None,
        steps=_steps(config, plan, counts["train"].examples),
    )


def _table(cached: CachedDataset) -> dict[str, np.ndarray]:
    """Return the columns of `tokens.ROWS` as arrays (rows,), the sketches as (rows, PERMUTATIONS)."""
    table = cached.table()
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "sketch"}
    sketches = [
        np.frombuffer(chunk.buffers()[1], np.uint32).reshape(-1, PERMUTATIONS)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in table["sketch"].chunks
    ]
    columns["sketch"] = np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *sketches])
    return columns


def _lengths(cached: CachedDataset) -> np.ndarray:
    """Return the tokens of each example (examples,), without reading the tokens themselves."""
    import pyarrow.compute

    return np.asarray(pyarrow.compute.list_value_length(cached.examples().data.column("input_ids")), np.int64)


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
) -> DatasetReport:
    outcome, lengths = cached.outcome, _lengths(cached)
    kept = table["reason"] < 0
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
        languages=languages,
        length_histogram=_histogram(lengths),
        trained_histogram=_shares(table["scored"][kept] / np.maximum(table["tokens"][kept], 1)),
        answer_histogram=_histogram(table["answer"][kept]),
    )


def _found(mask: np.ndarray) -> Found:
    rows = np.flatnonzero(mask)
    return Found(len(rows), rows[:LISTED].tolist())


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

    from trainer.data.render import IGNORED

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


def _steps(config: DictConfig, plan: BatchPlan, examples: int) -> Steps:
    train = config.train
    if config.data.streaming:
        return Steps(int(train.max_steps), None, None, plan.describe())
    per_epoch = plan.steps_per_epoch(examples)
    if train.max_steps:
        epochs = train.max_steps / per_epoch if per_epoch else 0.0
        return Steps(int(train.max_steps), per_epoch, epochs, plan.describe())
    return Steps(math.ceil(per_epoch * train.epochs), per_epoch, float(train.epochs), plan.describe())


# ---- saying it ------------------------------------------------------------------------------------------------------


def remarks(report: Report) -> list[Remark]:
    """Return what should be looked at before training: what is lost first, then what is learnt or measured wrongly."""
    found = [remark for dataset in report.datasets for remark in _losses(dataset, report.cutoff_len)]
    if report.overlap:
        found += _overlap_remarks(report.overlap)
    return found + [remark for dataset in report.datasets for remark in _doubts(dataset)]


def _losses(dataset: DatasetReport, cutoff_len: int) -> list[Remark]:
    found = []
    if dataset.dropped:
        text = f"{_part(dataset, dataset.read - dataset.kept)} dropped, because they cannot be used"
        found.append(Remark(text, dropped_lines(dataset, REASONS_SHOWN)))
    if dataset.truncated.count:
        text = f"{_part(dataset, dataset.truncated.count)} cut, because they are longer than data.cutoff_len"
        found.append(Remark(f"{text} = {cutoff_len}", [_rows_text(dataset.truncated)]))
    return found


def dropped_lines(dataset: DatasetReport, reasons: int) -> list[str]:
    """Return two lines for each of the most frequent reasons of dropping rows: the row numbers, and one row."""
    lines = []
    for dropped in dataset.dropped[:reasons]:
        lines.append(f"{dropped.count:,}: {dropped.reason} ({_rows_text(Found(dropped.count, dropped.rows))})")
        lines.append(f"  {visible(dropped.excerpt)}")
    if len(dataset.dropped) > reasons:
        lines.append(f"and {len(dataset.dropped) - reasons} other reasons")
    return lines


def _overlap_remarks(overlap: Overlap) -> list[Remark]:
    kinds: list[tuple[Repeats, str, str]] = [
        (overlap.same, "also among the training rows, so they measure memory", "="),
        (overlap.question, "with the question of a training row and another answer", "asks like"),
        (overlap.near, "nearly the same as a training row", "~"),
    ]
    return [
        Remark(f"{found.count:,} of {overlap.rows:,} held-out rows {text}", [pairs_text(found, sign, both=True)])
        for found, text, sign in kinds
        if found.count
    ]


def _doubts(dataset: DatasetReport) -> list[Remark]:
    found = []
    if dataset.unended.count:
        text = f"{_part(dataset, dataset.unended.count)} without a stop token: they do not teach the model to stop"
        found.append(Remark(text, [_rows_text(dataset.unended)]))
    if dataset.short.count:
        text = f"{_part(dataset, dataset.short.count)} with an answer of fewer than {SHORT} characters"
        found.append(Remark(text, [_rows_text(dataset.short)]))
    if dataset.exact.count:
        text = f"{_part(dataset, dataset.exact.count)} copied from an earlier row"
        found.append(Remark(text, [pairs_text(dataset.exact, "=")]))
    if dataset.near.count:
        text = f"{_part(dataset, dataset.near.count)} nearly the same as an earlier row"
        found.append(Remark(text, [pairs_text(dataset.near, "~")]))
    return found


def _part(dataset: DatasetReport, count: int) -> str:
    return f"{visible(dataset.name)}: {count:,} of {dataset.read:,} rows ({_percent(count / dataset.read)})"


def _percent(share: float) -> str:
    """Two figures: 0.013% is not nothing, and 99.98% is not everything."""
    if 0 < share < 0.01 or 0.99 < share < 1:
        return f"{share:.2%}"
    return f"{share:.0%}"


def _rows_text(found: Found) -> str:
    numbers = ", ".join(str(row) for row in found.rows[:SHOWN])
    return f"row{'s' if found.count > 1 else ''} {numbers}{', ...' if found.count > SHOWN else ''}"


def pairs_text(found: Repeats, sign: str, *, both: bool = False, shown: int = SHOWN) -> str:
    """Return "row 3 = 1, 7 = other 2": a dataset is named where it differs, or with `both` where there are several."""
    both = both and len({name for pair in found.pairs for name in (pair.dataset, pair.other_dataset)}) > 1
    texts = []
    for pair in found.pairs[:shown]:
        here = f"{pair.dataset} {pair.row}" if both else str(pair.row)
        there = f"{pair.other_dataset} {pair.other_row}" if both or pair.other_dataset != pair.dataset else ""
        texts.append(f"{here} {sign} {there or pair.other_row}")
    return visible(f"{'' if both else 'row '}{', '.join(texts)}{', ...' if found.count > shown else ''}")


def visible(text: str) -> str:
    """Return text with characters that a terminal would obey, or would not show, written as escapes."""
    return "".join(
        character
        if character.isprintable() or character == "\u3000"  # the space of Chinese and Japanese
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def report_json(report: Report) -> dict[str, Any]:
    """Return the report for programs: the fields of the data classes, and the remarks as lines."""
    lines = [remark.text for remark in remarks(report)]
    return {"remarks": lines, **asdict(report)}


def report_text(report: Report) -> str:
    """Return the report for people: what to look at first, then the figures."""
    lines = [headline(report), ""]
    found = remarks(report)
    if found:
        lines.append("To look at:")
        for remark in found:
            lines += [f"  ! {remark.text}", *(f"      {line}" for line in remark.details)]
    else:
        lines.append(ALL_WELL)
    head, rows = figures_table(report)
    lines += ["", *_aligned(head, rows)]
    head, rows = lengths_table(report)
    lines += ["", *_aligned(head, rows)]
    lines += ["", f"Languages of what is learnt, guessed on a sample of at most {LANGUAGE_ROWS}:"]
    lines += [f"  {_clipped(dataset.name)}: {languages_text(dataset.languages)}" for dataset in report.datasets]
    lines += ["", steps_text(report)]
    if found:
        lines += ["", "`tunewright data show NAME --row N` shows a row as the model sees it."]
    return "\n".join(lines)


def headline(report: Report) -> str:
    train, held = report.splits["train"], report.splits["eval"]
    text = f"{_examples(train)} to train on"
    text += f", {_examples(held)} held out" if held.examples else ", nothing held out"
    sampled = f"; of each stream the first {report.sample:,} rows" if report.sample else ""
    return f"{text} (model {report.model}, data.cutoff_len = {report.cutoff_len}{sampled})"


def _examples(split: Split) -> str:
    return f"{split.examples:,} example{'' if split.examples == 1 else 's'} ({split.tokens:,} tokens)"


def figures_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return a head and a row for each dataset: counts of rows and tokens."""
    head = ["dataset", "used for", "rows", "kept", "cut", "copies", "near copies", "tokens", "learnt"]
    rows = []
    for dataset in report.datasets:
        counts = (dataset.read, dataset.kept, dataset.truncated.count, dataset.exact.count, dataset.near.count)
        share = f"{dataset.scored / dataset.tokens:.0%}" if dataset.tokens else "-"
        rows.append([dataset.name, dataset.split, *(f"{count:,}" for count in counts), f"{dataset.tokens:,}", share])
    return head, rows


def lengths_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return a head and a row for each dataset: percentiles of the tokens of an example, and the longest rows."""
    names = [*(f"{percent}%" for percent in PERCENTILES), "max"]
    rows = []
    for dataset in report.datasets:
        longest = ", ".join(str(row) for row, _ in dataset.longest) or "-"
        rows.append([dataset.name, *(f"{dataset.lengths[name]:,}" if dataset.lengths else "-" for name in names)])
        rows[-1].append(longest)
    return ["tokens an example", *names, "longest: rows"], rows


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return lines with the first column to the left and figures to the right, in terminal cells."""
    table = [[_clipped(row[0]), *row[1:]] for row in (head, *rows)]
    widths = [max(display_width(row[column]) for row in table) for column in range(len(head))]
    lines = []
    for row in table:
        cells = [row[0] + " " * (widths[0] - display_width(row[0]))]
        cells += [" " * (width - display_width(cell)) + cell for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _clipped(name: str) -> str:
    """A long path keeps its end, which tells it from others."""
    name = visible(name)
    while display_width(name) > NAME_WIDTH:
        name = "…" + name.lstrip("…")[1:]
    return name


def languages_text(languages: Languages) -> str:
    """Return "en 50%, zh 48%, other 2% (of 300 answers)"."""
    if not languages.sampled:
        return "no answer to guess from"
    if not languages.classified:
        return f"all of {languages.sampled} answers are shorter than {LEAST_TEXT} characters, too short to guess"
    named = {code: share for code, share in list(languages.shares.items())[:4] if share >= 0.02}
    texts = [f"{code} {share:.0%}" for code, share in named.items()]
    rest = 1 - sum(named.values())
    if rest > 0.005:
        texts.append(f"other {rest:.0%}")
    skipped = languages.sampled - languages.classified
    short = f"; {skipped} more shorter than {LEAST_TEXT} characters" if skipped else ""
    return f"{', '.join(texts)} (of {languages.classified} answers{short})"


def steps_text(report: Report) -> str:
    """Return how many optimiser steps training takes, and why so many."""
    steps = report.steps
    total = f"{steps.total:,} optimiser step{'' if steps.total == 1 else 's'}"
    if steps.per_epoch is None:
        return f"{total} (train.max_steps); {steps.batch}"
    return f"{total}: {steps.per_epoch:,} an epoch, {steps.epochs:.3g} epochs; {steps.batch}"
