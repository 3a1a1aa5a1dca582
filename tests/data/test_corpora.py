"""Corpora of the Hub: every document, once, in the order of the files, as tokens alone; and never anew what is done."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litmoe.cli import UserError
from litmoe.data import corpora, documents, manifest, tokenizers, tokens
from litmoe.data.corpora import CORPORA, HubDataset
from litmoe.data.documents import clean
from tests.data.hub_server import serve
from tests.data.test_prepare import ROOT, decoded, put, state

UNUSUAL = [
    "a\u0000b",  # NUL
    "line\u2028separator and\u0085next line",
    "e\u0301 combining, \U0001f469\u200d\U0001f680 an astronaut of three characters",
    "carriage\r\nreturns\rof two kinds",
    "\u202eright to left\u202c \ufeff not at the beginning",
    "\u4e2d\u6587\u3000\u5168\u89d2",
]


def parquet(rows: list, column: str = "text", group: int = 20) -> bytes:
    """A parquet file of small row groups, with another column beside the text."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(rows))), column: rows}), buffer, row_group_size=group)
    return buffer.getvalue()


def jsonl(rows: list, column: str = "text") -> bytes:
    """A line for each row."""
    return "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()


def card(**configs: dict[str, str]) -> bytes:
    """A README.md that says which files belong to which split of which config."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name.replace('_', '-')}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {path}" for split, path in splits.items()]
    return "\n".join([*lines, "---", "# A data set", ""]).encode()


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes files as they lie in a repository of the Hub."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts files in the place of a corpus; returns its name."""

    def call(files: dict[str, bytes], name: str = "tinystories", **changes: object) -> str:
        folder = lay(tmp_path / "hub" / name, files)
        monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], path=str(folder), **changes))
        return name

    return call


@pytest.fixture
def plain(corpus: Callable, stories: list[str]) -> str:
    """120 training documents in two files of three row groups each, and 24 validation documents."""
    files = {f"data/train-{i:05d}-of-00002.parquet": parquet(stories[60 * i : 60 * i + 60]) for i in range(2)}
    return corpus({**files, "data/validation-00000-of-00001.parquet": parquet(stories[120:])})


def tokens_of(data_dir: Path) -> dict[str, bytes]:
    """All token files."""
    return {path.relative_to(data_dir).as_posix(): path.read_bytes() for path in data_dir.rglob("chunk-*.bin")}


# --- what comes out ---


def lines_of(articles: list[str]) -> list[str]:
    """WikiText's rows: a heading, and for every blank line an empty row."""
    return [
        row
        for i, article in enumerate(articles)
        for row in ("", f" = Article {i} = \n", "", f" {article} \n", "", " = = Section = = \n", "", " More . \n", "")
    ]


def articles_of(articles: list[str]) -> list[str]:
    """The documents in these rows."""
    return [f"= Article {i} = \n\n {text} \n\n = = Section = = \n\n More ." for i, text in enumerate(articles)]


def test_every_corpus_is_read_from_files_in_its_own_form(
    tmp_path: Path, run: Callable, corpus: Callable, stories: list[str]
) -> None:
    lines = lines_of(stories[:20])
    wiki = {
        f"wikitext-103-v1/{split}": parquet(rows, group=7)
        for split, rows in {
            "train-00000-of-00002.parquet": lines[:70],
            "train-00001-of-00002.parquet": lines[70:],
            "validation-00000-of-00001.parquet": lines_of(stories[20:23]),
            "test-00000-of-00001.parquet": lines_of(stories[23:25]),
        }.items()
    }
    splits = {split: f"{split}-*" for split in ("train", "validation", "test")}
    wiki["README.md"] = card(
        wikitext_2_v1={split: f"wikitext-2-v1/{path}" for split, path in splits.items()},
        wikitext_103_v1={split: f"wikitext-103-v1/{path}" for split, path in splits.items()},
    )
    wiki |= {f"wikitext-2-v1/{split}-00000-of-00001.parquet": parquet(["Not this."]) for split in splits}
    web = {f"{name}-{i}.parquet": parquet(stories[72 * i : 72 * i + 72]) for name in ("a/train", "b") for i in (0, 1)}
    forms: dict[str, tuple[dict[str, bytes], list[str], list[str] | None]] = {
        "tinystories": (
            {
                **{f"data/train-{i:05d}-of-00002-ab.parquet": parquet(stories[60 * i : 60 * i + 60]) for i in (0, 1)},
                "data/validation-00000-of-00001-ab.parquet": parquet(stories[120:]),
            },
            stories[:120],
            stories[120:],
        ),
        "shakespeare": (
            {
                f"data/{name}-00000-of-00001.parquet": parquet([text])
                for name, text in zip(splits, stories, strict=False)
            },
            stories[:1],
            stories[1:2],
        ),
        "wikitext-103": (wiki, articles_of(stories[:20]), articles_of(stories[20:23])),
        "openwebtext": (
            {"README.md": card(plain_text={"train": "a/train-*"}), **{n: d for n, d in web.items() if n[0] == "a"}},
            stories,
            None,
        ),
        "fineweb-edu": (
            {
                "README.md": card(default={"train": "a/*"}, sample_10BT={"train": "b-*"}),
                **{name: data for name, data in web.items() if name[0] == "b"},
                "a/x.parquet": parquet(["Not this."]),
            },
            stories,
            None,
        ),
    }
    assert set(forms) == {name for name, known in CORPORA.items() if isinstance(known, HubDataset)}
    for name, (files, train, val) in forms.items():
        data_dir = tmp_path / name / "data"
        found = run(source=corpus(files, name), data_dir=data_dir, val_fraction=0.3)
        shutil.copytree(tmp_path / "tokenizer", data_dir.parent / "tokenizer")
        assert found.source.name == name
        assert str(tmp_path) not in json.dumps([asdict(found.source), asdict(found.splits["train"])])
        if val is None:
            val = [text for text in train if documents.split_of(text, 0.3) == "val"]
            train = [text for text in train if documents.split_of(text, 0.3) == "train"]
            assert found.settings.val_fraction == 0.3
        else:
            assert found.settings.val_fraction is None
        assert (decoded(data_dir, "train"), decoded(data_dir, "val")) == (train, val)
        assert not (data_dir / "train").exists() and not (data_dir / "source.json").exists()  # tokens only


