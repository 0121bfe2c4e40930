"""Rows to tokens: read here, rendered and tokenised by several workers, written to Arrow files as they come.

    tokens.arrow   one line for each example   row, input_ids, labels
    rows.arrow     one line for each row read  what became of it: see ROWS

Rows pass through in chunks, and only a few chunks are under way at a time, so that memory does not grow with the data.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from tunewright.registry import Entry
from tunewright.trainer.data.formats import Conversation, Plain, to_conversation, unread
from tunewright.trainer.data.messages import Unusable
from tunewright.trainer.data.minhash import PERMUTATIONS, sketches
from tunewright.trainer.data.outcome import Outcome
from tunewright.trainer.data.process_pool import sent
from tunewright.trainer.data.readers import Row
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.sources import Rows, check_column

CHUNK = 500  # rows handed to a worker at once
EXCERPTS = 3  # dropped rows shown for each reason
EXCERPT_LENGTH = 200  # characters
MOST_KEYS = 100  # keys that nobody reads: where they are data themselves, there are as many as rows
DISTINCT = ("role", "content", "tool_calls", "reasoning_content")  # what of a message makes it another one
Progress = Callable[[int], None]  # rows done
Maker = tuple[Entry, Renderer]  # what rows mean and how they are rendered

TOKENS = pyarrow.schema(
    {
        "row": pyarrow.int64(),
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
    }
)
ROWS = pyarrow.schema(
    {
        "reason": pyarrow.int16(),  # index into the report's reasons of dropping, -1 for a row that is kept
        "tokens": pyarrow.int32(),  # of all of its examples
        "scored": pyarrow.int32(),  # tokens with a label
        "answer": pyarrow.int32(),  # characters of the last answer
        "truncated": pyarrow.bool_(),
        "unended": pyarrow.bool_(),  # no token that stops generation is learnt
        "special": pyarrow.bool_(),  # special tokens' strings are learnt as text
        "digest": pyarrow.uint64(),  # of the whole conversation
        "question": pyarrow.uint64(),  # digest of the conversation up to the last answer
        "sketch": pyarrow.binary(4 * PERMUTATIONS),  # MinHash of the text
    }
)


@dataclass
class Chunk:
    """What a worker made of some rows; `rows` has a list for each column of ROWS but `sketch`."""

    examples: dict[str, np.ndarray]  # row, lengths, input_ids, labels: the last two flat
    rows: dict[str, list[Any]]
    sketches: np.ndarray  # (rows, PERMUTATIONS) uint32
    reasons: list[str]  # those of this chunk, which `rows["reason"]` counts in
    excerpts: list[tuple[str, int, str]]  # (reason, row number, beginning of the row)
    columns: set[str]
    specials: Counter[str]  # special token's string that is learnt as text -> rows
    unread: Counter[str]  # key of a turn that nobody reads -> rows


def tokenize(
    rows: Rows,
    renderer: Renderer,
    folder: Path,
    *,
    threads: int,
    processes: Executor | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write tokens.arrow and rows.arrow into `folder` and return what became of the rows.

    Raises:
        DataError: the file is broken, or a column that the entry names is in no row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    with (
        pyarrow.OSFile(str(folder / "tokens.arrow"), "wb") as tokens_file,
        pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as rows_file,
        pyarrow.ipc.new_stream(tokens_file, TOKENS) as tokens_writer,
        pyarrow.ipc.new_stream(rows_file, ROWS) as rows_writer,
    ):
        for chunk in _tokenized(_chunks(islice(rows, limit)), (rows.entry, renderer), threads, processes):
            _add(outcome, chunk)
            tokens_writer.write(_token_batch(chunk))
            rows_writer.write(_row_batch(chunk))
            if progress:
                progress(outcome.read)
    if limit is None:
        for meaning in sorted(rows.entry.named):
            check_column(rows.entry, meaning, set(outcome.columns))
    return outcome


def warm_up() -> None:
    """Import in a process, together with this module, what unpickling a tokenizer will need."""
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    # The collector would look through the rows of a chunk again and again, and find nothing: a tenth of the time.
    gc.freeze()
    gc.set_threshold(200_000)


def _chunks(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Yield (number of the first row, rows)."""
    rows, start = iter(rows), 0
    while chunk := list(islice(rows, CHUNK)):
        yield start, chunk
        start += len(chunk)


