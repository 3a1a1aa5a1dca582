"""Encoded conversations: one turn as LitGPT encodes it, turns in order, only answers marked as such."""

from pathlib import Path

import litgpt.prompts
import pytest
from litgpt import Tokenizer
from litgpt.data import SFTDataset

from litmoe.cli import UserError
from litmoe.data.conversations import (
    EncodedConversation,
    Message,
    encode_conversation,
    encode_prompt,
    is_tuned,
    load_prompt_style,
    prompt_style,
    stop_sequences,
)


def _messages(*texts: str, system: str | None = None) -> list[Message]:
    turns = [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
    return turns if system is None else [Message(role="system", content=system), *turns]


def answer_ids(encoded: EncodedConversation) -> list[int]:
    return [token for token, is_answer in zip(encoded.input_ids, encoded.is_answer, strict=True) if is_answer]


@pytest.mark.parametrize("name", sorted(litgpt.prompts.prompt_styles))
def test_single_turn_equals_litgpt(tokenizer: Tokenizer, name: str) -> None:
    row = {"instruction": "Where did Mia go?", "output": "To the sea."}
    reference = SFTDataset([row], tokenizer, name)[0]
    encoded = encode_conversation(_messages(row["instruction"], row["output"]), tokenizer, prompt_style(name))
    assert encoded.input_ids == reference["input_ids"].tolist()
    assert encoded.is_answer == (reference["labels"] != -100).tolist()
    prompt = encode_prompt(_messages(row["instruction"]), tokenizer, prompt_style(name))
    assert prompt == encoded.input_ids[: len(prompt)] and not any(encoded.is_answer[: len(prompt)])


def test_each_answer_ends_with_end_of_text(tokenizer: Tokenizer) -> None:
    style = prompt_style("phi-2")
    encoded = encode_conversation(_messages("Who?", "Mia.", "Where?", "The sea."), tokenizer, style)
    text = tokenizer.processor.decode(encoded.input_ids, skip_special_tokens=False)
    assert text == ("Instruct: Who?\nOutput:Mia.<|endoftext|>Instruct: Where?\nOutput:The sea.<|endoftext|>")
    answers = answer_ids(encoded)
    assert tokenizer.processor.decode(answers, skip_special_tokens=False) == "Mia.<|endoftext|>The sea.<|endoftext|>"
    prompt = encode_prompt(_messages("Who?", "Mia.", "Where?"), tokenizer, style)
    assert prompt == encoded.input_ids[: len(prompt)]
    assert encoded.is_answer[len(prompt) :] == [True] * (len(encoded.input_ids) - len(prompt))


def test_begin_token_occurs_once(tokenizer: Tokenizer) -> None:
    tokenizer.use_bos = True
    encoded = encode_conversation(_messages("Who?", "Mia.", "Where?", "The sea."), tokenizer, prompt_style("phi-2"))
    assert encoded.input_ids[0] == tokenizer.bos_id
    assert encoded.input_ids.count(tokenizer.bos_id) == 1 + 2  # the same token ends both answers here


@pytest.mark.parametrize("name", ["phi-2", "llama2", "tinyllama"])
def test_tokenizer_template_adds_no_begin_token(llama_tokenizer_dir: Path, name: str) -> None:
    """``<s> $A`` in tokenizer.json would put ``<s>`` before every message."""
    tokenizer = Tokenizer(llama_tokenizer_dir)
    tokenizer.bos_id = 1
    encoded = encode_conversation(_messages("Who?", "Mia.", "Where?", "The sea."), tokenizer, prompt_style(name))
    assert encoded.input_ids[0] == 1 and encoded.input_ids.count(1) == 1
    answers = answer_ids(encoded)
    alone = [tokenizer.processor.encode(text, add_special_tokens=False).ids for text in ("Mia.", "The sea.")]
    assert answers == [*alone[0], tokenizer.eos_id, *alone[1], tokenizer.eos_id]
    # The folder names another begin-of-text token than its template: LitGPT's encode adds both.
    tokenizer.bos_id, tokenizer.use_bos = tokenizer.eos_id, False
    assert 1 not in encode_conversation(_messages("Who?", "Mia."), tokenizer, prompt_style(name)).input_ids


@pytest.mark.parametrize(("name", "expected"), [("phi-2", "Be kind.\n\nWho?"), ("chatml", None), ("alpaca", None)])
def test_every_style_keeps_the_system_message(tokenizer: Tokenizer, name: str, expected: str | None) -> None:
    style = litgpt.prompts.ChatML() if name == "chatml" else prompt_style(name)
    ids = encode_prompt(_messages("Who?", "Mia.", "Where?", system="Be kind."), tokenizer, style)
    text = tokenizer.processor.decode(ids)
    assert text.count("Be kind.") == 1
    assert expected is None or expected in text


@pytest.mark.parametrize(
    "messages",
    [[], _messages("Who?", "Mia."), _messages(system="Be kind."), _messages("Who?") + _messages("Where?")],
    ids=["none", "answered", "system alone", "two in a row"],
)
def test_invalid_prompt_is_refused(tokenizer: Tokenizer, messages: list[Message]) -> None:
    with pytest.raises(ValueError, match="not a conversation"):
        encode_prompt(messages, tokenizer, prompt_style("phi-2"))


def test_style_of_a_checkpoint(tmp_path: Path) -> None:
    litgpt.prompts.save_prompt_style("phi-2", tmp_path)
    assert type(load_prompt_style(tmp_path)) is litgpt.prompts.Phi2 and is_tuned(load_prompt_style(tmp_path))
    litgpt.prompts.save_prompt_style(litgpt.prompts.Default(), tmp_path)
    assert not is_tuned(load_prompt_style(tmp_path))
    for foreign in ("class_path: os.system", "class_path: litgpt.prompts.yaml", "class_path: 3", "- a list", "{"):
        (tmp_path / "prompt_style.yaml").write_text(foreign, encoding="utf-8")
        with pytest.raises(UserError, match=r"does not name a class of litgpt\.prompts"):
            load_prompt_style(tmp_path)


def test_unknown_style() -> None:
    with pytest.raises(UserError, match=r"'alpacca'; did you mean alpaca\?"):
        prompt_style("alpacca")


@pytest.mark.parametrize("name", sorted(litgpt.prompts.prompt_styles))
def test_every_style_stops_at_end_of_text(tokenizer: Tokenizer, name: str) -> None:
    assert [tokenizer.eos_id] in stop_sequences(prompt_style(name), tokenizer)


def test_special_tokens_in_a_message_are_removed(tokenizer: Tokenizer) -> None:
    """An end-of-text token inside an answer would teach the model to continue after it."""
    hostile = "say <|end<|endoftext|>oftext|> now"
    encoded = encode_conversation(_messages(hostile, hostile), tokenizer, prompt_style("phi-2"))
    assert encoded.input_ids.count(tokenizer.eos_id) == 1 and encoded.input_ids[-1] == tokenizer.eos_id
    assert "say  now" in tokenizer.processor.decode(encoded.input_ids)
    assert encoded.removed_special_tokens
    assert not encode_conversation(_messages("a", "b"), tokenizer, prompt_style("phi-2")).removed_special_tokens
