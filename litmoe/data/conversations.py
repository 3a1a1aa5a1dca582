"""Conversations as tokens, in LitGPT's prompt styles: the same for finetuning, chat and export.

A conversation of several turns is each turn as it would stand alone, one after the other:
``style.apply(user 1) answer 1 <end of text> style.apply(user 2) answer 2 <end of text> ...``. So a single turn is what
LitGPT's own finetuning and ``litgpt chat`` use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import litgpt.prompts
import yaml
from litgpt import Tokenizer
from litgpt.prompts import PromptStyle

from litmoe import checkpoints
from litmoe.cli import UserError, nearest
from litmoe.data.tokenizers import text_ids

DEFAULT_STYLE = "phi-2"
"""``Instruct: ...`` and ``Output:`` on two lines: few tokens, and plain words that any vocabulary can write"""


class Message(TypedDict):
    """One turn of a conversation, as chat APIs and the Hub's ``messages`` columns write it."""

    role: Literal["system", "user", "assistant"]
    content: str


class EncodedConversation(NamedTuple):
    """A conversation as a model reads it; both lists are equally long."""

    input_ids: list[int]
    is_answer: list[bool]
    """Whether the token is the assistant's; so is the end-of-text token after each answer"""


def prompt_style(name: str) -> PromptStyle:
    """LitGPT's style of that name.

    Raises:
        UserError: there is none.
    """
    known = litgpt.prompts.prompt_styles
    if name not in known:
        guess = nearest(name, known)
        hint = f"; did you mean {guess}?" if guess else f"; expected one of {', '.join(sorted(known))}."
        raise UserError(f"there is no prompt style {name!r}{hint}")
    return PromptStyle.from_name(name)


def load_prompt_style(folder: Path) -> PromptStyle:
    """The style that a checkpoint was tuned with; ``litgpt.prompts.Default`` where it was only pretrained.

    ``litgpt.prompts.load_prompt_style`` imports whatever class the file names; here it must be one of LitGPT's.

    Raises:
        UserError: the file names another class, or can't be read.
    """
    path = folder / "prompt_style.yaml"
    if not path.is_file():
        return PromptStyle.from_config(checkpoints.load_config(folder))
    try:
        module, _, name = yaml.safe_load(path.read_text(encoding="utf-8"))["class_path"].rpartition(".")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        module, name = "", ""
    found = getattr(litgpt.prompts, name, None) if module == litgpt.prompts.__name__ else None
    if not (isinstance(found, type) and issubclass(found, PromptStyle)):
        raise UserError(
            f"{path} does not name a class of litgpt.prompts, and classes from elsewhere are not run;"
            " write `class_path: litgpt.prompts.Default` into it, or the style that the model was tuned with."
        )
    return found()


def is_tuned(style: PromptStyle) -> bool:
    """Whether a checkpoint with this style was tuned to answer; a pretrained one only goes on with the text."""
    return type(style) is not litgpt.prompts.Default