def _tokenized(
    chunks: Iterator[tuple[int, list[Row]]], maker: Maker, threads: int, processes: Executor | None
) -> Iterator[Chunk]:
    """Yield what becomes of each chunk, in order.

    Without processes in threads, which share the tokenizer: it leaves Python's lock while it works.
    """
    with sent(maker) if processes else nullcontext() as call, ThreadPoolExecutor(threads) as own:
        pool, task = (processes, partial(call, make_chunk)) if processes and call else (own, partial(make_chunk, maker))
        waiting: deque[Future[Chunk]] = deque()
        try:
            for start, rows in chunks:
                waiting.append(pool.submit(task, start, rows))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def make_chunk(maker: Maker, start: int, rows: list[Row]) -> Chunk:
    """Render and tokenise some rows, the first of which has the number `start`."""
    entry, renderer = maker
    sources: list[Conversation | Plain | Unusable] = []
    for row in rows:
        try:
            sources.append(to_conversation(row, entry))
        except Unusable as unusable:
            sources.append(unusable)
    rendered = iter(renderer.render([source for source in sources if not isinstance(source, Unusable)]))
    made = [source if isinstance(source, Unusable) else next(rendered) for source in sources]

    reasons: dict[str, int] = {}
    excerpts: list[tuple[str, int, str]] = []
    table: dict[str, list[Any]] = {name: [] for name in ROWS.names if name != "sketch"}
    numbers, ids, labels = [], [], []
    specials, keys = Counter[str](), Counter[str]()
    for index, (source, examples) in enumerate(zip(sources, made, strict=True)):
        usable = [] if isinstance(examples, Unusable) else examples
        for example in usable:
            numbers.append(start + index)
            ids.append(example.input_ids)
            labels.append(example.labels)
        table["tokens"].append(sum(len(example.input_ids) for example in usable))
        table["scored"].append(sum(example.scored for example in usable))
        table["truncated"].append(any(example.truncated for example in usable))
        table["unended"].append(not all(example.ended for example in usable))
        kept_as_text = {string for example in usable for string in example.kept_as_text}
        table["special"].append(bool(kept_as_text))
        specials.update(kept_as_text)
        keys.update(unread(rows[index], entry) if usable else ())
        table["answer"].append(-1 if isinstance(source, Unusable) else len(source.answer.strip()))
        for key, digest in zip(("digest", "question"), _digests(source), strict=True):
            table[key].append(digest)
        if isinstance(examples, Unusable):
            reason = str(examples)
            table["reason"].append(reasons.setdefault(reason, len(reasons)))
            if sum(known == reason for known, _, _ in excerpts) < EXCERPTS:
                excerpts.append((reason, start + index, excerpt(rows[index])))
        else:
            table["reason"].append(-1)
    lengths = np.array([len(part) for part in ids], np.int64)
    flat = {
        "row": np.array(numbers, np.int64),
        "lengths": lengths,
        "input_ids": np.concatenate(ids) if ids else np.array([], np.int32),
        "labels": np.concatenate(labels) if labels else np.array([], np.int32),
    }
    columns = {key for row in rows for key in row}
    alike = sketches([_said(source) for source in sources])
    return Chunk(flat, table, alike, list(reasons), excerpts, columns, specials, keys)


def excerpt(row: Row) -> str:
    """Return the beginning of a row as JSON."""
    text = json.dumps(row, ensure_ascii=False, default=str).encode(errors="replace").decode()
    return text if len(text) <= EXCERPT_LENGTH else text[:EXCERPT_LENGTH] + " ..."


def _digests(source: Conversation | Plain | Unusable) -> tuple[int, int]:
    """Return the digests of the whole and of the part before the last answer."""
    if isinstance(source, Unusable):
        return 0, 0
    if isinstance(source, Plain):
        parts = [source.prompt, source.completion]
    else:
        parts = ["\0".join(str(message.get(key, "")) for key in DISTINCT) for message in source.messages]
        parts[0] = f"{source.tools or ''}\0{parts[0]}"
    question = hashlib.blake2b("\0\0".join(parts[:-1]).encode(errors="replace"), digest_size=8)
    whole = question.copy()
    whole.update(parts[-1].encode(errors="replace"))
    return int.from_bytes(whole.digest(), "little"), int.from_bytes(question.digest(), "little")


def _said(source: Conversation | Plain | Unusable) -> str:
    """Return the text that makes a row like another: without the system message, which many rows share."""
    if isinstance(source, Unusable):
        return ""
    if isinstance(source, Plain):
        return f"{source.prompt} {source.completion}"
    said = [message for message in source.messages if message["role"] != "system"]
    return " ".join(message.get("reasoning_content", "") + message["content"] for message in said)


def _add(outcome: Outcome, chunk: Chunk) -> None:
    table = chunk.rows
    outcome.read += len(table["reason"])
    outcome.kept += sum(reason < 0 for reason in table["reason"])
    outcome.examples += len(chunk.examples["row"])
    outcome.tokens += sum(table["tokens"])
    outcome.scored += sum(table["scored"])
    outcome.truncated += sum(table["truncated"])
    outcome.unended += sum(table["unended"])
    outcome.longest = max(outcome.longest, *chunk.examples["lengths"].tolist(), 0)
    known = {reason: index for index, reason in enumerate(outcome.reasons)}
    for reason in chunk.reasons:
        if reason not in known:
            known[reason] = len(known)
            outcome.reasons.append(reason)
            outcome.dropped.append(0)
            outcome.excerpts.append([])
    table["reason"] = [-1 if reason < 0 else known[chunk.reasons[reason]] for reason in table["reason"]]
    for reason in table["reason"]:
        if reason >= 0:
            outcome.dropped[reason] += 1
    outcome.columns = sorted({*outcome.columns, *chunk.columns})
    outcome.specials = dict(Counter(outcome.specials) + chunk.specials)
    outcome.unread = dict((Counter(outcome.unread) + chunk.unread).most_common(MOST_KEYS))
    for text, number, beginning in chunk.excerpts:
        shown = outcome.excerpts[known[text]]
        if len(shown) < EXCERPTS:
            shown.append({"row": number, "text": beginning})


def _token_batch(chunk: Chunk) -> Any:
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(chunk.examples["lengths"])]).astype(np.int32))
    lists = [
        pyarrow.ListArray.from_arrays(offsets, pyarrow.array(chunk.examples[key])) for key in ("input_ids", "labels")
    ]
    return pyarrow.record_batch([pyarrow.array(chunk.examples["row"]), *lists], schema=TOKENS)


def _row_batch(chunk: Chunk) -> Any:
    columns = [pyarrow.array(chunk.rows[name], ROWS.field(name).type) for name in ROWS.names if name != "sketch"]
    buffer = pyarrow.py_buffer(np.ascontiguousarray(chunk.sketches, np.uint32))
    sketch = pyarrow.Array.from_buffers(ROWS.field("sketch").type, len(chunk.sketches), [None, buffer])
    return pyarrow.record_batch([*columns, sketch], schema=ROWS)