@pytest.mark.parametrize("write", [parquet, jsonl])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_dataset_with_a_column_of_text(
    tmp_path: Path, run: Callable, stories: list[str], write: Callable, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files, another name of the column, empty rows, unusual characters, lines longer than a part."""
    monkeypatch.setattr(documents, "PART_BYTES", 700)
    rows = [*stories[:50], None, "", " \n", *UNUSUAL, "long " * 500 + "line", *stories[50:]]
    ending = write.__name__
    folder = {f"train/{i}.{ending}": write(rows[i * 60 : i * 60 + 60], "story") for i in range(3)}
    monkeypatch.chdir(lay(tmp_path / "hub", {f"org/name/{name}": data for name, data in folder.items()}))
    found = run(source="hf:org/name", val_fraction=0.3, num_workers=workers)
    texts = [row for row in rows if row and row.strip()]
    assert decoded(tmp_path / "data", "val") == [text for text in texts if documents.split_of(text, 0.3) == "val"]
    assert decoded(tmp_path / "data", "train") == [text for text in texts if documents.split_of(text, 0.3) == "train"]
    train, val = found.splits["train"], found.splits["val"]
    assert train.empty_documents + val.empty_documents == 3
    assert train.bytes + val.bytes == sum(len(text.encode()) for text in texts)
    assert [entry.path for entry in train.text] == [f"name/train/{i}.{ending}" for i in range(3)]
    assert (found.source.name, found.source.location) == ("hf:org/name", "name")


def test_splits_of_a_dataset_left_out_are_named(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    files = {f"org/name/data/{split}-0.jsonl": jsonl(stories) for split in ("train", "test")}
    monkeypatch.chdir(lay(tmp_path / "hub", files))
    run(source="hf:org/name", val_fraction=0.3)
    assert "Splits of org/name that are not used: test" in capsys.readouterr().out


def test_a_folder_of_csv_files_is_no_dataset(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lay(tmp_path, {"org/name/train.csv": b"text\nOnce\n"}))
    with pytest.raises(UserError, match=r"without hf: --source org.name"):
        run(source="hf:org/name")


def test_half_a_surrogate_pair_in_jsonl(tmp_path: Path, run: Callable, corpus: Callable, stories: list[str]) -> None:
    run(source=corpus({"train.jsonl": b'{"text": "a \\ud83d b"}\n' + jsonl(stories), "validation.jsonl": jsonl(["c"])}))
    assert decoded(tmp_path / "data", "train")[0] == "a \ufffd b"


@pytest.mark.parametrize("group", [1, 2, 5, 9, 1000])
def test_an_article_is_one_document_across_row_groups_and_files(tmp_path: Path, stories: list[str], group: int) -> None:
    rows = lines_of(stories[:6])
    wanted = articles_of(stories[:6])
    for cuts in ([], [9], [1, 2, 3, 20], [30, 31], [13, 40]):
        borders = [0, *cuts, len(rows)]
        paths: list[Path | str] = [tmp_path / f"{i}.parquet" for i in range(len(borders) - 1)]
        for path, start, stop in zip(paths, borders[:-1], borders[1:], strict=True):
            Path(path).write_bytes(parquet(rows[start:stop], group=group))
        files = corpora.Files("x", {"train": paths}, {}, "text", articles=True)
        rules = documents.Rules(text_column="text")
        found = [
            p
            for part in files.parts("train", rules, may_cut=True)
            for t in documents.read(part, rules)
            for p in t.pieces
        ]
        assert [piece.text for piece in found] == wanted, cuts


# --- no validation document in the training text ---


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["hub", "hub, text kept", "folder", "hash"])
def test_no_validation_document_is_trained_on(
    tmp_path: Path, run: Callable, corpus: Callable, stories: list[str], source: str, workers: int, capsys
) -> None:
    doubled = [stories[i] for i in range(0, 144, 3)] + [" " + stories[1] + "\r\n"]
    if source == "folder":
        put(tmp_path / "own/train/a.txt", stories + stories[:40])
        put(tmp_path / "own/val/a.txt", doubled)
        name = str(tmp_path / "own")
    elif source == "hash":
        name = corpus({"train.parquet": parquet(stories + stories)})
    else:
        train_file = parquet(stories + stories[:40], group=5)
        name = corpus({"train.parquet": train_file, "validation.parquet": parquet(doubled)})
    found = run(source=name, num_workers=workers, keep_text="kept" in source)
    train, val = decoded(tmp_path / "data", "train"), decoded(tmp_path / "data", "val")
    assert val and train and not set(train) & set(val)
    left_out = found.source.held_out + found.splits["train"].held_out
    if source == "hash":
        assert sorted(train + val) == sorted(stories + stories) and left_out == 0
    else:
        # A row is kept exactly; in a .txt the line end at the end of the file belongs to no document.
        assert val == ([*doubled[:-1], " " + stories[1]] if source == "folder" else doubled)
        assert train == [text for text in stories + stories[:40] if text not in {clean(text) for text in val}]
        assert left_out == 184 - len(train) and left_out > 49
        assert f"{left_out} training documents left out" in capsys.readouterr().out


def test_text_that_a_user_put_there_stays_as_it_lies(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    put(tmp_path / "data/train/a.txt", stories)
    put(tmp_path / "data/val/a.txt", stories[:5])
    run()
    assert decoded(tmp_path / "data", "train") == stories


def test_long_documents_are_held_out_too(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come in several parts, none of which holds the whole."""
    monkeypatch.setattr(documents, "PART_BYTES", 500)
    monkeypatch.setattr(documents, "LONG_DOCUMENT_BYTES", 1500)
    long = "\n".join(stories[:50])
    put(tmp_path / "own/train/a.txt", [stories[0], long, stories[1]])
    put(tmp_path / "own/val/a.txt", [long, stories[2]])
    found = run(source=str(tmp_path / "own"))
    assert decoded(tmp_path / "data", "train") == stories[:2]
    assert found.source.held_out == 1


# --- nothing twice ---


def test_a_second_call_does_nothing_and_asks_nobody(
    tmp_path: Path, run: Callable, plain: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run(source=plain)
    before = state(tmp_path / "data")
    monkeypatch.setattr(HubDataset, "open", None)
    capsys.readouterr()
    for settings in ({"source": plain}, {}):
        run(**settings)
        assert "nothing to do" in capsys.readouterr().out
        assert state(tmp_path / "data") == before
    for settings, message in (
        ({"source": "sample"}, r"already holds tinystories .*which --source sample would replace"),
        ({"max_documents": 5}, r"other settings \(max_documents None became 5\).*--source tinystories"),
        ({"overwrite": True}, "name a --source"),
    ):
        with pytest.raises(UserError, match=message):
            run(**settings)
    assert state(tmp_path / "data") == before


def test_changed_settings_and_tokenizers_stream_anew(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], capsys
) -> None:
    run(source=plain)
    run(source=plain, max_documents=7)
    assert "max_documents None became 7" in capsys.readouterr().out
    assert decoded(tmp_path / "data", "train") == stories[:7]
    run(source=plain)  # a setting that is not given stays
    assert "nothing to do" in capsys.readouterr().out
    for path in (tmp_path / "tokenizer").iterdir():
        path.unlink()
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"another tokenizer.*name a --source"):
        run()
    assert run(source=plain).tokenizer.vocab_size == 300
    assert "another tokenizer" in capsys.readouterr().out
    assert decoded(tmp_path / "data", "train") == stories[:7]


