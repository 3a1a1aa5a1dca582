"""What is a document, what belongs to it, which split it goes to, and that parts never change any of that."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litmoe.cli import UserError
from litmoe.data import documents
from litmoe.data.documents import END_OF_TEXT, Rules, cut_document, documents_of, parts, split_of, text_files


def read(part: documents.Part, rules: Rules) -> documents.PartText:
    """All of a part at once."""
    found = list(documents.read(part, rules))
    pieces = [piece for some in found for piece in some.pieces]
    return documents.PartText(pieces, sum(some.empty for some in found), sum(some.marks for some in found))


def texts(path: Path, rules: Rules | None = None, split: str | None = "train", may_cut: bool = True) -> list[str]:
    """The documents of a file, read part by part."""
    rules = rules or Rules()
    found, unfinished = [], ""
    for part in parts(path, rules, split, may_cut=may_cut):
        for piece in read(part, rules).pieces:
            unfinished += piece.text
            if piece.closes:
                found.append(unfinished)
                unfinished = ""
    assert unfinished == ""
    return found


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of some 100 bytes, so that small files come in many."""
    monkeypatch.setattr(documents, "PART_BYTES", 100)
    monkeypatch.setattr(documents, "LONG_DOCUMENT_BYTES", 300)


# --- .txt ---


def test_a_file_without_a_mark_is_one_document(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\n one\n\n two \n")) == ["\n one\n\n two \n"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_line_with_the_mark_ends_a_document(tmp_path: Path, line_end: str, bom: str) -> None:
    lines = [END_OF_TEXT, "a", "", "b", END_OF_TEXT + "  ", "c", END_OF_TEXT]
    assert texts(write(tmp_path / "a.txt", bom + line_end.join(lines))) == ["a\n\nb", "c"]


def test_a_mark_inside_a_line_is_text_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"a {END_OF_TEXT} b\n{END_OF_TEXT}c\nd{END_OF_TEXT}\n{END_OF_TEXT}\ne")
    assert texts(path) == [f"a {END_OF_TEXT} b\n{END_OF_TEXT}c\nd{END_OF_TEXT}", "e"]
    (part,) = parts(path, Rules(), "train", may_cut=True)
    assert read(part, Rules()).marks == 3


def test_a_separator_of_ones_own_stands_beside_the_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"a\n---\nb --- c\n----\n{END_OF_TEXT}\nd\n")
    assert texts(path, Rules(separator="---")) == ["a", "b --- c\n----", "d"]


def test_the_empty_separator_is_an_empty_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\nb\n\nc\r\n\r\nd\n  \ne")
    assert texts(path, Rules(separator="")) == ["a\nb", "c", "d", "e"]


def test_documents_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"a\n{END_OF_TEXT}\n \n\n{END_OF_TEXT}\n{END_OF_TEXT}\nb\n{END_OF_TEXT}\n")
    (part,) = parts(path, Rules(), "train", may_cut=True)
    found = read(part, Rules())
    assert [piece.text for piece in found.pieces] == ["a", "b"]
    assert found.empty == 2


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_parts_hold_the_documents_of_the_whole(tmp_path: Path, small_parts: None, line_end: str) -> None:
    wanted = [f"Document {i}:\n" + "word \u00e9\u4e2d " * (i % 9) + "end" for i in range(60)]
    path = write(tmp_path / "a.txt", f"\n{END_OF_TEXT}\n".join(wanted).replace("\n", line_end))
    found = list(parts(path, Rules(), "train", may_cut=True))
    assert len(found) > 10 and sum(part.size for part in found) == path.stat().st_size
    assert texts(path) == wanted


