"""Texts cut into chunks, where a reader would cut them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunewright.datagen.rouge import UNSPACED

SIZE = 1500  # characters of a chunk, about
LEAST = 500  # characters from which a chunk ends where a heading follows
FENCE = re.compile(r"\s*(```+|~~~+)")
HEADING = re.compile(r"#{1,6}\s")
SENTENCE = re.compile(r".*?(?:[.!?…]+['\"’”)\]]*(?=\s)|[。！？]+[」』”’）]*|\Z)\s*", re.DOTALL)
WORD = re.compile(rf"\s*(?:[{UNSPACED}]|(?:(?![{UNSPACED}])\S)+|\Z)\s*")


def cut(text: str, *, markdown: bool) -> list[str]:
    """Cut a text into chunks of at most SIZE characters, unless a single word is longer.

    Cuts are before headings and between paragraphs where that is possible, else between sentences, else between
    words. Only white space at the cuts is lost.
    """
    chunks: list[str] = []
    current = ""
    for block, is_heading in _blocks(text, markdown):
        if is_heading and len(current) >= LEAST:
            chunks.append(current)
            current = ""
        for piece in _pieces(block):
            if current and len(current) + len(piece.rstrip()) > SIZE:
                # A heading does not stay behind at the end of a chunk.
                body, heading = _without_last_heading(current) if markdown else (current, "")
                if len(heading) + len(piece.rstrip()) > SIZE:
                    body, heading = current, ""
                chunks.append(body)
                current = heading
            current += piece
    chunks.append(current)
    return [chunk.strip() for chunk in chunks if chunk.strip()]


def _blocks(text: str, markdown: bool) -> Iterator[tuple[str, bool]]:
    """Yield (paragraph with the white space after it, whether it is a heading); code in a fence is one paragraph."""
    block, fence, ended = "", "", False
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line) if markdown else None
        heading = markdown and not fence and HEADING.match(line) is not None
        if block and (heading or (ended and line.strip() and not fence)):
            yield block, _is_heading(block, markdown)
            block = ""
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip(" \t\n`~"):
            fence = ""
        block += line
        ended = not fence and (heading or not line.strip())
    if block:
        yield block, _is_heading(block, markdown)


def _is_heading(block: str, markdown: bool) -> bool:
    return markdown and HEADING.match(block) is not None


def _without_last_heading(chunk: str) -> tuple[str, str]:
    """Return a chunk as (what comes before, the headings at its end)."""
    lines = chunk.splitlines(keepends=True)
    keep = len(lines)
    while keep and (not lines[keep - 1].strip() or HEADING.match(lines[keep - 1])):
        keep -= 1
    if not any(line.strip() for line in lines[keep:]):
        return chunk, ""
    return "".join(lines[:keep]), "".join(lines[keep:])


def _pieces(block: str) -> list[str]:
    """Return a paragraph as it is, or as sentences where it is long, or as words where these are long too."""
    if len(block.rstrip()) <= SIZE:
        return [block]
    pieces: list[str] = []
    for sentence in filter(None, SENTENCE.findall(block)):
        pieces.extend([sentence] if len(sentence.rstrip()) <= SIZE else filter(None, WORD.findall(sentence)))
    return pieces
