"""A generated dataset as one HTML page to read through before training: samples, lengths, and what was rejected."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tunewright.deliver.comparison_page import PAGE, STYLE

Row = Mapping[str, Any]

EXAMPLES = 5  # rejected replies shown of one reason
FOLD = 1_200  # characters above which a text is folded
FOLD_LINES = 25
FOLDED, FOLDED_LINES = 400, 6  # of which these are seen before it is opened
LONGEST = 50_000  # characters of one text that the page holds at most, so that a browser opens it
BINS = 30  # at most
WIDTH, HEIGHT = 480, 190  # pixels of a histogram, labels included
LEFT, BOTTOM, TOP = 48, 34, 10  # of which these are for the labels

EXTRA_STYLE = """
:root { --bar: #0072B2; --other: #D55E00; --user: #dceafa; --model: #fff; --reject: #c4573a; }
@media (prefers-color-scheme: dark) { :root { --bar: #56B4E9; --other: #E69F00; --user: #1d3a55; --model: #262b31;
  --reject: #e07f63; } }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin-top: 1rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .55rem .9rem;
  min-width: 8rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88em; }
.card { margin-bottom: .8rem; }
.padded { padding: .7rem .9rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.soft { color: var(--soft); font-size: .88em; }
td.words, th.words { text-align: left; overflow-wrap: anywhere; }
tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 26rem; text-align: left; }
td.track { width: 45%; min-width: 5rem; padding-left: 0; }
.bar { display: flex; height: .85rem; margin-top: .3rem; }
.bar i { display: block; height: 100%; background: var(--bar); }
.bar i.rejected { background: var(--reject); }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin: 0 .35rem 0 .9rem;
  background: var(--bar); }
.key:first-child { margin-left: 0; } .key.other { background: var(--other); }
.key.rejected { background: var(--reject); }
details { border-top: 1px solid var(--line); } .card > details:first-child { border-top: 0; }
summary { cursor: pointer; padding: .5rem .9rem; }
details.fold { border: 0; } details.fold > summary { padding: .2rem 0; color: var(--soft); font-size: .88em; }
details.fold[open] + .start { display: none; }
.reply { margin: 0 .9rem .7rem; padding: .5rem .7rem; border-left: 3px solid var(--reject); background: var(--page);
  font: .88em/1.5 ui-monospace, monospace; }
.charts { display: flex; flex-wrap: wrap; gap: .8rem 1.6rem; padding: .7rem .9rem; }
figure { margin: 0; max-width: 100%; } figcaption { color: var(--soft); font-size: .88em; }
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg line { stroke: var(--line); }
svg rect { fill: var(--bar); } svg rect.other { fill: var(--other); }
.sample { padding: .7rem .9rem .9rem; }
.sample[hidden] { display: none; }
.labels { display: flex; flex-wrap: wrap; gap: .35rem; margin-bottom: .5rem; font-size: .8em; color: var(--soft); }
.labels span { border: 1px solid var(--line); border-radius: 99px; padding: .05rem .6rem; overflow-wrap: anywhere; }
.labels span.held { border-color: var(--other); color: var(--text); }
.bubble { width: fit-content; max-width: min(85%, 52rem); margin: .35rem 0; padding: .5rem .8rem;
  border: 1px solid var(--line); border-radius: 12px; background: var(--model); }
.bubble.user { margin-left: auto; background: var(--user); border-color: transparent; }
.bubble .input { margin-top: .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
.bubble.system { max-width: 100%; border-style: dashed; color: var(--soft); background: none; font-size: .9em; }
#search { width: 100%; padding: .5rem .8rem; margin-bottom: .6rem; font: inherit; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
"""

# The page is complete without it: the field that it serves is hidden until it runs.
SCRIPT = """
const field = document.getElementById("search"), found = document.getElementById("found");
const samples = [...document.querySelectorAll(".sample")];
const texts = samples.map(sample => sample.textContent.toLowerCase());
field.hidden = false;
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  samples.forEach((sample, at) => {
    sample.hidden = !words.every(word => texts[at].includes(word));
    shown += !sample.hidden;
  });
  found.textContent = words.length ? `${shown} of ${samples.length} shown.` : "";
});
"""


@dataclass(frozen=True)
class Rejected:
    """A reply that did not become a row."""

    reason: str
    text: str
    cell: str


def preview_page(
    manifest: Mapping[str, Any],
    train: Sequence[Row],
    test: Sequence[Row],
    rejects: Sequence[Rejected],
    samples: int = 40,
) -> str:
    """Return the page; parts that the manifest does not tell of are left out."""
    name = str(manifest.get("name") or "dataset")
    sections = [
        _tiles(manifest, train, test),
        _system_section(manifest),
        _yield_section(manifest),
        _rejects_section(_part(manifest, "rejects"), rejects),
        _lengths_section(train, test),
        _scores_section(manifest),
        _closest_section(manifest),
        _samples_section(train, test, samples),
        _settings_section(manifest),
    ]
    page = PAGE.replace("style-src", f"script-src '{_script_hash()}'; style-src").format(
        title=escape(f"Preview: {name}"),
        style=STYLE + EXTRA_STYLE,
        heading=escape(name),
        summary=escape(_short(str(_part(manifest, "settings").get("task") or "A generated dataset."), 600)),
        sections="\n".join(section for section in sections if section),
    )
    # Half of a surrogate pair, which a broken reply may hold, has no UTF-8 form.
    return page.encode("utf-8", errors="replace").decode()


def _script_hash() -> str:
    """What lets this script run, and none that a generated text might bring."""
    return "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()


# --------------------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------------------


def _tiles(manifest: Mapping[str, Any], train: Sequence[Row], test: Sequence[Row]) -> str:
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
    tiles = [
        f'<div class="tile"><b>{escape(_figure(value))}</b><span>{escape(label)}</span></div>'
        for label, value in figures
        if value is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _system_section(manifest: Mapping[str, Any]) -> str:
    message = manifest.get("system_message")
    plan = [
        f"<details><summary>{escape(str(kind))} ({len(values)})</summary>"
        f'<div class="padded text">{escape(_short(chr(10).join(map(_words, values)), LONGEST))}</div></details>'
        for kind, values in _part(manifest, "plan").items()
        if isinstance(values, (list, tuple)) and values
    ]
    parts = [f'<div class="card padded">{_text(str(message))}</div>' if message else ""]
    if plan:
        parts.append(f'<p>What the examples were asked for:</p><div class="card">{"".join(plan)}</div>')
    return _section("System message" if message else "Plan", *parts) if any(parts) else ""


def _yield_section(manifest: Mapping[str, Any]) -> str:
    rows = []
    for topic, entry in _part(manifest, "yield").items():
        counts = entry if isinstance(entry, Mapping) else {}
        rows.append((str(topic), _count(counts, "accepted"), _count(counts, "rejected")))
    if not rows:
        return ""
    most = max(1, *(accepted + rejected for _, accepted, rejected in rows))
    lines = [
        f'<tr><th>{escape(topic)}</th><td>{accepted:,}</td><td>{rejected:,}</td><td class="track"><div class="bar">'
        f'<i style="width:{100 * accepted / most:.2f}%"></i>'
        f'<i class="rejected" style="width:{100 * rejected / most:.2f}%"></i></div></td></tr>'
        for topic, accepted, rejected in rows
    ]
    head = "<tr><th>topic</th><th>accepted</th><th>rejected</th><th></th></tr>"
    key = '<span class="key"></span>accepted <span class="key rejected"></span>rejected'
    return _section("Topics", f"<p>{key}</p>", _table(head, lines))


def _rejects_section(counts: Mapping[str, Any], rejects: Sequence[Rejected]) -> str:
    title = "Rejected replies"
    seen = Counter(reject.reason for reject in rejects)
    total = {reason: max(_count(counts, reason), seen[reason]) for reason in dict.fromkeys([*counts, *seen])}
    if not total:
        return _section(title, "<p>None.</p>")
    parts = []
    for reason, count in sorted(total.items(), key=lambda item: -item[1]):
        examples = [reject for reject in rejects if reject.reason == reason][:EXAMPLES]
        shown = f", {len(examples)} shown" if examples else ""
        body = "".join(_rejected(reject) for reject in examples) or '<p class="padded">No example was kept.</p>'
        parts.append(f"<details><summary>{escape(str(reason))}: {count:,}{shown}</summary>{body}</details>")
    return _section(title, f'<div class="card">{"".join(parts)}</div>')


def _rejected(reject: Rejected) -> str:
    cell = f'<div class="soft">{escape(reject.cell)}</div>' if reject.cell else ""
    return f'<div class="reply">{cell}{_text(reject.text or "(nothing)")}</div>'


def _lengths_section(train: Sequence[Row], test: Sequence[Row]) -> str:
    if not train and not test:
        return ""
    charts = [
        _chart([len_of(row) for row in train], [len_of(row) for row in test], label)
        for len_of, label in ((_prompt_length, "prompts"), (_answer_length, "answers"))
    ]
    key = f'<span class="key"></span>train ({len(train):,}) <span class="key other"></span>held out ({len(test):,})'
    note = "The height is the share of its own rows, so that a small held-out part compares."
    return _section("Lengths", f"<p>{key}. {note}</p>", f'<div class="card charts">{"".join(charts)}</div>')


def _scores_section(manifest: Mapping[str, Any]) -> str:
    scores = _part(manifest, "scores")
    numbers = [(str(score), _count(scores, score)) for score in sorted(scores, key=_score_order)]
    if not numbers:
        return ""
    most = max(1, *(count for _, count in numbers))
    lines = [
        f'<tr><th>{escape(score)}</th><td>{count:,}</td><td class="track"><div class="bar">'
        f'<i style="width:{100 * count / most:.2f}%"></i></div></td></tr>'
        for score, count in numbers
    ]
    return _section("Scores", _table("<tr><th>score</th><th>replies</th><th></th></tr>", lines))


def _score_order(score: Any) -> tuple[float, str]:
    try:
        return float(score), str(score)
    except ValueError:
        return math.inf, str(score)


def _closest_section(manifest: Mapping[str, Any]) -> str:
    similarity = _part(manifest, "similarity")
    pair = similarity.get("pair")
    if not isinstance(pair, (list, tuple)) or not pair:
        return ""
    texts = "".join(f'<div class="card padded">{_text(_words(text))}</div>' for text in pair)
    return _section("Most alike across the split", texts)


def _samples_section(train: Sequence[Row], test: Sequence[Row], samples: int) -> str:
    rows = [("", number, row) for number, row in enumerate(train, 1)]
    rows += [("held out", number, row) for number, row in enumerate(test, 1)]
    count = min(max(samples, 0), len(rows))
    if not count:
        return _section("Samples", "<p>There are no rows.</p>") if not rows else ""
    # Evenly over all rows, because neighbours were asked for together.
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    # A system message that all rows share stands above; repeated here it would hide the rows.
    shared = len({str(row.get("system") or "") for _, _, row in rows}) == 1
    cards = [_sample(held, number, row, with_system=not shared) for held, number, row in chosen]
    field = '<input id="search" type="search" placeholder="Show samples with these words" aria-label="Filter" hidden>'
    note = f'<p>{count:,} of {len(rows):,} rows. <span id="found"></span></p>'
    return _section("Samples", note, field, *cards, f"<script>{SCRIPT}</script>")


def _sample(held: str, number: int, row: Row, *, with_system: bool) -> str:
    labels = [f"row {number:,}", *(str(row[key]) for key in ("topic", "persona", "difficulty", "form") if row.get(key))]
    if row.get("score") is not None:
        labels.append(f"score {row['score']}")
    spans = [f"<span>{escape(_short(label, 200))}</span>" for label in labels]
    if held:
        spans.insert(0, f'<span class="held">{escape(held)}</span>')
    bubbles = []
    if with_system and row.get("system"):
        bubbles.append(_bubble("system", _text(str(row["system"]))))
    for user, assistant in row.get("history") or []:
        bubbles += [_bubble("user", _text(str(user))), _bubble("model", _text(str(assistant)))]
    extra = f'<div class="input">{_text(str(row["input"]))}</div>' if row.get("input") else ""
    bubbles.append(_bubble("user", _text(str(row.get("instruction") or "")) + extra))
    bubbles.append(_bubble("model", _text(str(row.get("output") or ""))))
    return f'<div class="card sample"><div class="labels">{"".join(spans)}</div>{"".join(bubbles)}</div>'


def _bubble(kind: str, content: str) -> str:
    return f'<div class="bubble {kind}">{content}</div>'


def _settings_section(manifest: Mapping[str, Any]) -> str:
    entries: list[tuple[str, Any]] = []
    for part in ("settings", "counts", "usage", "cost", "versions", "hashes"):
        for key, value in _part(manifest, part).items():
            inner = value.items() if isinstance(value, Mapping) else [("", value)]
            entries += [(f"{part}.{key}" + (f".{below}" if below else ""), found) for below, found in inner]
    if manifest.get("date"):
        entries.insert(0, ("date", manifest["date"]))
    if not entries:
        return ""
    lines = [
        f'<tr><th>{escape(key)}</th><td class="words text">{escape(_short(_words(value), 4_000))}</td></tr>'
        for key, value in entries
    ]
    return _section("Settings and files", _table("", lines, "settings"))


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{chr(10).join(part for part in parts if part)}\n</section>"


def _table(head: str, lines: Sequence[str], kind: str = "") -> str:
    top = f"<thead>{head}</thead>" if head else ""
    return f'<div class="card"><table class="{kind}">{top}<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>'


def _text(text: str) -> str:
    """Text as it stands; a long one shows its start and opens on a click."""
    lines = text[: LONGEST + 1].splitlines()
    if len(text) <= FOLD and len(lines) <= FOLD_LINES:
        return f'<div class="text">{escape(text)}</div>'
    cut = f"\n[... {len(text) - LONGEST:,} more characters are not on this page]" if len(text) > LONGEST else ""
    start = "\n".join(lines[:FOLDED_LINES])[:FOLDED]
    return (
        f'<details class="fold"><summary>{len(text):,} characters</summary>'
        f'<div class="text">{escape(text[:LONGEST] + cut)}</div></details>'
        f'<div class="text start">{escape(start)}…</div>'
    )


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


def _chart(train: Sequence[int], test: Sequence[int], label: str) -> str:
    """Bars of both parts side by side, over bins that they share, as shares of their own rows."""
    edges = _edges([*train, *test])
    right, floor = WIDTH - 14, HEIGHT - BOTTOM
    step = (right - LEFT) / (len(edges) - 1)
    shares = [_shares(values, edges) for values in (train, test)]
    highest = max(share for part in shares for _, share in part) or 1.0
    thick = max(step / 2 - 1, 0.8)
    bars = []
    for at, (part, kind, named) in enumerate(zip(shares, ("", "other"), ("train", "held out"), strict=True)):
        for index, (count, share) in enumerate(part):
            if count:
                height = max((floor - TOP) * share / highest, 1)
                told = f"{edges[index]:,} to {edges[index + 1] - 1:,}: {count:,} {named} ({share:.1%})"
                place = f'x="{LEFT + index * step + at * step / 2:.1f}" y="{floor - height:.1f}"'
                size = f'width="{thick:.1f}" height="{height:.1f}"'
                bars.append(f'<rect class="{kind}" {place} {size}><title>{told}</title></rect>')
    marks = [
        f'<text x="{LEFT + index * step:.1f}" y="{floor + 14}" text-anchor="{anchor}">{edges[index]:,}</text>'
        for index, anchor in {0: "middle", len(edges) // 2: "middle", len(edges) - 1: "end"}.items()
    ]
    above = [value for value in (*train, *test) if value >= edges[-1]]
    beyond = f"; not drawn: {len(above):,} longer, up to {max(above):,}" if above else ""
    return (
        f"<figure><figcaption>{label}{beyond}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Lengths of {label}"><line x1="{LEFT}" y1="{floor + 0.5}" x2="{right}" y2="{floor + 0.5}"/>'
        f'{"".join(bars)}{"".join(marks)}<text x="{LEFT - 6}" y="{TOP + 10}" text-anchor="end">{highest:.0%}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">characters</text></svg></figure>'
    )


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