def test_parts_do_not_depend_on_where_a_mark_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark that straddles the target size of a part once went missing when it is searched from there."""
    wanted = ["a" * 30, "b" * 30, "c" * 30]
    path = write(tmp_path / "a.txt", f"\n{END_OF_TEXT}\n".join(wanted))
    for size in range(1, 120):
        monkeypatch.setattr(documents, "PART_BYTES", size)
        assert texts(path) == wanted, size


def test_a_long_document_comes_in_pieces(tmp_path: Path, small_parts: None) -> None:
    """Cut after a lone line end or before a lone space, never inside a run of white space."""
    blanks = ["\n", "\n\n", "  ", " ", "\u3000\n", ".\n ", "\r\n", "1 ", " 2"]
    long = "Begin" + "".join(f"{blanks[i * 7 % 9]}w\u00e9rd" for i in range(500)) + "end"
    path = write(tmp_path / "a.txt", f"short\n{END_OF_TEXT}\n{long}\n{END_OF_TEXT}\nlast")
    assert texts(path) == ["short", long.replace("\r", ""), "last"]
    found = [piece for part in parts(path, Rules(), "train", may_cut=True) for piece in read(part, Rules()).pieces]
    assert len(found) > 20
    for piece, following in pairwise(found):
        if not piece.closes:
            around = piece.text[-2:] + "|" + following.text[:2]
            assert re.fullmatch(r"\S\n\|\S.|.[^\W\d]\| [^\W\d]", around), around
    # A tokenizer that looks across words gets it whole.
    assert all(part.opens and part.closes for part in parts(path, Rules(), "train", may_cut=False))
    assert texts(path, may_cut=False) == texts(path)


def test_a_long_document_goes_to_the_split_of_its_hash_whole(tmp_path: Path, small_parts: None) -> None:
    splits = set()
    for i in range(20):
        long = "\n".join(f"Book {i}, line {j}." for j in range(50))
        path = write(tmp_path / f"{i}.txt", long)
        rules = Rules(val_fraction=0.5)
        pieces = [piece for part in parts(path, rules, None, may_cut=True) for piece in read(part, rules).pieces]
        assert len(pieces) > 3
        assert {piece.split for piece in pieces} == {split_of(long, 0.5)}
        splits.add(pieces[0].split)
    assert splits == {"train", "val"}


def test_a_long_document_is_cut_once_where_each_document_is(tmp_path: Path, small_parts: None) -> None:
    long = "\n".join(f"Line {i} of it." for i in range(100))
    path = write(tmp_path / "a.txt", long)
    rules = Rules(val_fraction=0.2, cut=True)
    pieces = [piece for part in parts(path, rules, None, may_cut=True) for piece in read(part, rules).pieces]
    train = "".join(piece.text for piece in pieces if piece.split == "train")
    val = "".join(piece.text for piece in pieces if piece.split == "val")
    assert train + "\n" + val == long
    assert val.startswith("Line ")
    assert 0.15 < len(val) / len(long) < 0.25
    assert [piece.split for piece in pieces if piece.closes] == ["train", "val"]


def test_text_that_is_not_utf8_names_file_offset_and_line(tmp_path: Path, small_parts: None) -> None:
    good = f"one line\n{END_OF_TEXT}\n" * 20
    path = write(tmp_path / "latin.txt", good.encode() + "caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=rf"latin\.txt is not UTF-8: byte 0xe9 at offset {len(good) + 3} \(line 41\)"):
        texts(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, encoding: str, line_end: str) -> None:
    wanted = ["  caf\u00e9 \U0001f600\n\n x", "\u4e2d\u6587 "]
    text = f"\n{END_OF_TEXT}\n".join(wanted)
    rows = line_end.join(json.dumps({"text": text}, ensure_ascii=False) for text in wanted) + line_end
    assert texts(write(tmp_path / "a.txt", text.replace("\n", line_end).encode(encoding))) == wanted
    assert texts(write(tmp_path / "a.md", text.replace("\n", line_end).encode(encoding))) == wanted
    assert texts(write(tmp_path / "a.jsonl", rows.encode(encoding))) == wanted
    assert texts(write(tmp_path / "a.jsonl.gz", gzip.compress(rows.encode(encoding)))) == wanted
    csv = "id,text" + line_end + "".join(f'1,"{text}"{line_end}' for text in wanted)
    assert texts(write(tmp_path / "a.csv", csv.encode(encoding))) == wanted


# --- .jsonl and .parquet ---


def test_jsonl_rows_are_documents(tmp_path: Path, small_parts: None) -> None:
    rows = [{"id": i, "text": f"Row {i}\r\nand more \u00e9"} for i in range(50)]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n")
    assert texts(path) == [f"Row {i}\r\nand more \u00e9" for i in range(50)]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(50), "text": [f"Row {i}" for i in range(50)]}), path, row_group_size=7)
    assert len(list(parts(path, Rules(), "train", may_cut=True))) == 8
    assert texts(path) == [f"Row {i}" for i in range(50)]


def test_empty_rows_are_left_out_and_marks_end_documents_in_rows_too(tmp_path: Path) -> None:
    values = ["a", None, "", " \n", f"b\n{END_OF_TEXT}\nc", f"d {END_OF_TEXT} e"]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": value}) for value in values))
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": values}), parquet)
    for path in (jsonl, parquet):
        (part,) = parts(path, Rules(), "train", may_cut=True)
        found = read(part, Rules())
        assert [piece.text for piece in found.pieces] == ["a", "b", "c", f"d {END_OF_TEXT} e"]
        assert (found.empty, found.marks) == (3, 1)


@pytest.mark.parametrize(
    ("row", "column", "wanted"),
    [
        ({"text": "right", "title": "wrong"}, None, "right"),
        ({"id": 1, "story": "right"}, None, "right"),
        ({"text": "wrong", "story": "right"}, "story", "right"),
    ],
)
def test_the_text_column_is_found_or_named(tmp_path: Path, row: dict, column: str | None, wanted: str) -> None:
    rules = Rules(text_column=column)
    assert texts(write(tmp_path / "a.jsonl", json.dumps(row)), rules) == [wanted]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", rules) == [wanted]


@pytest.mark.parametrize(
    ("lines", "column", "message"),
    [
        (['{"a": "x", "b": "y"}'], None, "'a', 'b'.*--text_column"),
        (['{"text": "x"}', '{"texte": "y"}'], None, "line 2: no field 'text' .*'texte'"),
        (['{"text": "x"}'], "story", "line 1: no field 'story'"),
        (['{"text": "x"}', "", '{"text": 5}'], None, "line 3: int where text was expected"),
        (['{"text": "x"}', '{"text": "y"'], None, "line 2: not JSON"),
        (['["x"]'], None, "line 1: list where an object"),
        ([b'{"text": "caf\xe9"}'], None, "not UTF-8: byte 0xe9 at offset 13"),
    ],
)
def test_a_broken_jsonl_names_the_line(tmp_path: Path, lines: list, column: str | None, message: str) -> None:
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    with pytest.raises(UserError, match=message):
        texts(write(tmp_path / "a.jsonl", data), Rules(text_column=column))


def test_a_broken_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet"):
        texts(write(tmp_path / "a.parquet", b"PAR1 but not really PAR1"))
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="--text_column"):
        texts(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no column 'text'"):
        texts(tmp_path / "b.parquet", Rules(text_column="text"))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    """JSON can write what UTF-8 cannot; encoding it would end the whole run."""
    path = write(tmp_path / "a.jsonl", '{"text": "a \\ud83d b \\ud83d\\ude00"}')
    assert texts(path) == ["a \ufffd b \U0001f600"]


# --- splits ---


def test_the_split_depends_on_the_document_alone() -> None:
    many = [f"Document number {i}." for i in range(4000)]
    val = {text for text in many if split_of(text, 0.1) == "val"}
    assert 0.08 < len(val) / len(many) < 0.12
    # A larger share keeps every document that was in the smaller one.
    assert val <= {text for text in many if split_of(text, 0.3) == "val"}


def test_the_same_document_has_the_same_split_in_every_format(tmp_path: Path) -> None:
    many = [f"Document number {i}.\nIt has two lines." for i in range(200)]
    write(tmp_path / "a.txt", f"\n{END_OF_TEXT}\n".join(many))
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": " " + text.replace("\n", "\r\n")}) for text in many))
    pq.write_table(pa.table({"text": many}), tmp_path / "a.parquet")
    rules = Rules(val_fraction=0.3)
    found: list[dict[str, str]] = []
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        pieces = [p for part in parts(tmp_path / name, rules, None, may_cut=True) for p in read(part, rules).pieces]
        found.append({documents.clean(piece.text): piece.split for piece in pieces})
    assert found[0] == found[1] == found[2] == {text: split_of(text, 0.3) for text in many}
    assert set(found[0].values()) == {"train", "val"}


@pytest.mark.parametrize("blank", ["\n", " ", ". "])
def test_a_document_is_cut_where_a_line_a_sentence_or_a_word_ends(blank: str) -> None:
    text = blank.join(f"word{i}" for i in range(200))
    head, tail = cut_document(text, 0.1)
    assert text in (head + blank + tail, head + " " + tail)
    assert 0.07 < len(tail) / len(text) < 0.13


def test_a_single_word_is_not_cut() -> None:
    assert cut_document("x" * 100, 0.1) == ("x" * 100, "")


def test_documents_of_is_what_reading_a_file_gives(tmp_path: Path) -> None:
    text = f"a\r\n{END_OF_TEXT}\r\nb\n\nc\n{END_OF_TEXT}\nd"
    assert list(documents_of(text)) == texts(write(tmp_path / "a.txt", text)) == ["a", "b\n\nc", "d"]


def test_text_files_come_in_a_fixed_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.jsonl", "a/b.PARQUET", ".hidden.txt", ".git/x.txt", "notes.md", "a-a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in text_files(tmp_path)]
    assert found == ["a-a.txt", "a/b.PARQUET", "a/c.jsonl", "b.txt", "notes.md"]


SEPARATOR = "\n<|endoftext|>\n"


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("shift", range(-20, 3))
def test_a_long_document_ends_and_begins_at_every_separator(
    tmp_path: Path, shift: int, bom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Separators were missed where they lay across the end of what is searched at once, came twice or came first."""
    monkeypatch.setattr(documents, "PART_BYTES", 200)
    monkeypatch.setattr(documents, "LONG_DOCUMENT_BYTES", 800)
    long = "alpha beta gamma " * 80 + "end"
    filler = ("word " * 60)[: 200 + shift - 24] + "z"
    texts = [
        f"small doc{SEPARATOR}{filler}{SEPARATOR}{long}{SEPARATOR}last",
        f"A{SEPARATOR}<|endoftext|>\n{long}",
        f"<|endoftext|>\n{long}{SEPARATOR}last",
        f"{filler}\n<|endoftext|> is said here {long}{SEPARATOR}x",
    ]
    for text in texts:
        path = tmp_path / "long.txt"
        path.write_text(bom + text, encoding="utf-8", newline="\n")
        found, open_document = [], ""
        for part in documents.parts(path, documents.Rules(), "train", may_cut=True):
            for some in documents.read(part, documents.Rules()):
                for piece in some.pieces:
                    open_document += piece.text
                    if piece.closes:
                        found.append(open_document)
                        open_document = ""
        assert not open_document
        assert found == [document for document in documents.documents_of(text) if document], text[:60]


