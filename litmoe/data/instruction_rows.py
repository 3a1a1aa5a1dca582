"""Turn a row of instruction data, in any of the common shapes, into a conversation.

A row is one of these, possibly with a system prompt or earlier turns in other fields:

- a chat: a list of messages, of question-answer pairs, or of texts that alternate between user and assistant
- a pair: one field with a prompt and one with its answer

A row that cannot be used raises ``ValueError`` with the reason, so that the caller can name or skip the single row.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from litmoe.data.conversations import Message, problem_with
from litmoe.data.documents import writable
from litmoe.data.files import BadRow

CHAT_FIELDS = ("messages", "conversations", "conversation", "data")
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
NO_INPUT = re.compile(r"<?\s*no\s?input\s*>?", re.IGNORECASE)  # Alpaca's rows without an input
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
NO_TOOLS = "tool calls are not supported"
NO_PREFERENCES = "preference data is not supported; write the preferred answer as 'response' and remove the other"
NO_MEDIA = "only text is supported"
UNSUPPORTED = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call", "function_calls"), NO_TOOLS),
    **dict.fromkeys(("chosen", "rejected"), NO_PREFERENCES),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), NO_MEDIA),
}

EXPECTED = (
    'expected {"messages": [{"role": ..., "content": ...}]}, {"conversations": [{"from": ..., "value": ...}]}, or the '
    "fields " + ", ".join("/".join(pair) for pair in PAIRS)
)

# Templates that data sets store as part of the prompt: the text before the instruction, and the text after it.
ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
TEMPLATES = (
    (ALPACA.format("") + "\n\n### Instruction:", "### Response:"),
    (ALPACA.format(", paired with an input that provides further context") + "\n\n### Instruction:", "### Response:"),
    ("### Instruction:", "### Response:"),
    ("###Instruction", "###Response"),
    ("Instruct:", "\nOutput:"),
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
    turns, used = _turns(fields)
    _check_turns(turns)
    history = _history(fields)

    # A row may give the system message in a field of its own, as the first message, or in both places.
    systems = {name: _text(fields.get(name), name) for name in SYSTEM_FIELDS}
    if turns[0]["role"] == "system":
        systems["the first message"] = turns.pop(0)["content"]
    conversation = [*_system_message(systems), *history, *turns]

    unwrapped = 0
    for message in conversation:
        instruction = unwrap(message["content"]) if message["role"] == "user" else None
        if instruction is not None:
            message["content"] = instruction
            unwrapped += 1
    unused = tuple(_unused_fields(fields, {*used, HISTORY, *SYSTEM_FIELDS}))
    return Row(conversation, unwrapped=unwrapped, unused=unused)


def has_conversation(value: Any) -> bool:
    """Return whether a value has the fields of a single conversation."""
    if not isinstance(value, dict):
        return False
    has_chat = any(isinstance(value.get(name), list) for name in CHAT_FIELDS if name != "data")
    return has_chat or _pair_in(value) is not None


def unwrap(prompt: str) -> str | None:
    """Return the instruction inside a prompt that is stored in a template; None without a template.

    Left in place, the template would be put inside the one of finetuning, and chat would use only one of them.
    """
    prompt = prompt.strip()
    for before, after in TEMPLATES:
        is_wrapped = prompt.startswith(before) and prompt.endswith(after.strip())
        inside = prompt[len(before) : -len(after.strip())].strip()
        if not is_wrapped or not inside:
            continue
        # A second end means several turns in one text. A system prompt inside is no part of the instruction.
        if after.strip() in inside or "<<SYS>>" in inside:
            return None
        instruction, _, context = inside.partition(ALPACA_INPUT)
        return f"{instruction.strip()}\n\n{context.strip()}".strip()
    return None


# --- the parts of a row ---


def _fields_of(value: Any) -> dict[str, Any]:
    if isinstance(value, BadRow):
        raise value
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict):
        raise ValueError(f"{_type_name(value)} where an object was expected")
    return {str(name).strip().lower(): field for name, field in value.items()}


def _refuse_unsupported(fields: dict[str, Any], what: str) -> None:
    for name, reason in UNSUPPORTED.items():
        if not _is_empty(fields.get(name)):
            raise ValueError(f"{what} {name!r}: {reason}")


def _turns(fields: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """Return the messages of a row without its history, and the names of their fields."""
    for name in CHAT_FIELDS:
        value = fields.get(name)
        # "data" has another meaning in many data sets, so only a list of texts counts.
        if _is_empty(value) or (name == "data" and not _are_texts(value)):
            continue
        return _chat(_as_list(value, name), name), {name}
    pair = _pair_in(fields)
    if pair is None:
        raise ValueError(_unknown_shape(fields))
    return _pair_turns(fields, *pair)


def _unknown_shape(fields: dict[str, Any]) -> str:
    """Return what a row without a conversation holds instead."""
    if any(fields.get(name) == [] for name in CHAT_FIELDS):
        return "no messages"
    if _first_present(fields, ROLE_FIELDS) and _first_present(fields, (*CONTENT_FIELDS, "text")):
        return "a single message; expected all messages of a conversation in one row"
    names = ", ".join(repr(writable(name)) for name in fields)
    return f"the fields {names[:300] or '(none)'}; {EXPECTED}"


def _check_turns(messages: list[Message]) -> None:
    if not messages:
        raise ValueError("no messages")
    problem = problem_with(messages, last="assistant")
    if problem:
        raise ValueError(problem)
    for number, message in enumerate(messages, 1):
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(f"message {number}, the {message['role']}'s, is empty")


def _history(fields: dict[str, Any]) -> list[Message]:
    value = fields.get(HISTORY)
    if _is_empty(value):
        return []
    try:
        messages = _chat(_as_list(value, HISTORY), HISTORY)
        _check_turns(messages)
        return messages
    except ValueError as error:
        raise ValueError(f"in {HISTORY!r}: {error}") from None


def _system_message(systems: dict[str, str]) -> list[Message]:
    systems = {place: text for place, text in systems.items() if text.strip()}
    if len({text.strip() for text in systems.values()}) > 1:
        raise ValueError(f"different system messages in {' and '.join(map(repr, systems))}; expected one")
    return [Message(role="system", content=text) for text in systems.values()][-1:]


def _pair_in(fields: dict[str, Any]) -> tuple[str, str] | None:
    """Return the fields of a prompt and its answer, if possible two that are not empty."""
    present = [pair for pair in PAIRS if pair[0] in fields and pair[1] in fields]
    # Rows of joined data sets have the fields of all of them, and most are empty.
    for prompt, answer in present:
        if not _is_empty(fields[prompt]) and not _is_empty(fields[answer]):
            return prompt, answer
    return present[0] if present else None


def _pair_turns(fields: dict[str, Any], prompt: str, answer: str) -> tuple[list[Message], set[str]]:
    question = _pair_side(fields[prompt], prompt, "user")
    texts = [question[-1]["content"]]
    used = {prompt, answer}
    for name in CONTEXT_FIELDS:
        if name not in used:
            text = _text(fields.get(name), name)
            texts.append("" if NO_INPUT.fullmatch(text.strip()) else text)
            used.add(name)
    question[-1]["content"] = "\n\n".join(text for text in texts if text.strip())
    return [*question, *_pair_side(fields[answer], answer, "assistant")], used


def _pair_side(value: Any, field: str, role: str) -> list[Message]:
    """Return a prompt or an answer: a text, or a list of messages as in TRL's data sets."""
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return _chat(value, field)
    if field == "answers":
        # SQuAD lists several correct answers; the first one is trained on.
        answers = value.get("text") if isinstance(value, dict) else value
        value = next(iter(answers), "") if isinstance(answers, list) else answers
    return [_as_message(role, _text(value, field))]


