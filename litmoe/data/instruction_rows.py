"""Rows of instruction data: the files that hold them, and the shapes that a row can have.

``rows_of`` reads a file row by row, ``conversation_of`` makes a conversation of a row. A row that can't be used raises
``ValueError`` with the reason, so that one bad row is named or skipped without ending the others.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice
from typing import Any, NamedTuple

from litgpt.prompts import prompt_styles

from litmoe.cli import UserError
from litmoe.data.conversations import Message, problem_with
from litmoe.data.documents import writable
from litmoe.data.files import Location, read_rows, suffix

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")  # each also compressed: .gz, .bz2, .xz, .zst

CHATS = ("messages", "conversations", "conversation", "data")  # fields that hold a list of turns
# A prompt and its answer; the first of these pairs that a row has is taken.
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
MORE = ("input", "context")  # belongs to the prompt of a pair
NO_INPUT = re.compile(r"<?\s*no\s?input\s*>?", re.IGNORECASE)  # how Alpaca's rows say that there is none
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORY = "history"  # Alpaca's earlier turns

ROLES = ("role", "from")
CONTENTS = ("content", "value")
KNOWN_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "observation", "tool_call", "tool_response", "function_call", "function_response")
MASKS = ("weight", "loss", "train")  # of a message: whether it counts in the loss
TEXT_PARTS = ("text", "input_text", "output_text")

# Fields that change what an answer means. To drop them would train on something else than the row says.
NO_TOOLS = "tool calls are not supported"
NO_PREFERENCES = "preference data is not supported; write the answer that is wanted as 'response' and remove the other"
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


class Row(NamedTuple):
    """A conversation as it is written: a line of train.jsonl or val.jsonl."""

    messages: list[Message]
    names: list[str] | None = None
    """Those that a request for a story asks for"""
    unwrapped: int = 0
    """Prompts that stood in a template"""
    unused: tuple[str, ...] = ()
    """Fields of the row that are no part of the conversation"""


# --- files ---


def rows_of(path: Location) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file, each with its place; a ``ValueError`` is an unreadable row.

    Raises:
        UserError: the file as a whole can't be read.
    """
    rows = read_rows(path)
    first = list(islice(rows, 2))
    if suffix(path) == ".json" and first:
        value = first[0][1]
        if len(first) == 1 and isinstance(value, dict) and (name := _list_of_rows(path, value)):
            yield from ((f"row {i} of {name!r}", row) for i, row in enumerate(value[name], 1))
            return
        if first[0][0] == "row 1" and _is_message(value):  # one conversation, over several lines
            yield "line 1", [row for _, row in chain(first, rows)]
            return
    yield from chain(first, rows)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(name in value for name in ROLES) and any(name in value for name in CONTENTS)


def _list_of_rows(path: Location, whole: dict[str, Any]) -> str | None:
    """The field with the rows in an object such as ``{"data": [...]}``; None where the object is itself a row."""
    if _pair_in(whole) or any(isinstance(whole.get(name), list) for name in CHATS if name != "data"):
        return None
    lists = [
        name for name, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict | list)
    ]
    if len(lists) > 1:
        raise UserError(
            f"{path}: one JSON object with several lists ({', '.join(map(repr, lists))}); expected one list of rows. "
            "Write each into a file of its own, such as train.json and val.json."
        )
    return lists[0] if lists else None


# --- a row ---


def conversation_of(values: Any) -> Row:
    r"""A conversation from a row in any of the shapes; ``bytes`` are .

    Texts are kept exactly, white space at their ends too. Two things change, as in text for pretraining: a line end is
    ``\n``, and half a surrogate pair, which UTF-8 can't write, is U+FFFD. A prompt that comes in a template is taken
    out of it, without white space around it.

    Raises:
        ValueError: it holds no conversation that can be trained on; the reason says what was found instead.
    """
    try:
        if isinstance(values, ValueError):
            raise values
        if isinstance(values, list):
            values = {"messages": values}
        if not isinstance(values, dict):
            raise ValueError(f"{_type(values)} where an object was expected")
        return _conversation(values)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _conversation(row: dict[str, Any]) -> Row:
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    if len(fields) < len(row):  # names that differ only so
        fields = row
    _refuse_unsupported(fields, "the field")
    turns, used = _turns(fields)
    if not turns:
        raise ValueError("no messages")
    _check_turns(turns)
    earlier = _earlier_turns(fields)
    systems = {name: _text(fields.get(name), name) for name in SYSTEMS}
    for place, messages in ((HISTORY, earlier), ("the first message", turns)):
        if messages and messages[0]["role"] == "system":
            systems[place] = messages.pop(0)["content"]
    messages = [*_only_system(systems), *earlier, *turns]
    unwrapped = 0
    for message in messages:
        if message["role"] == "user" and (inside := unwrap(message["content"])):
            message["content"], unwrapped = inside, unwrapped + 1
    return Row(messages, unwrapped=unwrapped, unused=tuple(_unused(fields, {*used, HISTORY, *SYSTEMS})))


