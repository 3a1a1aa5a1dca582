"""Turn a row of instruction data, in any of the common shapes, into a conversation.

A row is one of these, possibly with a system message in another field:

- a chat: a list of messages, of question-answer pairs, or of texts that alternate between user and assistant
- a pair: one field with a prompt and one with its answer, possibly with earlier pairs in ``history``

Both become a list of turns, and each turn a dictionary: a message, or a question with its answer. The tables list the
names of fields and roles. A row that cannot be used raises ``ValueError`` with the reason, so that the caller can name
or skip the row.
"""

import json
import re
from typing import Any, NamedTuple

from litmoe.data.conversations import Message, problem_with
from litmoe.data.documents import writable
from litmoe.data.files import BadRow

CHAT_FIELDS = ("messages", "conversations", "conversation")
# The first of these pairs that a row has is used.
PAIRS = (
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),  # GSM8K
    ("question", "response"),  # OpenOrca
    ("question", "output"),
    ("question", "answers"),  # SQuAD
    ("query", "response"),  # MetaMathQA
    ("query", "answer"),
    ("problem", "solution"),
    ("instruction", "answer"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("input", "output"),
    ("inputs", "targets"),  # FLAN
    ("user", "assistant"),
    ("human", "assistant"),
    ("prompt", "text"),  # Cosmopedia
)
CONTEXT_FIELDS = ("input", "context")  # added to the prompt of a pair
NO_INPUT = re.compile(r"\s*(<?\s*no\s?input\s*>?)?\s*", re.IGNORECASE)  # Alpaca's rows without an input
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
HISTORY = "history"  # Alpaca's earlier turns

ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
TOOL_ROLES = ("tool", "function", "observation", "tool_call", "tool_response", "function_call", "function_response")
LOSS_FIELDS = ("weight", "loss", "train")  # of a message: whether it counts in the loss
TEXT_PARTS = ("text", "input_text", "output_text")

# These fields change the meaning of an answer. Ignoring them would train on something else than the row says.
NO_TOOLS = "tool calls are not supported. Leave such rows out, or write calls and results as text into the messages"
NO_PREFERENCES = (
    "preference data is not supported. Keep the preferred answer: rename 'chosen' to 'messages' if it is a list of "
    "messages, or else to 'response', and remove 'rejected'"
)
NO_MEDIA = "only text is supported"
NO_WEIGHTS = "every answer is trained on, weights and masks are not supported: remove the field or the row"
UNSUPPORTED = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call", "function_calls"), NO_TOOLS),
    **dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_response"), NO_PREFERENCES),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), NO_MEDIA),
}

# Of a message; all other keys are reported as unused.
KNOWN_KEYS = {*ROLE_FIELDS, *CONTENT_FIELDS, *LOSS_FIELDS, *(name for pair in PAIRS for name in pair)}

EXPECTED = (
    'expected {"messages": [{"role": ..., "content": ...}]} with a complete conversation, {"conversations": [{"from": '
    '..., "value": ...}]}, or the fields ' + ", ".join("/".join(pair) for pair in PAIRS)
)

EXPECTED_MESSAGE = "expected an object with 'role' and 'content'"

# Templates that data sets store as part of the prompt: the text before the instruction, and the text after it.
ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
WITH_INPUT = ", paired with an input that provides further context"
TEMPLATES = (
    (ALPACA.format("") + "\n\n### Instruction:", "### Response:"),
    (ALPACA.format(WITH_INPUT) + "\n\n### Instruction:", "### Response:"),
    ("### Instruction:", "### Response:"),
    ("###Instruction", "###Response"),
    ("Instruct:", "Output:"),
    ("[INST]", "[/INST]"),
    ("<|im_start|>user", "<|im_end|>\n<|im_start|>assistant"),
    ("<start_of_turn>user", "<end_of_turn>\n<start_of_turn>model"),
)
ALPACA_INPUT = "\n\n### Input:\n"


class Row(NamedTuple):
    """A conversation in the form of train.jsonl and val.jsonl."""

    messages: list[Message]
    names: list[str] | None = None
    """The names that a request for a built-in story mentions"""
    unwrapped: int = 0
    """Prompts that were stored in a template"""
    unused: tuple[str, ...] = ()
    """Fields of the row that do not belong to the conversation"""


