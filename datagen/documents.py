"""The user's own documents and seed examples, cut into chunks that ground what is asked for."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.datagen.chunking import cut
from tunewright.errors import DataError, did_you_mean

AGAIN = "Save it as a PDF again, or as plain text."
SEEDS = (("instruction", "input", "output"), ("question", "answer"), ("text",))
OPTIONAL = "input"
SHAPES = '{"instruction": ..., "input": ..., "output": ...}, {"question": ..., "answer": ...} or {"text": ...}'


@dataclass(frozen=True)
class Chunk:
    """A piece of a document, or one seed example."""

    file: str
    number: int  # from 1, in its file
    text: str
    digest: str  # SHA-256 of the text


def read_sources(paths: list[str]) -> list[Chunk]:
    """Read files, folders (all files in them of a known kind) and patterns such as `docs/**/*.md`.

    Files come in the order of `paths`, and sorted where one path stands for several; none is read twice.

    Raises:
        DataError: a path that leads to no file, a file of another kind, or one that is empty, damaged or encrypted.
    """
    found: dict[str, str] = {}
    for path in paths:
        for file in _expanded(path):
            found.setdefault(os.path.realpath(file), file)
    return [chunk for file in found.values() for chunk in _read(file)]


def _expanded(path: str) -> list[str]:
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        files = [file for file in _visible(place) if Path(file).suffix.lower() in READERS]
        if not files:
            raise DataError(f"{path}: there is no file in this folder that can be read. {_endings()}")
        return files
    if os.path.exists(place):
        return [place]
    files = sorted(filter(os.path.isfile, glob.glob(place, recursive=True)))
    if not files:
        folder = os.path.dirname(place) or "."
        near = did_you_mean(os.path.basename(place), os.listdir(folder)) if os.path.isdir(folder) else ""
        raise DataError(f"{path}: there is no such file or folder, and nothing matches it as a pattern.{near}")
    return files


def _visible(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in sorted(names) if not name.startswith("."))


def _endings() -> str:
    return f"Known are {', '.join(READERS)}."


def _read(file: str) -> list[Chunk]:
    ending = Path(file).suffix.lower()
    if ending not in READERS:
        raise DataError(
            f"{file}: files that end with '{ending}' cannot be read. {_endings()} "
            "Save it as one of these, or leave it out."
        )
    texts = READERS[ending](file)
    if not texts:
        raise DataError(f"{file} holds no text. Put text into it or leave it out.")
    return [Chunk(file, number, text, _digest(text)) for number, text in enumerate(texts, 1)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# ---- documents ------------------------------------------------------------------------------------------------------


def _read_text(file: str) -> list[str]:
    return cut(_utf8(file), markdown=False)


def _read_markdown(file: str) -> list[str]:
    return cut(_utf8(file), markdown=True)


def _utf8(file: str) -> str:
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}:{line} holds a byte that is not UTF-8. Save the file as UTF-8, for example with "
            f"`iconv -f LATIN1 -t UTF-8`."
        ) from error


def _read_pdf(file: str) -> list[str]:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(file)
        locked = reader.is_encrypted and not reader.decrypt("")
        count = 0 if locked else len(reader.pages)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    except DependencyError:  # a cipher that needs another package
        locked = True
    except Exception as error:  # pypdf meets damage with whatever its parser runs into
        raise DataError(f"{file} is no readable PDF ({error}). {AGAIN}") from error
    if locked:
        raise DataError(f"{file} is encrypted. Save it without a password, for example with `qpdf --decrypt`.")
    pages = []
    for number in range(count):
        try:
            pages.append(reader.pages[number].extract_text().strip())
        except Exception as error:  # as above
            raise DataError(f"{file}, page {number + 1}: its text cannot be read ({error}). {AGAIN}") from error
    if count and not "".join(pages):
        raise DataError(f"{file}: none of its {count} pages holds text, only pictures. Recognise the text first (OCR).")
    # A word that was divided at the end of a line is one word again.
    return cut(re.sub(r"(?<=[^\W\d_])-\n(?=[^\W\d_])", "", "\n\n".join(pages)), markdown=False)


# ---- seed examples --------------------------------------------------------------------------------------------------


def _read_json(file: str) -> list[str]:
    text = _utf8(file)
    if not text.strip():
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{getattr(error, 'lineno', 1)} is not JSON ({error}).{_lines_hint(text)}") from error
    if not isinstance(found, list):
        found = [found]
    return [_seed(item, f"{file}, example {number}") for number, item in enumerate(found, 1)]


def _lines_hint(text: str) -> str:
    first = text.lstrip().split("\n", 1)[0].strip()
    if first.startswith("{") and first.endswith("}"):
        return " One object in each line is JSON Lines: let the name of the file end with .jsonl."
    return ' Write a list: [{"question": ..., "answer": ...}, ...].'


def _read_jsonl(file: str) -> list[str]:
    texts = []
    # Not splitlines: a JSON string may hold other characters that end a line.
    for number, line in enumerate(_utf8(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number} is not JSON ({error}). Write one object into each line.") from error
        texts.append(_seed(item, f"{file}:{number}"))
    return texts


def _seed(item: Any, where: str) -> str:
    """Return an example as text: its fields with their names, or a plain text as it is."""
    if not isinstance(item, dict):
        raise DataError(f"{where} is {json.dumps(item)[:60]}, not an object. Write {SHAPES}.")
    for names in SEEDS:
        if all(name in item or name == OPTIONAL for name in names):
            break
    else:
        keys = ", ".join(map(repr, item)) or "none"
        raise DataError(f"{where} has the keys {keys}. Write {SHAPES}.")
    parts = []
    for name in names:
        value = item.get(name)
        if name == OPTIONAL and value in (None, ""):
            continue
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: `{name}` is {json.dumps(value)[:60]}. Write a text that is not empty.")
        parts.append(value.strip() if names == ("text",) else f"{name.capitalize()}: {value.strip()}")
    return "\n".join(parts)


READERS = {
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".txt": _read_text,
    ".text": _read_text,
    ".pdf": _read_pdf,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}
