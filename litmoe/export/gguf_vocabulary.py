"""The tokenizer of a checkpoint as GGUF metadata: llama.cpp's "gpt2" vocabulary, a byte-level BPE."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from litgpt import Tokenizer

from litmoe.cli import UserError, quoted
from litmoe.data.tokenizers import GPT2_PATTERN, byte_level_bpe


def read_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Return the content of a checkpoint's ``tokenizer.json``.

    Args:
        folder: checkpoint folder.
        vocab_size: rows of the embedding.

    Raises:
        UserError: the file is missing, or llama.cpp would tokenize a text differently.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no tokenizer.json, which a GGUF file contains. Train with a --tokenizer_dir that `uv run"
            " python prepare_data.py` wrote."
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    problem = _problem(content)
    if problem:
        raise UserError(
            f"the tokenizer of {folder} can't be written to GGUF: found {problem}; expected a byte-level BPE like"
            " GPT-2's, as `--tokenizer gpt2` and `--tokenizer train` of prepare_data.py give. llama.cpp's"
            " convert_hf_to_gguf.py knows more tokenizers. It reads the folder of `uv run python export_hf.py"
            f" {quoted(folder)} exported`."
        )
    largest_id = max(_tokens(content))
    if largest_id >= vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has the id {largest_id:,}; expected less than {vocab_size:,}, the rows of the"
            " embedding. This tokenizer belongs to another model."
        )
    return content


def _problem(content: dict[str, Any]) -> str | None:
    """Return in what a ``tokenizer.json`` differs from GPT-2's kind; None if llama.cpp gives the same ids."""
    kind = content["model"].get("type")
    if kind != "BPE":
        return f"a model of type {kind}"
    if content.get("normalizer") is not None:
        return f"the normalizer {content['normalizer'].get('type')}"
    byte_level = byte_level_bpe(content)
    if byte_level is None:
        pre_tokenizer = (content.get("pre_tokenizer") or {}).get("type")
        return f"the pre-tokenizer {pre_tokenizer}, a prefix space, or merges in another order than the ids"
    pattern, _ = byte_level
    if pattern != GPT2_PATTERN:
        return f"the pattern {pattern!r}"
    if content["model"].get("ignore_merges"):
        return "ignore_merges: true"
    for token in content.get("added_tokens", []):
        # Those also match the spaces around a token, or only complete words.
        if any(token.get(option) for option in ("lstrip", "rstrip", "single_word")):
            return f"the token {token['content']!r} with lstrip, rstrip or single_word"
    return None


def _tokens(content: dict[str, Any]) -> dict[int, str]:
    """Return the text of each id, bytes as GPT-2's printable characters."""
    tokens = {id: token for token, id in content["model"]["vocab"].items()}
    return tokens | {token["id"]: token["content"] for token in content.get("added_tokens", [])}


def add_vocabulary(
    writer: GGUFWriter,
    content: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    end_of_turn_id: int | None,
    chat_template: str | None,
) -> None:
    """Add tokens, merges, special tokens and the chat template.

    Args:
        writer: of the file.
        content: from `read_tokenizer`.
        tokenizer: of the checkpoint; says which tokens begin and end a text.
        vocab_size: rows of the embedding. Ids without a token become unused tokens.
        end_of_turn_id: token that ends an answer if it is not the one that ends a text.
        chat_template: Jinja.
    """
    tokens = _tokens(content)
    special = {token["id"] for token in content.get("added_tokens", [])}
    texts, types = [], []
    for id in range(vocab_size):
        texts.append(tokens.get(id, f"[UNUSED {id}]"))
        if id not in tokens:
            types.append(TokenType.UNUSED)
        else:
            types.append(TokenType.CONTROL if id in special else TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    # "a b" in older files, ["a", "b"] in newer ones.
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    # Without these keys llama.cpp would use the ids of GPT-2's vocabulary.
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_bos_token_id(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.use_bos)
    writer.add_add_eos_token(False)
    if end_of_turn_id is not None:
        writer.add_eot_token_id(end_of_turn_id)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