def conversation_of(value: Any) -> Row:
    r"""Return the conversation in a row: a dictionary of any supported shape, or a list of messages.

    Texts keep their white space. Two things change, as in text for pretraining: line ends become ``\n``, and half of a
    surrogate pair, which UTF-8 cannot represent, becomes U+FFFD. A prompt in a template loses the template.

    Raises:
        ValueError: the row holds no conversation to train on. The message says what it holds instead.
    """
    fields = _fields_of(value)
    _refuse_unsupported(fields, "the field")
    # Each step removes the fields that it uses, so the fields that are left at the end are the unused ones.
    turns = [_turn_fields(turn, number) for number, turn in enumerate(_take_turns(fields), 1)]
    messages = _messages(turns)
    _check(messages)
    _add_system_message(fields, messages)

    # Left in place, a template would be put inside the one of finetuning, and chat would use only one of them.
    unwrapped = 0
    for message in messages:
        instruction = unwrap(message["content"]) if message["role"] == "user" else None
        if instruction is not None:
            message["content"] = instruction
            unwrapped += 1
    unused = [writable(name) for name in (*filter(fields.get, fields), *_unused_keys(turns))]
    return Row(messages, unwrapped=unwrapped, unused=tuple(unused))


def unwrap(prompt: str) -> str | None:
    """Return the instruction inside a prompt that is stored in a template; None without a template."""
    prompt = prompt.strip()
    for before, after in TEMPLATES:
        if not (prompt.startswith(before) and prompt.endswith(after)):
            continue
        instruction, _, context = prompt[len(before) : -len(after)].partition(ALPACA_INPUT)
        inside = f"{instruction.strip()}\n\n{context.strip()}".strip()
        # A second end means several turns in one text. A system prompt inside is no part of the instruction.
        if inside:
            return None if after in inside or "<<SYS>>" in inside else inside
    return None


# --- from fields to turns ---


def _fields_of(value: Any) -> dict[str, Any]:
    """Return the fields of a row, or of a message, with names in lower case and "" for everything that is empty."""
    if isinstance(value, BadRow):
        raise value
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict):
        raise ValueError(f"{_type_name(value)} where an object was expected")
    return {str(name).strip().lower(): "" if _is_empty(field) else field for name, field in value.items()}


def _refuse_unsupported(fields: dict[str, Any], what: str) -> None:
    for name, reason in UNSUPPORTED.items():
        # Some data sets store their lists as JSON text.
        if fields.get(name, "") not in ("", "[]", "{}"):
            raise ValueError(f"{what} {name!r}: {reason}")
    # TRL's rows for KTO: an answer and whether it is a good one.
    if fields.get("label") is False:
        raise ValueError(f"{what} 'label' is false: this answer is not preferred. Remove the row")


def _take_turns(fields: dict[str, Any]) -> list[Any]:
    """Remove the conversation from the fields of a row, and return it as a list of turns."""
    chat = next(filter(fields.get, CHAT_FIELDS), None)
    if chat is not None:
        return _as_list(fields.pop(chat), chat)
    pair = _pair_in(fields)
    if pair is not None:
        return _take_pair(fields, *pair)
    found = ", ".join(repr(writable(name)) for name in fields)
    raise ValueError(f"the fields {found[:300] or '(none)'}; {EXPECTED}")


def _take_pair(fields: dict[str, Any], prompt: str, answer: str) -> list[Any]:
    turns = _as_list(fields.pop(HISTORY, ""), HISTORY)
    # TRL stores a list of messages in both fields. Lists of texts are several rows in one, which are refused below.
    if all(isinstance(fields[name], list) and isinstance(fields[name][0], dict) for name in (prompt, answer)):
        return [*turns, *fields.pop(prompt), *fields.pop(answer)]
    question = _text(fields.pop(prompt), repr(prompt))
    for name in CONTEXT_FIELDS:
        context = _text(fields.pop(name, ""), repr(name))
        if not NO_INPUT.fullmatch(context):
            question = f"{question}\n\n{context}" if question else context
    value = fields.pop(answer)
    if answer == "answers":
        value = _first_answer(value)
    return [*turns, [question, _text(value, repr(answer))]]


def _pair_in(fields: dict[str, Any]) -> tuple[str, str] | None:
    """Return the fields of a prompt and its answer, if possible two that are not empty."""
    present = [pair for pair in PAIRS if fields.keys() >= {*pair}]
    # Rows of joined data sets have the fields of all of them, and most are empty. max takes the first of equals.
    return max(present, key=lambda pair: bool(fields[pair[0]] and fields[pair[1]]), default=None)


def _first_answer(answers: Any) -> Any:
    """Return the first of the correct answers that SQuAD lists."""
    if isinstance(answers, dict):
        answers = answers.get("text")
    return next(iter(answers), "") if isinstance(answers, list) else answers


