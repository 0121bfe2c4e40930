"""Documents and seed examples as chunks; the PDFs are real ones, written here."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfReader, PdfWriter

from tunewright.datagen.chunking import SIZE, cut
from tunewright.datagen.documents import Chunk, read_sources
from tunewright.errors import DataError


def pdf(pages: list[list[str]]) -> bytes:
    """A PDF of pages of lines, in Helvetica."""
    fonts = "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for number, lines in enumerate(pages):
        shown = " ".join(f"({line}) Tj T*" for line in lines)
        content = f"BT /F1 12 Tf 14 TL 72 720 Td {shown} ET"
        page = f"/Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R {fonts}"
        objects += [f"<< {page} >>", f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n"
    return out + f"{end}startxref\n{len(out)}\n%%EOF\n".encode()


def texts(*paths: Path | str) -> list[str]:
    return [chunk.text for chunk in read_sources([str(path) for path in paths])]


def bare(text: str) -> str:
    return re.sub(r"\s", "", text)


TEXTS = st.lists(
    st.sampled_from(
        [
            "word",
            "A sentence. ",
            "\n\n",
            "\n",
            " ",
            "# Heading\n",
            "```\n",
            "汉字。",
            "汉" * 40,
            "long " * 60,
            "x" * 200,
        ]
    ),
    max_size=120,
).map("".join)


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.booleans())
def test_nothing_is_lost_between_chunks_and_no_word_is_divided(text: str, markdown: bool) -> None:
    chunks = cut(text, markdown=markdown)
    assert bare("".join(chunks)) == bare(text)
    assert all(chunk == chunk.strip() and chunk for chunk in chunks)
    assert all(len(chunk) <= SIZE or not re.search(r"\s|汉", chunk) for chunk in chunks)
    assert (
        "\n".join(chunks).replace("汉", " 汉 ").replace("。", " 。 ").split()
        == text.replace("汉", " 汉 ").replace("。", " 。 ").split()
    )


def test_markdown_is_cut_before_headings_and_between_paragraphs() -> None:
    paragraph = "Boats are tied up at night. " * 20  # 560 characters
    text = f"# Boats\n\n{paragraph}\n\n## Night\n\n{paragraph}\n\n{paragraph}\n\n## Day\n\n{paragraph}\n\n{paragraph}\n"
    chunks = cut(text, markdown=True)
    assert [chunk.split("\n")[0] for chunk in chunks] == ["# Boats", "## Night", "## Day"]
    assert [chunk.count("Boats are") for chunk in chunks] == [20, 40, 40]


def test_a_heading_goes_with_what_follows_it_and_a_fence_stays_whole() -> None:
    code = "```python\n# not a heading\n\n\nprint(1)\n```\n"
    text = "Short words here. " * 20 + f"\n\n## Code\n\n{'A. ' * 400}\n\n{code}{'B. ' * 200}\n## After\nC."
    chunks = cut(text, markdown=True)
    assert [chunk.startswith("## Code") for chunk in chunks].count(True) == 1
    assert sum(code.strip() in chunk for chunk in chunks) == 1
    assert chunks[-1] == "## After\nC."


def test_long_paragraphs_are_cut_at_the_ends_of_sentences() -> None:
    for sentence in ('The harbour master (an old man) said: "No more boats today!" ', "港口的老船长说今天不再有船。"):
        chunks = cut(sentence * 200, markdown=False)
        assert len(chunks) > 1
        assert all(len(chunk) <= SIZE and chunk.startswith(sentence[:3]) for chunk in chunks)
        assert all(chunk.endswith(sentence.strip()[-3:]) for chunk in chunks)
        assert min(map(len, chunks[:-1])) > 0.9 * SIZE


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\ufeff# Title\r\n\r\nText.", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Grüße.\n", encoding="utf-8")
    (tmp_path / "c.pdf").write_bytes(pdf([["The first page ends with a divi-", "ded word."], ["The second page."]]))
    seeds = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "output": "Hi."},
        {"question": "Why?", "answer": "So.", "id": 7},
        {"text": "Plain.\u2028Still the same."},
    ]
    expected = [
        "Instruction: Add.\nInput: 1 2\nOutput: 3",
        "Instruction: Greet.\nOutput: Hi.",
        "Question: Why?\nAnswer: So.",
        "Plain.\u2028Still the same.",
    ]
    (tmp_path / "d.json").write_text(json.dumps(seeds), encoding="utf-8")
    (tmp_path / "e.JSONL").write_text("\n\n".join(json.dumps(seed, ensure_ascii=False) for seed in seeds) + "\n")
    (tmp_path / "f.png").write_bytes(b"\x89PNG")
    chunks = read_sources([str(tmp_path)])
    assert [chunk.text for chunk in chunks[:3]] == [
        "# Title\n\nText.",
        "Grüße.",
        "The first page ends with a divided word.\n\nThe second page.",
    ]
    assert [chunk.text for chunk in chunks[3:]] == expected * 2
    assert [(Path(chunk.file).name, chunk.number) for chunk in chunks] == [
        ("a.md", 1),
        ("b.txt", 1),
        ("c.pdf", 1),
        *[("d.json", number) for number in range(1, 5)],
        *[("e.JSONL", number) for number in range(1, 5)],
    ]
    assert chunks[1] == Chunk(str(tmp_path / "b.txt"), 1, "Grüße.", hashlib.sha256("Grüße.".encode()).hexdigest())


def test_folders_and_patterns_are_sorted_and_nothing_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("z.md", "b/y.md", "b/x.txt", "a/w.md", ".git/hidden.md", "b/.v.md", "[1].md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert texts(".") == ["[1].md", "z.md", "a/w.md", "b/x.txt", "b/y.md"]
    assert texts("**/*.md") == ["[1].md", "a/w.md", "b/y.md", "z.md"]
    assert texts("z.md", "b", "*.md", tmp_path / "b" / "x.txt", "[1].md") == ["z.md", "b/x.txt", "b/y.md", "[1].md"]


def encrypted(data: bytes, folder: Path, password: str) -> bytes:
    (folder / "plain").write_bytes(data)
    writer = PdfWriter(PdfReader(folder / "plain"))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(folder / "locked")
    return (folder / "locked").read_bytes()


def test_a_pdf_that_only_forbids_changes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(encrypted(pdf([["Read me."]]), tmp_path, ""))
    assert texts(tmp_path / "a.pdf") == ["Read me."]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.docx", b"PK", r"a\.docx: .*'\.docx' cannot be read.*\.md, .*\.pdf.*Save it"),
        ("a", b"x", r"''.*\.md"),
        ("a.md", b"", r"a\.md holds no text"),
        ("a.txt", b" \n\n", r"a\.txt holds no text"),
        ("a.jsonl", b"\n", r"a\.jsonl holds no text"),
        ("a.json", b"[]", r"a\.json holds no text"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt:2 .*not UTF-8.*iconv"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', r"a\.jsonl:3 is not JSON.*each line"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r'a\.jsonl:2 is \["b"\], not an object.*"question"'),
        ("a.jsonl", b'{"prompt": "a"}\n', r"a\.jsonl:1 has the keys 'prompt'.*\"question\""),
        ("a.json", b'[\n{"text": "a"},\n{"text": }]', r"a\.json:3 is not JSON.*Write a list"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', r"a\.json:2 is not JSON.*\.jsonl"),
        ("a.json", b'[{"text": "a"}, {"text": 3}]', r"a\.json, example 2: `text` is 3.*not empty"),
        ("a.json", b'[{"instruction": "a", "output": " "}]', r"example 1: `output`"),
        ("a.json", b"[" * 100000, r"a\.json:1 is not JSON"),
        ("a.pdf", b"", r"a\.pdf is no readable PDF.*plain text"),
        ("a.pdf", b"%PDF-1.4\nnothing", r"a\.pdf is no readable PDF"),
        ("a.pdf", pdf([[], []]), r"a\.pdf: none of its 2 pages holds text.*OCR"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_sources([str(tmp_path / name)])


def test_an_encrypted_pdf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(encrypted(pdf([["Secret."]]), tmp_path, "password"))
    with pytest.raises(DataError, match=r"a\.pdf is encrypted.*qpdf"):
        texts(tmp_path / "a.pdf")


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    damaged = pdf([["One."], ["Two."]]).replace(b"/Length 55 >>", b"/Length 55 /Filter /Nope >>")
    second = damaged.rindex(b"/Length")
    damaged = damaged[:second] + damaged[second:].replace(b">>\nstream", b"/Filter /Nope >>\nstream", 1)
    (tmp_path / "a.pdf").write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.pdf, page 2: its text cannot be read"):
        texts(tmp_path / "a.pdf")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"notse\.md: there is no such file.*Did you mean 'notes\.md'"):
        texts(tmp_path / "notse.md")
    with pytest.raises(DataError, match=r"\*\.pdf: there is no such file or folder, and nothing matches"):
        texts(tmp_path / "*.pdf")
    with pytest.raises(DataError, match=r"empty: there is no file in this folder that can be read.*\.jsonl"):
        texts(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        texts(tmp_path / "a.txt")