def test_null_in_the_first_row_is_an_empty_text(tmp_path: Path) -> None:
    """Another field, the only one with a string there, became the text."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null, "url": "http://a"}\n{"text": "Story.", "url": "http://b"}\n', encoding="utf-8")
    (part,) = documents.parts(path, documents.Rules(), "train", may_cut=True)
    assert [piece.text for some in documents.read(part, documents.Rules()) for piece in some.pieces] == ["Story."]


def test_a_column_that_holds_no_text_is_refused_and_a_dictionary_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    words = pa.array(["Story.", "Story."]).dictionary_encode()
    pq.write_table(pa.table({"messages": [[{"content": "a"}], []], "text": words}), path)
    with pytest.raises(UserError, match=r"'messages' holds list.*its columns with text: 'text'"):
        list(documents.parts(path, documents.Rules(text_column="messages"), "train", may_cut=True))
    (part,) = documents.parts(path, documents.Rules(), "train", may_cut=True)
    assert [piece.text for some in documents.read(part, documents.Rules()) for piece in some.pieces] == ["Story."] * 2


# --- other kinds of files, and compressed ones ---

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
WANTED = ["    y = x + 3\n    return y\n", 'a "quoted", text\r\nof two lines ', "caf\u00e9 \U0001f600"]


def rows_as(kind: str) -> str:
    """``WANTED`` in a file of that kind."""
    rows = [{"id": i, "text": text} for i, text in enumerate(WANTED)]
    if kind in ("csv", "tsv"):
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
        writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
        return file.getvalue()
    if kind == "json":
        return json.dumps(rows, indent=1)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "json of lines"])
def test_rows_of_every_kind_are_kept_exactly(tmp_path: Path, kind: str) -> None:
    ending = kind.split()[0]
    data = rows_as(kind).encode()
    assert texts(write(tmp_path / f"a.{ending}", data)) == WANTED
    for name, compress in COMPRESS.items():
        assert texts(write(tmp_path / f"a.{ending}.{name}", compress(data))) == WANTED


def test_a_json_may_hold_one_object(tmp_path: Path) -> None:
    for indent in (None, 2):
        assert texts(write(tmp_path / "a.json", json.dumps({"text": WANTED[0]}, indent=indent))) == WANTED[:1]
    digits = '[{"n": ' + "9" * 5000 + ', "text": "long number"}]'
    assert texts(write(tmp_path / "b.json", digits)) == ["long number"]


@pytest.mark.parametrize("kind", ["txt", "md"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_compressed_text_gives_the_documents(tmp_path: Path, kind: str, line_end: str) -> None:
    """The same that the plain file gives, wherever separators are and whatever the file ends with."""
    for text in (
        "  one\n\n two \n",
        f"a\n{END_OF_TEXT}\n\tb \n\n{END_OF_TEXT}\nc",
        f"{END_OF_TEXT}\na\n{END_OF_TEXT}\n\nb\n",
        f"a\n{END_OF_TEXT}\n \n{END_OF_TEXT}  \nb\n\n{END_OF_TEXT}\n",
        f"a\n{END_OF_TEXT}\n{END_OF_TEXT}\nb\n",
    ):
        data = text.replace("\n", line_end).encode()
        plain = texts(write(tmp_path / f"a.{kind}", data))
        assert plain == [document for document in documents_of(text) if document.strip()]
        for name, compress in COMPRESS.items():
            assert texts(write(tmp_path / f"a.{kind}.{name}", compress(data))) == plain


@pytest.mark.parametrize("name", COMPRESS)
def test_a_damaged_compressed_file_is_named(tmp_path: Path, name: str) -> None:
    data = COMPRESS[name](b"".join(b'{"text": "%d"}\n' % (i**9) for i in range(2000)))
    for broken in (data[: len(data) // 2], b"not compressed at all", b""):
        with pytest.raises(UserError, match=rf"a\.jsonl\.{name} is damaged or truncated"):
            texts(write(tmp_path / f"a.jsonl.{name}", broken), Rules(skip_broken=True))


# --- white space at the ends ---

ENDS = [
    "    y = x + 3\n    return y\n",
    "\n\nlines\n\n",
    "\tone\t",
    "\u3000wide\u3000",
    "\r\nwin\r\nlines\r\n",
    "\rold\r",
]


def test_white_space_at_the_ends_of_rows_stays(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in ENDS))
    pq.write_table(pa.table({"text": ENDS}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.parquet") == ENDS


def test_a_separator_takes_its_line_ends_alone(tmp_path: Path, small_parts: None) -> None:
    wanted = [text for text in ENDS if "\r" not in text] * 9 + ["last"]
    for end in ("", "\n", f"\n{END_OF_TEXT}\n"):
        path = write(tmp_path / "a.txt", f"\n{END_OF_TEXT}\n".join(wanted) + end)
        assert texts(path) == wanted
    row = f"a \r\n{END_OF_TEXT}\r\n b\n\n{END_OF_TEXT}\n{END_OF_TEXT}\n\tc"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": row}))
    assert texts(path) == ["a ", " b\n", "\tc"]


def test_a_long_document_keeps_its_ends(tmp_path: Path, small_parts: None) -> None:
    long = "\n\n  " + "\n".join(f"    line {i} of it" for i in range(60)) + "\n \n"
    path = write(tmp_path / "a.txt", f"short \n{END_OF_TEXT}\n{long}\n{END_OF_TEXT}\n last")
    assert len(list(parts(path, Rules(), "train", may_cut=True))) > 5
    assert texts(path) == ["short ", long, " last"]
    assert texts(write(tmp_path / "b.txt", path.read_text().replace("\n", "\r\n"))) == ["short ", long, " last"]
    assert texts(write(tmp_path / "c.txt", " \n" * 400 + f"\n{END_OF_TEXT}\nx")) == ["x"]


def test_a_cut_takes_one_line_end_alone(tmp_path: Path, small_parts: None) -> None:
    text = "\n".join("    indented\n" for _ in range(60))
    head, tail = cut_document(text, 0.2)
    assert head + "\n" + tail == text and tail.startswith(("    ", "\n    "))
    assert not cut_document(text.replace("\n", "\r\n"), 0.2)[0].endswith("\r")
    rules = Rules(val_fraction=0.2, cut=True)
    path = write(tmp_path / "a.txt", "\n" + "def f():\n    return 1\n" * 40)
    pieces = [piece for part in parts(path, rules, None, may_cut=True) for piece in read(part, rules).pieces]
    train, val = ("".join(piece.text for piece in pieces if piece.split == split) for split in ("train", "val"))
    assert train + "\n" + val == path.read_text() and val.startswith("def")


def test_white_space_around_it_decides_no_split() -> None:
    for text in ("Document 1.", "Document 2.\nIt has two lines."):
        copies = [text, f"  {text}\n", text.replace("\n", "\r\n") + "\r\n", f"\n{text}"]
        assert len({documents.document_hash(copy) for copy in copies}) == 1


# --- rows that cannot be read ---


def read_all(path: Path, rules: Rules) -> tuple[list[str], int]:
    """The documents of a file, and how many broken rows were left out."""
    found = [some for part in parts(path, rules, "train", may_cut=True) for some in documents.read(part, rules)]
    return [piece.text for some in found for piece in some.pieces], sum(some.broken for some in found)


BROKEN_LINES = {
    "digits": ('{"text": "x", "n": ' + "9" * 5000 + "}", "5000 digits"),
    "nested": ('{"text": "x", "n": ' + "[" * 200_000 + "]" * 200_000 + "}", "recursion"),
    "truncated": ('{"text": "x', "not JSON"),
    "NUL bytes": ("\0" * 9, "not JSON"),
    "list": ('["x"]', "list where an object"),
    "null": ("null", "NoneType where an object"),
    "another field": ('{"texte": "x"}', "no field 'text'"),
    "list of texts": ('{"text": ["x"]}', "'text'"),
    "number": ('{"text": 5}', "'text'"),
    "not UTF-8": ('{"text": "caf\udce9"}', "not UTF-8: byte 0xe9"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_broken_line_is_named_or_left_out(tmp_path: Path, case: str, compressed: bool) -> None:
    line, reason = BROKEN_LINES[case]
    data = f'{{"text": "a"}}\n{line}\n\ufeff{{"text": "b", "n": NaN}}\r\n'.encode("utf-8", "surrogateescape")
    path = write(tmp_path / f"a.jsonl{'.gz' * compressed}", gzip.compress(data) if compressed else data)
    with pytest.raises(UserError, match=rf"a\.jsonl.*, line 2: .*{reason}.*--skip_broken"):
        texts(path)
    assert read_all(path, Rules(skip_broken=True)) == (["a", "b"], 1)


@pytest.mark.parametrize("case", ["nested", "not UTF-8", "list", "number"])
def test_a_broken_element_is_named_or_left_out(tmp_path: Path, case: str) -> None:
    """One bad row of a .json ended the reading of all of it, also with --skip_broken."""
    row = BROKEN_LINES[case][0]
    data = f'[{{"text": "a"}},\n {row}, {{"text": "b"}}]'.encode("utf-8", "surrogateescape")
    path = write(tmp_path / "a.json", data)
    with pytest.raises(UserError, match=r"a\.json, row 2: .*--skip_broken"):
        texts(path)
    assert read_all(path, Rules(skip_broken=True)) == (["a", "b"], 1)


@pytest.mark.parametrize("case", ["nested", "digits", "truncated"])
def test_json_lines_in_a_json_may_begin_broken(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "a.json", f'{BROKEN_LINES[case][0]}\n{{"text": "a"}}\n')
    with pytest.raises(UserError, match=r"a\.json, line 1: .*--skip_broken"):
        texts(path)
    assert read_all(path, Rules(skip_broken=True)) == (["a"], 1)


def test_a_broken_first_line_is_left_out_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ["x"], "id": "1"}\n{"text": "a", "id": "2"}\n')
    with pytest.raises(UserError, match="line 1: its field 'text' holds list"):
        texts(path)
    assert read_all(path, Rules(skip_broken=True)) == (["a"], 1)


@pytest.mark.parametrize("articles", [False, True])
def test_parquet_text_that_is_not_utf8(tmp_path: Path, articles: bool) -> None:
    """Parquet does not check it; reading such a row ended in a traceback."""
    values = pa.array([b" = A = \n", b"good", b"caf\xe9", b"\xff", b"more"], pa.binary())
    column = pa.StringArray.from_buffers(len(values), *values.buffers()[1:])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path, row_group_size=2)
    rules = Rules(skip_broken=True)
    found = [
        some
        for part in parts(path, rules, "train", may_cut=True, articles=() if articles else None)
        for some in documents.read(replace(part, opens=part.start == 0), rules)
    ]
    pieces = [piece.text for some in found for piece in some.pieces]
    assert pieces == (["= A = \ngoodmore"] if articles else [" = A = \n", "good", "more"])
    assert sum(some.broken for some in found) == 2
    with pytest.raises(UserError, match=r"a\.parquet, row 3: .*0xe9 at offset 3.*--skip_broken"):
        texts(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("3,a,b\n", "line 3: 3 fields where the first line names 2"),
        ("3\n", "line 3: 1 fields where"),
        ('3,"a"b\n', "line 3: not a row"),
        ("3,caf\udce9\n", "line 3: not UTF-8: byte 0xe9"),
    ],
)
def test_a_broken_csv_row_is_named_or_left_out(tmp_path: Path, rows: str, message: str) -> None:
    data = f'id,text\n1,"{"long " * 40_000}"\n{rows}4,good\n'
    path = write(tmp_path / "a.csv", data.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=rf"{message}.*--skip_broken"):
        texts(path)
    assert read_all(path, Rules(skip_broken=True)) == (["long " * 40_000, "good"], 1)


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    """All rows after it would be one field, so it is no row to leave out."""
    path = write(tmp_path / "a.csv", 'id,text\n1,a\n2,"b\n3,c\n4,d\n')
    with pytest.raises(UserError, match="line 3: a quote that opens here is never closed"):
        texts(path, Rules(skip_broken=True))


@pytest.mark.parametrize("header", ["1,Once upon a time", "story", "id;text", "text,text"])
def test_a_csv_must_name_its_columns(tmp_path: Path, header: str) -> None:
    with pytest.raises(UserError, match=r"first line must name the columns.*--text_column"):
        texts(write(tmp_path / "a.csv", f"{header}\n{header}\n"))
    assert texts(write(tmp_path / "b.csv", "story\n a \n"), Rules(text_column="story")) == [" a "]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (["a"], "list<element: string>"),
        ({"a": "b"}, "struct<a: string>"),
        (b"a", "binary"),
        (1, "int64"),
        (None, "null"),
    ],
)
def test_a_text_column_of_another_type_is_named(tmp_path: Path, value: object, kind: str) -> None:
    """'none of its fields ('text') is called 'text'' was said of them; another column was taken without a word."""
    pq.write_table(pa.table({"text": [value], "title": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"its field 'text' holds {kind}, expected a string.*'title'.*--text_column"):
        texts(tmp_path / "a.parquet")


def test_fields_without_text_are_named_with_their_type(tmp_path: Path) -> None:
    for row, message in (({"a": 1, "b": ["x"]}, "'a' holds int, 'b' holds list"), ({}, "it has none")):
        for name in ("a.jsonl", "a.json"):
            with pytest.raises(UserError, match=f"none of its fields holds text .{message}.*--text_column"):
                texts(write(tmp_path / name, json.dumps(row)))
