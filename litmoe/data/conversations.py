"""Encode conversations in LitGPT's prompt styles, in the same way for finetuning, chat, evaluation and export.

A conversation is encoded turn by turn, each one as it would be encoded alone:
``style.apply(user 1) answer 1 <end of text> style.apply(user 2) answer 2 <end of text> ...``. So a single turn is
encoded as by LitGPT's own finetuning and ``litgpt chat``.

LitGPT is imported inside the functions that need it: preparing conversations uses this file, and does not need torch.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import yaml

from litmoe.cli import UserError, nearest
from litmoe.data.tokenizers import text_ids

if TYPE_CHECKING:
    from litgpt import Tokenizer
    from litgpt.prompts import PromptStyle

# ``Instruct: ...`` and ``Output:`` on two lines: few tokens, and plain words that any vocabulary can write.
DEFAULT_STYLE = "phi-2"


class Message(TypedDict):
    """One message of a conversation, in the form of chat APIs and of ``messages`` columns on the Hub."""

    role: Literal["system", "user", "assistant"]
    content: str


class EncodedConversation(NamedTuple):
    """A conversation as tokens; both lists have the same length."""

    input_ids: list[int]
    is_answer: list[bool]
    """Whether the token belongs to the assistant's text or is the end-of-text token after it"""
    removed_special_tokens: bool
    """Whether a message contained special tokens of the tokenizer as text, which were removed"""


# --- prompt styles ---


def prompt_style(name: str) -> "PromptStyle":
    """Return LitGPT's prompt style with this name.

    Raises:
        UserError: there is no such style.
    """
    from litgpt.prompts import PromptStyle, prompt_styles

    if name not in prompt_styles:
        guess = nearest(name, prompt_styles)
        hint = f"; did you mean {guess}?" if guess else f"; expected one of {', '.join(sorted(prompt_styles))}."
        raise UserError(f"there is no prompt style {name!r}{hint}")
    return PromptStyle.from_name(name)


def load_prompt_style(folder: Path) -> "PromptStyle":
    """Return the style that a checkpoint was tuned with, or ``litgpt.prompts.Default`` if it was only pretrained.

    Raises:
        UserError: ``prompt_style.yaml`` cannot be read, or names a class outside of ``litgpt.prompts``.
    """
    import litgpt.prompts
    from litgpt.prompts import PromptStyle

    from litmoe.checkpoints import load_config

    path = folder / "prompt_style.yaml"
    if not path.is_file():
        return PromptStyle.from_config(load_config(folder))
    try:
        module, _, name = yaml.safe_load(path.read_text(encoding="utf-8"))["class_path"].rpartition(".")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        module, name = "", ""
    # litgpt.prompts.load_prompt_style imports any class that the file names, which would run code of a checkpoint.
    style = getattr(litgpt.prompts, name, None) if module == litgpt.prompts.__name__ else None
    if not (isinstance(style, type) and issubclass(style, PromptStyle)):
        raise UserError(
            f"{path} does not name a class of litgpt.prompts, and other classes are not loaded. Write `class_path: "
            "litgpt.prompts.Default` into it, or the style that the model was tuned with."
        )
    return style()


def is_tuned(style: "PromptStyle") -> bool:
    """Return whether a checkpoint with this style was tuned to answer; a pretrained one continues the text."""
    from litgpt.prompts import Default

    return type(style) is not Default


def stop_sequences(style: "PromptStyle", tokenizer: "Tokenizer") -> list[list[int]]:
    """Return the token sequences that end an answer: the end of text, and those of the style that the tokenizer has."""
    try:
        of_style = [list(tokens) for tokens in style.stop_tokens(tokenizer)]
    except ValueError:  # the style uses a special token of another tokenizer
        of_style = []
    # Finetuning ends every answer with the end-of-text token, whatever the style says.
    sequences: list[list[int]] = []
    for tokens in ([tokenizer.eos_id], *of_style):
        if tokens not in sequences and None not in tokens:
            sequences.append(tokens)
    return sequences


# --- encoding ---


