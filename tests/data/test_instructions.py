"""From rows of any form to two files of conversations: nothing lost unsaid, no prompt in both, nothing done twice."""

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
import pyarrow.parquet as pq
import pytest
from litgpt import PromptStyle, Tokenizer
from litgpt.prompts import Alpaca, prompt_styles

from litmoe.checksummed_json import read_sealed, write_sealed
from litmoe.cli import UserError
from litmoe.data import instructions
from litmoe.data.conversations import encode_conversation
from litmoe.data.instruction_rows import conversation_of, rows_of, unwrap
from litmoe.data.instructions import (
    InstructArgs,
    Instructions,
    conversations,
    instructions_fingerprint,
    prepare_instructions,
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
        ({"prompt": " Who?\r\n", "completion": " Mia.\n"}, turn(" Who?\n", " Mia.\n")),
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
    "no object": (b"1", "a number where an object was expected"),
    "no messages in a list": (b"[1]", "a message 1; expected an object with 'role' and 'content'"),
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
    "a tool": ({"messages": [{"role": "tool", "content": "1"}]}, "a message of 'tool': tool calls are not supported"),
    "no role": (
        {"messages": [{"role": "narrator", "content": "1"}]},
        "a message of 'narrator'; expected one of system",
    ),
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
        ("a.json", b'[\n"\xff"]', "a.json, row 1: byte 0xff is not UTF-8"),
        ("a.parquet", b"PAR1 not", "a.parquet cannot be read as parquet"),
        ("a.txt", b"Who?", "expected a .json, .jsonl, .parquet, .csv, .tsv file"),
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


MIA, SYSTEM = turn("Who?", "Mia."), {"role": "system", "content": "Be kind."}
HERMES = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Mia."}]


@pytest.mark.parametrize(
    ("row", "expected", "unused"),
    [
        ({"instruction": "Who?", "output": "Mia.", "history": [["Hi", "Yes?"]]}, turn("Hi", "Yes?") + MIA, ""),
        ({"instruction": "Who?", "output": "Mia.", "history": [], "system": "Be kind."}, [SYSTEM, *MIA], ""),
        ({"instruction": "Who?", "input": "<noinput>", "output": "Mia."}, MIA, ""),
        ({"instruction": "", "input": "Who?", "output": "Mia."}, MIA, ""),
        ({"system_prompt": "Be kind.", "question": "Who?", "response": "Mia.", "id": 1}, [SYSTEM, *MIA], "id"),
        ({"context": "Mia left.", "question": "Who?", "answer": "Mia."}, turn("Who?\n\nMia left.", "Mia."), ""),
        ({"question": "Who?", "answers": {"text": ["Mia.", "Mia"]}}, MIA, "answers after the first"),
        ({"query": "Who?", "response": "Mia.", "original_question": "Who"}, MIA, "original_question"),
        ({"prompt": "Who?", "text": "Mia.", "audience": "all"}, MIA, "audience"),
        ({"Question": "Who?", "Answer": "Mia."}, MIA, ""),
        ({"prompt": MIA[:1], "completion": MIA[1:]}, MIA, ""),
        ({"messages": None, "prompt": "Who?", "response": "Mia."}, MIA, ""),
        ({"conversations": MIA}, MIA, ""),
        ({"messages": HERMES}, MIA, ""),
        ({"conversation": MIA, "language": "English"}, MIA, "language"),
        ({"conversation": [{"input": "Who?", "output": "Mia."}]}, MIA, ""),
        ({"conversations": ["Who?", "Mia."]}, MIA, ""),
        ({"conversations": HERMES, "system": "Be kind.", "tools": "[]"}, [SYSTEM, *MIA], ""),
        ({"messages": [SYSTEM, *MIA], "system": " Be kind.\n"}, [SYSTEM, *MIA], ""),
        (
            {"messages": [{**SYSTEM, "role": "developer"}, {**MIA[0], "name": "Tom"}, MIA[1]]},
            [SYSTEM, *MIA],
            "messages[].name",
        ),
        ({"messages": [{**MIA[0], "role": "Human"}, {**MIA[1], "role": "bot", "weight": 1.0}]}, MIA, ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "value": "Who?"}]}, MIA[1]]}, MIA, ""),
        ([SYSTEM, *MIA], [SYSTEM, *MIA], ""),
        (MIA, MIA, ""),
    ],
)
def test_fields_beside_the_turns_are_read(row: Any, expected: list[dict[str, str]], unused: str) -> None:
    found = conversation_of(json.dumps(row).encode())
    assert found.messages == expected
    assert ", ".join(found.unused) == unused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": MIA, "tools": [{"name": "f"}]}, "the field 'tools': tool calls are not supported"),
        ({"messages": [MIA[0], {"role": "assistant", "tool_calls": [{}]}]}, "message 2 has 'tool_calls'"),
        ({"conversations": [HERMES[0], {"from": "observation", "value": "1"}]}, "'observation': tool calls"),
        ({"chosen": "Human: Who?", "rejected": "Human: Who?"}, "'chosen': preference data is not supported"),
        ({"image": "mia.jpg", "conversations": HERMES}, "'image': only text is supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, MIA[1]]},
            "message 1 has a part of the type 'image_url'; only text is supported",
        ),
        ({"messages": [MIA[0], {**MIA[1], "weight": 0}]}, "message 2 has 'weight' 0; every answer is trained on"),
        ({"system": "Be kind.", "messages": [{**SYSTEM, "content": "Be rude."}, *MIA]}, "different system messages"),
        ({"system": "Be kind.", "conversations": HERMES[1:]}, "message 1 is the assistant's, expected user's"),
        ({"instruction": "Who?", "output": "Mia.", "history": [["Hi"]]}, "in 'history': "),
        ({"text": "Who?", "role": "prompter", "message_id": "1"}, "a single message; expected all messages"),
        ({"messages": 5}, "expected a list of messages in 'messages', found a number"),
        ({"question": "Who?", "answer": 42}, "expected text in 'answer', found a number"),
        (None, "null where an object was expected"),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        conversation_of(json.dumps(row).encode())