def _refuse_unsupported(fields: dict[str, Any], what: str) -> None:
    for name, why in UNSUPPORTED.items():
        if not _is_empty(fields.get(name)):
            raise ValueError(f"{what} {name!r}: {why}")


def _check_turns(messages: list[Message]) -> None:
    """Raises ``ValueError`` where messages are no turns of user and assistant; only a system message may be empty."""
    if problem := problem_with(messages, last="assistant"):
        raise ValueError(problem)
    for number, message in enumerate(messages, 1):
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(f"message {number}, the {message['role']}'s, is empty")


def _earlier_turns(fields: dict[str, Any]) -> list[Message]:
    """The turns of Alpaca's history, a list of [question, answer]."""
    try:
        earlier = _chat(_as_list(fields.get(HISTORY), HISTORY), HISTORY)
        if earlier:
            _check_turns(earlier)
    except ValueError as error:
        raise ValueError(f"in {HISTORY!r}: {error}") from None
    return earlier


def _only_system(found: dict[str, str]) -> list[Message]:
    """The system message, which a row may give in several places."""
    found = {place: text for place, text in found.items() if text.strip()}
    if len({text.strip() for text in found.values()}) > 1:
        raise ValueError(f"different system messages in {' and '.join(map(repr, found))}; expected one")
    return [Message(role="system", content=text) for text in found.values()][-1:]


def _turns(fields: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """The messages of a row without its history, and the fields that they come from."""
    for name in CHATS:
        entries = _as_list(fields.get(name), name) if name != "data" else fields.get(name)
        if entries and (name != "data" or _are_texts(entries)):
            return _chat(entries, name), {name}
    if pair := _pair_in(fields):
        return _pair_turns(fields, *pair)
    if any(fields.get(name) == [] for name in CHATS):
        return [], set()
    if any(name in fields for name in ROLES) and any(name in fields for name in (*CONTENTS, "text")):
        raise ValueError("a single message; expected all messages of a conversation in one row")
    names = [repr(writable(str(name))) for name in fields]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    raise ValueError(f"the fields {', '.join(names[:12]) or '(none)'}{more}; {EXPECTED}")


def _pair_in(fields: dict[str, Any]) -> tuple[str, str] | None:
    """The prompt's and the answer's field; rows of joined data sets have those of other rows too, empty."""
    pairs = [pair for pair in PAIRS if pair[0] in fields and pair[1] in fields]
    filled = [pair for pair in pairs if not any(_is_empty(fields[name]) for name in pair)]
    return next(iter(filled or pairs), None)


def _pair_turns(fields: dict[str, Any], prompt: str, answer: str) -> tuple[list[Message], set[str]]:
    asked, answered = _side(fields[prompt], prompt, "user"), _side(fields[answer], answer, "assistant")
    more = {name: _text(fields.get(name), name) for name in MORE if name not in (prompt, answer)}
    texts = [asked[-1]["content"], *("" if NO_INPUT.fullmatch(text.strip()) else text for text in more.values())]
    asked[-1]["content"] = "\n\n".join(text for text in texts if text.strip())
    return [*asked, *answered], {prompt, answer, *more}


def _side(value: Any, field: str, role: str) -> list[Message]:
    """A prompt or an answer: a text, or messages as TRL has them."""
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return _chat(value, field)
    if field == "answers":
        value = next(iter(_alternatives(value)), "")
    return [_as_message(role, _text(value, field))]


def _alternatives(answers: Any) -> list[Any]:
    """SQuAD's answers to a question, any of which is right."""
    answers = answers.get("text") if isinstance(answers, dict) else answers
    return answers if isinstance(answers, list) else [answers]


def _chat(entries: list[Any], field: str) -> list[Message]:
    """Messages, from a list of messages, of pairs, or of texts that are the user's and the assistant's in turn."""
    if _are_texts(entries):  # LIMA, UltraChat
        return [_as_message(("user", "assistant")[i % 2], _text(text, field)) for i, text in enumerate(entries)]
    messages: list[Message] = []
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, list | tuple) and len(entry) == 2:
            pair: tuple[Any, Any] | None = (entry[0], entry[1])
        elif isinstance(entry, dict) and not _is_message(entry) and (names := _pair_in(entry)):  # Capybara
            pair = (entry[names[0]], entry[names[1]])
        else:
            pair = None
        if pair:
            messages += [_as_message("user", _text(pair[0], field)), _as_message("assistant", _text(pair[1], field))]
        else:
            messages.append(_message(entry, number))
    return messages