def problem_with(messages: Sequence[Message], last: Literal["user", "assistant"]) -> str | None:
    """Return why ``messages`` are not a conversation that ends with a message of ``last``; None if they are one."""
    system_messages = 1 if messages and messages[0]["role"] == "system" else 0
    turns = messages[system_messages:]
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            return f"message {system_messages + index + 1} is the {message['role']}'s, expected {expected}'s"
    if not turns or turns[-1]["role"] != last:
        return f"it does not end with a message of the {last}"
    return None


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: "Tokenizer",
    style: "PromptStyle",
    last: Literal["user", "assistant"] = "assistant",
) -> EncodedConversation:
    """Encode a conversation that ends with a message of ``last``.

    Raises:
        ValueError: the roles do not alternate, see ``problem_with``.
    """
    problem = problem_with(messages, last)
    if problem:
        raise ValueError(f"not a conversation: {problem}")
    texts = [without_special_tokens(message, tokenizer) for message in messages]
    # The system message is part of the first prompt: styles have a single template for both.
    n_first = 2 if messages[0]["role"] == "system" else 1  # messages that form the first prompt
    ids = _encode_question(texts[:n_first], tokenizer, style, is_first=True)
    is_answer = [False] * len(ids)
    for message in texts[n_first:]:
        if message["role"] == "assistant":
            # Every answer ends with the end-of-text token, so that the model learns to stop after each turn.
            new_ids = [*text_ids(tokenizer, message["content"], begin=False), tokenizer.eos_id]
        else:
            new_ids = _encode_question([message], tokenizer, style, is_first=False)
        ids += new_ids
        is_answer += [message["role"] == "assistant"] * len(new_ids)
    return EncodedConversation(ids, is_answer, removed_special_tokens=texts != list(messages))


def encode_prompt(messages: Sequence[Message], tokenizer: "Tokenizer", style: "PromptStyle") -> list[int]:
    """Encode what the model reads before it answers the user's message at the end of ``messages``.

    Raises:
        ValueError: the roles do not alternate, see ``problem_with``.
    """
    return encode_conversation(messages, tokenizer, style, last="user").input_ids


def encode_newest(
    system: Sequence[Message], messages: Sequence[Message], tokenizer: "Tokenizer", style: "PromptStyle", longest: int
) -> tuple[int, list[int]]:
    """Encode the system message and as many of the newest turns as fit into ``longest`` tokens.

    The last user's message is always included, even if it alone is longer than ``longest``.

    Returns:
        The number of earlier turns that fit, and the tokens as of ``encode_prompt``.
    """
    kept, prompt = 0, encode_prompt([*system, messages[-1]], tokenizer, style)
    later: list[int] = []  # everything after the first question
    for start in range(len(messages) - 3, -1, -2):
        # Turns do not depend on each other, so a long history costs no time: only the turn that is added is encoded.
        question = encode_prompt([*system, messages[start]], tokenizer, style)
        later = encode_prompt([*system, *messages[start : start + 3]], tokenizer, style)[len(question) :] + later
        if len(question) + len(later) > longest:
            break
        kept, prompt = kept + 1, question + later
    return kept, prompt


def prompt_text(messages: Sequence[Message], style: "PromptStyle") -> str:
    """Return the text of a first turn: the user's message in its style, possibly after a system message."""
    user = messages[-1]["content"]
    text: str = style.apply(user)
    if messages[0]["role"] != "system":
        return text
    system = messages[0]["content"]
    with_system: str = style.apply(user, sys_prompt=system)
    # Some styles have no place for a system message, so it becomes the beginning of the user's.
    return with_system if with_system != text else str(style.apply(f"{system}\n\n{user}"))


def without_special_tokens(message: Message, tokenizer: "Tokenizer") -> Message:
    """Return a message without the special tokens, such as `<|endoftext|>`, that are part of its text.

    They would be encoded as the tokens themselves: an answer with ``<|endoftext|>`` would teach the model to continue
    after the end.
    """
    content, previous = message["content"], None
    # Removing a token can put the halves of another one together, so repeat until nothing changes.
    while content != previous:
        previous = content
        for token in _special_tokens(tokenizer):
            content = content.replace(token, "")
    return Message(role=message["role"], content=content)


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: "Tokenizer") -> list[str]:
    # Cached: for a tokenizer with hundreds of them this takes longer than encoding a message.
    if tokenizer.backend != "huggingface":
        # sentencepiece encodes them as ordinary text.
        return []
    return [token.content for token in tokenizer.processor.get_added_tokens_decoder().values() if token.special]


def _encode_question(
    messages: Sequence[Message], tokenizer: "Tokenizer", style: "PromptStyle", *, is_first: bool
) -> list[int]:
    ids = text_ids(tokenizer, prompt_text(messages, style), begin=is_first)
    # Some styles (Llama3) write the begin-of-text token into each turn. It belongs at the start of the conversation
    # only, and only if the tokenizer uses one.
    if ids[:1] == [tokenizer.bos_id] and not (is_first and tokenizer.use_bos):
        return ids[1:]
    return ids
