"""From text to tokens in one folder: right tokens, nothing done twice, nothing lost, and clear messages."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from litgpt import Tokenizer as LitTokenizer

from litmoe.checksummed_json import read_checksummed, write_checksummed
from litmoe.cli import UserError
from litmoe.data import corpora, documents, manifest, tokenizers, tokens
from litmoe.data.documents import END_OF_TEXT, split_of
from tests.data.text_helpers import ROOT, both, chunks, decoded, lay, put, put_rows, state, token_ids

NOTHING_TO_DO = "nothing changed; nothing to do"


# --- text in place ---


def test_text_in_place_is_tokenized_unchanged(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    val = [*stories[100:], "caf\u00e9 \U0001f600"]
    put(tmp_path / "data/train/b.txt", stories[:50])
    put(tmp_path / "data/train/a.txt", stories[50:100])
    put(tmp_path / "data/val/v.txt", val)
    found = run()
    assert decoded(tmp_path / "data", "train") == stories[50:100] + stories[:50]
    assert decoded(tmp_path / "data", "val") == val
    split = found.splits["val"]
    assert (split.documents, split.bytes) == (len(val), sum(len(text.encode()) for text in val))
    assert split.tokens == len(token_ids(tmp_path / "data", "val"))
    assert found == manifest.read(tmp_path / "data")
    assert (found.source.name, found.settings.val_fraction) == ("text", None)
    assert found.tokenizer.sha256 == manifest.tokenizer_fingerprint(tmp_path / "tokenizer")


def test_every_format_in_place(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    put(tmp_path / "data/train/a.txt", stories[:3])
    put_rows(tmp_path / "data/train/b.jsonl", stories[3:6])
    pq.write_table(pa.table({"text": stories[6:9]}), tmp_path / "data/train/c.parquet")
    (tmp_path / "data/train/d.txt.gz").write_bytes(gzip.compress(stories[9].encode()))
    # Duplicates of validation text stay in text that the user put in place.
    put(tmp_path / "data/val/v.txt", stories[:5])
    run()
    assert decoded(tmp_path / "data", "train") == stories[:10]


def test_text_without_validation_is_split_by_hash(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    path = put(tmp_path / "data/train/a.txt", stories)
    found = run(val_fraction=0.3)
    val = decoded(tmp_path / "data", "val")
    assert val == [text for text in stories if split_of(text, 0.3) == "val"]
    assert both(tmp_path / "data") == sorted(stories) and found.settings.val_fraction == 0.3
    assert path.read_text() == f"\n{END_OF_TEXT}\n".join(stories)


def test_single_document_is_cut(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    text = "\n".join(stories)
    put(tmp_path / "data/train/a.txt", [text])
    run()
    (train,), (val,) = decoded(tmp_path / "data", "train"), decoded(tmp_path / "data", "val")
    assert train + "\n" + val == text and 0.07 < len(val) / len(text) < 0.13
    assert "1 document: too few to split" in capsys.readouterr().out


def test_separator_inside_a_line_is_reported(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    put(tmp_path / "data/train/a.txt", [f"a {END_OF_TEXT} b", *stories])
    put(tmp_path / "data/val/a.txt", stories)
    run()
    assert decoded(tmp_path / "data", "train")[0] == f"a {END_OF_TEXT} b"
    assert f"1 times {END_OF_TEXT} inside a line" in capsys.readouterr().out


# --- what is up to date ---


@pytest.fixture
def prepared(tmp_path: Path, run: Callable, stories: list[str]) -> Path:
    """A data folder with tokens of text in both splits."""
    put(tmp_path / "data/train/a.txt", stories[:100])
    put(tmp_path / "data/val/v.txt", stories[100:])
    run()
    return tmp_path / "data"


def test_second_call_does_nothing(prepared: Path, run: Callable, capsys) -> None:
    before = state(prepared)
    os.utime(prepared / "train/a.txt")
    before["train/a.txt"] = state(prepared)["train/a.txt"]
    assert run() == manifest.read(prepared)
    assert NOTHING_TO_DO in capsys.readouterr().out
    assert state(prepared) == before


def test_added_and_removed_files_are_noticed(prepared: Path, run: Callable, stories: list[str], capsys) -> None:
    put(prepared / "train/b.txt", ["New."])
    run()
    assert "train/b.txt is new" in capsys.readouterr().out
    (prepared / "train/b.txt").unlink()
    run()
    assert "train/b.txt was removed" in capsys.readouterr().out
    assert decoded(prepared, "train") == stories[:100]


def test_another_tokenizer_rebuilds(prepared: Path, run: Callable, stories: list[str], capsys) -> None:
    shutil.rmtree(prepared.parent / "tokenizer")
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, prepared.parent / "tokenizer")
    found = run()
    assert "another tokenizer" in capsys.readouterr().out
    assert found.tokenizer.vocab_size == 300 and decoded(prepared, "train") == stories[:100]


def test_settings_are_not_inherited(prepared: Path, run: Callable, capsys) -> None:
    (prepared / "train/a.txt").write_text("a\n---\nb")
    run(document_separator="---")
    assert decoded(prepared, "train") == ["a", "b"]
    run(document_separator="---")
    assert NOTHING_TO_DO in capsys.readouterr().out
    run()
    assert "document_separator '---' became None" in capsys.readouterr().out
    assert decoded(prepared, "train") == ["a\n---\nb"]


def test_lost_or_cut_chunks_are_made_again(prepared: Path, run: Callable) -> None:
    chunk = prepared / "tokens/train/chunk-0-0.bin"
    data = chunk.read_bytes()
    for damage in (chunk.unlink, lambda: chunk.write_bytes(data[:-2])):
        damage()
        assert manifest.read(prepared) is None
        run()
        assert chunk.read_bytes() == data


def test_tokens_outlive_their_text(prepared: Path, run: Callable, tokenizer_dir: Path, capsys) -> None:
    shutil.rmtree(prepared / "train")
    shutil.rmtree(prepared / "val")
    run()
    assert NOTHING_TO_DO in capsys.readouterr().out
    # A lost tokenizer is brought back, but only the right one.
    shutil.rmtree(prepared.parent / "tokenizer")
    with pytest.raises(UserError, match=r"For another tokenizer they must be made again: put its text back"):
        run(tokenizer="train", vocab_size=300)
    assert run(tokenizer=str(tokenizer_dir)).splits == manifest.read(prepared).splits
    assert (prepared.parent / "tokenizer/tokenizer.json").is_file()


def test_overwrite_builds_again(prepared: Path, run: Callable) -> None:
    before, content = state(prepared), chunks(prepared)
    run(overwrite=True)
    after = state(prepared)
    assert chunks(prepared) == content and all(before[name] != after[name] for name in content)


def test_unknown_manifest_fields_are_ignored(prepared: Path, run: Callable, capsys) -> None:
    found = manifest.read(prepared)
    values = read_checksummed(manifest.manifest_path(prepared))
    for place in (values, values["source"], values["tokenizer"], values["settings"], values["splits"]["train"]):
        place["new"] = 1
    values["splits"]["train"]["text"][0]["new"] = 1
    # As version 0.1.0 wrote it.
    values["splits"]["val"]["held_out"] = values["splits"]["val"].pop("dropped_duplicates")
    write_checksummed(manifest.manifest_path(prepared), values)
    assert manifest.read(prepared) == found
    run()
    assert NOTHING_TO_DO in capsys.readouterr().out


def test_tokens_of_a_newer_format_are_kept(prepared: Path, run: Callable) -> None:
    path = manifest.manifest_path(prepared)
    write_checksummed(path, read_checksummed(path) | {"format": manifest.FORMAT + 1, "splits": 5})
    before = state(prepared)
    with pytest.raises(UserError, match=r"manifest\.json has format 2, but"):
        run()
    assert state(prepared) == before


# --- the user's own files ---


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_own_files_are_tokenized(tmp_path: Path, run: Callable, stories: list[str], kind: str) -> None:
    texts = [*stories, " \r\nwhite space\r\n "]
    put_rows(tmp_path / "own/x.jsonl", texts)
    if kind == "txt":
        texts[-1] = " \nwhite space\n "
        put(tmp_path / "own/x.txt", [*texts, ""])
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "own/x.parquet")
    before = state(tmp_path / "own")
    source = tmp_path / "own" if kind == "folder" else tmp_path / f"own/x.{kind}"
    found = run(source=str(source), val_fraction=0.2)
    for split in ("train", "val"):
        assert decoded(tmp_path / "data", split) == [text for text in texts if split_of(text, 0.2) == split]
    assert [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()] == ["tokens"]
    assert (found.source.name, found.settings.val_fraction) == ("files", 0.2)
    # Manifests are shared, so they don't contain the paths of this machine.
    assert str(tmp_path) not in json.dumps(found.source.location)
    assert state(tmp_path / "own") == before


@pytest.mark.parametrize(
    ("train", "val", "test", "others"),
    [
        (["train.jsonl"], ["val.jsonl"], ["test.jsonl"], []),
        (["train/a.jsonl"], ["dev/a.jsonl"], ["test/a.jsonl"], ["notes.md"]),
        (["data/train-0.jsonl", "data/train-1.jsonl"], ["data/valid-0.jsonl"], ["data/eval.jsonl"], []),
        (["train-00000-of-00001-ab.jsonl"], ["Validation-00000-of-00001.jsonl"], ["test-00000-of-00001.jsonl"], []),
        (["c4-train.00000-of-00009.jsonl"], ["c4-validation.00000-of-00001.jsonl"], [], []),
        (["TRAIN/test.jsonl"], ["VALID/train.jsonl"], ["testing/x.jsonl"], []),
        (["corpus.jsonl"], ["val.jsonl"], [], []),
        (["train_data/train/a.jsonl"], ["train_data/val/a.jsonl"], ["train_data/test/a.jsonl"], ["notes.md"]),
    ],
)
def test_names_tell_the_splits_of_files(
    tmp_path: Path, run: Callable, train: list[str], val: list[str], test: list[str], others: list[str], capsys
) -> None:
    found = run(source=str(lay(tmp_path / "own", [*train, *val, *test, *others])))
    for split, names in (("train", train), ("val", val)):
        assert {text.split()[0] for text in decoded(tmp_path / "data", split)} == set(names)
    assert found.settings.val_fraction is None
    out = capsys.readouterr().out
    assert all(f"Left out as test text, by name: {name}" in out for name in test)
    assert all(f"Left out, named neither train nor validation: {name}" in out for name in others)
    run(source=str(tmp_path / "own"))
    assert NOTHING_TO_DO in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test.txt", "train.txt", "train-0.jsonl"])
def test_one_split_name_among_others_is_ignored(tmp_path: Path, run: Callable, name: str) -> None:
    files = [*(f"{letter}.txt" for letter in "abcdefghijkl"), name]
    run(source=str(lay(tmp_path / "own", files)), val_fraction=0.3)
    assert {text.split()[0] for text in both(tmp_path / "data")} == set(files)


@pytest.mark.parametrize("files", [["test.jsonl"], ["val/a.jsonl", "test/b.jsonl"]])
def test_folder_without_training_text_is_refused(tmp_path: Path, run: Callable, files: list[str]) -> None:
    folder = lay(tmp_path / "own", files)
    with pytest.raises(UserError, match=r"all files are validation or test text.*--source .*jsonl"):
        run(source=str(folder))
    # It is used if it is named itself.
    run(source=str(folder / files[0]))


def test_files_that_are_not_read_are_reported(tmp_path: Path, run: Callable, capsys) -> None:
    folder = lay(tmp_path / "own", ["a.jsonl", "c.pdf", "d.PDF", "noending", ".DS_Store"])
    message = "Not read: 3 files (.pdf 2, without ending 1): "
    run(source=str(folder))
    assert f"{message}c.pdf, d.PDF, noending" in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "here/train")
    run(data_dir=tmp_path / "here")
    assert f"{message}train/c.pdf, train/d.PDF, train/noending" in capsys.readouterr().out


def test_source_code(tmp_path: Path, run: Callable, capsys) -> None:
    names = ["train.py", "tests/test_a.py", "b.c", *(f"src/{number}.py" for number in range(20))]
    folder = lay(tmp_path / "own", [*names, "README.md", "node_modules/d.py", ".git/e.py", "f.ipynb"])
    (folder / "image.py").write_bytes(b"\x89PNG\x00\x00\x00\x00\xff")
    (folder / "latin.c").write_bytes(b"// caf\xe9")
    for extensions in (".py,.c", "c, PY"):
        found = run(source=str(folder), extensions=extensions)
        assert found.settings.extensions == ".c,.py"
        assert both(tmp_path / "data") == sorted(names)
    output = capsys.readouterr().out
    assert "Not read: 3 files (.md 1, .ipynb 1, .py 1): README.md, f.ipynb, node_modules/d.py" in output
    assert "Left out, no UTF-8 text: 2 files: image.py, latin.c" in output
    assert NOTHING_TO_DO in output
    assert "--extensions .c,.py" in manifest.command_to_repeat(tmp_path / "data", found)
    run(source=str(folder), extensions=".py")
    assert "extensions '.c,.py' became '.py'" in capsys.readouterr().out


def test_saved_datasets(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    from datasets import Dataset, DatasetDict

    splits = {"train": stories[:100], "validation": stories[100:], "test": stories[:3]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()}).save_to_disk(
        tmp_path / "own", num_shards={"train": 2, "validation": 1, "test": 1}
    )
    run(source=str(tmp_path / "own"))
    assert decoded(tmp_path / "data", "train") == stories[:100]
    assert decoded(tmp_path / "data", "val") == stories[100:]
    assert "Left out as test text, by name: test/data-00000-of-00001.arrow" in capsys.readouterr().out


def test_compressed_parquet_with_row_groups(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    pq.write_table(pa.table({"text": stories}), tmp_path / "x.parquet", row_group_size=20)
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress((tmp_path / "x.parquet").read_bytes()))
    run(source=str(tmp_path / "x.parquet.gz"))
    assert both(tmp_path / "data") == sorted(stories)


@pytest.mark.parametrize("given", ["\\n", "\n"])
def test_empty_line_as_separator(tmp_path: Path, run: Callable, stories: list[str], given: str) -> None:
    (tmp_path / "x.txt").write_text("\n\n".join(stories))
    run(source=str(tmp_path / "x.txt"), document_separator=given)
    assert both(tmp_path / "data") == sorted(stories)


def test_broken_rows_are_skipped_and_counted(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    rows = [json.dumps({"text": text}) for text in stories]
    rows[3:3], rows[90:90] = ["{", "[1]"], ['{"text": 5}']
    for folder, settings in (("own/train", {"source": str(tmp_path / "own/train")}), ("data/train", {})):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jsonl").write_text("\n".join(rows))
        with pytest.raises(UserError, match=r"x\.jsonl, line 4: not JSON.*--skip_broken"):
            run(**settings)
        found = run(**settings, skip_broken=True)
        assert both(tmp_path / "data") == sorted(stories) and found.settings.skip_broken
        assert "3 rows left out that could not be read" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "data")


def test_changed_source_or_setting_is_read_again(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    source = put(tmp_path / "x.txt", stories[:100])
    run(source=str(source))
    run()  # the tokens as they are
    assert NOTHING_TO_DO in capsys.readouterr().out
    put(source, stories)
    run(source=str(source))
    assert "x.txt changed" in capsys.readouterr().out and both(tmp_path / "data") == sorted(stories)
    run(source=str(source), max_documents=40)
    assert "max_documents None became 40" in capsys.readouterr().out
    assert both(tmp_path / "data") == sorted(stories[:40])
    with pytest.raises(UserError, match=r"For --max_documents they must be made again: add --source"):
        run(max_documents=5)


def test_empty_documents_are_reported(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    run(source=str(put_rows(tmp_path / "x.jsonl", [*stories, "", None, "  "])))
    assert "3 empty documents left out" in capsys.readouterr().out


def test_no_validation_document_is_trained_on(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    put_rows(tmp_path / "own/train/a.jsonl", stories + stories[:40])
    put_rows(tmp_path / "own/val/a.jsonl", [*stories[::3], f" {stories[1]}\r\n"])
    run(source=str(tmp_path / "own"))
    train, val = decoded(tmp_path / "data", "train"), decoded(tmp_path / "data", "val")
    dropped = {text.strip() for text in val}
    assert train == [text for text in stories + stories[:40] if text not in dropped] and len(val) == 49
    assert f"{184 - len(train)} training documents left out" in capsys.readouterr().out


def test_built_in_corpus(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(corpora, "SAMPLE_BYTES", 100_000)
    found = run(source="sample")
    assert 100_000 <= sum(split.bytes for split in found.splits.values()) < 102_000
    run(source="sample")
    assert NOTHING_TO_DO in capsys.readouterr().out


# --- nothing is lost ---


def test_another_corpus_needs_overwrite(prepared: Path, run: Callable, stories: list[str], capsys) -> None:
    before = state(prepared)
    other = put(prepared.parent / "other.txt", [text.upper() for text in stories])
    with pytest.raises(UserError, match=r"already contains the tokens of text.*--data_dir.*--overwrite"):
        run(source=str(other))
    assert state(prepared) == before
    run(source=str(other), overwrite=True)
    assert both(prepared) == sorted(text.upper() for text in stories)
    with pytest.raises(UserError, match=r"already contains the tokens of files .*other\.txt"):
        run(source=str(put(prepared.parent / "another.txt", stories)))
    # The user's text stays, and replaces the tokens if that is said.
    with pytest.raises(UserError, match=r"already contains the tokens of files .*which the text in .* would replace"):
        run()
    run(overwrite=True)
    assert both(prepared) == sorted(stories)


def test_kept_text_is_the_text_of_the_tokens(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    texts = [*stories, " \r\nwhite space\r\n ", "\n", ""]
    run(source=str(put_rows(tmp_path / "x.jsonl", texts)), keep_text=True, val_fraction=0.2)
    kept = (tmp_path / "data/tokens/text/train/train-00000.txt").read_bytes().decode()
    assert kept.split(f"\n{END_OF_TEXT}\n") == [*decoded(tmp_path / "data", "train"), ""]


@pytest.mark.parametrize("foreign", ["train/notes.pdf", "val/model.txt", "source.json"])
def test_files_of_the_user_are_never_removed(tmp_path: Path, run: Callable, stories: list[str], foreign: str) -> None:
    source = str(put(tmp_path / "a.txt", stories))
    (tmp_path / "data" / foreign).parent.mkdir(parents=True)
    (tmp_path / "data" / foreign).write_text("mine", encoding="utf-8")
    for settings in ({}, {"keep_text": True}, {"overwrite": True}):
        run(source=source, **settings)
        assert (tmp_path / "data" / foreign).read_text(encoding="utf-8") == "mine"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def interrupt_second_call(function: Callable) -> Callable:
    """Return ``function``, but its second call is interrupted before it does anything."""
    calls = count()

    def call(*arguments: object) -> object:
        return function(*arguments) if next(calls) != 1 else interrupt()

    return call


def test_folder_of_the_same_name_is_another_source(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    put(tmp_path / "a/own/x.txt", stories)
    put(tmp_path / "b/own/x.txt", stories[:50])
    run(source=str(tmp_path / "a/own"))
    with pytest.raises(UserError, match=r"already contains the tokens of files \(own\)"):
        run(source=str(tmp_path / "b/own"))
    run(source=str(tmp_path / "b/own"), overwrite=True)
    assert both(tmp_path / "data") == sorted(stories[:50])


def test_leftovers_of_another_call_are_not_published(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its tokenizer, nor its text, nor the chunks of fewer documents."""
    source = put(tmp_path / "x.txt", [" ".join(stories)])
    tokenizer = (tmp_path / "tokenizer/tokenizer.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "write_file", interrupt)
        run(source=str(source), tokenizer="train", vocab_size=300, overwrite=True, keep_text=True)
    put(source, stories)
    found = run(source=str(source))
    assert (tmp_path / "tokenizer/tokenizer.json").read_bytes() == tokenizer
    assert both(tmp_path / "data") == sorted(stories) and manifest.read(tmp_path / "data") == found
    assert not (tmp_path / "data/tokens/text").exists()
    manifest.verify(tmp_path / "data")


def test_killed_call_is_finished_with_its_own_tokenizer(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call names another --tokenizer_dir, which it must not overwrite."""
    put(tmp_path / "data/train/x.txt", stories)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizers, "install", interrupt_second_call(tokenizers.install))
        run(tokenizer="train", vocab_size=300, tokenizer_dir=tmp_path / "first")
    before = state(tmp_path / "tokenizer")
    run()
    assert state(tmp_path / "tokenizer") == before
    assert tokenizers.load(tmp_path / "first").vocab_size == 300


def test_unfinished_text_in_place_is_resumed_without_source(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "data/train/x.txt", stories)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "write_file", interrupt)
        run()
    with pytest.raises(UserError, match=r"Resume it without --source, choose another --data_dir"):
        run(source=str(put(tmp_path / "other.txt", stories)))


def test_source_may_be_called_text(prepared: Path, run: Callable, stories: list[str], monkeypatch) -> None:
    monkeypatch.chdir(put(prepared.parent / "text/a.txt", stories).parents[1])
    with pytest.raises(UserError, match="which --source text would replace"):
        run(source="text")
    run(source="text", overwrite=True)
    assert both(prepared) == sorted(stories) and manifest.read(prepared).source.name == "files"


def test_text_of_version_0_1_0_is_not_the_users(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    """It wrote the text of every source to train/ and val/, and a source.json that said so."""
    run(source=str(put(tmp_path / "x.txt", stories)))
    put(tmp_path / "data/train/train-00000.txt", stories[:100])
    (tmp_path / "data/source.json").write_text("{}", encoding="utf-8")
    run()
    assert NOTHING_TO_DO in capsys.readouterr().out


def test_source_and_data_dir_must_differ(prepared: Path, run: Callable) -> None:
    for folder, message in (
        (prepared, "leave out --source"),
        (prepared / "train", "leave out --source"),
        (prepared.parent, "choose one outside of it"),
    ):
        with pytest.raises(UserError, match=message):
            run(source=str(folder), overwrite=True)
    assert (prepared / "train/a.txt").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/book.pdf", r"nothing in .*train can be read \(it has \.pdf 1\); expected files of \.txt"),
        ("train.jsonl", r"train\.jsonl is not read: move it to .*train"),
        ("validation/a.jsonl", r"validation is not read: move it to .*val"),
        ("book.jsonl", r"book\.jsonl is not read: move it to .*train.*--source"),
        ("val/a.jsonl", "put the training text there"),
    ],
)
def test_text_in_a_wrong_place_is_refused(tmp_path: Path, run: Callable, name: str, message: str) -> None:
    lay(tmp_path / "data", [name])
    with pytest.raises(UserError, match=message):
        run()


def bad_inputs() -> dict[str, tuple[dict[str, Any], dict[str, bytes], str]]:
    """Name to flags, files and message. A value ``{}`` in a flag is the folder of the test."""
    own = {"source": "{}/x.txt"}
    return {
        "no such path": ({"source": "{}/none.txt"}, {}, "no such file, folder or corpus"),
        "unknown corpus": ({"source": "tinystory"}, {}, r"(?s)Did you mean tinystories.*sample.*hf:ORG/NAME"),
        "unknown format": ({"source": "{}/x.docx"}, {"x.docx": b"x"}, r"a \.docx file; expected \.txt"),
        "empty folder": ({"source": "{}/own"}, {"own/x.pdf": b"x"}, r"nothing there can be read \(it has \.pdf 1\)"),
        "empty file": (own, {"x.txt": b""}, "no text for train"),
        "blank file": (own, {"x.txt": b" \n\n "}, "no text for train"),
        "not UTF-8": (own, {"x.txt": b"caf\xe9 " * 9}, r"x\.txt, line 1: byte 0xe9 is not UTF-8"),
        "not UTF-8 in place": ({}, {"data/train/x.txt": b"caf\xe9 " * 9}, "byte 0xe9 is not UTF-8"),
        "blank in place": ({}, {"data/train/x.txt": b"\n"}, "no text for train"),
        "one word": (own, {"x.txt": b"word"}, "too little text to take validation text from"),
        "broken parquet": ({"source": "{}/x.parquet"}, {"x.parquet": b"PAR1"}, "cannot be read as parquet"),
        "no tokenizer": ({**own, "tokenizer": "{}/none/at/all"}, {"x.txt": b"some text"}, "no tokenizer"),
        "broken tokenizer": (own, {"x.txt": b"text " * 9, "tokenizer/tokenizer.json": b"{"}, r"json is broken"),
        "file for a folder": ({"source": "sample"}, {"data": b"x"}, "is a file; expected a folder"),
        "fraction": ({"val_fraction": 1.0}, {}, "val_fraction 1.0: expected a number between 0 and 1"),
        "separator": ({"document_separator": "a\nb"}, {}, "expected one line"),
        "vocab size": ({"vocab_size": 300}, {}, "--vocab_size needs --tokenizer train"),
        "small vocab": ({"tokenizer": "train", "vocab_size": 100}, {}, "expected 257 or more"),
        "documents": ({"max_documents": 0}, {}, "expected 1 or more"),
        "documents in place": ({"max_documents": 5}, {"data/train/x.txt": b"a"}, "--max_documents needs a --source"),
        "workers": ({"num_workers": -1}, {}, "expected 0 or more"),
        "code in a file": ({**own, "extensions": ".py"}, {"x.txt": b"text"}, "--extensions needs a folder"),
        "code in place": ({"extensions": ".py"}, {"data/train/x.txt": b"text"}, "--extensions needs a folder"),
        "no extensions": ({"source": "{}/own", "extensions": ","}, {"own/x.py": b"x"}, "expected endings such as .py"),
        "no code": (
            {"source": "{}/own", "extensions": ".py"},
            {"own/x.c": b"x"},
            r"no text file ends in \.py there \(it has \.c 1\)",
        ),
        "conversations": (
            {"source": "{}/x.jsonl"},
            {"x.jsonl": b'{"prompt": "Who?", "chosen": "Mia", "rejected": "Tom"}'},
            "prepared with --instruct",
        ),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_writes_nothing(tmp_path: Path, run: Callable, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    flags, files, message = bad_inputs()[case]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = state(tmp_path)
    with pytest.raises(UserError, match=message):
        run(**{name: value.format(tmp_path) if isinstance(value, str) else value for name, value in flags.items()})
    assert state(tmp_path) == before
    assert [path for path in tmp_path.rglob("*") if path.is_dir() and not any(path.iterdir())] == []


def test_bad_new_text_keeps_the_old_one(prepared: Path, run: Callable, stories: list[str]) -> None:
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, prepared.parent / "other")
    bad = prepared.parent / "bad.txt"
    bad.write_bytes(b"good " * 1000 + b"\xff")
    before = state(prepared.parent)
    with pytest.raises(UserError, match="not UTF-8"):
        run(source=str(bad), tokenizer=str(prepared.parent / "other"), overwrite=True)
    assert state(prepared.parent) == before


def test_full_disk_loses_nothing(
    prepared: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "000000.val")

    put(prepared / "val/v.txt", stories)
    before = state(prepared)
    for place in ("_close", "_copy_range", "_write_index"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(tokens, place, full)
            run()
        assert {name: value for name, value in state(prepared).items() if ".building" not in name} == before
    run()
    assert decoded(prepared, "val") == stories and not (prepared / "tokens/.building").exists()


def test_missing_network_names_the_other_ways(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for tokenizer_dir in (tmp_path / "tokenizer", tmp_path / "none"):
        with pytest.raises(UserError, match=r"(?s)--source sample.*--source PATH.*into train/ and val/"):
            run(tokenizer_dir=tokenizer_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


# --- tokenizers ---


def test_tokenizer_is_trained_once_for_a_text(tmp_path: Path, run: Callable, stories: list[str], capsys) -> None:
    shutil.rmtree(tmp_path / "tokenizer")
    source = put(tmp_path / "x.txt", stories)
    settings = {"source": str(source), "tokenizer": "train", "vocab_size": 300}
    found = run(**settings)
    assert (found.tokenizer.name, found.tokenizer.vocab_size) == ("train", 300)
    before = state(tmp_path)
    run(**settings)
    assert NOTHING_TO_DO in capsys.readouterr().out and state(tmp_path) == before
    put(source, [text.replace("Mia", "Zoraya") for text in stories])
    assert run(**settings).tokenizer.sha256 != found.tokenizer.sha256
    assert run(**{**settings, "vocab_size": 290}).tokenizer.vocab_size == 290
    size = run(**{**settings, "vocab_size": 5000}).tokenizer.vocab_size
    assert f"no more than {size:,} tokens" in capsys.readouterr().out and size < 1000


def test_tokenizer_of_a_single_document(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    """By its hash it may be validation text; a tokenizer must not be trained on nothing."""
    shutil.rmtree(tmp_path / "tokenizer")
    numbered = (f"{number} " + " ".join(stories) for number in range(100))
    put(tmp_path / "data/train/a.txt", [next(text for text in numbered if split_of(text, 0.5) == "val")])
    assert run(tokenizer="train", vocab_size=300, val_fraction=0.5).tokenizer.vocab_size == 300


def test_another_tokenizer_needs_overwrite(
    tmp_path: Path, run: Callable, stories: list[str], tokenizer_dir: Path
) -> None:
    source = str(put(tmp_path / "x.txt", stories))
    run(source=source, tokenizer=str(tokenizer_dir))  # the same one
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, tmp_path / "other")
    before = state(tmp_path)
    for name in ("train", str(tmp_path / "other")):
        with pytest.raises(UserError, match=r"already contains another tokenizer .*--tokenizer_dir.*--overwrite"):
            run(source=source, tokenizer=name)
    assert state(tmp_path) == before
    assert run(source=source, tokenizer=str(tmp_path / "other"), overwrite=True).tokenizer.vocab_size == 300


def test_each_document_begins_with_the_begin_token(
    tmp_path: Path, run: Callable, llama_tokenizer_dir: Path, stories: list[str], capsys
) -> None:
    put(tmp_path / "data/train/a.txt", stories[:100])
    put(tmp_path / "data/val/a.txt", stories[100:])
    shutil.rmtree(tmp_path / "tokenizer")
    shutil.copytree(llama_tokenizer_dir, tmp_path / "tokenizer")
    run()
    assert "begins with '<s>', id 1, and ends with '</s>', id 2" in capsys.readouterr().out
    tokenizer = LitTokenizer(llama_tokenizer_dir)
    expected = [token for story in stories[:100] for token in tokenizer.encode(story, eos=True).tolist()]
    assert token_ids(tmp_path / "data", "train").tolist() == expected
    # Another rule for the same tokenizer.json makes other tokens.
    path = tmp_path / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    assert run().splits["train"].tokens == len(expected) - 100


def test_incomplete_tokenizer_is_completed(
    tmp_path: Path, run: Callable, llama_tokenizer_dir: Path, stories: list[str]
) -> None:
    """Llama 3's config does not say add_bos_token; the template in tokenizer.json does."""
    put(tmp_path / "data/train/a.txt", stories)
    shutil.copy(llama_tokenizer_dir / "tokenizer.json", tmp_path / "tokenizer/tokenizer.json")
    config = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="which token begins a text"):
        tokenizers.load(tmp_path / "tokenizer")
    run()
    assert LitTokenizer(tmp_path / "tokenizer").use_bos
    assert token_ids(tmp_path / "data", "val")[0] == 1


# --- threads and chunks ---


def test_chunks_do_not_depend_on_threads(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 500)
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 1000)
    put(tmp_path / "data/train/a.txt", stories * 3)
    run(num_workers=0)
    expected = chunks(tmp_path / "data")
    assert len(expected) > 8
    run(num_workers=3, overwrite=True)
    assert chunks(tmp_path / "data") == expected