def _message(entry: Any, number: int) -> Message:
    if isinstance(entry, dict):
        _refuse_unsupported(entry, f"message {number} has")
    role, content = (_field_of(entry, names) for names in (ROLES, CONTENTS))
    if role is None or content is None:
        shown = json.dumps(entry, default=str)[:80]
        raise ValueError(f"a message {shown}; expected an object with {ROLES[0]!r} and {CONTENTS[0]!r}")
    name = str(entry[role]).strip().lower()
    if name in TOOL_ROLES:
        raise ValueError(f"a message of {entry[role]!r}: {NO_TOOLS}")
    if name not in KNOWN_ROLES:
        raise ValueError(f"a message of {entry[role]!r}; expected one of {', '.join(KNOWN_ROLES)}")
    for mask in MASKS:
        if KNOWN_ROLES[name] == "assistant" and entry.get(mask) not in (None, 1):
            raise ValueError(
                f"message {number} has {mask!r} {entry[mask]!r}; every answer is trained on, weights and masks are not "
                "supported: remove the field or the row"
            )
    return _as_message(KNOWN_ROLES[name], _text(entry[content], content, f"message {number}"))


def _field_of(entry: Any, names: tuple[str, ...]) -> str | None:
    """Which of the names an object has, one with a value if it can be; None for none."""
    present = [name for name in names if name in entry] if isinstance(entry, dict) else []
    return next((name for name in present if entry[name] is not None), next(iter(present), None))


def _as_message(role: str, content: str) -> Message:
    return Message(role=role, content=content)  # type: ignore[typeddict-item]


def _text(value: Any, field: str, place: str | None = None) -> str:
    if _is_nothing(value):
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = "".join(_part(part, place or repr(field)) for part in value)  # a chat API's parts
    if not isinstance(value, str):
        raise ValueError(f"expected text in {field!r}, found {_type(value)}")
    return writable(value.replace("\r\n", "\n").replace("\r", "\n"))


def _part(part: dict[str, Any], place: str) -> str:
    text = next((part[name] for name in ("text", "value") if not _is_nothing(part.get(name))), "")
    text = text.get("value") if isinstance(text, dict) else text
    kind = part.get("type") or ("text" if "text" in part or "value" in part else next(iter(part), ""))
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise ValueError(f"{place} has a part of the type {kind!r}; {NO_MEDIA}")
    return text


def _as_list(value: Any, field: str) -> list[Any]:
    """A list of turns, also written as JSON in a text, as in the cells of a .csv."""
    if _is_empty(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(writable(value))
        except ValueError as error:
            raise ValueError(f"in {field!r}: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"expected a list of messages in {field!r}, found {_type(value)}")
    return value


def _are_texts(entries: Any) -> bool:
    return isinstance(entries, list) and len(entries) > 0 and all(isinstance(entry, str) for entry in entries)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # NaN is how pandas writes null


def _is_empty(value: Any) -> bool:
    return _is_nothing(value) or value in ([], {}) or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))


def _type(value: Any) -> str:
    """The kind of a value, as JSON calls it."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _unused(fields: dict[str, Any], used: set[str]) -> Iterator[str]:
    """The fields with something in them that are no part of the conversation."""
    read = {*ROLES, *CONTENTS, *MASKS, *UNSUPPORTED}
    for name, value in fields.items():
        if name not in used:
            if not _is_empty(value):
                yield writable(name)
        elif name == "answers" and any(answer != _alternatives(value)[0] for answer in _alternatives(value)):
            yield "answers after the first"
        elif isinstance(value, list):
            objects = (entry for entry in value if isinstance(entry, dict) and not _pair_in(entry))
            keys = (key for entry in objects for key in entry if key not in read and not _is_empty(entry[key]))
            yield from (writable(f"{name}[].{key}") for key in keys)


def unwrap(prompt: str) -> str | None:
    """Return the instruction inside a prompt in one of LitGPT's templates, such as Alpaca's; None without a template.

    Left in, the model would be asked in two templates, one inside the other, and chat would ask in one.
    """
    prompt = prompt.strip()
    for before, after in _templates():
        if len(prompt) > len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after):
            asked, _, given = prompt[len(before) : -len(after)].partition(ALPACA_INPUT)
            return f"{asked.strip()}\n\n{given.strip()}".strip() or None
    return None


ALPACA_INPUT = "\n\n### Input:\n"


@cache
def _templates() -> list[tuple[str, str]]:
    """The texts before and after a prompt, of the styles that have both; the longest first."""
    found = set()
    for style in prompt_styles.values():
        before, _, after = style().apply("PROMPT").partition("PROMPT")
        if before.strip() and after.strip():
            found.add((before.strip(), after.strip()))
    return sorted(found, key=lambda ends: (-len(ends[0]), ends))
