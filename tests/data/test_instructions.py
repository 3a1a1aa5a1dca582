"""Prepared instructions: files of all kinds, fixed splits, nothing lost silently, nothing overwritten."""

import gzip
import json
import lzma
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from litgpt.prompts import Alpaca

from litmoe.checksummed_json import read_checksummed, write_checksummed
from litmoe.cli import UserError
from litmoe.data import instructions
from litmoe.data.instructions import (
    InstructArgs,
    Instructions,
    conversations,
    instructions_fingerprint,
    prepare_instructions,
)
from tests.data.hub_server import serve
from tests.data.instruction_helpers import jsonl, pairs, turn

PROJECT = Path(__file__).resolve().parents[2]


def prepare(source: Path | str, data_dir: Path, **settings: Any) -> Instructions:
    return prepare_instructions(InstructArgs(str(source), data_dir, **settings))


def both(data_dir: Path) -> list[list[dict[str, str]]]:
    return [*conversations(data_dir, "train"), *conversations(data_dir, "val")]


def questions(data_dir: Path, split: str) -> list[str]:
    return [messages[0]["content"] for messages in conversations(data_dir, split)]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


# --- files ---


def test_files_of_all_kinds_in_one_folder(tmp_path: Path) -> None:
    """Each file has other rows; the formats themselves are tested in test_files.py."""
    chats = [turn(row["prompt"], row["response"]) for row in pairs(20)]
    cells = ["prompt,response\r\n", *(f"{row['prompt']},{row['response']}\r\n" for row in pairs(20, start=20))]
    table = pa.Table.from_pylist([{"messages": turn(row["prompt"], row["response"])} for row in pairs(20, start=60)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text(json.dumps(chats))
    (tmp_path / "in/b.CSV.gz").write_bytes(gzip.compress("".join(cells).encode("utf-16")))
    (tmp_path / "in/c.jsonl.xz").write_bytes(lzma.compress(jsonl(tmp_path / "c", pairs(20, start=40)).read_bytes()))
    pq.write_table(table, tmp_path / "in/d.parquet")
    with ipc.new_stream(tmp_path / "in/e.arrow", (table := pa.Table.from_pylist(pairs(20, start=80))).schema) as writer:
        writer.write_table(table)
    prepare(tmp_path / "in", tmp_path / "data")
    expected = [turn(row["prompt"], row["response"]) for row in pairs(100)]
    assert sorted(both(tmp_path / "data"), key=str) == sorted(expected, key=str)


BROKEN_ROWS = {
    "not JSON": (b'{"prompt": "Who?"', "not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "byte 0xff is not UTF-8"),
    "no conversation": (b'{"text": "Who?"}', "the fields 'text'; expected"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_broken_row_is_named_or_skipped(tmp_path: Path, name: str) -> None:
    line, problem = BROKEN_ROWS[name]
    good = [json.dumps(row).encode() for row in pairs(40)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join([*good[:20], b"", line, *good[20:]]))
    with pytest.raises(UserError) as raised:
        prepare(source, tmp_path / "data")
    assert str(raised.value).startswith(f"{source}, line 22: {problem}")
    assert str(raised.value).endswith("--skip_broken")
    assert not (tmp_path / "data").exists()
    assert "1 rows that cannot be used are left out." in prepare(source, tmp_path / "data", skip_broken=True).notes
    assert len(both(tmp_path / "data")) == 40


def test_broken_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [], "tools": [{"name": "f"}]}] * 4 + [{"chosen": "a", "rejected": "b"}]
    source = jsonl(tmp_path / "rows.jsonl", [*rows, *pairs(30)])
    with pytest.raises(UserError, match=r"(?s)line 1: .*line 2: .*line 3: .*\.\.\. and 2 more rows"):
        prepare(source, tmp_path / "data")
    prepare(source, tmp_path / "data", skip_broken=True)
    output = capsys.readouterr().out
    assert "4 of these: the field 'tools': tool calls are not supported" in output
    assert "1 of these: the field 'chosen': preference data is not supported" in output


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"prompt": 1},\n\n{]', "a.json, line 3: not JSON"),
        ("a.json", b'{"version": 2, "data": [{"prompt": "Who?"}]}', "row 1: the fields 'version', 'data'; expected"),
        ("a.parquet", b"PAR1 not", "a.parquet cannot be read as parquet"),
        ("a.txt", b"Who?", "expected a .jsonl, .json, .csv, .tsv, .parquet, .arrow file"),
        ("a.jsonl", b"", "no conversation for train among 0"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(tmp_path / name, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unknown_source_and_bad_fraction(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--instruct storys: no such file or folder; did you mean stories"):
        prepare("storys", tmp_path / "data")
    with pytest.raises(UserError, match=r"--val_fraction 1\.5: expected a number between 0 and 1"):
        prepare("stories", tmp_path / "data", val_fraction=1.5)


def test_summary_names_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "prompt": Alpaca().apply(row["prompt"]), "id": i, "note": None} for i, row in enumerate(pairs(40))]
    result = prepare(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    assert result.notes[0].startswith("40 prompts were taken out of a template") and len(result.notes) == 2
    assert instructions.read(tmp_path / "data") == result
    output = capsys.readouterr().out
    assert "1 fields are not used: id." in output and "40 prompts were taken out of a template" in output
    assert {first["content"] for first, _ in both(tmp_path / "data")} == {row["prompt"] for row in pairs(40)}


def test_white_space_is_kept(tmp_path: Path) -> None:
    code = [turn(f"def f(x):  # {i}\n", f"    y = x + {i}\n    return y\n") for i in range(40)]
    rows = [{"prompt": question["content"], "completion": answer["content"]} for question, answer in code]
    prepare(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    assert sorted(both(tmp_path / "data"), key=str) == sorted(code, key=str)


# --- splits ---


def test_splits_share_no_question(tmp_path: Path) -> None:
    rows = pairs(300)
    others = [{**row, "response": "I don't know."} for row in rows]
    spaced = [{"prompt": f"{row['prompt']}\n", "response": row["response"]} for row in rows]
    source = jsonl(tmp_path / "rows.jsonl", [*rows, *others, *spaced, *rows[:30]])
    result = prepare(source, tmp_path / "data", val_fraction=0.3)
    train, val = ({text.strip() for text in questions(tmp_path / "data", split)} for split in ("train", "val"))
    assert not train & val and len(train | val) == 300
    assert 60 <= len(val) <= 120
    assert result.notes == ("30 duplicates are left out.",) and len(both(tmp_path / "data")) == 900


def test_split_of_a_row_does_not_depend_on_others(tmp_path: Path) -> None:
    prepare(jsonl(tmp_path / "few.jsonl", pairs(50)), tmp_path / "few")
    prepare(jsonl(tmp_path / "many.jsonl", pairs(200)[::-1]), tmp_path / "many")
    few, many = (conversations(tmp_path / name, "val") for name in ("few", "many"))
    assert few and all(messages in many for messages in few)


def test_no_validation_question_in_training(tmp_path: Path) -> None:
    jsonl(tmp_path / "in/train.jsonl", pairs(50))
    jsonl(tmp_path / "in/validation.json", [*pairs(5, start=45), *pairs(5, start=100)])
    result = prepare(tmp_path / "in", tmp_path / "data")
    assert result.val_fraction is None
    assert result.notes == (
        "1 files are used for validation: validation.json.",
        "5 that begin like a validation conversation are left out of training.",
    )
    assert questions(tmp_path / "data", "train") == [row["prompt"] for row in pairs(45)]
    assert len(conversations(tmp_path / "data", "val")) == 10


@pytest.mark.parametrize(
    "names",
    [
        ("TRAIN/a.jsonl", "Valid/b.jsonl", "Test/c.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
    ],
)
def test_names_of_files_and_folders_give_the_split(
    tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for start, name in zip((0, 100, 200), names, strict=True):
        jsonl(tmp_path / "in" / name, pairs(50, start))
    assert prepare(tmp_path / "in", tmp_path / "data").val_fraction is None
    assert questions(tmp_path / "data", "train") == [row["prompt"] for row in pairs(50)]
    assert questions(tmp_path / "data", "val") == [row["prompt"] for row in pairs(50, 100)]
    assert "test" in capsys.readouterr().out.lower()


def test_folder_without_validation_is_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(tmp_path / "in/a.jsonl", pairs(30))
    jsonl(tmp_path / "in/b.json", pairs(30, start=30))
    jsonl(tmp_path / "in/test.jsonl", pairs(50, 100))
    for name in ("README.md", "dataset_info.json", ".DS_Store"):
        (tmp_path / "in" / name).write_text("{}")
    for _ in range(2):  # the prepared folder inside is no source
        assert prepare(tmp_path / "in", tmp_path / "in/data").val_fraction == 0.1
        output = capsys.readouterr().out
        assert "1 files are not used, because of their names (test data): test.jsonl." in output
        assert "2 files are not read (.md 1, .json 1): README.md, dataset_info.json." in output
    assert len(both(tmp_path / "in/data")) == 60
    os.remove(tmp_path / "in/a.jsonl"), os.remove(tmp_path / "in/b.json")
    with pytest.raises(UserError, match=r"file to train on.* It has .*test\.jsonl"):
        prepare(tmp_path / "in", tmp_path / "in/data", overwrite=True)
    assert len(both(tmp_path / "in/data")) == 60


def test_too_few_conversations_for_validation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no conversation for val among 2 .* another --val_fraction"):
        prepare(jsonl(tmp_path / "rows.jsonl", pairs(2)), tmp_path / "data", val_fraction=0.001)


# --- the prepared folder ---


def test_second_call_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    result = prepare(source, data)
    before = state(data)
    assert {"instructions.json", "train.jsonl", "val.jsonl"} <= before.keys()
    assert prepare(source, data) == result and state(data) == before
    assert "nothing to do" in capsys.readouterr().out


def test_other_settings_need_overwrite(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    result = prepare(source, data)
    before = state(data)
    with pytest.raises(UserError, match=r"val_fraction 0\.1 became 0\.5.*--overwrite"):
        prepare(source, data, val_fraction=0.5)
    with pytest.raises(UserError, match="source 'files' became 'stories'"):
        prepare("stories", data)
    jsonl(source, pairs(60))
    with pytest.raises(UserError, match=r"rows\.jsonl changed"):
        prepare(source, data)
    jsonl(source, [*pairs(60), {}])
    with pytest.raises(UserError, match="line 61"):
        prepare(source, data, overwrite=True)
    assert state(data) == before
    jsonl(source, pairs(60))
    prepare(source, data, overwrite=True, val_fraction=0.5)
    assert len(both(data)) == 60 and instructions.read(data) != result


def test_metadata_of_another_version(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    result = prepare(source, data)
    values = read_checksummed(data / instructions.MANIFEST)
    newer = {**values, "new": 1, "source_files": [{**values["source_files"][0], "new": 1}]}
    write_checksummed(data / instructions.MANIFEST, newer)
    assert instructions.read(data) == result
    older = {name: value for name, value in values.items() if name != "notes"}
    write_checksummed(data / instructions.MANIFEST, older)
    assert prepare(source, data) == result
    write_checksummed(data / instructions.MANIFEST, {**values, "format": 3})
    with pytest.raises(UserError, match=r"it has the format 3, expected 2.*--overwrite"):
        prepare(source, data)
    assert prepare(source, data, overwrite=True).format == 2


def test_changed_or_foreign_files_are_kept(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    prepare(source, data)
    jsonl(data / "train.jsonl", [{"messages": turn("Who?", "Mia.")}])
    for call in (instructions_fingerprint, lambda data: prepare(source, data)):
        with pytest.raises(UserError, match=r"changed since it was prepared: train\.jsonl changed"):
            call(data)
    (data / "instructions.json").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl was not made by this command"):
        prepare(source, data)
    for own in (data / "train.jsonl", data):
        with pytest.raises(UserError, match="would be replaced; choose another --data_dir"):
            prepare(own, data, overwrite=True)
    prepare(source, data, overwrite=True)
    assert len(both(data)) == 50


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_killed_while_publishing(tmp_path: Path, moved: int) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    result = prepare(source, data)
    building = data / instructions.BUILDING
    building.mkdir()
    for name in ("train.jsonl", "val.jsonl", "instructions.json")[moved:]:
        os.replace(data / name, building / name)
    assert prepare(source, data) == result
    assert not building.exists()


def test_killed_while_writing(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    jsonl(data / instructions.BUILDING / "train.jsonl", pairs(3))
    prepare(source, data)
    assert len(both(data)) == 50 and not (data / instructions.BUILDING).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; expected prepared instructions.*`uv run python prepare_data.py --instruct"),
        ("{", "instructions.json cannot be read"),
        ('{"splits": {}}', "instructions.json cannot be read"),
    ],
)
def test_missing_or_broken_metadata(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/instructions.json").write_text(text)
    with pytest.raises(UserError, match=message):
        instructions.read(tmp_path / "data")


# --- the script ---


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "rows.jsonl", pairs(50))

    def run(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags])
        try:
            runpy.run_path(str(PROJECT / "prepare_data.py"), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert run(f"--instruct={source}", "--data-dir", str(tmp_path / "data"), "--val_fraction", "0.2") == 0
    assert len(both(tmp_path / "data")) == 50
    assert run("--instruct", str(source), "--tokenizer", "train") == 1
    assert "'tokenizer'" in capsys.readouterr().err
    assert run("--instruct", "stories", "--help") == 0
    assert "--skip_broken" in capsys.readouterr().out


def test_preparing_imports_no_torch(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from litmoe.data.instructions import InstructArgs, prepare_instructions
        prepare_instructions(InstructArgs("stories", Path(sys.argv[1])))
        sys.exit(bool({"torch", "litgpt", "lightning", "transformers"} & sys.modules.keys()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "data")]
    assert subprocess.run(command, cwd=PROJECT, timeout=280, check=False).returncode == 0


@pytest.mark.slow
def test_dataset_of_the_hub(tmp_path: Path) -> None:
    """Through the Hub's own client. The second call does not ask the Hub again."""
    rows = {"data/train.jsonl": "".join(json.dumps(row) + "\n" for row in pairs(40)).encode()}
    pq.write_table(pa.Table.from_pylist(pairs(5, start=100)), tmp_path / "validation.parquet")
    table = (tmp_path / "validation.parquet").read_bytes()
    code = """
        import sys
        from pathlib import Path
        from litmoe.cli import UserError
        from litmoe.data.instructions import InstructArgs, prepare_instructions
        for line in sys.stdin:
            try:
                prepare_instructions(InstructArgs(f"hf:org/{line.strip()}", Path(line.strip())))
            except UserError as error:
                print("error:", error)
            print("END", flush=True)
        """
    datasets = {
        "org/lines": {"main": rows},
        "org/tables": {"main": dict.fromkeys(("train/0.parquet", "validation/0.parquet"), table)},
    }
    with serve(datasets) as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=tmp_path,
            env={**os.environ, **settings, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def call(name: str) -> str:
            server.requests.clear()
            assert process.stdin and process.stdout
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            return "".join(iter(process.stdout.readline, "END\n"))

        assert "training conversations" in call("lines")
        assert len(both(tmp_path / "lines")) == 40
        assert "nothing to do" in call("lines") and not server.requests
        assert "no conversation for train among 5" in call("tables")  # all questions are in the validation split
        assert "the Hub has no dataset org/none" in call("none")
        process.communicate("", timeout=280)
