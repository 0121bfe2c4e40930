"""What `tunewright data check` says, as data: for text, JSON and a page alike."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.plan.batch_plan import Steps


@dataclass(frozen=True)
class Found:
    """Rows that have something in common: how many there are, and the numbers of the first of them."""

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
    """Rows that repeat another: how many there are, and the first of them."""

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
