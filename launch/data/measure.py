"""What is in the tokens of a configuration, measured for a report.

Everything comes from the token cache, as arrays: no row is rendered again, and a report on 100,000 rows takes seconds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig

from tunewright.launch.data.copies import LISTED, label, overlap_of, repeats_in, row_table, stacked, used_rows
from tunewright.launch.data.languages import languages_of
from tunewright.launch.data.report import DatasetReport, Dropped, Found, Histogram, Languages, Repeats, Report, Split
from tunewright.plan.batch_plan import BatchPlan, planned_steps
from tunewright.plan.method_rules import longest_row
from tunewright.trainer.data.formats import OLDER_TOOLS
from tunewright.trainer.data.token_cache import SAMPLE, SPLITS, CachedDataset, TokenCache, epoch_size
from tunewright.trainer.model.config_json import known_positions, model_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (5, 25, 50, 75, 95, 99)
SHORT = 3  # characters: an answer with fewer is pointed out
LONGEST = 5  # longest examples that are named
BARS = 30


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
        tables = [row_table(cached) for cached in datasets]
        kept = [np.flatnonzero(table["reason"] < 0) for table in tables]
        exact, near = repeats_in(stacked(datasets, tables, kept))
        for number, cached in enumerate(datasets):
            languages = languages_of(cached, tokenizer)
            beyond = _beyond(cached, positions)
            reports.append(_of_dataset(cached, split, tables[number], exact[number], near[number], languages, beyond))
    return Report(
        model=config.model.name,
        cutoff_len=longest_row(config),
        positions=known,
        sample=SAMPLE if config.data.streaming else None,
        datasets=reports,
        splits=counts,
        overlap=overlap_of(used_rows(cache, "train"), used_rows(cache, "eval")) if counts["eval"].examples else None,
        steps=planned_steps(config, plan, *epoch_size(cache, config)),
    )


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
        name=label(cached),
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
