"""A prompt style of LitGPT as a Jinja chat template for transformers.

The template is derived from what the style makes of placeholder messages, then tested on conversations: it must give
the same tokens as `litmoe.data.conversations`, otherwise it is not used.
"""

import json
from typing import Any, NamedTuple

from litgpt import Tokenizer
from litgpt.prompts import PromptStyle

from litmoe.data.conversations import Message, encode_prompt, is_tuned

_USER, _SYSTEM = "\x02user\x03", "\x02system\x03"
"""Placeholders that no prompt style contains"""

# With what a template could change: quotes, braces, line breaks, and spaces at both ends.
TEST_CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "Write a story about a cat named Mia."}],
    [{"role": "user", "content": "  Is {{ this }} \\ \"one\" 'line'?\nNo: {% two %}.\n"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "Who is Mia?"},
        {"role": "assistant", "content": "Mia is a cat.\nShe lives here."},
        {"role": "user", "content": "And Tom?"},
    ],
    [
        {"role": "system", "content": "You tell stories."},
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "Once upon a time."},
        {"role": "user", "content": "Two!"},
        {"role": "assistant", "content": "There was a fox."},
        {"role": "user", "content": "More"},
    ],
]


class Parts(NamedTuple):
    """The fixed texts of a prompt style."""

    before_user: str
    after_user: str
    before_system: str  # these three are around system message and first question
    after_system: str
    after_first_user: str


def chat_template(style: PromptStyle, tokenizer: Tokenizer, bos_token: str | None) -> str | None:
    """Return the template of a style; None for a base model, or if the style can't be written as fixed texts.

    In training and chat, an answer is tokenized on its own, but with the template as a part of the text. An answer that
    starts with a character that the tokenizer joins with the end of the prompt may get other tokens.

    Args:
        style: of the checkpoint.
        tokenizer: of the checkpoint.
        bos_token: begin-of-text token, which comes before a conversation if the tokenizer adds it.
    """
    parts = parts_of(style, bos_token) if is_tuned(style) else None
    if parts is None:
        return None
    bos = ""
    # Once before the conversation, not before each turn.
    if bos_token and tokenizer.use_bos:
        bos = f"{{{{- {_literal(bos_token)} }}}}"
    before_user, after_user, before_system, after_system, after_first_user = map(_literal, parts)
    # The tag marks the answers for return_assistant_tokens_mask of transformers and assistant_only_loss of TRL. Other
    # programs skip or remove it, as llama.cpp and huggingface.js do, so no white space may be next to it.
    answer = "{% generation %}{{- message['content'] + eos_token }}{% endgeneration %}"
    # {%- removes the line break before it, so that none of this text gets into the prompt.
    return f"""\
{{%- if messages[0]['role'] == 'system' %}}
{{%- set system, turns = messages[0]['content'], messages[1:] %}}
{{%- else %}}
{{%- set system, turns = none, messages %}}
{{%- endif %}}{bos}
{{%- for message in turns %}}
{{%- if message['role'] == 'assistant' %}}{answer}
{{%- elif loop.first and system is not none %}}
{{{{- {before_system} + system + {after_system} + message['content'] + {after_first_user} }}}}
{{%- else %}}
{{{{- {before_user} + message['content'] + {after_user} }}}}
{{%- endif %}}
{{%- endfor %}}
"""


def parts_of(style: PromptStyle, bos_token: str | None) -> Parts | None:
    """Return the fixed texts of a style, without a begin-of-text token; None if it has no such texts.

    Some styles contain that token. LitGPT's tokenizer removes it there, and adds it if the tokenizer uses one.
    """
    parts = _with_all_tokens(style)
    if parts is None or not bos_token:
        return parts
    return parts._replace(
        before_user=parts.before_user.removeprefix(bos_token),
        before_system=parts.before_system.removeprefix(bos_token),
    )


def _with_all_tokens(style: PromptStyle) -> Parts | None:
    # Fixed texts around the placeholder can be copied into a template. Everything else can't.
    user_only = style.apply(_USER)
    if user_only.count(_USER) != 1:
        return None
    before_user, after_user = user_only.split(_USER)
    with_system = style.apply(_USER, sys_prompt=_SYSTEM)
    if with_system == user_only:
        # The style has no place for a system message: it is put above the first question.
        return Parts(before_user, after_user, before_user, "\n\n", after_user)
    if with_system.count(_SYSTEM) != 1 or with_system.count(_USER) != 1:
        return None
    before_system, rest = with_system.split(_SYSTEM)
    # The template writes the system message before the question.
    if _USER not in rest:
        return None
    after_system, after_first_user = rest.split(_USER)
    return Parts(before_user, after_user, before_system, after_system, after_first_user)


def differing(theirs: Any, tokenizer: Tokenizer, style: PromptStyle) -> list[Message] | None:
    """Return the first test conversation with other tokens in transformers; None if all are equal."""
    for messages in TEST_CONVERSATIONS:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if ids != encode_prompt(messages, tokenizer, style):
            return messages
    return None


def _literal(text: str) -> str:
    # A literal of Jinja, as of Python. llama.cpp's Jinja does not know \u, so letters other than ASCII are kept.
    return json.dumps(text, ensure_ascii=False)
