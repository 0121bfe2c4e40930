"""README.md and docs/*.md as data: their code blocks, the commands in these, spans in backticks, links and anchors.

A block of commands is fenced with `sh`; a block that shows what a command prints begins with `$ command`. Of a block
that stands behind the remark `FIGURES` the numbers are one machine's, or of one reader's data, and differ elsewhere.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FIGURES = "<!-- figures differ elsewhere -->"
NUMBER = re.compile(r"\b[0-9a-f]{16}\b|\d[\d,.:]*\d|\d")  # digests too


@dataclass(frozen=True)
class Block:
    """A code block; `line` is that of its first line of text, counted from 1."""

    document: str
    line: int
    language: str
    text: str
    figures: bool  # its numbers differ elsewhere


@dataclass(frozen=True)
class Command:
    """What a reader types, and what the document says that it prints (None where it says nothing)."""

    document: str
    line: int
    text: str
    printed: str | None = None
    figures: bool = False

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def error(self) -> str | None:
        """The class of the error with which it ends, by what the document shows."""
        found = re.search(r"^(?:Rank \d+ failed with )?(\w+Error): ", self.printed or "", flags=re.MULTILINE)
        return found[1] if found else None


@dataclass(frozen=True)
class Span:
    """Text in backticks outside code blocks."""

    document: str
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass
class Document:
    """A document taken apart."""

    name: str
    blocks: list[Block] = field(default_factory=list)
    indented: list[Span] = field(default_factory=list)  # lines of blocks that are indented, not fenced
    spans: list[Span] = field(default_factory=list)
    links: list[Span] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    @property
    def commands(self) -> list[Command]:
        return [command for block in self.blocks for command in commands_of(block)]


def documents() -> list[Document]:
    """Return README.md and every docs/*.md, taken apart."""
    paths = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    return [take_apart(str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8")) for path in paths]


def take_apart(name: str, text: str) -> Document:
    """Take the text of a document apart.

    Raises:
        ValueError: a code block has no end.
    """
    found, lines = Document(name), text.splitlines()
    prose = list(lines)  # with code blocked out, so that line numbers stay
    start, figures = None, False
    for index, line in enumerate(lines):
        if line.startswith("```"):
            if start is None:
                start, figures = index, index > 0 and lines[index - 1].strip() == FIGURES
            else:
                body = "\n".join(lines[start + 1 : index])
                found.blocks.append(Block(name, start + 2, lines[start][3:].strip(), body, figures))
                start, prose[index] = None, ""
        if start is not None:
            prose[index] = ""
        elif line.startswith("    "):
            found.indented.append(Span(name, index + 1, line.strip()))
            prose[index] = ""
    if start is not None:
        raise ValueError(f"{name}:{start + 1}: a code block that does not end")
    joined = "\n".join(prose)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", joined):
        found.spans.append(Span(name, _line(joined, match.start()), " ".join(match[1].split())))
    for match in re.finditer(r"\]\(([^)\s]+)\)", joined):
        found.links.append(Span(name, _line(joined, match.start()), match[1]))
    found.anchors = {anchor(line.lstrip("#").strip()) for line in prose if re.match(r"#{1,6} ", line)}
    return found


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands_of(block: Block) -> Iterator[Command]:
    """Yield the commands of a block; one that goes on over several lines (a backslash, an open quote) is one."""
    shown = block.text.startswith("$ ")
    if not shown and block.language != "sh":
        return
    lines = block.text.splitlines()
    index = 0
    while index < len(lines):
        begin, text = index, lines[index].removeprefix("$ ") if shown else lines[index]
        while text.endswith("\\") or _is_open(text):
            index += 1
            text += f"\n{lines[index]}"
        index += 1
        printed = None
        if shown:
            first = index
            while index < len(lines) and not lines[index].startswith("$ "):
                index += 1
            printed = "\n".join(lines[first:index])
        if text.strip() and not text.startswith("#"):
            yield Command(block.document, block.line + begin, text, printed, block.figures)


def words(command: str) -> list[str]:
    """Return what the shell would make of a command, without its comment."""
    return shlex.split(command.replace("\\\n", " "), comments=True)


def matches(printed: str, output: str, figures: bool) -> bool:
    """Return whether a command's output is what a document shows.

    Lines may be broken elsewhere, `...` stands for any text, and with `figures` any number for any other.
    """
    if figures:
        printed, output = NUMBER.sub("0", printed), NUMBER.sub("0", output)
    parts = (r"\s+".join(map(re.escape, part.split())) for part in printed.split("..."))
    return re.fullmatch(r"\s*" + r".*?".join(rf"\s*{part}\s*" for part in parts), output, flags=re.DOTALL) is not None


def _is_open(text: str) -> bool:
    try:
        shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError:
        return True
    return False


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
