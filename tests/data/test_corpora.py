"""Corpora of the Hub: every document once and in order, as tokens only, and resumed after an interruption."""

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litmoe.cli import UserError
from litmoe.data import corpora, documents, manifest, tokenizers, tokens
from litmoe.data.corpora import CORPORA
from litmoe.data.documents import split_of
from litmoe.data.hub import Dataset
from litmoe.data.prepare import PrepareArgs
from tests.data.hub_server import serve
from tests.data.text_helpers import ROOT, both, chunks, decoded, put, state

NOTHING_TO_DO = "nothing changed; nothing to do"


def parquet(rows: list, column: str = "text", group: int = 20) -> bytes:
    """A parquet file of small row groups, with another column next to the text."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(rows))), column: rows}), buffer, row_group_size=group)
    return buffer.getvalue()


def jsonl(rows: list, column: str = "text") -> bytes:
    return "".join(json.dumps({"id": number, column: row}) + "\n" for number, row in enumerate(rows)).encode()


def card(**configs: dict[str, str]) -> bytes:
    """A README.md that says which files belong to which split of which config."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name.replace('_', '-')}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {path}" for split, path in splits.items()]
    return "\n".join([*lines, "---", "# A data set", ""]).encode()


def repository(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files with the layout of a Hub repository."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row group and every file is a unit."""
    monkeypatch.setattr(corpora, "UNIT_BYTES", 1)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Replace a known corpus by files; returns its name."""

    def call(files: dict[str, bytes], name: str = "tinystories", **changes: object) -> str:
        folder = repository(tmp_path / "hub" / name, files)
        monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], path=str(folder), **changes))
        return name

    return call


@pytest.fixture
def plain(corpus: Callable, stories: list[str]) -> str:
    """120 training documents in two files of three row groups each, and 24 validation documents."""
    files = {f"data/train-{i:05d}-of-00002.parquet": parquet(stories[60 * i : 60 * i + 60]) for i in range(2)}
    return corpus({**files, "data/validation-00000-of-00001.parquet": parquet(stories[120:])})


def hashed(texts: list[str], split: str) -> list[str]:
    return [text for text in texts if split_of(text, 0.3) == split]


# --- what comes out ---


def test_help_names_every_corpus() -> None:
    assert all(f"`{name}`" in inspect.getsource(PrepareArgs) for name in CORPORA)


def test_wikitext(tmp_path: Path, run: Callable, corpus: Callable, stories: list[str]) -> None:
    rows = {
        split: [line for text in texts for line in ("", f" = {text[-9:]} = \n", "", f" {text} \n")]
        for split, texts in (("train", stories[:20]), ("validation", stories[20:23]), ("test", stories[23:25]))
    }
    splits = {split: f"{split}-*" for split in rows}
    files = {f"wikitext-103-v1/{split}-0.parquet": parquet(lines, group=7) for split, lines in rows.items()}
    files |= {f"wikitext-2-v1/{split}-0.parquet": parquet(["Not this."]) for split in rows}
    files["README.md"] = card(
        **{
            config: {split: f"{config.replace('_', '-')}/{path}" for split, path in splits.items()}
            for config in ("wikitext_2_v1", "wikitext_103_v1")
        }
    )
    found = run(source=corpus(files, "wikitext-103"))
    assert decoded(tmp_path / "data", "train") == [f"= {text[-9:]} = \n\n {text}" for text in stories[:20]]
    assert found.splits["val"].documents == 3 and found.settings.val_fraction is None


@pytest.mark.parametrize("name", ["openwebtext", "fineweb-edu"])
def test_web_corpora_are_split_by_hash(
    tmp_path: Path, run: Callable, corpus: Callable, stories: list[str], name: str
) -> None:
    files = {
        "README.md": card(default={"train": "a/*"}, sample_10BT={"train": "b-*"}, plain_text={"train": "b-*"}),
        "a/x.parquet": parquet(["Not this."]),
        **{f"b-{i}.parquet": parquet(stories[72 * i : 72 * i + 72]) for i in (0, 1)},
    }
    changes = {"config": "plain-text"} if name == "openwebtext" else {}
    found = run(source=corpus(files, name, **changes), val_fraction=0.3)
    for split in ("train", "val"):
        assert decoded(tmp_path / "data", split) == hashed(stories, split)
    # Only tokens are written, and they name no path of this machine.
    assert [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()] == ["tokens"]
    assert str(tmp_path) not in json.dumps([asdict(found.source), asdict(found.splits["train"])])
    # A thousandth of few documents is none.
    assert run(source=name, max_documents=100, overwrite=True).settings.val_fraction == 0.1


@pytest.mark.parametrize("write", [parquet, jsonl])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_dataset_with_a_text_column(
    tmp_path: Path, run: Callable, stories: list[str], write: Callable, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unusual = ["a\u0000b", "line\u2028separator", "e\u0301 \U0001f469\u200d\U0001f680", "carriage\r\nreturns\r"]
    rows = [*stories[:50], None, "", " \n", *unusual, *stories[50:]]
    folder = {f"org/name/train/{i}.{write.__name__}": write(rows[60 * i : 60 * i + 60], "story") for i in range(3)}
    folder[f"org/name/test/0.{write.__name__}"] = write(["Not this."], "story")
    monkeypatch.chdir(repository(tmp_path / "hub", folder))
    found = run(source="hf:org/name", val_fraction=0.3, num_workers=workers)
    texts = [row for row in rows if row and row.strip()]
    for split in ("train", "val"):
        assert decoded(tmp_path / "data", split) == hashed(texts, split)
    assert sum(split.empty_documents for split in found.splits.values()) == 3
    assert [entry.path for entry in found.splits["train"].text] == [
        f"name/train/{i}.{write.__name__}" for i in range(3)
    ]
    assert (found.source.name, found.source.location) == ("hf:org/name", "name")


@pytest.mark.parametrize("keep_text", [False, True])
def test_validation_documents_are_dropped_from_train(
    tmp_path: Path, run: Callable, corpus: Callable, stories: list[str], keep_text: bool
) -> None:
    val = [*stories[::3], f" {stories[1]}\r\n"]
    name = corpus({"train.parquet": parquet(stories + stories[:40]), "validation.parquet": parquet(val)})
    found = run(source=name, keep_text=keep_text)
    assert decoded(tmp_path / "data", "val") == val
    wanted = [text for text in stories + stories[:40] if text not in {text.strip() for text in val}]
    assert decoded(tmp_path / "data", "train") == wanted
    assert sum(split.dropped_duplicates for split in found.splits.values()) == 184 - len(wanted)


def test_max_documents_opens_no_more_files(tmp_path: Path, run: Callable, corpus: Callable, stories: list[str]) -> None:
    files = {"data/train-00000.parquet": parquet([*stories[:20], "", None, *stories[20:]], group=7)}
    files |= {"data/train-00001.parquet": b"no parquet", "data/validation-00000.parquet": parquet(["v", "w", "x"])}
    run(source=corpus(files), max_documents=37)
    assert decoded(tmp_path / "data", "train") == stories[:37] and decoded(tmp_path / "data", "val") == ["v", "w", "x"]


# --- nothing twice ---


def test_second_call_does_not_ask_the_hub(
    tmp_path: Path, run: Callable, plain: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run(source=plain)
    before = state(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "find", None)
        for settings in ({"source": plain}, {}):
            capsys.readouterr()
            run(**settings)
            assert NOTHING_TO_DO in capsys.readouterr().out
        for settings, message in (
            ({"source": "sample"}, r"already contains the tokens of tinystories .*which --source sample would replace"),
            ({"max_documents": 5}, r"For --max_documents they .* again: add --source tinystories"),
            ({"overwrite": True}, "Name the source.*--source tinystories --overwrite"),
        ):
            with pytest.raises(UserError, match=message):
                run(**settings)
    assert state(tmp_path / "data") == before


def test_other_settings_and_tokenizers_stream_again(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], capsys
) -> None:
    run(source=plain)
    run(source=plain, max_documents=7)
    assert "max_documents None became 7" in capsys.readouterr().out
    assert decoded(tmp_path / "data", "train") == stories[:7]
    shutil.rmtree(tmp_path / "tokenizer")
    tokenizers.install(tokenizers.train(stories, 300), {"name": "new"}, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"For another tokenizer they .* again: add --source tinystories"):
        run()
    assert run(source=plain, max_documents=7).tokenizer.vocab_size == 300
    assert "another tokenizer" in capsys.readouterr().out


def test_tokenizer_is_trained_on_a_stream(tmp_path: Path, run: Callable, plain: str, stories: list, capsys) -> None:
    shutil.rmtree(tmp_path / "tokenizer")
    settings = {"source": plain, "tokenizer": "train", "vocab_size": 300}
    assert run(**settings).tokenizer.vocab_size == 300
    assert decoded(tmp_path / "data", "train") == stories[:120]
    before = state(tmp_path)
    run(**settings)
    assert NOTHING_TO_DO in capsys.readouterr().out and state(tmp_path) == before
    assert run(**{**settings, "vocab_size": 290}).tokenizer.vocab_size == 290


def test_text_is_kept_if_asked_for(tmp_path: Path, run: Callable, plain: str, capsys) -> None:
    run(source=plain)
    wanted = chunks(tmp_path / "data")
    run(source=plain, keep_text=True)
    assert (tmp_path / "data/tokens/text/train/train-00000.txt").is_file() and chunks(tmp_path / "data") == wanted
    for settings in ({"source": plain}, {"source": plain, "keep_text": True}, {}):
        capsys.readouterr()
        run(**settings)
        assert NOTHING_TO_DO in capsys.readouterr().out
    run(source=plain, overwrite=True)  # without --keep_text: only tokens
    assert not (tmp_path / "data/tokens/text").exists() and chunks(tmp_path / "data") == wanted


def test_training_uses_streamed_tokens(tmp_path: Path, run: Callable, plain: str, corpus: Callable) -> None:
    from litmoe.data.manifest import checked_manifest

    first = run(source=plain)
    assert checked_manifest(tmp_path / "data") == first
    files = {"train.parquet": parquet(["a b"] * 9), "validation.parquet": parquet(["c"])}
    other = run(source=corpus(files, "shakespeare"), overwrite=True)
    assert checked_manifest(tmp_path / "data") == other
    prints = {manifest.text_fingerprint(split.text) for found in (first, other) for split in found.splits.values()}
    assert len(prints) == 4


# --- interrupted ---


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def stop_at(number: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Stop before the unit with that index is read, counted from the start of the call; returns the units read."""
    read: list[int] = []

    def stopping(unit: documents.Unit, *arguments: object) -> object:
        if len(read) == number:
            raise Stop
        read.append(unit.number)
        yield from documents.read_unit(unit, *arguments)

    patch.setattr(tokens, "read_unit", stopping)
    return read


@pytest.mark.parametrize(
    "case", ["own validation", "hash", "few documents", "first documents", "text kept", "in place"]
)
def test_interrupted_call_resumes(
    tmp_path: Path, run: Callable, corpus: Callable, stories: list[str], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of units: the same bytes as an uninterrupted call, and no unit is read twice."""
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 500)
    settings: dict[str, object] = {}
    if case != "in place":
        rows = stories + stories[:20]
        if case == "few documents":
            rows = [" ".join(stories[i : i + 9]) for i in range(6)]
        files = {f"data/train-0000{i}.parquet": parquet(rows[i::2], group=40) for i in range(2)}
        if case in ("own validation", "text kept"):
            files["data/validation-00000.parquet"] = parquet(stories[::9])
        settings = {"source": corpus(files), "keep_text": case == "text kept"}
        settings["val_fraction"] = 0.05 if case == "few documents" else 0.2
        settings["max_documents"] = 90 if case == "first documents" else None

    def prepare_into(name: str) -> dict[str, bytes]:
        if case == "in place" and not (tmp_path / name).exists():
            for i in range(3):
                put(tmp_path / name / f"train/{i}.txt", stories[i::3])
        run(data_dir=tmp_path / name, **settings)
        return chunks(tmp_path / name)

    with monkeypatch.context() as patch:
        units = stop_at(-1, patch)
        wanted = prepare_into("complete")
    assert len(units) >= 3
    for number in range(len(units)):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            first = stop_at(number, patch)
            prepare_into(f"data-{number}")
        assert manifest.read(tmp_path / f"data-{number}") is None
        with monkeypatch.context() as patch:
            second = stop_at(-1, patch)
            assert prepare_into(f"data-{number}") == wanted, number
        assert first + second == units
        assert not (tmp_path / f"data-{number}/tokens/.building").exists()


def test_units_of_other_text_are_dropped(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(4, patch)
        run(source=plain)
    # A power failure may lose data of a finished unit.
    units = tmp_path / "data/tokens/.building/units"
    os.truncate(units / "000002.train", 10)
    run(source=plain)
    assert decoded(tmp_path / "data", "train") == stories[:120]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(3, patch)
        run(source=plain, overwrite=True)
    repository(tmp_path / "hub" / plain, {"data/train-00000-of-00002.parquet": parquet(["New."])})
    run(source=plain, overwrite=True)
    assert decoded(tmp_path / "data", "train") == ["New.", *stories[60:120]]


def test_unfinished_stream_is_not_replaced(
    tmp_path: Path, run: Callable, plain: str, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(3, patch)
        run(source=plain)
    before = state(tmp_path / "data")
    own = str(put(tmp_path / "own.txt", stories))
    for source in ("shakespeare", own):
        with pytest.raises(UserError, match=f"unfinished preparation of {plain}.*--source {plain}.*--overwrite"):
            run(source=source)
    assert state(tmp_path / "data") == before
    complete = run(source=own, overwrite=True)
    # A given-up replacement does not change what is complete.
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(1, patch)
        run(source=plain, overwrite=True)
    assert run(source=own) == complete


# --- over the wire ---


def test_hub_end_to_end(tmp_path: Path, run: Callable, stories: list[str]) -> None:
    """huggingface_hub and datasets talk to a server: parquet, jsonl, the Hub's conversion, a lost connection."""
    many = [f"{number} {text}" for number in range(20) for text in stories]
    plain = {f"data/train-{i:05d}-of-00003.parquet": parquet(many[i::3], group=80) for i in range(3)}
    script = {"README.md": b"# A data set\n", "script.py": b"import datasets"}
    converted = {
        "a/partial-train/0000.parquet": parquet(stories[:40]),
        "a/partial-train/0001.parquet": parquet(stories[40:60]),
        "a/valid/0000.parquet": parquet(stories[50:70]),
        "b/train/0000.parquet": parquet(["Not this."]),
    }
    lines = {"README.md": card(default={"train": "x/*.jsonl"})}
    lines |= {f"x/{i}.jsonl": jsonl(many[1440 * i : 1440 * i + 1440]) for i in range(2)}
    body = """
        import sys
        from pathlib import Path
        from litmoe.cli import UserError
        from litmoe.data import corpora, tokens
        from litmoe.data.prepare import PrepareArgs, prepare
        corpora.UNIT_BYTES = 1
        tokens.RETRY_SECONDS = (0.0,)
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
    datasets = {
        "org/plain": {"main": plain},
        "org/script": {"main": script, "refs/convert/parquet": converted},
        "org/lines": {"main": lines},
        "org/none": {"main": script | {"none.py": b"x"}},
    }
    with serve(datasets) as server:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(body)],
            cwd=tmp_path,
            env={**environment, "HF_HOME": str(tmp_path / "home")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin and process.stdout

        def prepare_in_process(*words: object) -> str:
            server.sent.clear()
            server.requests.clear()
            process.stdin.write(" ".join(map(str, words)) + "\n")
            process.stdin.flush()
            return "".join(iter(process.stdout.readline, "END\n"))

        def documents_in(name: str) -> list[str]:
            shutil.copytree(tmp_path / "tokenizer", tmp_path / name / "tokenizer", dirs_exist_ok=True)
            return both(tmp_path / name / "data")

        # The connection is lost, then the files on the Hub change: the same command resumes with the earlier files.
        units = tmp_path / "plain/data/tokens/.building/units"
        server.hangs_up = lambda: (units / "000005.json").exists()
        assert "run the same command again" in prepare_in_process("plain", "hf:org/plain")
        assert manifest.read(tmp_path / "plain/data") is None
        server.hangs_up = lambda: False
        server.push("org/plain", "main", {"data/train-00000-of-00001.parquet": parquet(["Another."])})
        assert "Resuming an interrupted preparation" in prepare_in_process("plain", "hf:org/plain")
        assert documents_in("plain") == sorted(many)
        assert NOTHING_TO_DO in prepare_in_process("plain", "hf:org/plain") and server.requests == []
        # A short interruption is not even noticed.
        hang_ups = iter([False] * 8 + [True])
        server.hangs_up = lambda: next(hang_ups, False)
        assert "Prepared" in prepare_in_process("lines", "hf:org/lines")
        assert documents_in("lines") == sorted(many)
        # Only the first lines of the first file are read.
        assert "Prepared" in prepare_in_process("few", "hf:org/lines", 100)
        assert documents_in("few") == sorted(many[:100]) and "x/1.jsonl" not in server.sent
        # A dataset with a loading script and two configs: the Hub's conversion is read.
        assert "has the configs [a, b], and none is named" in prepare_in_process("script", "hf:org/script")
        output = prepare_in_process("script", "hf:org/script:a")
        assert "only the beginning" in output and "10 training documents left out" in output
        assert documents_in("script") == sorted(stories[:50] + stories[50:70])
        assert "has the configs [a, b], but no 'c'" in prepare_in_process("other", "hf:org/script:c")
        assert "no parquet of it" in prepare_in_process("none", "hf:org/none")
        process.stdin.close()
        assert process.wait() == 0


# --- messages ---


def test_unusable_datasets_are_named(
    tmp_path: Path, run: Callable, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = io.BytesIO()
    pq.write_table(pa.table({"n": [1, 2]}), numbers)
    two = {"README.md": card(a={"train": "a.parquet"}, b={"train": "b.parquet"})}
    two |= {f"{name}.parquet": parquet(stories) for name in "ab"}
    for name, files, source, message in (
        ("two", two, "hf:org/two", r"has the configs \['a', 'b'\], and none is named; name one: --source hf:org/two:"),
        ("two", two, "hf:org/two:c", r"has the configs \['a', 'b'\], but no 'c'"),
        ("test", {"test.parquet": parquet(stories)}, "hf:org/test", "no split called train, but test"),
        (
            "csv",
            {"train.csv": b"text\na\n"},
            "hf:org/csv",
            r"neither .* without hf: --source org.csv|without \.parquet",
        ),
        ("number", {"train.parquet": numbers.getvalue()}, "hf:org/number", r"'n'.*--text_column"),
        ("broken", {"train.parquet": b"PAR1"}, "hf:org/broken", "cannot be read as parquet"),
        ("empty", {"train.parquet": parquet(["", None])}, "hf:org/empty", "no text for train"),
    ):
        repository(tmp_path / "org" / name, files)
        with pytest.raises(UserError, match=message):
            run(source=source)
        assert not (tmp_path / "data").exists(), name
    for source in ("hf:", "hf:org", "hf:org/name/more", "hf:org/name:", "hf:a b/c"):
        with pytest.raises(UserError, match="expected hf:ORG/NAME"):
            run(source=source)
    run(source="hf:org/two:b", text_column="text", val_fraction=0.3)
    assert both(tmp_path / "data") == sorted(stories)
