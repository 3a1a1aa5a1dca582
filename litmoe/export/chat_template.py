"""A prompt style as the Jinja template with which transformers writes a conversation.

Derived from what the style makes of stand-ins for the messages, then tried on conversations: token for token what
`litmoe.data.conversations` gives, or there is no template.
"""

import json
from typing import Any

from litgpt import Tokenizer
from litgpt.prompts import PromptStyle

from litmoe.data.conversations import Message, encode_prompt, is_tuned

_USER, _SYSTEM = "\x02user\x03", "\x02system\x03"
_TRIED: list[list[Message]] = [
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


def chat_template(style: PromptStyle, tokenizer: Tokenizer, bos_token: str | None) -> str | None:
    """The template of a style, None where the model only goes on with a text or the style is not of this kind.

    An answer is encoded by itself in training and chat, but as part of the text here: one that begins with a sign that
    the tokenizer joins to the end of the prompt may be divided otherwise.

    Args:
        bos_token: stands before a conversation where the tokenizer puts one there.
    """
    if not is_tuned(style):
        return None
    plain = style.apply(_USER).split(_USER)
    with_system = style.apply(_USER, sys_prompt=_SYSTEM)
    if len(plain) != 2:
        return None
    before, after = plain
    if with_system == style.apply(_USER):  # no place for it: it stands above the user's first message
        first = (before, "\n\n", after)
    elif with_system.count(_SYSTEM) == with_system.count(_USER) == 1:
        head, _, rest = with_system.partition(_SYSTEM)
        middle, user, tail = rest.partition(_USER)
        if not user:
            return None
        first = (head, middle, tail)
    else:
        return None
    if bos_token:  # LitGPT's tokenizer has it where it adds it, and takes it away everywhere else
        before, first = before.removeprefix(bos_token), (first[0].removeprefix(bos_token), *first[1:])
    bos = f"{{{{- {_literal(bos_token)} }}}}" if bos_token and tokenizer.use_bos else ""
    return f"""\
{{%- if messages[0]['role'] == 'system' %}}
{{%- set system, turns = messages[0]['content'], messages[1:] %}}
{{%- else %}}
{{%- set system, turns = none, messages %}}
{{%- endif %}}{bos}
{{%- for message in turns %}}
{{%- if message['role'] == 'assistant' %}}
{{{{- message['content'] + eos_token }}}}
{{%- elif loop.first and system is not none %}}
{{{{- {_literal(first[0])} + system + {_literal(first[1])} + message['content'] + {_literal(first[2])} }}}}
{{%- else %}}
{{{{- {_literal(before)} + message['content'] + {_literal(after)} }}}}
{{%- endif %}}
{{%- endfor %}}
"""


def differing(theirs: Any, tokenizer: Tokenizer, style: PromptStyle) -> list[Message] | None:
    """The first tried conversation of which a transformers tokenizer makes other tokens; None where all are equal."""
    for messages in _TRIED:
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if found != encode_prompt(messages, tokenizer, style):
            return messages
    return None


def _literal(text: str) -> str:
    return json.dumps(text)  # Jinja reads it as Python would