@pytest.mark.parametrize("count", [30, 100, 130, 149, 150, 151, 260])
def test_chunks_equal_litdata(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """litdata's reader gets the tokens, whatever the units are; a short last chunk is joined to the one before."""
    from litdata import StreamingDataset, TokensLoader

    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 100)
    ids = np.arange(count, dtype=np.uint16)
    store = tokens.UnitStore(tmp_path / "units", "inputs")
    records = []
    for number, part in enumerate(np.array_split(ids, 4)):
        part.tofile(store.part(number, "train"))
        records.append(store.write(number, documents.Counts()))
    written, number = tokens.write_chunks(store, records, "train", "uint16")
    index = json.loads((store.folder / "train/index.json").read_text())
    lengths = [chunk["dim"] for chunk in index["chunks"]]
    assert (written, number, sum(lengths)) == (count, len(lengths), count)
    assert count < 100 or min(lengths) >= 50
    dataset = StreamingDataset(str(store.folder / "train"), item_loader=TokensLoader(block_size=10), shuffle=False)
    windows = [dataset[window].tolist() for window in range(len(dataset))]
    assert windows[0] == list(range(10)) and len(windows) == sum(length // 10 for length in lengths)
    # All units were used up, and nothing is written twice.
    assert not list(store.folder.glob("0*.train"))
    before = state(store.folder)
    tokens.write_chunks(store, records, "train", "uint16")
    assert {name for name, value in state(store.folder).items() if before[name] != value} <= {"train/index.json"}


def test_errors_of_threads_are_raised(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 1000)
    put(tmp_path / "data/train/a.txt", stories)
    put(tmp_path / "data/train/b.txt", ["text " * 500 + "end"])
    (tmp_path / "data/train/c.txt").write_bytes(b"text\n\xff")
    with pytest.raises(UserError, match=r"c\.txt, line 2: byte 0xff"):
        run(num_workers=2)


# --- killed, and several at once ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")
def test_killed_at_every_moment(tmp_path: Path, stories: list[str]) -> None:
    """SIGKILL before each change of the file system: nothing half looks complete, and the next call completes it."""
    put(tmp_path / "own/a.txt", stories)
    put(tmp_path / "own/b.txt", stories[:10])
    script = f"""
        import os, shutil, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from litmoe.data import manifest
        from litmoe.data.prepare import PrepareArgs, prepare
        folder = Path({str(tmp_path)!r})
        CHANGES = {{"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}}

        def call():
            prepare(PrepareArgs(source=str(folder / "own"), tokenizer="train", vocab_size=300, num_workers=0,
                                keep_text=True, data_dir=folder / "data", tokenizer_dir=folder / "tokenizer"))

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
            return found and ({{name: (split.documents, split.tokens) for name, split in found.splits.items()}},
                              found.tokenizer, found.source)

        def put_back(saved):
            for name in ("data", "tokenizer"):
                shutil.rmtree(folder / name, ignore_errors=True)
                if (saved / name).is_dir():
                    shutil.copytree(saved / name, folder / name)

        # In an empty folder, and in one with the tokens of an older text.
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
            for kill_at in range(1, 10**6, 3):
                put_back(saved)
                code = in_child(kill_at)
                if code == 0:
                    break
                assert code == -signal.SIGKILL, code
                assert result() in (None, wanted, old), kill_at
                assert in_child(None) == 0, kill_at
                assert result() == wanted, kill_at
                assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == names, kill_at
            moments.append(kill_at)
        print("moments", *moments)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(int(number) > 30 for number in done.stdout.split("moments ")[1].split())


def test_several_at_once_build_once(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    put(tmp_path / "own/a.txt", stories * 20)
    flags = ["--data-dir", str(tmp_path / "data"), "--tokenizer-dir", str(tmp_path / "tokenizer")]
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--source", str(tmp_path / "own"), *flags]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("not tokenized yet" in output for output in outputs) == 1, outputs
    assert sum(NOTHING_TO_DO in output for output in outputs) == 2, outputs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_script_resumes(tmp_path: Path, run: Callable, stories: list[str], how: signal.Signals) -> None:
    for number in range(4):
        put(tmp_path / f"text/train/{number}.txt", stories * 400)
    put(tmp_path / "text/val/a.txt", ["Not in the training text."])
    # Every file is a unit.
    script = "import runpy, sys; from litmoe.data import corpora; corpora.UNIT_BYTES = 1 << 20\n"
    script += f"sys.argv[0] = 'x'; sys.path.insert(0, {str(ROOT)!r}); "
    script += f"runpy.run_path({str(ROOT / 'prepare_data.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", script, "--num_workers", "2", "--tokenizer_dir", "tokenizer", "--data_dir"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("complete", "data"):
        shutil.copytree(tmp_path / "text", tmp_path / name)
    run(data_dir=tmp_path / "complete")
    first = subprocess.Popen(
        [*command, "data"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "data/tokens/.building/units/000001.json").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(how)
    output, _ = first.communicate()
    if how == signal.SIGINT:
        assert first.returncode == 130 and "run the same command again to resume" in output
        assert "Traceback" not in output
    assert manifest.read(tmp_path / "data") is None
    second = subprocess.run([*command, "data"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0 and "Resuming an interrupted preparation" in second.stdout, second.stderr
    assert chunks(tmp_path / "data") == chunks(tmp_path / "complete")


# --- the script ---


def test_script_prepares_and_complains(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    def script(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "prepare_data.py"), "--data-dir=data", "--tokenizer_dir", "tokenizer"]
        return subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path)

    (tmp_path / "x.txt").write_text("\n---\n".join(stories))
    done = script("--source", "x.txt", "--document-separator=---")
    assert done.returncode == 0 and "Prepared in" in done.stdout, done.stderr
    assert manifest.read(tmp_path / "data").settings.document_separator == "---"
    done = script("--source", "x.txt", "--overwrite")  # a switch needs no value
    assert done.returncode == 0 and "Tokenizing x.txt: --overwrite" in done.stdout, done.stderr
    for wrong, message in ((["--source", "y.txt"], "no such file"), (["--tokeniser", "gpt2"], "tokenizer")):
        done = script(*wrong)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


def test_preparation_does_not_import_torch() -> None:
    code = "import sys, litmoe.data.prepare; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
