"""A generated dataset as one HTML page to read through before training: samples, lengths, and what was rejected."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.datagen.curation import Rejected
from tunewright.pages import Bars, Chart, render_page

Row = Mapping[str, Any]

EXAMPLES = 5  # rejected replies shown of one reason
FOLD = 1_200  # characters above which a text is folded
FOLD_LINES = 25
FOLDED, FOLDED_LINES = 400, 6  # of which these are seen before it is opened
LONGEST = 50_000  # characters of one text that the page holds at most, so that a browser opens it
BINS = 30  # at most


@dataclass(frozen=True)
class Folded:
    """A text as the page shows it: a long one opens on a click, and begins with `start` until then."""

    whole: str
    start: str | None
    length: int


def preview_page(
    manifest: Mapping[str, Any],
    train: Sequence[Row],
    test: Sequence[Row],
    rejects: Sequence[Rejected],
    samples: int = 40,
) -> str:
    """Return the page; parts that the manifest does not tell of are left out."""
    name = str(manifest.get("name") or "dataset")
    pair = _part(manifest, "similarity").get("pair")
    rows = [(False, number, row) for number, row in enumerate(train, 1)]
    rows += [(True, number, row) for number, row in enumerate(test, 1)]
    return render_page(
        "datagen_preview.html.jinja",
        script="filter_samples.js",
        title=f"Preview: {name}",
        heading=name,
        summary=_short(str(_part(manifest, "settings").get("task") or "A generated dataset."), 600),
        fold=_fold,
        tiles=_tiles(manifest, train, test),
        system=manifest.get("system_message"),
        plan=_plan(manifest),
        topics=_topics(manifest),
        rejects=_rejects(_part(manifest, "rejects"), rejects),
        charts=_charts(train, test),
        parts_of_rows=[("", f"train ({len(train):,})"), ("other", f"held out ({len(test):,}).")],
        scores=_scores(manifest),
        pair=[_words(text) for text in pair] if isinstance(pair, (list, tuple)) else [],
        samples=_samples(rows, min(max(samples, 0), len(rows))),
        rows=len(rows),
        settings=_settings(manifest),
    )


def _fold(text: object) -> Folded:
    whole = str(text)
    lines = whole[: LONGEST + 1].splitlines()
    if len(whole) <= FOLD and len(lines) <= FOLD_LINES:
        return Folded(whole, None, len(whole))
    cut = f"\n[... {len(whole) - LONGEST:,} more characters are not on this page]" if len(whole) > LONGEST else ""
    return Folded(whole[:LONGEST] + cut, "\n".join(lines[:FOLDED_LINES])[:FOLDED] + "…", len(whole))


def _tiles(manifest: Mapping[str, Any], train: Sequence[Row], test: Sequence[Row]) -> list[tuple[str, str]]:
    counts, usage = _part(manifest, "counts"), _part(manifest, "usage")
    rejected = sum(value for value in _part(manifest, "rejects").values() if isinstance(value, int))
    tokens = sum(value for value in usage.values() if isinstance(value, int))
    figures: list[tuple[str, Any]] = [
        ("rows to train on", counts.get("train", len(train))),
        ("rows held out", counts.get("eval", len(test))),
        ("rows asked for", counts.get("asked_for")),
        ("requests", counts.get("requests")),
        ("rejected", rejected if "rejects" in manifest else None),
        ("tokens", tokens if usage else None),
    ]
    if "cost" in manifest:
        usd = _part(manifest, "cost").get("usd")
        figures.append(("cost", "price unknown" if usd is None else f"${_figure(usd)}"))
    highest = _part(manifest, "similarity").get("highest_train_test")
    if isinstance(highest, (int, float)):
        # Cut, not rounded: 0.6996 is below a limit of 0.7 and must read so.
        figures.append(("highest similarity across the split", math.floor(highest * 1000) / 1000))
    return [(_figure(value), label) for label, value in figures if value is not None]


def _plan(manifest: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    return [
        (str(kind), len(values), _short("\n".join(map(_words, values)), LONGEST))
        for kind, values in _part(manifest, "plan").items()
        if isinstance(values, (list, tuple)) and values
    ]


def _topics(manifest: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    rows = []
    for topic, entry in _part(manifest, "yield").items():
        counts = entry if isinstance(entry, Mapping) else {}
        rows.append((str(topic), _count(counts, "accepted"), _count(counts, "rejected")))
    return rows


def _rejects(counts: Mapping[str, Any], rejects: Sequence[Rejected]) -> list[tuple[str, int, list[Rejected]]]:
    """Return each reason, most frequent first, with its count and a few of its replies."""
    seen = Counter(reject.reason for reject in rejects)
    total = {reason: max(_count(counts, reason), seen[reason]) for reason in dict.fromkeys([*counts, *seen])}
    return [
        (str(reason), count, [reject for reject in rejects if reject.reason == reason][:EXAMPLES])
        for reason, count in sorted(total.items(), key=lambda item: -item[1])
    ]


def _scores(manifest: Mapping[str, Any]) -> list[tuple[str, int]]:
    scores = _part(manifest, "scores")
    return [(str(score), _count(scores, score)) for score in sorted(scores, key=_score_order)]


def _score_order(score: Any) -> tuple[float, str]:
    try:
        return float(score), str(score)
    except ValueError:
        return math.inf, str(score)


def _samples(rows: Sequence[tuple[bool, int, Row]], count: int) -> list[dict[str, Any]]:
    # A system message that all rows share stands above; repeated here it would hide the rows.
    shared = len({str(row.get("system") or "") for *_, row in rows}) == 1
    # Evenly over all rows, because neighbours were asked for together.
    return [_sample(*rows[index * len(rows) // count], with_system=not shared) for index in range(count)]


def _sample(held: bool, number: int, row: Row, *, with_system: bool) -> dict[str, Any]:
    labels = [f"row {number:,}", *(str(row[key]) for key in ("topic", "persona", "difficulty", "form") if row.get(key))]
    if row.get("score") is not None:
        labels.append(f"score {row['score']}")
    turns = [("system", row["system"], "")] if with_system and row.get("system") else []
    for user, assistant in row.get("history") or []:
        turns += [("user", user, ""), ("model", assistant, "")]
    turns.append(("user", row.get("instruction") or "", row.get("input") or ""))
    turns.append(("model", row.get("output") or "", ""))
    return {"held": held, "labels": [_short(label, 200) for label in labels], "turns": turns}


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    entries: list[tuple[str, Any]] = [("date", manifest["date"])] if manifest.get("date") else []
    for part in ("settings", "counts", "usage", "cost", "versions", "hashes"):
        for key, value in _part(manifest, part).items():
            inner = value.items() if isinstance(value, Mapping) else [("", value)]
            entries += [(f"{part}.{key}" + (f".{below}" if below else ""), found) for below, found in inner]
    return [(key, _short(_words(value), 4_000)) for key, value in entries]


def _charts(train: Sequence[Row], test: Sequence[Row]) -> list[Chart]:
    if not train and not test:
        return []
    return [
        _chart([length(row) for row in train], [length(row) for row in test], label)
        for length, label in ((_prompt_length, "prompts"), (_answer_length, "answers"))
    ]


def _prompt_length(row: Row) -> int:
    """Characters of all that the model reads before it answers, the system message left out."""
    turns = sum(len(str(text)) for turn in row.get("history") or [] for text in turn)
    return turns + len(str(row.get("instruction") or "")) + len(str(row.get("input") or ""))


def _answer_length(row: Row) -> int:
    return len(str(row.get("output") or ""))


def _edges(values: Sequence[int]) -> list[int]:
    """Round edges of bins that hold all but the few largest values, which would press the rest together."""
    ordered = sorted(values)
    most = ordered[math.ceil(0.99 * len(ordered)) - 1] + 1
    step = 10 ** math.floor(math.log10(max(most / BINS, 1)))
    width = next(factor * step for factor in (1, 2, 5, 10, 20) if factor * step * BINS >= most)
    return [index * width for index in range(math.ceil(most / width) + 1)]


def _chart(train: Sequence[int], test: Sequence[int], label: str) -> Chart:
    """Bars of both parts over bins that they share, as shares of their own rows."""
    edges = _edges([*train, *test])
    series = []
    for values, named in ((train, "train"), (test, "held out")):
        shares = _shares(values, edges)
        titles = [
            f"{edges[i]:,} to {edges[i + 1] - 1:,}: {count:,} {named} ({share:.1%})"
            for i, (count, share) in enumerate(shares)
        ]
        series.append(Bars([share for _, share in shares], titles))
    above = [value for value in (*train, *test) if value >= edges[-1]]
    beyond = f"; not drawn: {len(above):,} longer, up to {max(above):,}" if above else ""
    highest = max(share for bars in series for share in bars.heights) or 1.0
    return Chart(f"{label}{beyond}", "characters", [f"{edge:,}" for edge in edges], f"{highest:.0%}", series)


def _shares(values: Sequence[int], edges: Sequence[int]) -> list[tuple[int, float]]:
    """Return count and share of the values in each bin."""
    counts = Counter(value // edges[1] for value in values if value < edges[-1])
    return [(counts[index], counts[index] / max(len(values), 1)) for index in range(len(edges) - 1)]


def _part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, Mapping) else {}


def _count(counts: Mapping[str, Any], key: str) -> int:
    value = counts.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _figure(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4g}"


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
