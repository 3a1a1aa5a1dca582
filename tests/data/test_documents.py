"""Documents: their exact text, their split, broken rows, duplicates, and long documents in pieces."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litmoe.cli import UserError
from litmoe.data.documents import (
    END_OF_TEXT,
    Batch,
    Counts,
    Rules,
    Unit,
    _divided,
    cut_document,
    document_hash,
    read_unit,
    split_of,
)
from litmoe.data.files import Location

PLAIN = Rules()
ENDS = [
    "    y = x + 3\n    return y\n",
    "\n\nlines\n\n",
    "\tone\t",
    "\u3000wide\u3000",
    "\r\nwin\r\nlines\r\n",
    "\rold\r",
]


def read(
    paths: Path | list[Location], rules: Rules = PLAIN, split: str | None = "train", hashes: set[int] | None = None
) -> tuple[dict[str, list[str]], Counts]:
    """The documents of each split, and the counts."""
    files = tuple(paths) if isinstance(paths, list) else (paths,)
    found: dict[str, list[str]] = {"train": [], "val": []}
    *batches, end = read_unit(Unit(0, split, files, 0), rules, set() if hashes is None else hashes)
    for batch in batches:
        assert isinstance(batch, Batch)
        found[batch.split] += batch.texts
    assert not isinstance(end, Batch)
    return found, end.counts


def texts(path: Path, rules: Rules = PLAIN) -> list[str]:
    return read(path, rules)[0]["train"]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
    return path


# --- text files ---


def test_file_without_separator_is_one_document(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\n one\n\n two \n")) == ["\n one\n\n two \n"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_separator_lines_divide_text(tmp_path: Path, line_end: str, encoding: str, name: str) -> None:
    for text, wanted in (
        ("  one\n\n two \n", ["  one\n\n two \n"]),
        (f"a\n{END_OF_TEXT}\n\tb \n\n{END_OF_TEXT}  \nc", ["a", "\tb \n", "c"]),
        (f"{END_OF_TEXT}\na\n{END_OF_TEXT}\n\nb\n", ["a", "\nb"]),
        (f"a\n{END_OF_TEXT}\n \n{END_OF_TEXT}\nb\n\n{END_OF_TEXT}\n", ["a", "b\n"]),
        (f"a {END_OF_TEXT} b\n{END_OF_TEXT}c\nd\u2028e", [f"a {END_OF_TEXT} b\n{END_OF_TEXT}c\nd\u2028e"]),
    ):
        data = text.replace("\n", line_end).encode(encoding)
        assert texts(write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)) == wanted
        assert [document for document in _divided(io.StringIO(text, newline=None), None) if document.strip()] == wanted


def test_own_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"a\n---\nb --- c\n----\n{END_OF_TEXT}\nd\n")
    assert texts(path, Rules(separator="---")) == ["a", "b --- c\n----", "d"]
    path = write(tmp_path / "a.txt", "a\nb\n\nc\r\n\r\nd\n  \ne")
    assert texts(path, Rules(separator="")) == ["a\nb", "c", "d", "e"]


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"a\n{END_OF_TEXT}\n \n\n{END_OF_TEXT}\n{END_OF_TEXT}\nb {END_OF_TEXT}\n")
    found, counts = read(path)
    assert found["train"] == ["a", f"b {END_OF_TEXT}\n".removesuffix("\n")]
    assert (counts.empty_documents, counts.eot_in_text, counts.documents["train"]) == (2, 1, 2)


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"one line\n{END_OF_TEXT}\n" * 20 + "caf\udce9")
    with pytest.raises(UserError, match=r"a\.txt, line 41: byte 0xe9 is not UTF-8.*iconv"):
        texts(path)


# --- rows ---


def test_text_of_rows_is_exact(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in ENDS))
    pq.write_table(pa.table({"id": range(len(ENDS)), "text": ENDS}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.parquet") == ENDS


def test_separator_lines_divide_rows_too(tmp_path: Path) -> None:
    values = [f"a \r\n{END_OF_TEXT}\r\n b\n\n{END_OF_TEXT}\n{END_OF_TEXT}\n\tc", None, " \n", f"d {END_OF_TEXT} e"]
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": value}) for value in values))
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found, counts = read(tmp_path / name)
        assert found["train"] == ["a ", " b\n", "\tc", f"d {END_OF_TEXT} e"]
        assert counts.empty_documents == 3


def test_half_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", '{"text": "a \\ud83d b \\ud83d\\ude00"}')) == ["a \ufffd b \U0001f600"]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "right", "title": "wrong"}, None),
        ({"id": 1, "story": "right"}, None),
        ({"text": "wrong", "story": "right"}, "story"),
    ],
)
def test_text_column_is_found_or_named(tmp_path: Path, row: dict, column: str | None) -> None:
    rules = Rules(text_column=column)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", json.dumps(row)), tmp_path / "a.parquet"):
        assert texts(path, rules) == ["right"]


def test_null_in_the_first_row_is_an_empty_text(tmp_path: Path) -> None:
    rows = '{"text": null, "url": "http://a"}\n{"text": "Story.", "url": "http://b"}\n'
    assert texts(write(tmp_path / "a.jsonl", rows)) == ["Story."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["x"]', "line 2: list where an object"),
        ("null", "line 2: NoneType where an object"),
        ('{"texte": "x"}', "line 2: no field 'text'"),
        ('{"text": 5}', "line 2: int where text was expected"),
        ('{"text": "x', "line 2: not JSON"),
    ],
)
def test_broken_row_is_named_or_skipped(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}')
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}.*--skip_broken"):
        texts(path)
    found, counts = read(path, Rules(skip_broken=True))
    assert (found["train"], counts.broken_rows) == (["a", "b"], 1)


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, b"a", 1])
def test_text_column_of_another_type_is_refused(tmp_path: Path, value: object) -> None:
    pq.write_table(pa.table({"text": [value], "title": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"'text' holds .*expected a string.*'title'"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'body'.*'title' \(--text_column\)"):
        texts(tmp_path / "a.parquet", Rules(text_column="body"))


def test_unclear_text_column_is_refused(tmp_path: Path) -> None:
    for row in ({"a": "x", "b": "y"}, {"a": 1, "b": ["x"]}, {}):
        with pytest.raises(UserError, match=r"expected a field 'text', or one field with text.*--text_column"):
            texts(write(tmp_path / "a.jsonl", json.dumps(row)))


def test_dictionary_column_is_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["Story."] * 2).dictionary_encode()}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["Story."] * 2


def test_csv_must_name_its_columns(tmp_path: Path) -> None:
    for header in ("1,Once upon a time", "story", "id;text"):
        with pytest.raises(UserError, match=r"no field 'text'.*--text_column"):
            texts(write(tmp_path / "a.csv", f"{header}\n{header}\n"))
    assert texts(write(tmp_path / "b.csv", "story\n a \n"), Rules(text_column="story")) == [" a "]


def test_wikitext_articles_cross_files(tmp_path: Path, stories: list[str]) -> None:
    rows, wanted = [], []
    for number, story in enumerate(stories[:6]):
        rows += ["", f" = Article {number} = \n", "", f" {story} \n", "", " = = Section = = \n", "", " More . \n", ""]
        wanted.append(f"= Article {number} = \n\n {story} \n\n = = Section = = \n\n More .")
    for cuts in ([], [9], [1, 2, 3, 20], [13, 40]):
        borders = [0, *cuts, len(rows)]
        paths: list[Location] = [tmp_path / f"{number}.parquet" for number in range(len(borders) - 1)]
        for path, start, stop in zip(paths, borders[:-1], borders[1:], strict=True):
            pq.write_table(pa.table({"text": rows[start:stop]}), path, row_group_size=2)
        assert read(paths, Rules(articles=True))[0]["train"] == wanted, cuts


# --- splits ---


def test_split_depends_on_the_document_alone() -> None:
    many = [f"Document number {number}." for number in range(4000)]
    val = {text for text in many if split_of(text, 0.1) == "val"}
    assert 0.08 < len(val) / len(many) < 0.12
    # A larger share keeps every document of the smaller one.
    assert val <= {text for text in many if split_of(text, 0.3) == "val"}
    for copy in ("  Document 1.\n", "Document 1.\r\n", "\nDocument 1."):
        assert document_hash(copy) == document_hash("Document 1.")


def test_documents_are_split_by_hash(tmp_path: Path, stories: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": story}) for story in stories))
    found, counts = read(path, Rules(val_fraction=0.3), split=None)
    for split in ("train", "val"):
        assert found[split] == [story for story in stories if split_of(story, 0.3) == split]
        assert counts.bytes[split] == sum(len(story.encode()) for story in found[split])


def test_duplicates_of_validation_text_are_dropped(tmp_path: Path, stories: list[str]) -> None:
    hashes: set[int] = set()
    rules = Rules(drop_duplicates=True)
    val = write(tmp_path / "v.jsonl", "\n".join(json.dumps({"text": f" {story}\r\n"}) for story in stories[::3]))
    train = write(tmp_path / "t.jsonl", "\n".join(json.dumps({"text": story}) for story in stories))
    _, counts = read(val, rules, "val", hashes)
    assert set(counts.hashes) == hashes
    found, counts = read(train, rules, "train", hashes)
    assert found["train"] == [story for number, story in enumerate(stories) if number % 3]
    assert counts.dropped_duplicates == len(stories[::3])


@pytest.mark.parametrize("blank", ["\n", " ", ". "])
def test_document_is_cut_between_lines_or_words(blank: str) -> None:
    text = blank.join(f"word{number}" for number in range(200))
    head, tail = cut_document(text, 0.1)
    assert head + blank[-1] + tail == text or head + blank + tail == text
    assert 0.05 < len(tail) / len(text) < 0.15
    assert cut_document("word", 0.5) == ("word", "")
    assert not cut_document(text.replace("\n", "\r\n"), 0.2)[0].endswith("\r")


def test_cut_rule_takes_the_end_of_each_document(tmp_path: Path, stories: list[str]) -> None:
    found, counts = read(write(tmp_path / "a.txt", "\n".join(stories)), Rules(val_fraction=0.2, cut=True), None)
    assert found["train"][0] + "\n" + found["val"][0] == "\n".join(stories)
    assert counts.read == 1 and counts.documents == {"train": 1, "val": 1}


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": "b"}\nnot JSON')
    *batches, _ = read_unit(Unit(0, "train", (path,), 0), Rules(), set(), limit=2)
    assert [batch.texts for batch in batches if isinstance(batch, Batch)] == [["a", "b"]]