def _as_list(value: Any, name: str) -> list[Any]:
    """Return a list of turns, which a cell of a .csv holds as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a list of messages in {name!r}, found text ({error})") from None
    if not isinstance(value, list):
        raise ValueError(f"expected a list of messages in {name!r}, found {_type_name(value)}")
    return value


# --- from turns to messages ---


def _turn_fields(turn: Any, number: int) -> dict[str, Any]:
    """Return a turn of any form as a dictionary: a message, or a question with its answer."""
    if isinstance(turn, dict):
        return _fields_of(turn)
    if isinstance(turn, list) and len(turn) == 2:
        return {"user": turn[0], "assistant": turn[1]}
    if isinstance(turn, str):
        # LIMA lists the texts alone.
        return {"role": ("assistant", "user")[number % 2], "content": turn}
    raise ValueError(f"message {number} is {_shown(turn)}; {EXPECTED_MESSAGE}")


def _messages(turns: list[dict[str, Any]]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        place = f"message {len(messages) + 1}"
        _refuse_unsupported(turn, f"{place} has")
        role, content, pair = _first_of(turn, ROLE_FIELDS), _first_of(turn, CONTENT_FIELDS), _pair_in(turn)
        if role is not None and content is not None:
            contents = {_role(str(role), turn, place): content}
        elif pair is not None:
            contents = {"user": turn[pair[0]], "assistant": turn[pair[1]]}
        else:
            raise ValueError(f"{place} is {_shown(turn)}; {EXPECTED_MESSAGE}")
        for name, value in contents.items():
            messages.append(Message(role=name, content=_text(value, place)))  # type: ignore[typeddict-item]
    return messages


def _first_of(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first value that is not empty, else "", or None without such a field."""
    # In a .parquet, every entry of a list has the fields of all entries.
    values = [fields[name] for name in names if name in fields]
    return next(filter(None, values), "") if values else None


def _role(name: str, fields: dict[str, Any], place: str) -> str:
    key = name.strip().lower()
    if key not in ROLES:
        reason = NO_TOOLS if key in TOOL_ROLES else f"expected one of {', '.join(ROLES)}"
        raise ValueError(f"{place} has the role {name!r}; {reason}")
    role = ROLES[key]
    for field in LOSS_FIELDS:
        if role == "assistant" and fields.get(field, "") not in ("", 1):
            raise ValueError(f"{place} has {field!r} {fields[field]!r}; {NO_WEIGHTS}")
    return role


def _check(messages: list[Message]) -> None:
    """Raise ``ValueError`` unless the messages alternate, end with an answer, and have texts."""
    problem = problem_with(messages, last="assistant")
    if problem:
        raise ValueError(problem)
    for number, message in enumerate(messages, 1):
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(f"message {number}, the {message['role']}'s, is empty")


def _add_system_message(fields: dict[str, Any], messages: list[Message]) -> None:
    """Put the system message of the fields before the messages, unless they begin with one of their own."""
    # Only a system message can be empty here.
    if not messages[0]["content"].strip():
        del messages[0]
    name = next(filter(fields.get, SYSTEM_FIELDS), None)
    if name is not None and messages[0]["role"] != "system":
        messages.insert(0, Message(role="system", content=_text(fields.pop(name), repr(name))))


def _unused_keys(turns: list[dict[str, Any]]) -> list[str]:
    """Return the keys of messages that have a value and are not read."""
    keys = {key for turn in turns for key in filter(turn.get, turn)}
    return [f"messages[].{key}" for key in sorted(keys - KNOWN_KEYS)]


# --- values ---


def _text(value: Any, place: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = "".join(_text_of_part(part, place) for part in value)  # the parts of a chat API
    if not isinstance(value, str | None):
        raise ValueError(f"expected text in {place}, found {_type_name(value)}")
    return writable((value or "").replace("\r\n", "\n").replace("\r", "\n"))


def _text_of_part(part: dict[str, Any], place: str) -> str:
    kind, text = part.get("type", "text"), _first_of(part, ("text", "value"))
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise ValueError(f"{place} has a part of the type {kind!r}; {NO_MEDIA}")
    return text


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    # pandas writes a missing value as NaN, the only value that differs from itself.
    return value in (None, [], {}) or value != value


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:80]


def _type_name(value: Any) -> str:
    """Return the type of a value in the words of JSON."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", dict: "object"}
    return names.get(type(value), type(value).__name__)