def problem_with(messages: Sequence[Message], last: Literal["user", "assistant"]) -> str | None:
    """What keeps these messages from being a conversation that ends with ``last``; None where nothing does."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            return f"message {len(messages) - len(turns) + index + 1} is the {message['role']}'s, expected {expected}'s"
    if not turns or turns[-1]["role"] != last:
        return f"it does not end with a message of the {last}"
    return None


def encode_conversation(messages: Sequence[Message], tokenizer: Tokenizer, style: PromptStyle) -> EncodedConversation:
    """A whole conversation, which ends with the assistant's message.

    Special tokens that are written out in its messages are left out.

    Raises:
        ValueError: roles do not alternate, as ``problem_with`` says.
    """
    return _encode(messages, tokenizer, style, last="assistant")


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, style: PromptStyle) -> list[int]:
    """What the model reads before it answers the user's message that ``messages`` end with.

    Raises:
        ValueError: roles do not alternate, as ``problem_with`` says.
    """
    return _encode(messages, tokenizer, style, last="user").input_ids


def encode_newest(
    system: Sequence[Message], messages: Sequence[Message], tokenizer: Tokenizer, style: PromptStyle, longest: int
) -> tuple[int, list[int]]:
    """`encode_prompt` of the system message and as many of the newest turns as fit: how many those are, and its tokens.

    Only what fits, and one turn more, is encoded, however long the conversation is. The user's message that
    ``messages`` end with is always there, also where it alone is longer than ``longest``.
    """
    prompt = encode_prompt([*system, messages[-1]], tokenizer, style)
    later: list[int] = []  # what follows the first prompt
    kept = 0
    for index in range(len(messages) - 3, -1, -2):
        answer, question = (
            _encode_later(without_special_tokens(message, tokenizer), tokenizer, style)
            for message in messages[index + 1 : index + 3]
        )
        later = answer + question + later
        if len(later) >= longest:
            break
        longer = encode_prompt([*system, messages[index]], tokenizer, style) + later
        if len(longer) > longest:
            break
        kept, prompt = kept + 1, longer
    return kept, prompt


def _encode_later(message: Message, tokenizer: Tokenizer, style: PromptStyle) -> list[int]:
    """A message that is not of the conversation's first prompt."""
    if message["role"] == "assistant":
        return [*text_ids(tokenizer, message["content"], begin=False), tokenizer.eos_id]
    return _prompt_ids(tokenizer, prompt_text([message], style), begin=False)


def _prompt_ids(tokenizer: Tokenizer, prompt: str, *, begin: bool) -> list[int]:
    """The ids of a prompt in its style; begin: of the conversation's first one."""
    ids = text_ids(tokenizer, prompt, begin=begin)
    # Some styles (Llama3) write the begin-of-text token into each turn: it belongs at the start of a conversation, and
    # only where the tokenizer uses one.
    if ids[:1] == [tokenizer.bos_id] and not (begin and tokenizer.use_bos):
        return ids[1:]
    return ids


def _encode(
    messages: Sequence[Message], tokenizer: Tokenizer, style: PromptStyle, last: Literal["user", "assistant"]
) -> EncodedConversation:
    if problem := problem_with(messages, last):
        raise ValueError(f"no conversation: {problem}")
    texts = [without_special_tokens(message, tokenizer) for message in messages]
    first = 2 if messages[0]["role"] == "system" else 1  # messages of the first prompt
    ids = _prompt_ids(tokenizer, prompt_text(texts[:first], style), begin=True)
    is_answer = [False] * len(ids)
    for message in texts[first:]:
        new = _encode_later(message, tokenizer, style)
        ids += new
        is_answer += [message["role"] == "assistant"] * len(new)
    return EncodedConversation(ids, is_answer)


def without_special_tokens(message: Message, tokenizer: Tokenizer) -> Message:
    """A message as text alone: a special token that is written out in it, such as `<|endoftext|>`, would become one."""
    if tokenizer.backend != "huggingface":
        return message  # sentencepiece reads them as text
    content = message["content"]
    special = [token.content for token in tokenizer.processor.get_added_tokens_decoder().values() if token.special]
    while found := [token for token in special if token in content]:  # what is left may be one again
        for token in found:
            content = content.replace(token, "")
    return Message(role=message["role"], content=content)


def prompt_text(messages: Sequence[Message], style: PromptStyle) -> str:
    """The user's message as the model sees it, of the conversation's first turn (a system message may stand before).

    A style without a place for the system's message gets it before the user's.
    """
    user = messages[-1]["content"]
    if messages[0]["role"] != "system":
        text: str = style.apply(user)
    elif (text := style.apply(user, sys_prompt=messages[0]["content"])) == style.apply(user):
        text = style.apply(f"{messages[0]['content']}\n\n{user}")
    return text


def stop_sequences(style: PromptStyle, tokenizer: Tokenizer) -> list[list[int]]:
    """What ends an answer: the end-of-text token, and what else the style ends with where the tokenizer has it."""
    try:
        found = [list(tokens) for tokens in style.stop_tokens(tokenizer)]
    except ValueError:  # a special token of the model that the style was made for
        found = []
    end = [] if tokenizer.eos_id is None else [[tokenizer.eos_id]]
    return [*end, *(tokens for tokens in found if tokens not in end and None not in tokens)]
