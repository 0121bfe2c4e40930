"""`tunewright data show`: rows as the model sees them, and which tokens are learnt."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.errors import DataError, StorageError
from tunewright.files import written_aside
from tunewright.launch.data.check import compose, make_tokens, set_environment
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import check
from tunewright.text import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunewright.trainer.data.token_cache import CachedDataset

TRAINED, MASKED, RESET = ("\x1b[32m", "\x1b[92m"), ("\x1b[2m", "\x1b[90m"), "\x1b[0m"  # two shades: tokens alternate
LONGEST_CHARACTER = 4  # tokens: of bytes, in UTF-8
COPIED_AT_ONCE = 1000  # examples in memory while dumping


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of several that are one character together, of which this is number `part`."""

    text: str
    part: int = 1
    parts: int = 1


def run(args: argparse.Namespace) -> int:
    """Run `tunewright data show` and return its exit code.

    Raises:
        DataError: no such dataset or row.
        StorageError: the dump cannot be written.
    """
    config = compose([args.name], args.overrides, args.config_dir, args.dir)
    check(config, find_devices())
    if args.dump and args.dump.exists():
        raise StorageError(f"{args.dump} is there already: name a new file.")
    set_environment(config)
    tokens = make_tokens(config)
    cached = tokens.cache.train[0]
    if args.dump:
        print(f"Wrote {dump(cached, args.dump):,} examples of {cached.name} to {args.dump}.")
    if args.row is not None or not args.dump:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(row_lines(cached, tokens.tokenizer, args.row or 0, ids=args.ids, colour=colour)))
    return 0


def row_lines(
    cached: CachedDataset, tokenizer: PreTrainedTokenizerBase, row: int, *, ids: bool, colour: bool
) -> list[str]:
    """Return lines that show a row: what became of it, then its tokens, or why it was dropped.

    Raises:
        DataError: there is no such row.
    """
    import numpy as np

    from tunewright.trainer.data.render import IGNORED
    from tunewright.trainer.data.tokenization import excerpt

    read = cached.outcome.read
    if not 0 <= row < read:
        raise DataError(f"{cached.name} has no row {row}: rows go from 0 to {read - 1}.")
    line = cached.table().slice(row, 1).to_pylist()[0]
    if line["reason"] >= 0:
        source = next(islice(cached.rows, row, None))
        return [f"{cached.name} row {row}: dropped, {cached.outcome.reasons[line['reason']]}", f"  {excerpt(source)}"]
    lines = []
    examples = np.flatnonzero(cached.part.rows == row)
    for number, index in enumerate(examples.tolist(), 1):
        example = cached.examples()[index]
        input_ids, labels = example["input_ids"], example["labels"]
        trained = sum(label != IGNORED for label in labels)
        which = f", example {number} of {len(examples)}" if len(examples) > 1 else ""
        cut = "truncated" if line["truncated"] else "not truncated"
        lines.append(f"{cached.name} row {row}{which}: {len(input_ids)} tokens, {trained} trained, {cut}")
        made = pieces(tokenizer, input_ids)
        if ids:
            lines += _id_lines(input_ids, labels, made)
        else:
            lines += [_legend(colour), *_token_text(made, [label != IGNORED for label in labels], colour).split("\n")]
    return lines


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Piece]:
    """Return the text of each token, special tokens included.

    Tokens of bytes may hold a part of a character: the text of all its parts stands at the first of them. Each text is
    what decoding gains by the token, because some tokenizers drop the space in front of the first one.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    made: list[Piece] = []
    before = first = 0
    for end in range(1, len(ids) + 1):
        through, known = decode(ids[before:end]), decode(ids[before:first])
        text = through[len(known) :] if through.startswith(known) else decode(ids[first:end])
        goes_on = end < len(ids) and ids[end] not in special and end - first < LONGEST_CHARACTER
        if text.endswith("\N{REPLACEMENT CHARACTER}") and goes_on:
            continue
        parts = end - first
        made += [Piece(text if part == 1 else "", part, parts) for part in range(1, parts + 1)]
        before, first = first, end
    return made


def _legend(colour: bool) -> str:
    if not colour:
        return "  [[ ]] around what is trained, | between tokens, || inside a character that several tokens make"
    return f"  {TRAINED[0]}trained{RESET}, {MASKED[0]}masked{RESET}; the shade changes from token to token"


def _token_text(made: Sequence[Piece], trained: Sequence[bool], colour: bool) -> str:
    texts = [shown(piece.text) for piece in made]
    if colour:
        shades = [(TRAINED if learnt else MASKED)[index % 2] for index, learnt in enumerate(trained)]
        return "".join(f"{shade}{text}{RESET}" for shade, text in zip(shades, texts, strict=True))
    marked = "[[" if trained[0] else ""
    for text, now, then in zip(texts, trained, [*trained[1:], False], strict=True):
        mark = {(False, True): "[[", (True, False): "]]"}.get((now, then), "|")
        # A mark after the end of a line stands on that line, except one that begins what is trained.
        marked += f"{text[:-1]}{mark}\n" if text.endswith("\n") and mark != "[[" else text + mark
    return marked.removesuffix("\n").removesuffix("|")


def shown(text: str) -> str:
    """Line ends stay line ends, with a mark; all else that a terminal would obey becomes an escape."""
    return "↵\n".join(visible(line) for line in text.split("\n"))


def _id_lines(ids: Sequence[int], labels: Sequence[int], made: Sequence[Piece]) -> list[str]:
    lines = [f"{'index':>6}  {'id':>7}  {'label':>7}  text"]
    text = ""
    for index, (number, label, piece) in enumerate(zip(ids, labels, made, strict=True)):
        text = piece.text if piece.part == 1 else text
        part = f"  part {piece.part} of {piece.parts}" if piece.parts > 1 else ""
        lines.append(f"{index:>6}  {number:>7}  {label:>7}  {text!r}{part}")
    return lines


def dump(cached: CachedDataset, file: Path) -> int:
    """Write all examples of a dataset as JSONL and return how many there are; an older file stays until it is done.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        with written_aside(file) as staging, staging.open("w", encoding="utf-8") as out:
            for part in cached.examples().iter(COPIED_AT_ONCE):
                for row, ids, labels in zip(part["row"], part["input_ids"], part["labels"], strict=True):
                    out.write(json.dumps({"row": row, "input_ids": ids, "labels": labels}) + "\n")
    except OSError as error:
        raise StorageError(f"Cannot write {file}: {error.strerror}.") from error
    return cached.outcome.examples