# --- chats ---


def _chat(entries: list[Any], field: str) -> list[Message]:
    if _are_texts(entries):  # LIMA, UltraChat
        return [_as_message(("user", "assistant")[i % 2], _text(text, field)) for i, text in enumerate(entries)]
    messages: list[Message] = []
    for number, entry in enumerate(entries, 1):
        pair = _pair_of(entry)
        if pair is None:
            messages.append(_message(entry, number))
        else:
            messages += [_as_message("user", _text(pair[0], field)), _as_message("assistant", _text(pair[1], field))]
    return messages


def _pair_of(entry: Any) -> tuple[Any, Any] | None:
    """Return the question and the answer of an entry that holds both."""
    if isinstance(entry, list | tuple) and len(entry) == 2:
        return entry[0], entry[1]
    if isinstance(entry, dict) and not _is_message(entry):
        names = _pair_in(entry)  # Capybara
        if names is not None:
            return entry[names[0]], entry[names[1]]
    return None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return _first_present(value, ROLE_FIELDS) is not None and _first_present(value, CONTENT_FIELDS) is not None


def _message(entry: Any, number: int) -> Message:
    if isinstance(entry, dict):
        _refuse_unsupported(entry, f"message {number} has")
    if not _is_message(entry):
        shown = json.dumps(entry, default=str)[:80]
        raise ValueError(f"a message {shown}; expected an object with 'role' and 'content'")
    role = _role(entry)
    if role == "assistant":
        _require_loss(entry, number)
    content_field = str(_first_present(entry, CONTENT_FIELDS))
    return _as_message(role, _text(entry[content_field], content_field, f"message {number}"))