def test_a_tokenizer_trained_on_a_stream(tmp_path: Path, run: Callable, plain: str, stories: list[str], capsys) -> None:
    for path in (tmp_path / "tokenizer").iterdir():
        path.unlink()
    settings = {"source": plain, "tokenizer": "train", "vocab_size": 300}
    assert run(**settings).tokenizer.vocab_size == 300
    assert decoded(tmp_path / "data", "train") == stories[:120]
    before = state(tmp_path)
    run(**settings)
    assert "nothing to do" in capsys.readouterr().out and state(tmp_path) == before
    assert run(**{**settings, "vocab_size": 290}).tokenizer.vocab_size == 290
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no text .* to train a tokenizer on; name a --source"):
        run(tokenizer="train", vocab_size=290)


def test_text_is_kept_when_asked_for(tmp_path: Path, run: Callable, plain: str, stories: list[str], capsys) -> None:
    streamed = run(source=plain)
    wanted = tokens_of(tmp_path / "data")
    kept = run(source=plain, keep_text=True)
    assert documents.text_files(tmp_path / "data/train") and tokens_of(tmp_path / "data") == wanted
    assert kept.splits["train"].tokens == streamed.splits["train"].tokens
    assert kept.source.sha256 != streamed.source.sha256  # of other files
    for settings in ({"source": plain}, {"source": plain, "keep_text": True}, {}):
        capsys.readouterr()
        run(**settings)
        assert "nothing to do" in capsys.readouterr().out
    run(source=plain, overwrite=True)  # as asked for now: tokens alone
    assert not (tmp_path / "data/train").exists() and tokens_of(tmp_path / "data") == wanted
    assert not (tmp_path / "data/source.json").exists() and not (tmp_path / "data/tokens/.building").exists()


