"""From rows of any form to two files of conversations: nothing lost unsaid, no prompt in both, nothing done twice."""

import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from litgpt.prompts import Alpaca, prompt_styles

from recipe.cli import UserError
from recipe.data import instructions
from recipe.data.instructions import (
    InstructArgs,
    Instructions,
    conversation_of,
    conversations,
    instructions_fingerprint,
    prepare_instructions,
    unwrap,
)
from tests.data.hub_server import serve
from tests.data.test_prepare import ROOT, state


def turn(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def pairs(number: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i} + 1?", "response": f"{i + 1}."} for i in range(start, start + number)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(source: Path | str, data_dir: Path, **settings: Any) -> Instructions:
    return prepare_instructions(InstructArgs(str(source), data_dir, **settings))


def both(data_dir: Path) -> list[list[dict[str, str]]]:
    return [*conversations(data_dir, "train"), *conversations(data_dir, "val")]


# --- forms ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, turn("Add.\n\n1 and 2", "3")),
        ({"instruction": "Say hello.", "input": "", "output": "Hello."}, turn("Say hello.", "Hello.")),
        ({"instruction": "Say hello.", "output": "Hello.", "text": "..."}, turn("Say hello.", "Hello.")),
        ({"instruction": "Who?", "context": "Mia left.", "response": "Mia."}, turn("Who?\n\nMia left.", "Mia.")),
        ({"prompt": "Who?", "response": "Mia."}, turn("Who?", "Mia.")),
        ({"prompt": " Who?\r\n", "completion": " Mia.\n"}, turn("Who?", "Mia.")),
        ({"question": "Who?", "answer": "Mia \ud83d."}, turn("Who?", "Mia \ufffd.")),
        ({"messages": turn("Who?", "Mia."), "prompt": "Who?", "response": "?"}, turn("Who?", "Mia.")),
        (
            {"messages": [{"role": "system", "content": "Be kind."}, *turn("Who?", "Mia."), *turn("Where?", "Here.")]},
            [{"role": "system", "content": "Be kind."}, *turn("Who?", "Mia."), *turn("Where?", "Here.")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": "Who?"},
                    {"from": "gpt", "value": "Mia.", "weight": 1},
                ]
            },
            turn("Who?", "Mia."),
        ),
    ],
)
def test_each_form_is_found_by_itself(row: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert conversation_of(row).messages == expected
    assert conversation_of(json.dumps(row).encode()).messages == expected


BROKEN = {
    "not JSON": (b'{"prompt": "Who?"', "not JSON (Expecting ',' delimiter at column 18); expected an object on a line"),
    "not UTF-8": (b'{"prompt": "\xff"}', "byte 0xff at column 13 is not UTF-8"),
    "no object": (b"[1]", "list where an object was expected"),
    "no known fields": ({"text": "Who?", "id": 1}, "the fields 'text', 'id'; expected {\"messages\""),
    "nothing": ({}, "the fields (none)"),
    "no text": ({"prompt": ["Who?"], "response": "Mia."}, "expected text in 'prompt', found list"),
    "empty answer": ({"prompt": "Who?", "response": " \n"}, "message 2, the assistant's, is empty"),
    "no answer": ({"prompt": "Who?", "response": None}, "message 2, the assistant's, is empty"),
    "empty prompt": ({"instruction": "", "input": "", "output": "Mia."}, "message 1, the user's, is empty"),
    "two in a row": (
        {"messages": turn("Who?", "Mia.") + turn("Who?", "Mia.")[1:]},
        "message 3 is the assistant's, expected user's",
    ),
    "no end": ({"messages": turn("Who?", "Mia.")[:1]}, "it does not end with a message of the assistant"),
    "no message": ({"messages": []}, "no messages"),
    "a tool": ({"messages": [{"role": "tool", "content": "1"}]}, "a message of 'tool'; expected one of system"),
    "half a message": ({"conversations": [{"from": "human"}]}, 'a message {"from": "human"}; expected an object with'),
    "message of parts": ({"messages": [{"role": "user", "content": [1]}]}, "expected text in 'content', found list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named_with_its_place_or_left_out_and_counted(tmp_path: Path, name: str) -> None:
    row, problem = BROKEN[name]
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    good = [json.dumps(row).encode() for row in pairs(40)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join([*good[:20], b"", line, *good[20:]]))
    with pytest.raises(UserError) as raised:
        prepare(source, tmp_path / "data")
    assert str(raised.value).startswith(f"{source}, line 22: {problem}")
    assert str(raised.value).endswith("--skip_broken")
    assert not (tmp_path / "data").exists()
    found = prepare(source, tmp_path / "data", skip_broken=True)
    assert found.skipped == 1 and len(both(tmp_path / "data")) == 40


def test_many_broken_rows_are_counted(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [{"text": "?"}] * 7 + pairs(10))
    with pytest.raises(UserError, match=r"(?s)line 1: .*line 2: .*line 3: .*\.\.\. and 4 rows more"):
        prepare(source, tmp_path / "data")


def test_a_list_lines_and_parquet_are_the_same(tmp_path: Path) -> None:
    rows = pairs(60)
    jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prints = set()
    for name in ("lines.json", "list.json", "rows.parquet"):
        found = prepare(tmp_path / name, tmp_path / name.replace(".", "_"))
        prints.add(instructions_fingerprint(tmp_path / name.replace(".", "_")))
        assert sum(split.conversations for split in found.splits.values()) == 60
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"prompt": 1},\n\n{]', "a.json, line 3: not JSON"),
        ("a.json", b'[\n"\xff"]', "a.json, line 2: byte 0xff is not UTF-8"),
        ("a.parquet", b"PAR1 not", "a.parquet cannot be read as parquet"),
        ("a.txt", b"Who?", "expected a .json, .jsonl, .parquet file"),
        ("a.jsonl", b"", "no conversation for train among 0"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as raised:
        prepare(tmp_path / name, tmp_path / "data")
    assert message in str(raised.value)
    assert not (tmp_path / "data").exists()


def test_a_name_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--instruct storys: no such file or folder; did you mean stories"):
        prepare("storys", tmp_path / "data")
    with pytest.raises(UserError, match=r"--val_fraction 1\.5: expected a number between 0 and 1"):
        prepare("stories", tmp_path / "data", val_fraction=1.5)


# --- templates ---


@pytest.mark.parametrize("name", sorted(prompt_styles))
def test_a_prompt_comes_out_of_any_template_with_two_ends(name: str) -> None:
    wrapped = prompt_styles[name]().apply("Who is\n\nMia?")
    before, _, after = wrapped.partition("Who is\n\nMia?")
    assert unwrap(wrapped.strip()) == ("Who is\n\nMia?" if before.strip() and after.strip() else None)


def test_a_prompt_comes_out_of_alpacas_template() -> None:
    """As the rows of dolly_hhrlhf carry it: tuned on so, the model would be asked in two templates at once."""
    row = {"prompt": Alpaca().apply("what is fish oil?"), "response": "Oil."}
    assert conversation_of(row) == (turn("what is fish oil?", "Oil."), None, 1)
    row = {"prompt": Alpaca().apply("Add.", input="1 and 2"), "response": "3"}
    assert conversation_of(row) == (turn("Add.\n\n1 and 2", "3"), None, 1)


def test_words_of_a_template_inside_a_prompt_stay() -> None:
    for prompt in ("What does ### Response: mean?", "Instruct: stay", Alpaca().apply("").strip()):
        assert unwrap(prompt) is None


def test_how_many_were_unwrapped_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "prompt": Alpaca().apply(row["prompt"])} for row in pairs(40)] + pairs(10, start=100)
    found = prepare(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    assert found.unwrapped == 40 and "40 prompts were taken out of a template" in capsys.readouterr().out
    assert {first["content"] for first, _ in both(tmp_path / "data")} == {
        r["prompt"] for r in pairs(40) + pairs(10, 100)
    }


# --- splits ---


def test_a_prompt_stands_in_one_split_and_a_conversation_once(tmp_path: Path) -> None:
    rows = pairs(300)
    others = [{**row, "response": "I don't know."} for row in rows]
    found = prepare(jsonl(tmp_path / "rows.jsonl", [*rows, *others, *rows[:30]]), tmp_path / "data", val_fraction=0.3)
    asked = {
        split: {messages[0]["content"] for messages in conversations(tmp_path / "data", split)}
        for split in ("train", "val")
    }
    assert not asked["train"] & asked["val"] and len(asked["train"] | asked["val"]) == 300
    assert 60 <= len(asked["val"]) <= 120
    assert found.duplicates == 30 and len(both(tmp_path / "data")) == 600


def test_the_split_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    prepare(jsonl(tmp_path / "few.jsonl", pairs(50)), tmp_path / "few")
    prepare(jsonl(tmp_path / "many.jsonl", pairs(200)[::-1]), tmp_path / "many")
    few, many = (conversations(tmp_path / name, "val") for name in ("few", "many"))
    assert few and all(messages in many for messages in few)


@pytest.mark.parametrize("name", ["val.jsonl", "validation.json", "valid.jsonl"])
def test_a_folder_with_a_split_keeps_it_but_for_what_it_holds_out(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "in/train.jsonl", pairs(50))
    jsonl(tmp_path / "in" / name, [*pairs(5, start=45), *pairs(5, start=100)])
    found = prepare(tmp_path / "in", tmp_path / "data")
    assert found.val_fraction is None and found.held_out == 5
    assert conversations(tmp_path / "data", "train") == [turn(r["prompt"], r["response"]) for r in pairs(45)]
    assert len(conversations(tmp_path / "data", "val")) == 10


def test_a_folder_of_other_files_is_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "in/a.jsonl", pairs(30))
    jsonl(tmp_path / "in/b.json", pairs(30, start=30))
    (tmp_path / "in/README.md").write_text("Rows.")
    prepare(tmp_path / "in", tmp_path / "data")
    assert len(both(tmp_path / "data")) == 60
    jsonl(tmp_path / "other/val.jsonl", pairs(3))
    with pytest.raises(UserError, match=r"val\.jsonl is there, but no train\.jsonl"):
        prepare(tmp_path / "other", tmp_path / "data", overwrite=True)
    assert len(both(tmp_path / "data")) == 60


def test_too_few_to_hold_any_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no conversation for val among 2; give more, or another --val_fraction"):
        prepare(jsonl(tmp_path / "rows.jsonl", pairs(2)), tmp_path / "data", val_fraction=0.001)


# --- the folder ---


def test_nothing_is_done_twice_and_nothing_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    found = prepare(source, data)
    before = state(data)
    assert sorted(before) == [".prepare.lock", "instructions.json", "train.jsonl", "val.jsonl"]
    capsys.readouterr()
    assert prepare(source, data) == found == instructions.read(data) and state(data) == before
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made otherwise \(val_fraction 0\.1 became 0\.5\).*--overwrite"):
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
    assert len(both(data)) == 60 and instructions.read(data) != found


def test_files_that_changed_or_are_foreign_are_not_replaced(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    prepare(source, data)
    jsonl(data / "train.jsonl", [{"messages": turn("Who?", "Mia.")}])
    for call in (instructions_fingerprint, lambda data: prepare(source, data)):
        with pytest.raises(UserError, match=r"not as it was prepared: train\.jsonl changed"):
            call(data)
    (data / "instructions.json").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl was not made by this command"):
        prepare(source, data)
    prepare(source, data, overwrite=True)
    assert len(both(data)) == 50


def test_a_source_is_never_written_over(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "data/train.jsonl", pairs(50))
    for name in (source, tmp_path / "data"):
        with pytest.raises(UserError, match="is what would be written; choose another --data_dir"):
            prepare(name, tmp_path / "data", overwrite=True)
    prepare(tmp_path / "data", tmp_path / "other")
    assert source.read_text().count("\n") == len(both(tmp_path / "other")) == 50


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_call_killed_at_the_very_end_is_finished_by_the_next(tmp_path: Path, moved: int) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    found = prepare(source, data)
    building = data / instructions.BUILDING
    building.mkdir()
    for name in ("train.jsonl", "val.jsonl", "instructions.json")[moved:]:
        os.replace(data / name, building / name)
    assert prepare(source, data) == found
    assert not building.exists()


def test_a_call_killed_before_is_made_anew(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    jsonl(data / instructions.BUILDING / "train.jsonl", pairs(3))
    prepare(source, data)
    assert len(both(data)) == 50 and not (data / instructions.BUILDING).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; expected prepared instructions: `uv run python prepare_data.py --instruct"),
        ("{", "instructions.json cannot be read"),
        ('{"splits": {}}', "instructions.json cannot be read"),
    ],
)
def test_a_folder_that_is_none_is_told_with_the_command(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/instructions.json").write_text(text)
    with pytest.raises(UserError, match=message):
        instructions.read(tmp_path / "data")


# --- the door ---


def test_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "rows.jsonl", pairs(50))

    def door(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags])
        try:
            runpy.run_path(str(ROOT / "prepare_data.py"), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert door(f"--instruct={source}", "--data-dir", str(tmp_path / "data"), "--val_fraction", "0.2") == 0
    assert len(both(tmp_path / "data")) == 50
    assert door("--instruct", str(source), "--tokenizer", "train") == 1
    assert "'tokenizer'" in capsys.readouterr().err
    assert door("--instruct", "stories", "--help") == 0
    assert "--skip_broken" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    """Over the wire, by the Hub's own client; and called again, the Hub is not asked."""
    rows = {"data/train.jsonl": "".join(json.dumps(row) + "\n" for row in pairs(40)).encode()}
    pq.write_table(pa.Table.from_pylist(pairs(5, start=100)), tmp_path / "validation.parquet")
    mixed = {
        "train/0.parquet": (tmp_path / "validation.parquet").read_bytes(),
        "validation/0.parquet": (tmp_path / "validation.parquet").read_bytes(),
    }
    body = """
        import sys
        from pathlib import Path
        from recipe.cli import UserError
        from recipe.data.instructions import InstructArgs, prepare_instructions
        for line in sys.stdin:
            try:
                prepare_instructions(InstructArgs(f"hf:org/{line.strip()}", Path(line.strip())))
            except UserError as error:
                print("error:", error)
            print("END", flush=True)
        """
    with serve({"org/lines": {"main": rows}, "org/tables": {"main": mixed}}) as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(body)],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT)},
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

        assert "conversations to train on" in call("lines")
        assert len(both(tmp_path / "lines")) == 40
        assert "nothing to do" in call("lines") and not server.requests
        assert "no conversation for train among 5" in call("tables")  # all of them are held out
        assert "the Hub has no dataset org/none" in call("none")
        process.communicate("", timeout=280)