def _role(entry: dict[str, Any]) -> str:
    name = entry[str(_first_present(entry, ROLE_FIELDS))]
    key = str(name).strip().lower()
    if key in TOOL_ROLES:
        raise ValueError(f"a message of {name!r}: {NO_TOOLS}")
    if key not in ROLES:
        raise ValueError(f"a message of {name!r}; expected one of {', '.join(ROLES)}")
    return ROLES[key]


def _require_loss(entry: dict[str, Any], number: int) -> None:
    """Raise ``ValueError`` for an answer that is not to be trained on, because every answer is."""
    for field in LOSS_FIELDS:
        if entry.get(field) not in (None, 1):
            raise ValueError(
                f"message {number} has {field!r} {entry[field]!r}; every answer is trained on, weights and masks are "
                "not supported: remove the field or the row"
            )


def _first_present(entry: dict[str, Any], names: Iterable[str]) -> str | None:
    """Return the first of the names that has a value, else the first that is present, else None."""
    present = [name for name in names if name in entry]
    for name in present:
        if entry[name] is not None:
            return name
    return present[0] if present else None


def _as_message(role: str, content: str) -> Message:
    return Message(role=role, content=content)  # type: ignore[typeddict-item]


# --- values ---


def _text(value: Any, field: str, place: str | None = None) -> str:
    if _is_null(value):
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = "".join(_text_part(part, place or repr(field)) for part in value)  # the parts of a chat API
    if not isinstance(value, str):
        raise ValueError(f"expected text in {field!r}, found {_type_name(value)}")
    return writable(value.replace("\r\n", "\n").replace("\r", "\n"))


def _text_part(part: dict[str, Any], place: str) -> str:
    kind = part.get("type", "text")
    text = part["value"] if part.get("text") is None and "value" in part else part.get("text")
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise ValueError(f"{place} has a part of the type {kind!r}; {NO_MEDIA}")
    return text


def _as_list(value: Any, field: str) -> list[Any]:
    """Return a list of turns, which a cell of a .csv holds as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"in {field!r}: not JSON ({error})") from None
    if not isinstance(value, list):
        raise ValueError(f"expected a list of messages in {field!r}, found {_type_name(value)}")
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


def _is_null(value: Any) -> bool:
    # pandas writes null as NaN, the only value that differs from itself.
    return value is None or (isinstance(value, float) and value != value)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    return _is_null(value) or value in ([], {})


def _type_name(value: Any) -> str:
    """Return the type of a value in the words of JSON."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _unused_fields(fields: dict[str, Any], used: set[str]) -> Iterator[str]:
    """Yield the names of the fields, and of the keys of messages, that have a value and are not read."""
    known_keys = {*ROLE_FIELDS, *CONTENT_FIELDS, *LOSS_FIELDS, *UNSUPPORTED}
    for name, value in fields.items():
        if name not in used:
            if not _is_empty(value):
                yield writable(name)
        elif isinstance(value, list):
            for message in filter(_is_message, value):
                keys = message.keys() - known_keys
                yield from (writable(f"{name}[].{key}") for key in sorted(keys) if not _is_empty(message[key]))
