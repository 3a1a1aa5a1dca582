"""From text to tokens: right tokens, nothing done twice, nothing half, nothing lost, and clear messages."""

import errno
import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from litgpt import Tokenizer as LitTokenizer
from tokenizers import Tokenizer

from litmoe.checksummed_json import read_sealed, write_sealed
from litmoe.cli import UserError
from litmoe.data import corpora, documents, manifest, tokenizers, tokens
from litmoe.data.documents import END_OF_TEXT, split_of

ROOT = Path(__file__).resolve().parents[2]


def put(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"\n{END_OF_TEXT}\n".join(texts), encoding="utf-8", newline="\n")
    return path


def ids(data_dir: Path, split: str) -> np.ndarray:
    """The tokens of a split, read from litdata's chunk files themselves."""
    folder = data_dir / "tokens" / split
    index = json.loads((folder / "index.json").read_text())
    assert index["config"]["data_format"] == ["no_header_tensor:20"]  # uint16
    return np.concatenate(
        [
            np.fromfile(folder / chunk["filename"], np.uint16, offset=4 * (chunk["chunk_size"] + 2))
            for chunk in index["chunks"]
        ]
    )


def decoded(data_dir: Path, split: str) -> list[str]:
    """The documents that a split's tokens spell, each ended by the end-of-text id."""
    tokenizer = Tokenizer.from_file(str(data_dir.parent / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    found = ids(data_dir, split)
    assert found[-1] == end
    return [tokenizer.decode(piece.tolist()) for piece in np.split(found, np.flatnonzero(found == end) + 1)[:-1]]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything under a folder: name to (inode, time of change)."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- text as it lies ---


def test_text_is_tokenized_as_it_lies(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    put(tmp_path / "data/train/b.txt", stories[:50])
    put(tmp_path / "data/train/a.txt", stories[50:100])
    put(tmp_path / "data/val/v.txt", [*stories[100:], "caf\u00e9 \U0001f600"])
    found = run()
    assert decoded(tmp_path / "data", "train") == stories[50:100] + stories[:50]
    assert decoded(tmp_path / "data", "val") == [*stories[100:], "caf\u00e9 \U0001f600"]
    train, val = found.splits["train"], found.splits["val"]
    assert (train.documents, val.documents) == (100, len(stories) - 99)
    assert train.tokens == len(ids(tmp_path / "data", "train"))
    assert val.bytes == sum(len(text.encode()) for text in [*stories[100:], "caf\u00e9 \U0001f600"])
    assert found == manifest.read(tmp_path / "data")
    assert (found.source.name, found.settings.val_fraction) == ("text", None)
    assert found.tokenizer.sha256 == manifest.tokenizer_fingerprint(tmp_path / "tokenizer")
    assert set(found.versions) >= {"python", "litdata", "tokenizers", "tiktoken"}
    assert "100" in capsys.readouterr().out


def test_manifest_of_another_version_is_read(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    """Fields that are not known here made all tokens stale; an older manifest has fewer."""
    put(tmp_path / "data/train/a.txt", stories[:100])
    put(tmp_path / "data/val/v.txt", stories[100:])
    found, data = run(), tmp_path / "data"
    for split in manifest.SPLITS:
        path = manifest.tokens_dir(data, split) / "split.json"
        values = read_sealed(path)
        write_sealed(path, {**values, "new": 1, "counts": {**values["counts"], "new": 1}})
    values = read_sealed(manifest.manifest_path(data))
    for place in (values, values["source"], values["tokenizer"], values["settings"], values["splits"]["train"]):
        place["new"] = 1
    values["splits"]["train"]["text"][0]["new"] = 1
    del values["source"]["held_out"], values["splits"]["val"]["held_out"]
    write_sealed(manifest.manifest_path(data), values)
    assert manifest.read(data) == found
    capsys.readouterr()
    run()
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["manifest.json", "train/split.json"])
def test_tokens_of_a_newer_format_stay(tmp_path: Path, run: Callable, stories: list[str], name: str) -> None:
    """They counted as stale, and were replaced."""
    put(tmp_path / "data/train/a.txt", stories)
    run()
    path = manifest.tokens_dir(tmp_path / "data") / name
    write_sealed(path, read_sealed(path) | {"format": manifest.FORMAT + 1})
    before = state(tmp_path / "data")
    with pytest.raises(UserError, match=rf"{path.name} is of a format that this version .* does not know"):
        run()
    assert state(tmp_path / "data") == before


def test_every_kind_of_file_may_lie_there(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    put(tmp_path / "data/train/a.txt", stories[:3])
    (tmp_path / "data/train/b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in stories[3:6]))
    pq.write_table(pa.table({"text": stories[6:9]}), tmp_path / "data/train/c.parquet")
    put(tmp_path / "data/val/v.txt", stories[9:])
    run()
    assert decoded(tmp_path / "data", "train") == stories[:9]


def test_without_validation_text_documents_are_split_by_hash(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    path = put(tmp_path / "data/train/a.txt", stories)
    found = run(val_fraction=0.3)
    train, val = decoded(tmp_path / "data", "train"), decoded(tmp_path / "data", "val")
    assert val == [text for text in stories if split_of(text, 0.3) == "val"]
    assert sorted(train + val) == sorted(stories) and len(val) > 10
    assert found.settings.val_fraction == 0.3
    assert path.read_text() == f"\n{END_OF_TEXT}\n".join(stories)  # the user's text is left alone
    # More text moves no document to the other side.
    put(tmp_path / "data/train/b.txt", [text + " More." for text in stories])
    run()
    assert set(train) <= set(decoded(tmp_path / "data", "train"))
    assert set(val) <= set(decoded(tmp_path / "data", "val"))


def test_a_single_document_gives_its_end_for_validation(
    tmp_path: Path, run: Callable, stories: list[str], capsys
) -> None:
    text = "\n".join(stories)
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/a.txt").write_text(text)
    run()
    (train,), (val,) = decoded(tmp_path / "data", "train"), decoded(tmp_path / "data", "val")
    assert train + "\n" + val == text
    assert 0.07 < len(val) / len(text) < 0.13
    assert "1 document: too few to split" in capsys.readouterr().out


def test_a_mark_inside_a_line_is_text_and_said_so(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    put(tmp_path / "data/train/a.txt", [f"a {END_OF_TEXT} b", *stories])
    put(tmp_path / "data/val/a.txt", stories)
    found = run()
    assert decoded(tmp_path / "data", "train")[0] == f"a {END_OF_TEXT} b"
    assert found.splits["train"].documents == len(stories) + 1
    assert f"1 times {END_OF_TEXT} inside a line" in capsys.readouterr().out


# --- what is stale, and what is not ---


@pytest.fixture
def prepared(tmp_path: Path, run: Callable, stories: list[str]) -> Path:
    """Text in both splits, tokenized."""
    put(tmp_path / "data/train/a.txt", stories[:100])
    put(tmp_path / "data/val/v.txt", stories[100:])
    run()
    return tmp_path / "data"


def test_a_second_call_does_nothing_and_says_so(prepared: Path, run: Callable, capsys) -> None:
    before = state(prepared)
    capsys.readouterr()
    first = manifest.read(prepared)
    assert run() == first
    assert "nothing changed; nothing to do" in capsys.readouterr().out
    assert state(prepared) == before


def test_a_touched_file_is_no_changed_file_and_is_read_once(
    prepared: Path, run: Callable, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all files of a copied or downloaded folder are."""
    os.utime(prepared / "train/a.txt", ns=(1, 1))
    before = {name: value for name, value in state(prepared).items() if name.endswith(".bin")}
    for _ in range(2):
        run()
        assert "nothing to do" in capsys.readouterr().out
        monkeypatch.setattr(manifest, "record", None)  # from now on no file's content may be asked for
    assert {name: value for name, value in state(prepared).items() if name.endswith(".bin")} == before


def changed(before: dict, after: dict) -> set[str]:
    """The splits whose tokens are other files than before."""
    names = {name for name in before | after if before.get(name) != after.get(name)}
    return {name.split("/")[1] for name in names if name.startswith("tokens/") and name.count("/") == 2}


def test_changed_validation_text_rebuilds_its_tokens_alone(prepared: Path, run: Callable, capsys) -> None:
    before = state(prepared)
    (prepared / "val/v.txt").write_text("Another text.")
    run()
    assert "Tokenizing val: val/v.txt changed" in capsys.readouterr().out
    assert changed(before, state(prepared)) == {"val"}
    assert decoded(prepared, "val") == ["Another text."]


def test_new_and_missing_files_are_noticed(prepared: Path, run: Callable, stories: list[str], capsys) -> None:
    put(prepared / "train/b.txt", ["New."])
    run()
    assert "Tokenizing train: train/b.txt is new" in capsys.readouterr().out
    (prepared / "train/b.txt").unlink()
    run()
    assert "Tokenizing train: train/b.txt is gone" in capsys.readouterr().out
    assert decoded(prepared, "train") == stories[:100]


def test_another_tokenizer_rebuilds_all(prepared: Path, run: Callable, stories: list[str], capsys) -> None:
    shutil.rmtree(prepared.parent / "tokenizer")
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, prepared.parent / "tokenizer")
    before = state(prepared)
    found = run()
    out = capsys.readouterr().out
    assert "Tokenizing train: another tokenizer" in out and "Tokenizing val: another tokenizer" in out
    assert changed(before, state(prepared)) == {"train", "val"}
    assert found.tokenizer.vocab_size == 300
    assert decoded(prepared, "train") == stories[:100]


def test_another_setting_rebuilds_and_stays(prepared: Path, run: Callable, stories: list[str], capsys) -> None:
    (prepared / "train/a.txt").write_text("a\n---\nb")
    run(document_separator="---")
    assert "separator None became '---'" in capsys.readouterr().out
    assert decoded(prepared, "train") == ["a", "b"]
    run()  # a setting that is not given stays as it was
    assert "nothing to do" in capsys.readouterr().out


def test_lost_or_cut_token_files_are_made_anew(prepared: Path, run: Callable, stories: list[str]) -> None:
    chunk = prepared / "tokens/train/chunk-0-0.bin"
    data = chunk.read_bytes()
    for damage in (chunk.unlink, lambda: chunk.write_bytes(data[:-2])):
        damage()
        assert manifest.read(prepared) is None
        run()
        assert chunk.read_bytes() == data


def test_text_that_was_removed_to_save_space_leaves_the_tokens_good(prepared: Path, run: Callable, capsys) -> None:
    shutil.rmtree(prepared / "train")
    shutil.rmtree(prepared / "val")
    run()
    assert "nothing to do" in capsys.readouterr().out


def test_overwrite_builds_anew_from_the_same_text(prepared: Path, run: Callable, stories: list[str]) -> None:
    before = state(prepared)
    run(overwrite=True)
    assert changed(before, state(prepared)) == {"train", "val"}
    assert decoded(prepared, "train") == stories[:100]


# --- sources ---


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_the_users_own_files(tmp_path: Path, run: Callable, stories: list[str], kind: str) -> None:
    put(tmp_path / "own/x.txt", stories)
    (tmp_path / "own/x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in stories))
    pq.write_table(pa.table({"text": stories}), tmp_path / "own/x.parquet")
    if kind == "folder":
        (tmp_path / "own/x.jsonl").unlink()
        (tmp_path / "own/x.parquet").unlink()
    before = state(tmp_path / "own")
    found = run(source=str(tmp_path / "own" if kind == "folder" else tmp_path / f"own/x.{kind}"), val_fraction=0.2)
    assert decoded(tmp_path / "data", "val") == [text for text in stories if split_of(text, 0.2) == "val"]
    assert decoded(tmp_path / "data", "train") == [text for text in stories if split_of(text, 0.2) == "train"]
    assert (found.source.name, found.settings.val_fraction) == ("files", 0.2)
    assert str(tmp_path) not in json.dumps(found.source.location)  # manifests travel
    assert state(tmp_path / "own") == before
    assert (tmp_path / "data/train/train-00000.txt").is_file() and (tmp_path / "data/val/val-00000.txt").is_file()


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_folder_with_validation_text_is_not_split(
    tmp_path: Path, run: Callable, stories: list[str], name: str
) -> None:
    put(tmp_path / "own/train/a.txt", stories[:90])
    put(tmp_path / f"own/{name}/a.txt", stories[90:])
    found = run(source=str(tmp_path / "own"))
    assert decoded(tmp_path / "data", "train") == stories[:90]
    assert decoded(tmp_path / "data", "val") == stories[90:]
    assert found.settings.val_fraction is None


def lines(name: str, number: int = 30) -> str:
    """A .jsonl whose documents begin with that name."""
    return "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(number))


def lay(folder: Path, files: list[str]) -> Path:
    """Files whose documents begin with the file's own path."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(lines(name) if name.endswith("jsonl") else name, encoding="utf-8")
    return folder


def names_in(data_dir: Path) -> tuple[set[str], set[str]]:
    """The files that the training and the validation text come from."""
    train, val = ({text.split()[0] for text in decoded(data_dir, split)} for split in ("train", "val"))
    return train, val


@pytest.mark.parametrize(
    ("train", "val", "test", "others"),
    [
        (["train.jsonl"], ["val.jsonl"], ["test.jsonl"], []),
        (["train/a.jsonl"], ["dev/a.jsonl"], ["test/a.jsonl"], ["notes.md"]),
        (["data/train-0.jsonl", "data/train-1.jsonl"], ["data/valid-0.jsonl"], ["data/eval.jsonl"], []),
        (["train-00000-of-00001-ab.jsonl"], ["Validation-00000-of-00001.jsonl"], ["test-00000-of-00001.jsonl"], []),
        (["Tiny-train.jsonl"], ["Tiny-valid.jsonl"], [], []),
        (["c4-train.00000-of-00009.jsonl"], ["c4-validation.00000-of-00001.jsonl"], [], []),
        (["TRAIN/test.jsonl"], ["VALID/train.jsonl"], ["testing/x.jsonl"], []),
        (["corpus.jsonl"], ["val.jsonl"], [], []),
        (["train_data/train/a.jsonl"], ["train_data/val/a.jsonl"], ["train_data/test/a.jsonl"], ["notes.md"]),
        (["eval_data/train.jsonl"], ["eval_data/dev.jsonl"], ["eval_data/test.jsonl"], []),
    ],
)
def test_names_tell_validation_and_test_text(
    tmp_path: Path, run: Callable, train: list[str], val: list[str], test: list[str], others: list[str], capsys
) -> None:
    found = run(source=str(lay(tmp_path / "own", [*train, *val, *test, *others])))
    assert names_in(tmp_path / "data") == (set(train), set(val))
    assert found.settings.val_fraction is None
    out = capsys.readouterr().out
    assert all(f"Left out as test text, by name: {name}" in out for name in test)
    assert all(f"Left out, named neither train nor validation: {name}" in out for name in others)
    run(source=str(tmp_path / "own"))
    assert "nothing to do" in capsys.readouterr().out


def test_test_text_beside_training_text_is_left_out(tmp_path: Path, run: Callable, capsys) -> None:
    found = run(source=str(lay(tmp_path / "own", ["train/a.jsonl", "test/a.jsonl"])), val_fraction=0.3)
    assert names_in(tmp_path / "data") == ({"train/a.jsonl"}, {"train/a.jsonl"})
    assert found.settings.val_fraction == 0.3
    assert "Left out as test text, by name: test/a.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test.txt", "train.txt", "train-0.jsonl"])
def test_a_name_among_other_texts_is_no_split(tmp_path: Path, run: Callable, name: str, capsys) -> None:
    files = [*(f"{letter}.txt" for letter in "abcdefghijkl"), name]
    run(source=str(lay(tmp_path / "own", files)), val_fraction=0.3)
    assert set.union(*names_in(tmp_path / "data")) == set(files)
    assert ("Training text like the rest" in capsys.readouterr().out) == (name == "test.txt")


@pytest.mark.parametrize("files", [["test.jsonl"], ["val/a.jsonl", "test/b.jsonl"], ["dev.jsonl"]])
def test_a_folder_without_training_text_is_refused(tmp_path: Path, run: Callable, files: list[str]) -> None:
    folder = lay(tmp_path / "own", files)
    with pytest.raises(UserError, match=r"all files are validation or test text.*--source .*jsonl"):
        run(source=str(folder))
    run(source=str(folder / files[0]))  # named itself, it is taken
    assert set.union(*names_in(tmp_path / "data")) == {files[0]}


def test_files_that_are_not_read_are_named(tmp_path: Path, run: Callable, capsys) -> None:
    folder = lay(tmp_path / "own", ["a.jsonl", "b.md", "c.pdf", "d.PDF", "e.docx", "state.json", "noending"])
    lay(folder, [".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/f-checkpoint.txt", ".gitkeep"])
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(lines("g.jsonl.gz").encode()))
    run(source=str(folder), val_fraction=0.3)
    assert set.union(*names_in(tmp_path / "data")) == {"a.jsonl", "b.md", "g.jsonl.gz"}
    names = "c.pdf, d.PDF, e.docx, noending, state.json"
    said = f"Not read: 5 files (.pdf 2, .docx 1, without ending 1, .json 1): {names}"
    assert said in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "here/train")
    run(data_dir=tmp_path / "here")
    assert said in capsys.readouterr().out


def test_a_readme_beside_data_is_no_text(tmp_path: Path, run: Callable, capsys) -> None:
    """As in a dataset cloned from the Hub; alone it is text like any other."""
    folder = lay(tmp_path / "own", ["a.jsonl", "README.md", "data/LICENSE.txt"])
    run(source=str(folder), val_fraction=0.3)
    assert set.union(*names_in(tmp_path / "data")) == {"a.jsonl"}
    assert "Not read: 2 files (.md 1, .txt 1): README.md, data/LICENSE.txt" in capsys.readouterr().out
    alone = lay(tmp_path / "alone", ["README.md"])
    assert documents.text_files(alone) == [alone / "README.md"]


def test_white_space_is_kept_from_file_to_tokens(tmp_path: Path, run: Callable, monkeypatch) -> None:
    """Through train/ and val/ and without them; long documents come in parts, in both of them."""
    monkeypatch.setattr(documents, "PART_BYTES", 100)
    monkeypatch.setattr(documents, "LONG_DOCUMENT_BYTES", 300)
    texts = ["    y = x + 3\n    return y\n", "\r\nwin\r\n", "\tone", "\n\ntwo\n\n", "old\rmac\r", "\u3000wide "]
    texts += [f" {i}" + "\r\n    some more of it" * 40 + "\n \n" for i in range(3)] + [f"{i} end\n" for i in range(20)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    run(source=str(tmp_path / "x.jsonl"), val_fraction=0.3)
    val = [text for text in texts if split_of(text, 0.3) == "val"]
    assert decoded(tmp_path / "data", "val") == val
    assert decoded(tmp_path / "data", "train") == [text for text in texts if text not in val]
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "placed/tokenizer")
    (tmp_path / "placed/data/train").mkdir(parents=True)
    shutil.copy(tmp_path / "x.jsonl", tmp_path / "placed/data/train/x.jsonl")
    run(data_dir=tmp_path / "placed/data", val_fraction=0.3)
    assert decoded(tmp_path / "placed/data", "val") == val


def test_older_tokens_and_text_are_made_again(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    """Those whose documents lost the white space at their ends."""
    source = put(tmp_path / "x.txt", [f" {text}" for text in stories])
    before = run(source=str(source))

    def make_older() -> None:
        for split in ("train", "val"):
            folder = tmp_path / "data/tokens" / split
            built = manifest.read_split(tmp_path / "data", split)
            rules = {name: built.rules[name] for name in ("separator", "text_column", "val_fraction", "cut")}
            manifest.write_split(folder, replace(built, rules=rules))

    make_older()
    run()
    assert "Tokenizing train: made by an older version, which cut white space" in capsys.readouterr().out
    make_older()
    values = read_sealed(tmp_path / "data/source.json")
    del values["format"]
    write_sealed(tmp_path / "data/source.json", values)
    found = run(source=str(source))
    assert "again (written by an older version, which cut white space" in capsys.readouterr().out
    assert found.made_from("train", "val") == before.made_from("train", "val")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_rows_are_left_out_and_counted(
    tmp_path: Path, run: Callable, stories: list[str], workers: int, many_parts: None, capsys
) -> None:
    rows = [json.dumps({"text": text}) for text in stories]
    rows[3:3], rows[90:90] = ["{", "[1]"], ['{"text": 5}']
    for folder, settings in (("own/train", {"source": str(tmp_path / "own/train")}), ("data/train", {})):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jsonl").write_text("\n".join(rows))
        with pytest.raises(UserError, match=r"x\.jsonl, line 4: not JSON.*--skip_broken"):
            run(**settings, num_workers=workers)
        found = run(**settings, num_workers=workers, skip_broken=True)
        assert sorted(decoded(tmp_path / "data", "train") + decoded(tmp_path / "data", "val")) == sorted(stories)
        assert "3 rows left out that could not be read" in capsys.readouterr().out
        assert found.settings.skip_broken
        run(**settings)  # a setting that is not given stays
        assert "nothing to do" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/book.pdf", r"nothing in .*train can be read \(it has \.pdf 1\); expected files of \.txt"),
        ("train.jsonl", r"train\.jsonl is not where text is read from: move it to .*train"),
        ("validation/a.jsonl", r"validation is not where text is read from: move it to .*val"),
        ("book.jsonl", r"book\.jsonl is not where text is read from: move it to .*train.*--source"),
    ],
)
def test_text_in_the_wrong_place_is_refused(tmp_path: Path, run: Callable, name: str, message: str) -> None:
    """TinyStories was fetched in its place."""
    lay(tmp_path / "data", [name])
    with pytest.raises(UserError, match=message):
        run()


def test_a_lone_md_is_text(tmp_path: Path, run: Callable) -> None:
    lay(tmp_path / "data", ["train/.DS_Store", "val/Thumbs.db"])
    (tmp_path / "data/train/book.md").write_text("# A book\n\n" + "Once upon a time.\n" * 50)
    run()
    assert decoded(tmp_path / "data", "train")[0].startswith("# A book\n\nOnce")


def test_system_files_are_no_files_of_others(tmp_path: Path, run: Callable) -> None:
    lay(tmp_path / "data", ["train/.DS_Store", "train/Thumbs.db", "val/.ipynb_checkpoints/a.txt", "val/desktop.ini"])
    run(source=str(lay(tmp_path / "own", ["a.jsonl"])), val_fraction=0.3)
    assert names_in(tmp_path / "data") == ({"a.jsonl"}, {"a.jsonl"})


def test_a_source_with_a_separator_and_a_column_of_its_own(
    tmp_path: Path, run: Callable, stories: list[str], capsys
) -> None:
    source = tmp_path / "x.txt"
    source.write_text("\n===\n".join(stories), newline="\n")
    run(source=str(source), document_separator="===")
    assert sorted(decoded(tmp_path / "data", "train") + decoded(tmp_path / "data", "val")) == sorted(stories)
    capsys.readouterr()
    run(source=str(source))
    run()
    assert capsys.readouterr().out.count("nothing to do") == 2
    with pytest.raises(UserError, match=r"(?s)document_separator '===' became '---'.*--source .*x\.txt"):
        run(document_separator="---")


@pytest.mark.parametrize("given", ["\\n", "\n", "\n\n"])
def test_an_empty_line_as_separator(tmp_path: Path, run: Callable, stories: list[str], given: str) -> None:
    (tmp_path / "x.txt").write_text("\n\n".join(stories))
    found = run(source=str(tmp_path / "x.txt"), document_separator=given)
    assert sum(split.documents for split in found.splits.values()) == len(stories)


def test_a_long_single_file_is_written_and_read_in_pieces(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 500)
    monkeypatch.setattr(documents, "LONG_DOCUMENT_BYTES", 1500)
    text = "\r\n".join(" ".join(stories[i : i + 5]) for i in range(0, 140, 5))
    (tmp_path / "x.txt").write_bytes(text.encode())
    found = run(source=str(tmp_path / "x.txt"))
    (train,), (val,) = decoded(tmp_path / "data", "train"), decoded(tmp_path / "data", "val")
    assert train + "\n" + val == text.replace("\r", "")
    assert 0.05 < len(val) / len(text) < 0.15
    assert found.splits["train"].documents == 1
    assert found.splits["train"].bytes == len(train)
    # Tokens of pieces are the tokens of the whole.
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer/tokenizer.json"))
    assert ids(tmp_path / "data", "train")[:-1].tolist() == tokenizer.encode(train).ids


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    rows = [*stories[:50], "", None, "  ", *stories[50:]]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    found = run(source=str(tmp_path / "x.jsonl"))
    assert found.source.empty_documents == 3
    assert sum(split.documents for split in found.splits.values()) == len(stories)
    assert "3 empty documents left out" in capsys.readouterr().out


def test_a_changed_source_is_written_anew(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    source = put(tmp_path / "x.txt", stories[:100])
    run(source=str(source))
    put(source, stories)
    run(source=str(source))
    assert "x.txt changed" in capsys.readouterr().out
    assert sorted(decoded(tmp_path / "data", "train") + decoded(tmp_path / "data", "val")) == sorted(stories)


def test_max_documents_takes_the_first_ones(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    run(source=str(put(tmp_path / "x.txt", stories)), max_documents=40)
    assert sorted(decoded(tmp_path / "data", "train") + decoded(tmp_path / "data", "val")) == sorted(stories[:40])


def test_max_documents_of_text_in_place_is_refused(prepared: Path, run: Callable) -> None:
    with pytest.raises(UserError, match="--max_documents goes with a --source"):
        run(max_documents=5)


def test_another_corpus_is_never_overwritten_unasked(prepared: Path, run: Callable, stories: list[str]) -> None:
    before = state(prepared)
    other = put(prepared.parent / "other.txt", [text.upper() for text in stories])
    with pytest.raises(UserError, match=r"already holds text.*--data_dir.*--overwrite"):
        run(source=str(other))
    assert state(prepared) == before
    run(source=str(other), overwrite=True)
    assert sorted(decoded(prepared, "train") + decoded(prepared, "val")) == sorted(text.upper() for text in stories)
    another = put(prepared.parent / "another.txt", stories)
    with pytest.raises(UserError, match=r"already holds files .*other\.txt"):
        run(source=str(another))


def test_text_changed_by_hand_is_not_overwritten_by_its_own_source(
    tmp_path: Path, run: Callable, stories: list[str]
) -> None:
    source = put(tmp_path / "x.txt", stories)
    run(source=str(source))
    put(tmp_path / "data/train/train-00000.txt", ["Mine."])
    with pytest.raises(UserError, match="was changed since it was written"):
        run(source=str(source))
    run()
    assert decoded(tmp_path / "data", "train") == ["Mine."]


def test_the_built_in_corpus(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(corpora, "SAMPLE_BYTES", 100_000)
    found = run(source="sample")
    assert found.source.name == "sample"
    assert 100_000 <= sum(split.bytes for split in found.splits.values()) < 102_000
    assert 0.05 < found.splits["val"].bytes / found.splits["train"].bytes < 0.2
    run(source="sample")
    assert "nothing to do" in capsys.readouterr().out


def test_without_a_network_one_message_names_the_other_ways(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for tokenizer_dir in (tmp_path / "tokenizer", tmp_path / "none"):
        with pytest.raises(UserError) as error:
            run(tokenizer_dir=tokenizer_dir)
        for way in ("--source sample", "--source PATH", "into train/ and val/"):
            assert way in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer"]


# --- tokenizers ---


def test_a_tokenizer_is_trained_and_kept_while_the_text_stays(
    tmp_path: Path, run: Callable, stories: list[str], capsys
) -> None:
    shutil.rmtree(tmp_path / "tokenizer")
    source = put(tmp_path / "x.txt", stories)
    settings = {"source": str(source), "tokenizer": "train", "vocab_size": 300}
    found = run(**settings)
    assert (found.tokenizer.name, found.tokenizer.vocab_size) == ("train", 300)
    assert decoded(tmp_path / "data", "train")
    before = state(tmp_path)
    capsys.readouterr()
    run(**settings)
    assert "nothing to do" in capsys.readouterr().out
    assert state(tmp_path) == before
    # Changed text: the tokenizer that was trained on it is trained anew.
    put(source, [text.replace("Mia", "Zoraya") for text in stories])
    assert run(**settings).tokenizer.sha256 != found.tokenizer.sha256
    assert run(**{**settings, "vocab_size": 290}).tokenizer.vocab_size == 290


def test_a_small_text_says_that_it_gives_fewer_tokens(
    tmp_path: Path, run: Callable, stories: list[str], capsys
) -> None:
    shutil.rmtree(tmp_path / "tokenizer")
    found = run(source=str(put(tmp_path / "x.txt", stories)), tokenizer="train", vocab_size=5000)
    assert found.tokenizer.vocab_size < 1000
    assert f"no more than {found.tokenizer.vocab_size:,} tokens" in capsys.readouterr().out


def test_another_tokenizer_is_not_overwritten_unasked(
    tmp_path: Path, run: Callable, stories: list[str], tokenizer_dir: Path
) -> None:
    source = str(put(tmp_path / "x.txt", stories))
    run(source=source, tokenizer=str(tokenizer_dir))  # the same one: fine
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, tmp_path / "other")
    before = state(tmp_path)
    for name in ("train", str(tmp_path / "other")):
        with pytest.raises(UserError, match=r"already holds another tokenizer .*--tokenizer_dir.*--overwrite"):
            run(source=source, tokenizer=name)
        assert state(tmp_path) == before
    assert run(source=source, tokenizer=str(tmp_path / "other"), overwrite=True).tokenizer.vocab_size == 300


def test_bad_text_leaves_the_old_tokenizer(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    put(tmp_path / "data/train/a.txt", stories)
    run()
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, tmp_path / "other")
    (tmp_path / "data/train/b.txt").write_bytes(b"\xff")
    before = state(tmp_path)
    with pytest.raises(UserError, match="not UTF-8"):
        run(tokenizer=str(tmp_path / "other"), overwrite=True)
    assert state(tmp_path) == before


def test_a_tokenizer_for_a_single_document(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    """By hash all of it may be validation text; a tokenizer must not be trained on nothing."""
    shutil.rmtree(tmp_path / "tokenizer")
    numbered = (f"{i} " + " ".join(stories) for i in range(100))
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/a.txt").write_text(next(text for text in numbered if split_of(text, 0.5) == "val"))
    assert run(tokenizer="train", vocab_size=300, val_fraction=0.5).tokenizer.vocab_size == 300


def test_each_document_begins_with_the_begin_token(
    tmp_path: Path, run: Callable, llama_tokenizer_dir: Path, stories: list[str], capsys
) -> None:
    put(tmp_path / "data" / "train" / "a.txt", stories[:100])
    put(tmp_path / "data" / "val" / "a.txt", stories[100:])
    shutil.rmtree(tmp_path / "tokenizer")
    shutil.copytree(llama_tokenizer_dir, tmp_path / "tokenizer")
    split = run().splits["train"]
    assert "begins with '<s>', id 1, and ends with '</s>', id 2" in capsys.readouterr().out
    found = ids(tmp_path / "data", "train").tolist()
    tokenizer = LitTokenizer(llama_tokenizer_dir)
    expected = [token for story in stories[:100] for token in tokenizer.encode(story, eos=True).tolist()]
    assert found == expected and found.count(1) == split.documents == 100 and split.tokens == len(expected)
    # Another rule of the same tokenizer.json makes the tokens stale.
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    assert run().splits["train"].tokens == len(expected) - 100
    assert 1 not in ids(tmp_path / "data", "train")


def test_a_template_by_hand_is_completed(tmp_path: Path, run: Callable, llama_tokenizer_dir: Path, stories) -> None:
    """Llama 3's tokenizer_config.json does not say add_bos_token: the template in tokenizer.json does."""
    put(tmp_path / "data" / "train" / "a.txt", stories)
    shutil.copy(llama_tokenizer_dir / "tokenizer.json", tmp_path / "tokenizer" / "tokenizer.json")
    config = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="which token begins a text"):
        tokenizers.load(tmp_path / "tokenizer")
    run()
    assert LitTokenizer(tmp_path / "tokenizer").use_bos
    assert ids(tmp_path / "data", "val")[0] == 1


def test_a_divided_document_begins_once(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    monkeypatch.setattr(documents, "LONG_DOCUMENT_BYTES", 2000)
    put(tmp_path / "data" / "train" / "a.txt", [" ".join(stories), stories[0]])
    put(tmp_path / "data" / "val" / "a.txt", stories[:3])
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True}))
    assert run().splits["train"].documents == 2
    assert (ids(tmp_path / "data", "train") == 0).sum() == 4  # <|endoftext|> begins and ends both


def test_a_tokenizer_put_there_by_hand_is_completed(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    (tmp_path / "tokenizer/tokenizer_config.json").unlink()
    put(tmp_path / "data/train/a.txt", stories)
    run()
    assert decoded(tmp_path / "data", "train")
    assert tokenizers.load(tmp_path / "tokenizer").eos_token == END_OF_TEXT


# --- bad input: one message, nothing written, nothing lost ---


def bad_inputs() -> dict[str, tuple[Callable[[Path], dict], str]]:
    def write(name: str, data: bytes) -> Callable[[Path], dict]:
        def make(folder: Path) -> dict:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            return {} if name.startswith("data/") else {"source": str(folder / name.split("/")[0])}

        return make

    return {
        "no such path": (lambda folder: {"source": str(folder / "none.txt")}, "no such file, folder or corpus"),
        "unknown corpus": (lambda folder: {"source": "tinystory"}, r"(?s)Did you mean tinystories.*sample"),
        "unknown kind": (write("x.docx", b"x"), r"a \.docx file; expected \.txt"),
        "empty folder": (write("own/x.pdf", b"x"), r"nothing there can be read \(it has \.pdf 1\)"),
        "empty file": (write("x.txt", b""), "no text for train|too little text"),
        "blank file": (write("x.txt", b" \n\n "), "no text for train|too little text"),
        "not utf-8": (write("x.txt", b"caf\xe9 " * 9), "not UTF-8: byte 0xe9 at offset 3"),
        "not utf-8 in place": (write("data/train/x.txt", b"caf\xe9 " * 9), "not UTF-8: byte 0xe9 at offset 3"),
        "empty in place": (write("data/train/x.txt", b"\n"), "no text in|too little text"),
        "one word": (write("x.txt", b"word"), "too little text to take validation text from"),
        "one word in place": (write("data/train/x.txt", b"word"), "holds too little text"),
        "only validation": (write("data/val/x.txt", b"text"), "put the training text there"),
        "broken jsonl": (write("x.jsonl", b'{"text": "a"}\n{'), "line 2: not JSON"),
        "broken parquet": (write("x.parquet", b"PAR1"), "cannot be read as parquet"),
        "no tokenizer": (
            lambda folder: {**write("x.txt", b"some text")(folder), "tokenizer": str(folder / "none/at/all")},
            "no tokenizer",
        ),
        "broken tokenizer": (
            lambda folder: {
                **write("x.txt", b"some text " * 9)(folder),
                **write("tokenizer/tokenizer.json", b"{")(folder),
                "source": str(folder / "x.txt"),
            },
            r"tokenizer\.json is broken",
        ),
        "a file for a folder": (
            lambda folder: {**write("data", b"x")(folder), "source": "sample"},
            "is a file; expected a folder",
        ),
        "fractions": (lambda folder: {"val_fraction": 1.0}, "val_fraction 1.0: expected a number between 0 and 1"),
        "separator": (lambda folder: {"document_separator": "a\nb"}, "expected a line"),
        "vocab size": (lambda folder: {"vocab_size": 300}, "--vocab_size goes with --tokenizer train"),
        "small vocab": (lambda folder: {"tokenizer": "train", "vocab_size": 100}, "expected 257 or more"),
        "workers": (lambda folder: {"num_workers": -1}, "expected 0 or more"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, run: Callable, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    make, message = bad_inputs()[case]
    settings = make(tmp_path)
    before = state(tmp_path)
    with pytest.raises(UserError, match=message):
        run(**settings)
    assert {name: value for name, value in state(tmp_path).items() if not name.endswith(".lock")} == before
    leftovers = [path for path in tmp_path.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert leftovers == []


def test_bad_new_text_leaves_the_old_text_and_tokens(prepared: Path, run: Callable) -> None:
    before = state(prepared)
    bad = prepared.parent / "bad.txt"
    bad.write_bytes(b"good " * 1000 + b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        run(source=str(bad), overwrite=True)
    assert state(prepared) == before
    run()


def test_a_full_disk_leaves_the_old_text_and_tokens(
    prepared: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "chunk-0-0.bin")

    put(prepared / "val/v.txt", stories)
    before = state(prepared)
    for place in ("append", "flush", "close"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"chunk-0-0\.bin"):
            patch.setattr(tokens.ChunkWriter, place, full)
            run()
        assert {name: value for name, value in state(prepared).items() if ".building" not in name} == before
    run()
    assert decoded(prepared, "val") == stories
    assert not (prepared / "tokens/.building").exists()


def test_a_source_where_the_text_goes_is_refused(prepared: Path, run: Callable) -> None:
    for folder, message in (
        (prepared, "leave --source out"),
        (prepared / "train", "leave --source out"),
        (prepared.parent, "choose one outside of it"),
    ):
        with pytest.raises(UserError, match=message):
            run(source=str(folder), overwrite=True)
    assert (prepared / "train/a.txt").is_file()


@pytest.mark.parametrize("foreign", ["train/notes.pdf", "val/model.py", "source.json"])
def test_files_of_others_are_never_removed(tmp_path: Path, run: Callable, stories: list[str], foreign: str) -> None:
    """A folder of this name in somebody's project counted as empty and was replaced."""
    put(tmp_path / "a.txt", stories)
    (tmp_path / "data" / foreign).parent.mkdir(parents=True)
    (tmp_path / "data" / foreign).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=f"not this project's.*{foreign}"):
        run(source=str(tmp_path / "a.txt"))
    assert (tmp_path / "data" / foreign).read_text(encoding="utf-8") == "mine"


# --- worker processes ---


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many parts that worker processes start for a small text."""
    monkeypatch.setattr(documents, "PART_BYTES", 1000)


def test_the_tokens_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, run: Callable, stories: list[str], many_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 500)
    put(tmp_path / "data/train/a.txt", stories * 3)
    run(num_workers=0)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "data/tokens/train").glob("*.bin")}
    assert len(wanted) > 3
    run(num_workers=2, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data/tokens/train").glob("*.bin")} == wanted


def test_a_workers_complaint_arrives(tmp_path: Path, run: Callable, stories: list[str], many_parts: None) -> None:
    put(tmp_path / "data/train/a.txt", stories)
    (tmp_path / "data/train/b.txt").write_bytes(b"text " * 500 + b"\xff")
    put(tmp_path / "data/val/a.txt", stories[:5])
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8: byte 0xff at offset 2500"):
        run(num_workers=2)
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error_and_not_a_wait_for_ever(
    tmp_path: Path, run: Callable, stories: list[str], many_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "data/train/a.txt", stories * 20)
    put(tmp_path / "data/val/a.txt", stories[:5])
    append = tokens.ChunkWriter.append

    def kill_the_workers(self: tokens.ChunkWriter, new: np.ndarray) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
        append(self, new)

    monkeypatch.setattr(tokens.ChunkWriter, "append", kill_the_workers)
    with pytest.raises(UserError, match=r"tokenizing process was killed.*--num_workers 1"):
        run(num_workers=2)
    assert manifest.read(tmp_path / "data") is None


def script(tmp_path: Path, body: str) -> list[str]:
    """A script that prepares tmp_path/data, with no ``if __name__ == "__main__"``."""
    path = tmp_path / "script.py"
    head = f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from litmoe.data import documents, manifest, tokens
        from litmoe.data.prepare import PrepareArgs, prepare
        folder = Path({str(tmp_path)!r})
        documents.PART_BYTES = 1000
        """
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return [sys.executable, str(path)]


def test_workers_import_neither_the_script_nor_torch_and_end_with_their_parent(
    tmp_path: Path, run: Callable, stories: list[str]
) -> None:
    """A script without a main guard died in spawn; one that imports torch made each worker import it; a killed parent
    left its workers behind."""
    put(tmp_path / "data/train/a.txt", stories * 20)
    put(tmp_path / "data/val/a.txt", stories[:5])
    body = """
        import psutil
        with open(folder / "imported", "a") as file:
            file.write("script\\n")
        append = tokens.ChunkWriter.append
        def report_and_die(self, new):
            children = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
            maps = [str([m.path for m in child.memory_maps()]) for child in children] if sys.platform == "linux" else []
            print([child.pid for child in children], any("libtorch" in m for m in maps), flush=True)
            os.kill(os.getpid(), signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        tokens.ChunkWriter.append = report_and_die
        prepare(PrepareArgs(data_dir=folder / "data", tokenizer_dir=folder / "tokenizer", num_workers=2))
        """
    done = subprocess.run(script(tmp_path, body), stdout=subprocess.PIPE, text=True)
    assert done.returncode != 0
    pids, torch_seen = done.stdout.splitlines()[-1].rsplit("] ", 1)
    workers = json.loads(pids + "]")
    assert len(workers) == 2 and torch_seen == "False"
    assert (tmp_path / "imported").read_text() == "script\n"
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)
    assert manifest.read(tmp_path / "data") is None


# --- killed, and two at once ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")
def test_killed_at_any_moment_it_leaves_nothing_that_looks_complete(tmp_path: Path, stories: list[str]) -> None:
    """SIGKILL before each change of the file system: nothing half counts as complete; the next call completes it."""
    put(tmp_path / "own/a.txt", stories)
    put(tmp_path / "own/b.txt", stories[:10])
    body = """
        import shutil
        from litmoe.data import tokenizers
        CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

        def call():
            prepare(PrepareArgs(source=str(folder / "own"), tokenizer="train", vocab_size=300, num_workers=0,
                                data_dir=folder / "data", tokenizer_dir=folder / "tokenizer"))

        def in_child(kill_at):
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                seen = [0]
                def hook(event, arguments):
                    flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
                    writes = flags & (os.O_WRONLY | os.O_RDWR)
                    inside = arguments and str(arguments[0]).startswith(str(folder))
                    if inside and (writes or event in CHANGES):
                        seen[0] += 1
                        if seen[0] == kill_at:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(hook)
                call()
                os._exit(0)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        def result():
            found = manifest.read(folder / "data")
            return found and ({name: (split.documents, split.tokens) for name, split in found.splits.items()},
                              found.tokenizer, found.source)

        def put_back(saved):
            for name in ("data", "tokenizer"):
                shutil.rmtree(folder / name, ignore_errors=True)
                if (saved / name).is_dir():
                    shutil.copytree(saved / name, folder / name)

        # Onto nothing, and onto tokens of an older text.
        new = (folder / "own/b.txt").read_text()
        (folder / "own/b.txt").write_text("Old. " * 50)
        assert in_child(None) == 0
        shutil.copytree(folder / "data", folder / "old/data")
        shutil.copytree(folder / "tokenizer", folder / "old/tokenizer")
        old = result()
        (folder / "own/b.txt").write_text(new)
        assert in_child(None) == 0
        wanted, names = result(), sorted(p.relative_to(folder) for p in folder.rglob("*"))
        moments = []
        for saved in (folder / "nothing", folder / "old"):
            for kill_at in range(1, 10**6):
                put_back(saved)
                code = in_child(kill_at)
                if code == 0:
                    break
                assert code == -signal.SIGKILL, code
                # Complete is only what is so in truth: the new, or the old before anything of it was touched.
                assert result() in (None, wanted, old), kill_at
                assert in_child(None) == 0, kill_at
                assert result() == wanted, kill_at
                assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == names, kill_at
            moments.append(kill_at)
        print("moments", *moments)
        """
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    moments = done.stdout.split("moments ")[1].split()
    assert all(int(number) > 15 for number in moments), moments


def test_two_at_once_build_once(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    put(tmp_path / "own/a.txt", stories * 20)
    flags = ["--data-dir", str(tmp_path / "data"), "--tokenizer-dir", str(tmp_path / "tokenizer")]
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--source", str(tmp_path / "own"), *flags]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0, 0], outputs
    assert sum("Tokenizing train" in output for output in outputs) == 1, outputs
    assert sum("nothing to do" in output for output in outputs) == 2, outputs
    assert manifest.read(tmp_path / "data") is not None


# --- the script ---


def door(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare_data.py"), *flags], capture_output=True, text=True, cwd=cwd
    )


def test_the_script_prepares_and_complains(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    source = tmp_path / "x.txt"
    source.write_text("\n---\n".join(stories))
    flags = ["--data-dir=data", "--tokenizer_dir", "tokenizer", "--document-separator=---"]
    done = door("--source", "x.txt", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Prepared in" in done.stdout
    assert manifest.read(tmp_path / "data").settings.document_separator == "---"
    done = door("--overwrite", *flags, cwd=tmp_path)  # a switch needs no value
    assert done.returncode == 0 and "Tokenizing train: --overwrite" in done.stdout, done.stderr
    for wrong, message in ((["--source", "y.txt"], "no such file"), (["--tokeniser", "gpt2"], "tokenizer")):
        done = door(*wrong, *flags, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


def test_the_modules_that_workers_import_do_not_import_torch() -> None:
    code = "import sys, litmoe.data.tokens, litmoe.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
