"""The row reader: every format, compressed and encoded, and errors that name file and row."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from litmoe.cli import UserError
from litmoe.data.files import BadRow, code_files, is_text, read_rows, text_files, unread_files
from tests.data.text_helpers import lay

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
ROWS = [
    {"id": "0", "text": "    y = x + 3\n    return y\n"},
    {"id": "1", "text": 'a "quoted", text\r\nof two lines '},
    {"id": "2", "text": "caf\u00e9 \U0001f600\u2028 still the same line"},
]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
    return path


def encoded(kind: str) -> str:
    """``ROWS`` in a file of that kind."""
    if kind in ("csv", "tsv"):
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, ["id", "text"], delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        return file.getvalue()
    if kind == "json":
        return json.dumps(ROWS, indent=1)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def values(path: Path) -> list:
    return [value for _, value in read_rows(path)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "json of lines"])
def test_rows_are_exact_in_every_format(tmp_path: Path, kind: str) -> None:
    suffix = kind.split()[0]
    data = encoded(kind).encode()
    assert values(write(tmp_path / f"a.{suffix}", data)) == ROWS
    for name, compress in COMPRESS.items():
        assert values(write(tmp_path / f"a.{suffix}.{name}", compress(data))) == ROWS
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        assert values(write(tmp_path / f"a.{suffix}", data.decode().encode(encoding))) == ROWS


def test_parquet_rows_and_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    assert values(path) == ROWS
    assert list(read_rows(path, ["text"], range(1, 2))) == [("row 3", {"text": ROWS[2]["text"]})]
    # A part of a data set may be empty, and has no row group then.
    pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()
    assert list(read_rows(path, ["text"], range(1))) == []


def test_compressed_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    for name, compress in COMPRESS.items():
        path = write(tmp_path / f"a.parquet.{name}", compress((tmp_path / "a.parquet").read_bytes()))
        assert values(path) == ROWS
        assert list(read_rows(path, ["text"], range(1, 2))) == [("row 3", {"text": ROWS[2]["text"]})]
        with pytest.raises(UserError, match="is damaged or truncated"):
            values(write(path, path.read_bytes()[:-20]))
    assert text_files(tmp_path) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("write_format", [ipc.new_file, ipc.new_stream], ids=["file", "stream"])
def test_arrow_of_both_formats(tmp_path: Path, write_format: Any) -> None:
    # Repeated texts are stored as a dictionary, which is a message of its own in the file.
    table = pa.Table.from_pylist(ROWS * 200).append_column("kind", pa.array(["a", "b", "a"] * 200).dictionary_encode())
    with write_format(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    data = (tmp_path / "a.arrow").read_bytes()
    expected = [{**row, "kind": kind} for row, kind in zip(ROWS, "aba", strict=True)] * 200
    for name, compress in {"": bytes, **{f".{name}": compress for name, compress in COMPRESS.items()}}.items():
        assert values(write(tmp_path / f"a.arrow{name}", compress(data))) == expected
    assert list(read_rows(tmp_path / "a.arrow", ["text"]))[-1] == ("row 600", {"text": ROWS[2]["text"]})
    with pytest.raises(UserError, match=r"a\.arrow cannot be read as arrow"):
        values(write(tmp_path / "a.arrow", data[: len(data) // 2]))


def test_json_may_hold_one_object(tmp_path: Path) -> None:
    for indent in (None, 2):
        assert values(write(tmp_path / "a.json", json.dumps(ROWS[0], indent=indent))) == ROWS[:1]
    assert values(write(tmp_path / "b.json", "[]")) == values(write(tmp_path / "c.jsonl", "\n\n")) == []


@pytest.mark.parametrize("name", COMPRESS)
def test_damaged_compressed_file_is_named(tmp_path: Path, name: str) -> None:
    data = COMPRESS[name](b"".join(b'{"text": "%d"}\n' % (i**9) for i in range(2000)))
    for broken in (data[: len(data) // 2], b"not compressed at all", b""):
        with pytest.raises(UserError, match=rf"a\.jsonl\.{name} is damaged or truncated"):
            values(write(tmp_path / f"a.jsonl.{name}", broken))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"n": ' + "9" * 5000 + "}", "5000 digits"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"text": "x', "not JSON"),
        ('{"text": "caf\udce9"}', "byte 0xe9 is not UTF-8.*iconv"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_broken_line_is_one_bad_row(tmp_path: Path, name: str, line: str, reason: str) -> None:
    # Concatenated files have byte order marks in the middle.
    path = write(tmp_path / name, f'{{"a": 1}}\n{line}\n\ufeff{{"b": 2}}\r\n')
    (_, first), (place, bad), (_, last) = read_rows(path)
    assert (first, place, last) == ({"a": 1}, "line 2", {"b": 2})
    with pytest.raises(BadRow, match=reason):
        raise bad


def test_bad_bytes_in_a_json_list_are_one_bad_row(tmp_path: Path) -> None:
    (_, bad), (place, good) = read_rows(write(tmp_path / "a.json", '[{"a": "\udce9"},\n{"b": 1}]'))
    assert isinstance(bad, BadRow) and (place, good) == ("row 2", {"b": 1})


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("3,a,b\n", "3 cells, but the header has 2"),
        ("3\n", "1 cells"),
        ('3,"a"b\n', "not a row"),
        ("3,caf\udce9\n", "0xe9"),
    ],
)
def test_broken_csv_row_is_one_bad_row(tmp_path: Path, rows: str, reason: str) -> None:
    path = write(tmp_path / "a.csv", f'id,text\n1,"{"long " * 40_000}"\n{rows}4,good\n')
    (_, first), (place, bad), (_, last) = read_rows(path)
    assert first["text"] == "long " * 40_000 and place == "line 3" and last == {"id": "4", "text": "good"}
    with pytest.raises(BadRow, match=reason):
        raise bad


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", 'id,text\n1,a\n2,"b\n3,c\n', "line 3: a quote that opens here is never closed"),
        ("a.csv", "text,text\n1,a\n", "several columns are called 'text'"),
        ("a.csv", '"id"x,text\n1,a\n', "line 1: the names of the columns cannot be read"),
        ("a.json", '[{"a": 1},\n\n{]', r"line 3: not JSON"),
        ("a.json", "{\n", "not JSON"),
        ("a.jsonl", "Once upon a time".encode("utf-16-le"), "NUL.*UTF-16"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16")[:-1], "broken UTF-16"),
        ("a.parquet", b"PAR1 but not really PAR1", "cannot be read as parquet"),
        ("a.arrow", b"", "cannot be read as arrow"),
        ("a.arrow", b"ARROW1 but not really", "cannot be read as arrow"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.\w+.*{message}"):
        values(write(tmp_path / name, data))


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"good", b"caf\xe9", b"more"], pa.binary())
    text = pa.StringArray.from_buffers(len(column), *column.buffers()[1:])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    first, bad, last = values(tmp_path / "a.parquet")
    assert (first, last) == ({"text": "good"}, {"text": "more"})
    assert "byte 0xe9 in the column 'text'" in str(bad)


def test_files_of_a_folder(tmp_path: Path) -> None:
    names = ["a.jsonl", "b.md", "c.pdf", "state.json", "train/index.json", "README.md", "data/LICENSE.txt", "d/e.TXT"]
    hidden = [".DS_Store", "Thumbs.db", ".ipynb_checkpoints/f-checkpoint.txt"]
    folder = lay(tmp_path, names + hidden)
    assert [path.name for path in text_files(folder)] == ["a.jsonl", "b.md", "e.TXT"]
    assert {path.name for path in unread_files(folder)} == {
        "c.pdf",
        "state.json",
        "index.json",
        "README.md",
        "LICENSE.txt",
    }
    # A README alone is text.
    assert len(text_files(lay(tmp_path / "alone", ["README.md"]))) == 1


def test_code_files(tmp_path: Path) -> None:
    wanted = ["a.py", "src/b.PY", "src/c.c", "tests/test_d.py", "train.py"]
    others = [
        "e.txt",
        ".git/f.py",
        "node_modules/g.py",
        "src/__pycache__/h.py",
        "venv/lib/site-packages/i.py",
        "Makefile",
    ]
    assert code_files(lay(tmp_path, wanted + others), [".c", ".py"]) == [tmp_path / name for name in wanted]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"print('caf\xc3\xa9')", True),
        ("x = 1".encode("utf-16"), True),
        (b"", True),
        (b"# caf\xe9", False),
        (b"\x7fELF\x00\x00\x00\x00\x00", False),
        (b"x = 1\n" * 10**6 + b"\xff", False),
        ("x".encode("utf-16")[:-1], False),
    ],
)
def test_is_text(tmp_path: Path, data: bytes, expected: bool) -> None:
    assert is_text(write(tmp_path / "a.py", data)) == expected
