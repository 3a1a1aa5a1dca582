"""The Modelfile that `ollama create` reads: which file to run, how to write a conversation, and the sampling.

Format: Ollama's documentation of the Modelfile and of its templates, which are those of Go.
"""

import json

from litmoe.export.chat_template import Parts

FIRST_LINE = "# Written by export_gguf.py."


def modelfile(
    gguf_name: str,
    parts: Parts | None,
    *,
    eos_token: str,
    stop: list[str],
    context: int,
    temperature: float,
    top_k: int,
) -> str:
    """Return the text of a Modelfile.

    Args:
        gguf_name: name of the GGUF file in the same folder.
        parts: fixed texts of the prompt style; None for a base model, which continues the text as it is.
        eos_token: ends each answer in a conversation.
        stop: texts that end an answer.
        context: length in tokens.
        temperature: of sampling.
        top_k: of sampling.
    """
    template = "{{ .Prompt }}" if parts is None else _template(parts, eos_token)
    lines = [
        FIRST_LINE,
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{template}"""',
        f"PARAMETER num_ctx {context}",
        f"PARAMETER temperature {temperature}",
        f"PARAMETER top_k {top_k}",
        *(f'PARAMETER stop """{text}"""' for text in stop),
    ]
    return "\n".join(lines) + "\n"


def _template(parts: Parts, eos_token: str) -> str:
    """Return the template of one turn. Ollama writes one after another, and drops what follows the last response."""
    first = f"{_go(parts.before_system)}{{{{ .System }}}}{_go(parts.after_system)}{{{{ .Prompt }}}}"
    first += _go(parts.after_first_user)
    later = f"{_go(parts.before_user)}{{{{ .Prompt }}}}{_go(parts.after_user)}"
    return f"{{{{ if .System }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}{{{{ .Response }}}}{_go(eos_token)}"


def _go(text: str) -> str:
    """Return a text for a template; as a literal of Go if it could be read as something else."""
    is_plain = all(character.isprintable() or character == "\n" for character in text)
    if is_plain and "{{" not in text and "}}" not in text and '"' not in text:
        return text
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"