def test_unused_fields_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "id": i, "topic": "sums", "note": None} for i, row in enumerate(pairs(40))]
    found = prepare(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    assert found.unused_fields == ("id", "topic") and instructions.read(tmp_path / "data") == found
    assert "Fields not used: id, topic." in capsys.readouterr().out


def test_white_space_of_texts_is_kept(tmp_path: Path, tokenizer_dir: Path) -> None:
    code = [turn(f"def f(x):  # {i}\n", f"    y = x + {i}\n    return y\n") for i in range(40)]
    rows = [{"prompt": asked["content"], "completion": answer["content"]} for asked, answer in code]
    prepare(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    assert sorted(both(tmp_path / "data"), key=str) == sorted(code, key=str)
    tokenizer = Tokenizer(tokenizer_dir)
    encoded = encode_conversation(code[0], tokenizer, PromptStyle.from_name("phi-2"))
    text = tokenizer.processor.decode(encoded.input_ids)
    assert text == f"Instruct: {code[0][0]['content']}\nOutput:{code[0][1]['content']}"


def test_white_space_does_not_split_a_prompt(tmp_path: Path) -> None:
    """The same question with and without it would be in both splits."""
    rows = [
        {"prompt": f"{row['prompt']}{end}", "response": f"{row['response']}{end}"}
        for row in pairs(60)
        for end in ("", "\n")
    ]
    found = prepare(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    train, val = ({one[0]["content"].strip() for one in conversations(tmp_path / "data", s)} for s in ("train", "val"))
    assert not train & val and len(both(tmp_path / "data")) == 120 and found.duplicates == 0


def test_a_folder_of_the_older_format_is_read(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data"
    prepare(source, data)
    values = read_sealed(data / "instructions.json")
    del values["unused_fields"]
    write_sealed(data / "instructions.json", {**values, "format": 1})
    assert instructions_fingerprint(data)
    with pytest.raises(UserError, match=r"older version, which cut off white space.*--overwrite"):
        prepare(source, data)
    assert prepare(source, data, overwrite=True).format == 2


# --- files ---


def places(path: Path) -> list[str]:
    """What each row of a file is: its place, and why it is none."""
    found = []
    for place, values in rows_of(path):
        try:
            assert conversation_of(values).messages[-1]["content"] == "Mia é."
            found.append(place)
        except ValueError as error:
            found.append(f"{place}: {error}")
    return found


ROW = '{"prompt": "Who?", "response": "Mia é."}'
CHAT = '[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mia é."}]'
LONG = f'{{"prompt": "Who?", "response": "Mia é.", "id": {"9" * 5000}}}'
DEEP = f'{{"prompt": "Who?", "response": "Mia é.", "id": {"[" * 200_000 + "]" * 200_000}}}'
GOOD_FILES = {
    "lines of lists.jsonl": f"{CHAT}\n{CHAT}\n",
    "list of lists.json": f"[{CHAT},\n{CHAT}]",
    "two pairs.json": '[["Who?", "Mia é."], ["Who?", "Mia é."]]',
    "data.json": f'{{"version": 2, "data": [{ROW}, {ROW}]}}',
    "train.json": f'{{"train": [\n{CHAT},\n{CHAT}\n]}}',
    "windows.jsonl": f"\ufeff{ROW}\r\n{ROW}\r\n",
    "utf-16.jsonl": f"{ROW}\n{ROW}".encode("utf-16"),
    "utf-16.csv": "prompt,response\r\nWho?,Mia é.\r\nWho?,Mia é.\r\n".encode("utf-16"),
    "rows.tsv": "id\tprompt\tresponse\n1\tWho?\tMia é.\n2\tWho?\tMia é.",
    "rows.CSV.gz": gzip.compress('prompt,response\n"Who?","Mia é."\n\nWho?,Mia é.\n'.encode()),
    "rows.jsonl.xz": lzma.compress(f"{ROW}\n{ROW}\n".encode()),
    "rows.jsonl.gz": gzip.compress(f"{ROW}\n{ROW}\n".encode()),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_files_of_many_kinds(tmp_path: Path, name: str) -> None:
    data = GOOD_FILES[name]
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    found = places(tmp_path / name)
    assert len(found) == 2 and not any(":" in place for place in found)


def test_one_conversation_as_a_list_is_one_row(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", CHAT), ("b.json", json.dumps(json.loads(CHAT), indent=1)), ("c.json", "[]")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [places(tmp_path / name) for name in ("a.jsonl", "b.json", "c.json")] == [["line 1"], ["line 1"], []]


BROKEN_ROWS = {
    "long number on a line": ("a.jsonl", f"{ROW}\n{LONG}\n{ROW}", "line 2: a number that can't be read"),
    "deep line": ("a.jsonl", f"{ROW}\n{DEEP}\n{ROW}", "line 2: JSON nested too deeply"),
    "long number in a list": ("a.json", f"[{ROW},\n{LONG}, {ROW}]", "row 2: a number that can't be read"),
    "deep in a list": ("a.json", f"[{ROW},\n{DEEP}, {ROW}]", "row 2: JSON nested too deeply"),
    "Latin-1 in a list": ("a.json", f'[{ROW},["\udce9"],{ROW}]', "row 2: byte 0xe9 is not UTF-8"),
    "half a conversation": ("a.jsonl", f"{CHAT}\n{CHAT[:40]}\n{CHAT}", "line 2: not JSON"),
    "NaN": (
        "a.jsonl",
        f'{ROW}\n{{"prompt": "?", "response": NaN}}\n{ROW}',
        "line 2: message 2, the assistant's, is empty",
    ),
    "missing cell": ("a.csv", "prompt,response\n?,Mia é.\n?\n?,Mia é.", "row 2: 1 cells, but the header has 2"),
    "Latin-1 in a cell": ("a.csv", "prompt,response\n?,Mia é.\n?,\udce9\n?,Mia é.", "row 2: byte 0xe9 is not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN_ROWS)
def test_an_unreadable_row_ends_no_others(tmp_path: Path, case: str) -> None:
    name, text, reason = BROKEN_ROWS[case]
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    first, broken, last = places(tmp_path / name)
    assert broken.startswith(reason) and ":" not in first + last


def test_a_parquet_row_that_is_not_utf8(tmp_path: Path) -> None:
    data = pa.array([b"Who?", b"caf\xe9", b"Who?"])
    prompts = pa.Array.from_buffers(pa.string(), 3, data.buffers())
    pq.write_table(pa.table({"prompt": prompts, "response": ["Mia é."] * 3}), tmp_path / "rows.parquet")
    broken = "row 2: byte 0xe9 in the column 'prompt' is not UTF-8"
    assert places(tmp_path / "rows.parquet") == ["row 1", broken, "row 3"]


BROKEN_FILES = {
    "cut list": ("a.json", f"[\n{ROW},\n{ROW}".encode(), "line 3: not JSON"),
    "two lists": ("a.json", f'{{"train": [{ROW}], "test": [{ROW}]}}'.encode(), "several lists ('train', 'test')"),
    "objects over lines": ("a.json", (ROW.replace(",", ",\n") + "\n").encode() * 2, "JSON objects over several lines"),
    "cut UTF-16": ("a.jsonl", ROW.encode("utf-16")[:-1], "is broken UTF-16 text"),
    "open quote": ("a.csv", b'prompt,response\nWho?,"Mia\nWho?,Mia\n', "a quote opens after row 0 and never closes"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(ROW.encode())[:-9], "damaged or truncated"),
    "empty parquet": ("a.parquet", b"", "cannot be read as parquet"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_an_unreadable_file_is_named(tmp_path: Path, case: str) -> None:
    name, data, reason = BROKEN_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(reason)) as raised:
        places(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name))


def test_rows_left_out_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": MIA, "tools": [{"name": "f"}]}] * 2 + [{"chosen": "a", "rejected": "b"}]
    prepare(jsonl(tmp_path / "rows.jsonl", [*rows, *pairs(30)]), tmp_path / "data", skip_broken=True)
    printed = capsys.readouterr().out
    assert "Left out, 2 rows: the field 'tools': tool calls are not supported" in printed
    assert "Left out, 1 row: the field 'chosen': preference data is not supported" in printed
    with pytest.raises(UserError, match=r"no conversation for train among 0 \(3 rows were left out\)"):
        prepare(jsonl(tmp_path / "none.jsonl", rows), tmp_path / "none", skip_broken=True)


# --- templates ---


@pytest.mark.parametrize("name", sorted(prompt_styles))
def test_a_prompt_comes_out_of_any_template_with_two_ends(name: str) -> None:
    wrapped = prompt_styles[name]().apply("Who is\n\nMia?")
    before, _, after = wrapped.partition("Who is\n\nMia?")
    assert unwrap(wrapped.strip()) == ("Who is\n\nMia?" if before.strip() and after.strip() else None)


def test_a_prompt_comes_out_of_alpacas_template() -> None:
    """As the rows of dolly_hhrlhf carry it: tuned on so, the model would be asked in two templates at once."""
    row = {"prompt": Alpaca().apply("what is fish oil?"), "response": "Oil."}
    assert conversation_of(row) == (turn("what is fish oil?", "Oil."), None, 1, ())
    row = {"prompt": Alpaca().apply("Add.", input="1 and 2"), "response": "3"}
    assert conversation_of(row) == (turn("Add.\n\n1 and 2", "3"), None, 1, ())


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


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "dev.jsonl", "test.jsonl"),
        ("TRAIN/a.jsonl", "Valid/b.jsonl", "Test/c.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("my_train.jsonl", "my_val.jsonl", "my_test.jsonl"),
        ("train-v2.0.jsonl", "dev-v2.0.jsonl", "eval.jsonl"),
    ],
)
def test_test_files_are_left_out(tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for start, name in zip((0, 100, 200), names, strict=True):
        jsonl(tmp_path / "in" / name, pairs(50, start))
    found = prepare(tmp_path / "in", tmp_path / "data")
    train, val = (conversations(tmp_path / "data", split) for split in ("train", "val"))
    assert [one[0]["content"] for one in train] == [row["prompt"] for row in pairs(50)]
    assert [one[0]["content"] for one in val] == [row["prompt"] for row in pairs(50, 100)]
    assert found.val_fraction is None
    assert f"Left out, since they are test data: {names[2]} (1 of the files)." in capsys.readouterr().out


def test_test_files_beside_others_are_left_out(tmp_path: Path) -> None:
    jsonl(tmp_path / "in/alpaca.jsonl", pairs(50))
    jsonl(tmp_path / "in/test.jsonl", pairs(50, 100))
    found = prepare(tmp_path / "in", tmp_path / "data")
    assert len(both(tmp_path / "data")) == 50 and found.val_fraction == 0.1
    prepare(tmp_path / "in/test.jsonl", tmp_path / "named")  # asked for by name
    assert len(both(tmp_path / "named")) == 50
    os.remove(tmp_path / "in/alpaca.jsonl")
    with pytest.raises(UserError, match=r"file to train on in that folder\.\nLeft out.*test\.jsonl"):
        prepare(tmp_path / "in", tmp_path / "data", overwrite=True)


def test_a_folder_around_all_splits_names_none(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        (tmp_path / "in/training_data" / split).mkdir(parents=True)
        jsonl(tmp_path / "in/training_data" / split / "a.jsonl", pairs(30, 100 * number))
    found = prepare(tmp_path / "in", tmp_path / "data")
    assert (found.splits["train"].conversations, found.splits["val"].conversations) == (30, 30)


def test_files_of_other_kinds_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("README.md", b"Rows."), ("dataset_info.json", b"{}"), (".DS_Store", b"\0"), ("x/a.arrow", b"")):
        (tmp_path / "in/x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(UserError, match=r"expected a \.json.* file to train on.*\nNot read.*README\.md"):
        prepare(tmp_path / "in", tmp_path / "in/data")
    jsonl(tmp_path / "in/x/rows.jsonl", pairs(30))
    (tmp_path / "in/more.csv").write_text("prompt,response\nWho?,Mia.\n")
    for _ in range(2):  # what was prepared there is no source
        prepare(tmp_path / "in", tmp_path / "in/data")
        others = "README.md, dataset_info.json, x/a.arrow (3 of the files)."
        assert f"Not read, since they are files of other kinds: {others}" in capsys.readouterr().out
    assert len(both(tmp_path / "in/data")) == 31


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


def test_manifest_of_another_version_is_read(tmp_path: Path) -> None:
    found = prepare(jsonl(tmp_path / "rows.jsonl", pairs(50)), tmp_path / "data")
    path = tmp_path / "data" / instructions.MANIFEST
    values = read_sealed(path)
    values["new"] = values["source_files"][0]["new"] = values["splits"]["val"]["file"]["new"] = 1
    write_sealed(path, {name: value for name, value in values.items() if name not in ("unwrapped", "skipped")})
    assert instructions.read(tmp_path / "data") == found


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
        from litmoe.cli import UserError
        from litmoe.data.instructions import InstructArgs, prepare_instructions
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