def test_a_lost_tokenizer_is_brought_back_without_streaming(
    tmp_path: Path, run: Callable, plain: str, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(source=plain)
    for path in (tmp_path / "tokenizer").iterdir():
        path.unlink()
    monkeypatch.setattr(HubDataset, "open", None)
    assert replace(run(tokenizer=str(tokenizer_dir)), tokenizer=before.tokenizer) == before
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()


def test_max_documents_reads_no_more(tmp_path: Path, run: Callable, corpus: Callable, stories: list[str]) -> None:
    """What is not parquet at all is never opened."""
    rows = [*stories[:20], "", None, *stories[20:]]
    files = {"data/train-00000.parquet": parquet(rows, group=7), "data/train-00001.parquet": b"no parquet"}
    name = corpus({**files, "data/validation-00000.parquet": parquet(["v", "w", "x"])})
    for workers in (0, 2):
        run(source=name, max_documents=37, num_workers=workers, overwrite=True)
        assert decoded(tmp_path / "data", "train") == stories[:37]
        assert decoded(tmp_path / "data", "val") == ["v", "w", "x"]


# --- interrupted ---


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def stop_after(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list]:
    """Ctrl-C after so many parts; returns what gives the parts that were encoded."""
    encoded: list[documents.Part] = []
    call = tokens.PartEncoder.__call__

    def stopping(self: tokens.PartEncoder, part: documents.Part, limit: int | None = None) -> tokens.Encoded:
        if len(encoded) == number:
            raise Stop
        encoded.append(part)
        return call(self, part, limit)

    monkeypatch.setattr(tokens.PartEncoder, "__call__", stopping)
    return lambda: encoded


@pytest.mark.parametrize("source", ["own validation", "hash", "few documents", "first documents", "text in place"])
def test_interrupted_it_goes_on_where_it_was(
    tmp_path: Path,
    run: Callable,
    corpus: Callable,
    stories: list[str],
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """After any number of parts; the tokens come out as if nothing had happened, and no part is encoded twice."""
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 500)
    monkeypatch.setattr(tokens, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(documents, "PART_BYTES", 2500)
    settings: dict[str, object] = {}
    if source == "text in place":
        put(tmp_path / "text/a.txt", stories * 2)
        put(tmp_path / "text/b.txt", stories[:50])
    else:
        rows, write, ending = stories + stories[:20], parquet, "parquet"
        if source == "few documents":
            rows = [" ".join(stories[i : i + 9]) for i in range(6)]
        if source == "own validation":
            write, ending = jsonl, "jsonl"
        files = {f"data/train-0000{i}.{ending}": write(rows[i::2]) for i in range(2)}
        if source == "own validation":
            files["data/validation-00000.jsonl"] = jsonl(stories[::9])
        settings = {"source": corpus(files), "max_documents": 100 if source == "first documents" else None}
        settings["val_fraction"] = 0.05 if source == "few documents" else 0.2

    def prepare_into(name: str) -> Path:
        if source == "text in place" and not (tmp_path / name).exists():
            lay(tmp_path / name / "train", {p.name: p.read_bytes() for p in (tmp_path / "text").iterdir()})
        run(data_dir=tmp_path / name, **settings)
        return tmp_path / name

    with monkeypatch.context() as patch:
        whole = stop_after(-1, patch)
        wanted = tokens_of(prepare_into("whole"))
        number = len(whole())
    assert number >= 4 and len(wanted) >= 2
    for stop in range(number):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            first = stop_after(stop, patch)
            prepare_into(f"data-{stop}")
        assert "the same command goes on where it was" in capsys.readouterr().out
        assert manifest.read(tmp_path / f"data-{stop}") is None
        with monkeypatch.context() as patch:
            second = stop_after(-1, patch)
            assert tokens_of(prepare_into(f"data-{stop}")) == wanted, stop
        again = source == "first documents" and stop == number - 1  # the last part was being cut to its first documents
        assert len(first()) + len(second()) == number + again
        assert not (tmp_path / f"data-{stop}/tokens/.building").exists()
        said = capsys.readouterr().out
        assert "Going on where" in said and manifest.read(tmp_path / f"data-{stop}") is not None


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("moment", ["first split", "second split", "manifest", "end"])
def test_stopped_while_the_tokens_are_put_in_place_nothing_is_done_again(
    tmp_path: Path,
    run: Callable,
    plain: str,
    corpus: Callable,
    stories: list[str],
    moment: str,
    hashed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = corpus({"train.parquet": parquet(stories)}, "fineweb-edu", config=None) if hashed else plain
    settings = {"source": name, "val_fraction": 0.3}
    replace_folder, calls = manifest.replace_folder, []

    def stopping(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > (moment == "second split"):
            raise Stop
        replace_folder(*arguments)

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        if "split" in moment:
            patch.setattr(manifest, "replace_folder", stopping)
        else:
            patch.setattr(
                "litmoe.data.manifest.write" if moment == "manifest" else "litmoe.data.prepare._summary", stop
            )
        run(**settings)
    with monkeypatch.context() as patch:
        again = stop_after(-1, patch)
        found = run(**settings)
        assert again() == []
    assert found == manifest.read(tmp_path / "data") and not (tmp_path / "data/tokens/.building").exists()
    train, val = decoded(tmp_path / "data", "train"), decoded(tmp_path / "data", "val")
    assert sorted(train + val) == sorted(stories) and not set(train) & set(val)


def test_training_takes_streamed_tokens(tmp_path: Path, run: Callable, plain: str, corpus: Callable) -> None:
    """The reader looks for changed text: there is none; and tells two corpora apart by their files."""
    from litmoe.data.module import checked_manifest

    first = run(source=plain)
    assert checked_manifest(tmp_path / "data") == first
    files = {"train.parquet": parquet(["a b"] * 9), "validation.parquet": parquet(["c"])}
    other = run(source=corpus(files, "shakespeare"), overwrite=True)
    assert checked_manifest(tmp_path / "data") == other
    prints = {manifest.text_fingerprint(split.text) for found in (first, other) for split in found.splits.values()}
    assert len(prints) == 4


@pytest.mark.parametrize("source", ["hub, text kept", "own files", "own validation", "one document"])
def test_interrupted_while_it_writes_text_it_goes_on_too(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], source: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(corpora, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(corpora, "SHARD_BYTES", 1000)
    monkeypatch.setattr(documents, "PART_BYTES", 1500)
    monkeypatch.setattr(documents, "LONG_DOCUMENT_BYTES", 3000)
    own = tmp_path / "own"
    put(own / "train/a.txt", ["\n".join(stories)] if source == "one document" else stories)
    if source == "own validation":
        put(own / "val/a.txt", [*stories[::20], "Not in the training text."])
    settings: dict[str, object] = {"source": str(own), "val_fraction": 0.2}
    if source == "hub, text kept":
        settings = {"source": plain, "keep_text": True}

    def stop(number: int, patch: pytest.MonkeyPatch) -> list:
        seen: list[documents.Part] = []

        def stopping(part: documents.Part, *more: object) -> Iterator[documents.PartText]:
            if len(seen) == number:
                raise Stop
            seen.append(part)
            yield from documents.read(part, *more)

        patch.setattr(corpora, "read", stopping)
        return seen

    def files(name: str) -> dict[str, bytes]:
        return {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in (tmp_path / name).rglob("*-*.*")}

    with monkeypatch.context() as patch:
        every = stop(-1, patch)
        run(data_dir=tmp_path / "whole", **settings)
    wanted = files("whole")
    assert len(every) > 4
    for at in range(1, len(every), 2):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop(at, patch)
            run(data_dir=tmp_path / f"data-{at}", **settings)
        kept = (tmp_path / f"data-{at}/.incoming").exists()
        assert ("the same command goes on where it was" in capsys.readouterr().out) == kept
        with monkeypatch.context() as patch:
            second = stop(-1, patch)
            run(data_dir=tmp_path / f"data-{at}", **settings)
        assert files(f"data-{at}") == wanted, at
        # Validation text is read again for its hashes; a single document's first pass, if it was over.
        assert at + len(second) <= len(every) + 3 or source == "one document", at
        assert not (tmp_path / f"data-{at}/.incoming").exists()


def test_what_was_begun_of_another_text_is_thrown_away(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(tokens, "JOURNAL_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(3, patch)
        run(source=plain)
    lay(tmp_path / "hub" / plain, {"data/train-00000-of-00002.parquet": parquet(["New."])})
    run(source=plain)
    assert "beginning anew" in capsys.readouterr().out
    assert decoded(tmp_path / "data", "train") == ["New.", *stories[60:120]]


@pytest.mark.parametrize("lost", ["cut", "journal"])
def test_a_journal_that_is_not_true_is_not_believed(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power failure on a disk that says that it has written what it has not."""
    monkeypatch.setattr(tokens, "JOURNAL_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(4, patch)
        run(source=plain)
    splits = tmp_path / "data/tokens/.building/splits"
    if lost == "cut":
        os.truncate(splits / "train/chunk-0-0.bin", 100)
    else:
        (splits / "train.json").write_text("{")
    run(source=plain)
    assert decoded(tmp_path / "data", "train") == stories[:120]


@pytest.mark.parametrize("count", [30, 100, 130, 149, 150, 151, 260])
def test_a_writer_goes_on_after_any_token(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was stopped while it closed."""
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 100)
    ids = np.arange(count, dtype=np.uint16)

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole = tokens.ChunkWriter(tmp_path / "whole", 0, "uint16")
    whole.append(ids)
    whole.close()
    wanted = files(tmp_path / "whole")
    for length in range(0, count + 1, 7):
        first = tokens.ChunkWriter(tmp_path / "a", 0, "uint16")
        first.append(ids[: length + 5])
        first.flush()
        first.abandon()
        second = tokens.ChunkWriter(tmp_path / "a", 0, "uint16", length)
        second.append(ids[length:])
        second.close()
        assert files(tmp_path / "a") == wanted, length
    for name in ("_write_index", "_header"):
        closing = tokens.ChunkWriter(tmp_path / "b", 0, "uint16")
        closing.append(ids)
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(closing, name, None)
            closing.close()
        for _ in range(2):  # the second time on what was closed
            closing = tokens.ChunkWriter(tmp_path / "b", 0, "uint16", count)
            closing.close()
            assert files(tmp_path / "b") == wanted


def test_a_disk_that_was_full_loses_nothing(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "JOURNAL_SECONDS", 0.0)
    flush = tokens.ChunkWriter.flush
    flushed = []

    def full(self: tokens.ChunkWriter) -> None:
        flushed.append(self)
        if len(flushed) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "chunk-0-0.bin")
        flush(self)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"chunk-0-0\.bin"):
        patch.setattr(tokens.ChunkWriter, "flush", full)
        run(source=plain)
    with monkeypatch.context() as patch:
        second = stop_after(-1, patch)
        run(source=plain)
    assert 0 < len(second()) < 8
    assert decoded(tmp_path / "data", "train") == stories[:120]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_stopped_the_script_goes_on(
    tmp_path: Path, run: Callable, stories: list[str], how: signal.Signals
) -> None:
    """With worker processes, which end too; the second call has less to do than the first."""
    put(tmp_path / "text/train/a.txt", stories * 2500)  # 22 parts
    put(tmp_path / "text/val/a.txt", ["Not in the training text."])
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--num_workers", "2", "--tokenizer_dir", "tokenizer"]
    folders = [tmp_path / "whole", tmp_path / "data"]
    for folder in folders:
        shutil.copytree(tmp_path / "text", folder)
    run(data_dir=folders[0])
    journal = tmp_path / "data/tokens/.building/splits/train-val.json"
    first = subprocess.Popen(
        [*command, "--data_dir", "data"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while not journal.exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(how)
    output, _ = first.communicate()
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    if how == signal.SIGINT:
        assert first.returncode == 130 and "the same command goes on where it was" in output
        assert "Traceback" not in output
    assert manifest.read(tmp_path / "data") is None
    second = subprocess.run([*command, "--data_dir", "data"], cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0 and "Going on where an interrupted call was" in second.stdout, second.stderr
    assert tokens_of(tmp_path / "data") == tokens_of(tmp_path / "whole")


# --- over the wire ---


def test_the_hub_end_to_end(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    """huggingface_hub and datasets against a server: parquet, jsonl, the Hub's own conversion, a lost connection."""
    many = [f"{i} {text}" for i in range(20) for text in stories]
    plain = {f"data/train-{i:05d}-of-00003.parquet": parquet(many[i::3], group=80) for i in range(3)}
    script = {"README.md": b"# A data set\n", "script.py": b"import datasets"}
    converted = {
        "a/partial-train/0000.parquet": parquet(stories[:40]),
        "a/partial-train/0001.parquet": parquet(stories[40:60]),
        "a/valid/0000.parquet": parquet(stories[50:70]),
        "b/train/0000.parquet": parquet(["Not this."]),
    }
    lines = {
        "README.md": card(default={"train": "x/*.jsonl"}),
        "x/0.jsonl": jsonl(many[:2400]),
        "x/1.jsonl": jsonl(many[2400:]),
    }
    body = """
        import sys
        from pathlib import Path
        from litmoe.cli import UserError
        from litmoe.data import documents, tokens
        from litmoe.data.prepare import PrepareArgs, prepare
        tokens.JOURNAL_SECONDS = 0.0
        documents.REMOTE_PART_BYTES = 30_000
        for line in sys.stdin:
            name, source, *more = line.split()
            try:
                prepare(PrepareArgs(source, Path(name) / "data", tokenizer_dir=Path("tokenizer"), val_fraction=0.1,
                                    num_workers=2 if name == "plain" else 0,
                                    max_documents=int(more[0]) if more else None))
            except UserError as error:
                print("error:", error)
            print("END", flush=True)
        """
    (tmp_path / "script.py").write_text(textwrap.dedent(body))
    with serve(
        {
            "org/plain": {"main": plain},
            "org/script": {"main": script, "refs/convert/parquet": converted},
            "org/lines": {"main": lines},
            "org/none": {"main": script | {"none.py": b"x"}},
        }
    ) as server:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        process = subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def say(*words: object) -> str:
            server.sent.clear()
            server.requests.clear()
            assert process.stdin and process.stdout
            process.stdin.write(" ".join(map(str, words)) + "\n")
            process.stdin.flush()
            return "".join(iter(process.stdout.readline, "END\n"))

        def both(name: str) -> list[str]:
            shutil.copytree(tmp_path / "tokenizer", tmp_path / name / "tokenizer", dirs_exist_ok=True)
            return decoded(tmp_path / name / "data", "train") + decoded(tmp_path / name / "data", "val")

        # The connection is lost half-way; the Hub's files change; the same command goes on, with the files from before.
        journal = tmp_path / "plain/data/tokens/.building/splits/train-val.json"
        server.hangs_up = lambda: journal.exists() and json.loads(journal.read_text())["parts"] >= 5
        assert "same command goes on" in say("plain", "hf:org/plain")
        assert manifest.read(tmp_path / "plain/data") is None
        done = json.loads(journal.read_text())["parts"]
        server.hangs_up = lambda: False
        server.push("org/plain", "main", {"data/train-00000-of-00001.parquet": parquet(["Another."])})
        assert "Going on where" in say("plain", "hf:org/plain")
        assert sorted(both("plain")) == sorted(many)
        assert 5 <= done < 36
        assert "nothing to do" in say("plain", "hf:org/plain") and server.requests == []
        # Two configs of a script.
        assert "has the configs a, b; name one" in say("script", "hf:org/script")
        said = say("script", "hf:org/script:a")
        assert "only the beginning" in said and "10 training documents left out" in said
        assert both("script") == stories[:50] + stories[50:70]
        assert "has the configs a, b; name one" in say("other", "hf:org/script:c")
        assert "parquet of it" in say("none", "hf:org/none")
        # The first lines of the first file, and no more.
        assert "Prepared" in say("lines", "hf:org/lines", 100)
        assert sorted(both("lines")) == sorted(many[:100])
        assert "x/1.jsonl" not in server.sent
        assert process.stdin
        process.stdin.close()
        assert process.wait() == 0


# --- messages ---


def test_what_a_dataset_lacks_is_named(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two = {
        "README.md": card(a={"train": "a.parquet"}, b={"train": "b.parquet"}),
        "a.parquet": parquet(stories),
        "b.parquet": parquet(stories),
    }
    numbers = io.BytesIO()
    pq.write_table(pa.table({"n": [1, 2]}), numbers)
    for name, files, source, message in (
        (
            "two",
            two,
            "hf:org/two",
            r"has the configs \['a', 'b'\], and none is named; name one: --source hf:org/two:CONFIG",
        ),
        ("two", two, "hf:org/two:c", r"has the configs \['a', 'b'\], but no 'c'"),
        ("test", {"test.parquet": parquet(stories)}, "hf:org/test", "no split called train, but test"),
        ("csv", {"train.csv": b"text\na\n"}, "hf:org/csv", r"neither \.parquet nor plain \.jsonl"),
        ("number", {"train.parquet": numbers.getvalue()}, "hf:org/number", r"'n'.* called 'text'.*--text_column"),
        ("broken", {"train.parquet": b"PAR1"}, "hf:org/broken", "cannot be read as parquet"),
        ("empty", {"train.parquet": parquet(["", None])}, "hf:org/empty", "no text for train"),
    ):
        lay(tmp_path / "org" / name, files)
        with pytest.raises(UserError, match=message):
            run(source=source)
        assert not (tmp_path / "data").exists(), name
    for source in ("hf:", "hf:org", "hf:org/name/more", "hf:org/name:", "hf:a b/c"):
        with pytest.raises(UserError, match="expected hf:ORG/NAME"):
            run(source=source)
    with pytest.raises(UserError, match=r"(?s)no such.*fineweb-edu.*10 B GPT-2 tokens.*hf:ORG/NAME"):
        run(source="fineweb")
    run(source="hf:org/two:b", text_column="text", val_fraction=0.3)
    assert len(decoded(tmp_path / "data", "train") + decoded(tmp_path / "data", "val")) == len(stories)


# --- what was begun is not lost by another call ---


@pytest.fixture
def begun(tmp_path: Path, run: Callable, plain: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stream with settings of its own that was stopped after its third part."""
    monkeypatch.setattr(tokens, "JOURNAL_SECONDS", 0.0)
    encode, seen = tokens.PartEncoder.__call__, []

    def stopping(self: tokens.PartEncoder, part: documents.Part, *more: int) -> tokens.Encoded:
        seen.append(part)
        if len(seen) > 3:
            raise Stop
        return encode(self, part, *more)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(tokens.PartEncoder, "__call__", stopping)
        run(source=plain, max_documents=100)
    return plain


def test_without_a_source_the_stream_that_was_begun_goes_on(run: Callable, begun: str, capsys) -> None:
    """It began TinyStories in its place, and dropped what was done."""
    found = run()
    assert "Going on where an interrupted call was" in capsys.readouterr().out
    assert (found.source.name, found.settings.max_documents, found.splits["train"].documents) == (begun, 100, 100)


def test_another_source_does_not_drop_what_was_begun(tmp_path: Path, run: Callable, begun: str, stories: list) -> None:
    before = state(tmp_path / "data")
    put(tmp_path / "own.txt", stories)
    with pytest.raises(UserError, match=f"holds the beginning of {begun}.*--overwrite"):
        run(source=str(tmp_path / "own.txt"))
    assert state(tmp_path / "data") == before
    assert run(source=str(tmp_path / "own.txt"), overwrite=True).source.name == "files"


def test_what_is_complete_is_not_touched_by_what_was_begun_over_it(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A replacement that was given up refused the corpus that still lay there, and lent it its settings."""
    put(tmp_path / "own.txt", stories)
    own = {"source": str(tmp_path / "own.txt")}
    before = run(**own)

    def stopping(self: tokens.PartEncoder, part: documents.Part, *more: int) -> tokens.Encoded:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(tokens.PartEncoder, "__call__", stopping)
        run(source=plain, overwrite=True, max_documents=7)
    assert (tmp_path / "data/tokens/.building/source.json").is_file()
    capsys.readouterr()
    for settings in (own, {}):
        assert run(**settings) == before
        assert "nothing to do" in capsys.readouterr().out


def test_text_that_replaces_other_text_goes_on_too(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Where a text from a source lay already, what an interrupted call had written was removed at the next one."""
    monkeypatch.setattr(corpora, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    put(tmp_path / "first.txt", stories[:40])
    put(tmp_path / "second.txt", stories)
    run(source=str(tmp_path / "first.txt"))
    seen = []

    def stopping(part: documents.Part, *more: object) -> Iterator[documents.PartText]:
        seen.append(part)
        if len(seen) > 3:
            raise Stop
        yield from documents.read(part, *more)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(corpora, "read", stopping)
        run(source=str(tmp_path / "second.txt"), overwrite=True)
    capsys.readouterr()
    run(source=str(tmp_path / "second.txt"), overwrite=True)
    assert "Going on where an interrupted call was" in capsys.readouterr().out
    assert sorted(decoded(tmp_path / "data", "train") + decoded(tmp_path / "data", "val")) == sorted(stories)


def test_a_quick_try_of_a_corpus_with_little_validation_text(run: Callable, corpus: Callable, stories: list) -> None:
    """A thousandth of 100 documents is none, and a thousandth of each can't be cut off."""
    source = corpus({"train.parquet": parquet(stories)}, "fineweb-edu", config=None)
    found = run(source=source, max_documents=100)
    assert found.settings.val_fraction == 0.1 and found.splits["val"].documents > 0


def test_hashes_that_were_lost_are_made_anew(
    tmp_path: Path, run: Callable, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them validation documents would have come into the training text."""
    encode = tokens.PartEncoder.__call__

    def stopping(self: tokens.PartEncoder, part: documents.Part, *more: int) -> tokens.Encoded:
        if part.split == "train":
            raise Stop
        return encode(self, part, *more)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(tokens.PartEncoder, "__call__", stopping)
        run(source=plain)
    hashes = tmp_path / "data/tokens/.building/splits/val.hashes"
    size = hashes.stat().st_size
    os.truncate(hashes, size - 8)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(tokens.PartEncoder, "__call__", stopping)
        run(source=plain)
    assert hashes.stat().st_size == size
