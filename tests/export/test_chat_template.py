"""With the chat template, transformers gives the same tokens as chat and finetuning here."""

import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
from litgpt import Tokenizer
from litgpt.prompts import Default, prompt_styles, save_prompt_style
from transformers import AutoTokenizer

from litmoe.data.conversations import Message, encode_conversation, encode_prompt
from litmoe.export.chat_template import chat_template, differing
from litmoe.export.huggingface import export
from tests.helpers import save_tiny, tiny_gpt

WITHOUT_TEMPLATE = {"llama2"}  # its prompt ends with a space, which a tokenizer joins with the answer


@pytest.fixture(params=[False, True], ids=["", "with-begin-token"])
def folder(request: pytest.FixtureRequest, tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A tokenizer with the special tokens of some styles; the second one adds a begin-of-text token."""
    from tokenizers import Tokenizer as Library

    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|begin_of_text|>"])
    library.save(str(folder / "tokenizer.json"))
    bos = {"bos_token": "<|begin_of_text|>", "add_bos_token": True} if request.param else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_every_style_of_litgpt(folder: Path) -> None:
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    without = set()
    for name, style in prompt_styles.items():
        template = chat_template(style(), ours, theirs.bos_token)
        theirs.chat_template = template
        if template is None or differing(theirs, ours, style()) is not None:
            without.add(name)
            continue
        messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
        messages += [{"role": "user", "content": f"I am {name} {{x}}"}]
        for turns in (messages, messages[:1], [{"role": "system", "content": "Be kind."}, *messages]):
            found = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            assert found == encode_prompt(turns, ours, style()), name
    assert without == WITHOUT_TEMPLATE


def test_template_marks_the_answers(folder: Path) -> None:
    """For return_assistant_tokens_mask of transformers: the same tokens as the targets of finetuning here."""
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    messages: list[Message] = [{"role": "system", "content": "Be kind."}]
    for question, answer in (("Hello?", "Yes."), ("Who is Mia?", "Mia is a cat.\n\nShe lives here. ")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    marked = []
    for name, style in prompt_styles.items():
        theirs.chat_template = chat_template(style(), ours, theirs.bos_token)
        expected = encode_conversation(messages, ours, style())
        if theirs.chat_template is None:
            continue
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if found["input_ids"] == expected.input_ids:
            assert found["assistant_masks"] == list(map(int, expected.is_answer)), name
            marked.append(name)
    assert len(marked) > 20


@pytest.mark.parametrize("name", ["phi-2", "llama3"])
def test_template_without_the_generation_tag(name: str, folder: Path) -> None:
    """Programs that do not know the tag remove it; with or without trim_blocks, the text is the same."""
    theirs = AutoTokenizer.from_pretrained(folder)
    template = chat_template(prompt_styles[name](), Tokenizer(folder), theirs.bos_token)
    assert template is not None
    removed = re.sub(r"\{%\s*(?:end)?generation\s*%\}", "", template)
    assert removed != template
    messages: list[Message] = [
        {"role": "user", "content": " One\n"},
        {"role": "assistant", "content": " 1\n "},
        {"role": "user", "content": "Two"},
    ]
    theirs.chat_template = template
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for trim in (False, True):
        environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim)
        assert environment.from_string(removed).render(messages=messages, eos_token=theirs.eos_token) == expected


def test_base_model_has_no_template(folder: Path) -> None:
    assert chat_template(Default(), Tokenizer(folder), None) is None


@pytest.mark.parametrize("name", ["phi-2", pytest.param("qwen2.5", marks=pytest.mark.slow)])
def test_exported_with_a_finetuned_model(name: str, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    checkpoint = save_tiny(tmp_path / "final", tiny_gpt(moe_fields | {"block_size": 256}), tokenizer_dir)
    save_prompt_style(name, checkpoint)
    checks = dict(export(checkpoint, tmp_path / "out"))
    assert checks["chat template"].startswith("the tokens of the prompt style")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Write a story about a cat."}]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == encode_prompt(messages, Tokenizer(tokenizer_dir), prompt_styles[name]())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "apply_chat_template" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"out"', repr(str(tmp_path / "out")))
    exec(compile(code, "card", "exec"), {})
