"""Rows of all common shapes become conversations; a row with another meaning is refused by name."""

import json
import re
from typing import Any

import pytest
from litgpt.prompts import Alpaca, prompt_styles

from litmoe.data.instruction_rows import conversation_of, unwrap
from tests.data.instruction_helpers import turn

MIA, SYSTEM = turn("Who?", "Mia."), {"role": "system", "content": "Be kind."}
HERMES = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Mia."}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Pairs
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, turn("Add.\n\n1 and 2", "3")),
        ({"instruction": "Say hello.", "input": "", "output": "Hello."}, turn("Say hello.", "Hello.")),
        ({"instruction": "Who?", "input": "<noinput>", "output": "Mia."}, MIA),
        ({"instruction": "", "input": "Who?", "output": "Mia."}, MIA),
        ({"instruction": "Who?", "context": "Mia left.", "response": "Mia."}, turn("Who?\n\nMia left.", "Mia.")),
        ({"context": "Mia left.", "question": "Who?", "answer": "Mia."}, turn("Who?\n\nMia left.", "Mia.")),
        ({"prompt": "Who?", "response": "Mia."}, MIA),
        ({"prompt": " Who?\r\n", "completion": " Mia.\n"}, turn(" Who?\n", " Mia.\n")),
        ({"question": "Who?", "answer": "Mia \ud83d."}, turn("Who?", "Mia \ufffd.")),
        ({"question": "Who?", "answers": {"text": ["Mia.", "Mia"]}}, MIA),
        ({"Question": "Who?", "Answer": "Mia."}, MIA),
        ({"prompt": MIA[:1], "completion": MIA[1:]}, MIA),
        ({"messages": None, "prompt": "Who?", "response": "Mia."}, MIA),
        # Chats
        ({"messages": MIA, "prompt": "Who?", "response": "?"}, MIA),
        ({"messages": [SYSTEM, *MIA, *turn("Where?", "Here.")]}, [SYSTEM, *MIA, *turn("Where?", "Here.")]),
        ({"conversations": [{"from": "system", "value": ""}, HERMES[0], {**HERMES[1], "weight": 1}]}, MIA),
        ({"conversations": MIA}, MIA),
        ({"messages": HERMES}, MIA),
        ({"conversation": [{"input": "Who?", "output": "Mia."}]}, MIA),
        ({"conversations": ["Who?", "Mia."]}, MIA),
        ({"conversations": [["Who?", "Mia."]]}, MIA),
        ({"messages": json.dumps(MIA)}, MIA),  # as in a cell of a .csv
        ({"messages": [{**MIA[0], "role": "Human"}, {**MIA[1], "role": "bot", "weight": 1.0}]}, MIA),
        ({"messages": [{"role": "user", "content": [{"type": "text", "value": "Who?"}]}, MIA[1]]}, MIA),
        ([SYSTEM, *MIA], [SYSTEM, *MIA]),
        # System messages and history
        ({"instruction": "Who?", "output": "Mia.", "history": [["Hi", "Yes?"]]}, turn("Hi", "Yes?") + MIA),
        ({"instruction": "Who?", "output": "Mia.", "history": [], "system": "Be kind."}, [SYSTEM, *MIA]),
        ({"system_prompt": "Be kind.", "question": "Who?", "response": "Mia."}, [SYSTEM, *MIA]),
        ({"conversations": HERMES, "system": "Be kind.", "tools": "[]"}, [SYSTEM, *MIA]),
        ({"messages": [SYSTEM, *MIA], "system": "Be rude."}, [SYSTEM, *MIA]),  # "system" is reported as unused
        ({"messages": [{**SYSTEM, "content": ""}, *MIA], "system": "Be kind."}, [SYSTEM, *MIA]),
    ],
)
def test_row_shapes(row: Any, expected: list[dict[str, str]]) -> None:
    assert conversation_of(row).messages == expected


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"instruction": "Who?", "output": "Mia.", "text": "..."}, "text"),
        ({"query": "Who?", "response": "Mia.", "original_question": "Who", "note": None}, "original_question"),
        ({"prompt": "Who?", "text": "Mia.", "audience": "all"}, "audience"),
        ({"conversation": MIA, "language": "English"}, "language"),
        ({"messages": [SYSTEM, *MIA], "system": "Be rude."}, "system"),
        ({"messages": MIA, "history": [["Hi", "Yes?"]]}, "history"),
        ({"messages": [{**SYSTEM, "role": "developer"}, {**MIA[0], "name": "Tom"}, MIA[1]]}, "messages[].name"),
    ],
)
def test_unused_fields_are_reported(row: Any, unused: str) -> None:
    assert ", ".join(conversation_of(row).unused) == unused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (1, "a number where an object was expected"),
        (None, "null where an object was expected"),
        ([1], "message 1 is 1; expected an object with 'role' and 'content'"),
        ({}, "the fields (none)"),
        ({"text": "Who?", "id": 1}, "the fields 'text', 'id'; expected {\"messages\""),
        ({"prompt": ["Who?", "Where?"], "response": ["Mia.", "Here."]}, "expected text in 'prompt', found list"),
        ({"question": "Who?", "answer": 42}, "expected text in 'answer', found a number"),
        ({"prompt": "Who?", "response": " \n"}, "message 2, the assistant's, is empty"),
        ({"prompt": "Who?", "response": None}, "message 2, the assistant's, is empty"),
        ({"prompt": "Who?", "response": float("nan")}, "message 2, the assistant's, is empty"),
        ({"instruction": "", "input": "", "output": "Mia."}, "message 1, the user's, is empty"),
        ({"messages": MIA + MIA[1:]}, "message 3 is the assistant's, expected user's"),
        ({"messages": MIA[:1]}, "it does not end with a message of the assistant"),
        ({"messages": []}, "the fields 'messages'; expected {\"messages\""),
        ({"messages": 5}, "expected a list of messages in 'messages', found a number"),
        (
            {"messages": [{"role": "narrator", "content": "1"}]},
            "message 1 has the role 'narrator'; expected one of system",
        ),
        ({"conversations": [{"from": "human"}]}, 'message 1 is {"from": "human"}; expected an object'),
        ({"messages": [{"role": "user", "content": [1]}]}, "expected text in message 1, found list"),
        ({"text": "Who?", "role": "prompter"}, "the fields 'text', 'role'; expected {\"messages\""),
        ({"data": ["Who?", "Mia."]}, "the fields 'data'; expected {\"messages\""),
        ({"conversation": "Who?"}, "expected a list of messages in 'conversation', found text"),
        ({"system": "Be kind.", "conversations": HERMES[1:]}, "message 1 is the assistant's, expected user's"),
        ({"instruction": "Who?", "output": "Mia.", "history": [["Hi"]]}, 'message 1 is ["Hi"]; expected an object'),
        # Fields that change the meaning of the answer
        ({"messages": MIA, "tools": [{"name": "f"}]}, "the field 'tools': tool calls are not supported"),
        ({"messages": [MIA[0], {"role": "assistant", "tool_calls": [{}]}]}, "message 2 has 'tool_calls'"),
        (
            {"messages": [{"role": "tool", "content": "1"}]},
            "message 1 has the role 'tool'; tool calls are not supported",
        ),
        ({"messages": MIA, "tools": [{"name": "f"}]}, "write calls and results as text into the messages"),
        ({"chosen": "Human: Who?", "rejected": "Human: Who?"}, "'chosen': preference data is not supported"),
        ({"chosen": MIA, "rejected": MIA}, "rename 'chosen' to 'messages' if it is a list of messages"),
        ({"prompt": "Who?", "chosen": "Mia.", "rejected": "Tom."}, "or else to 'response', and remove 'rejected'"),
        ({"prompt": "Who?", "rejected_response": "Tom."}, "'rejected_response': preference data is not supported"),
        ({"prompt": "Who?", "completion": "Tom.", "label": False}, "'label' is false: this answer is not preferred"),
        ({"image": "mia.jpg", "conversations": HERMES}, "'image': only text is supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, MIA[1]]},
            "message 1 has a part of the type 'image_url'; only text is supported",
        ),
        ({"messages": [MIA[0], {**MIA[1], "weight": 0}]}, "message 2 has 'weight' 0; every answer is trained on"),
    ],
)
def test_unusable_rows_are_refused(row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        conversation_of(row)


@pytest.mark.parametrize(
    "name", ["alpaca", "longform", "platypus", "stablecode", "codellama", "phi-2", "qwen3", "gemma"]
)
def test_prompt_leaves_its_template(name: str) -> None:
    assert unwrap(prompt_styles[name]().apply("Who is\n\nMia?").strip()) == "Who is\n\nMia?"


@pytest.mark.parametrize("name", sorted(prompt_styles))
def test_unwrapping_never_damages_a_prompt(name: str) -> None:
    assert unwrap(prompt_styles[name]().apply("Who is\n\nMia?")) in (None, "Who is\n\nMia?")


def test_alpaca_input_leaves_its_template() -> None:
    row = {"prompt": Alpaca().apply("Add.", input="1 and 2"), "response": "3"}
    assert conversation_of(row) == (turn("Add.\n\n1 and 2", "3"), None, 1, ())


@pytest.mark.parametrize(
    "prompt",
    [
        "What does ### Response: mean?",
        "Instruct: stay",
        Alpaca().apply("").strip(),
        "[INST] a [/INST] b [INST] c [/INST]",
    ],
)
def test_other_prompts_stay_as_they_are(prompt: str) -> None:
    assert unwrap(prompt) is None
