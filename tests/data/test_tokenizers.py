"""Tokenizers from folders and from training, and that the fast encoder gives the tokenizer's own ids."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from litmoe.checksummed_json import write_json
from litmoe.cli import UserError
from litmoe.data import manifest, tokenizers
from litmoe.data.manifest import fingerprint_of
from litmoe.data.tokenizers import (
    Encoder,
    agrees_with_tiktoken,
    byte_level_bpe,
    from_folder,
    install,
    litgpt_tokenizer,
    text_ids,
)

END = "<|endoftext|>"
END_ID = 0
# What GPT-4's and Llama 3's tokenizers divide by, in the form of a tokenizer.json.
MODERN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(stories: list[str], pre_tokenizer: Any = None, special: tuple[str, ...] = (END,)) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def strange_texts() -> list[str]:
    """Random Unicode, white space of all kinds, contractions, and the mark as text."""
    rng = random.Random(0)
    alphabets = [
        "abcxyz'",
        "   \n\t\r",
        "0123456789",
        "\u00e9\u00fc\u4e2d\u6587\u0431\u0638\u0939\u093f",
        "\U0001f600\u200d\u0301",
        "\u00a0\u3000\u2028",
        "!?.,-()",
    ]
    texts = ["", " ", "\n\n", "a", "don't I'LL we've", f"a {END} b", f"{END}{END}", "a" * 3000, " " * 3000, "1" * 999]
    for _ in range(3000):
        texts.append("".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 40))))
    return texts


# --- encoding ---


def assert_same_ids(path: Path, texts: list[str], bos: int | None = None) -> None:
    """Both encoders give the ids that the tokenizer gives to each text alone, with the ids that begin and end it."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    begin = [] if bos is None else [bos]
    alone = [[*begin, *encoding.ids, END_ID] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    expected = [token for ids in alone for token in ids]
    for fast in (True, False):
        assert Encoder(path, END_ID, bos, fast=fast)(texts).tolist() == expected


@pytest.mark.parametrize("modern", [False, True])
def test_tiktoken_gives_the_tokenizers_ids(tmp_path: Path, stories: list[str], modern: bool) -> None:
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(MODERN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    path = saved(tmp_path, trained(stories, pre_tokenizer if modern else None)) / "tokenizer.json"
    texts = stories + strange_texts()
    assert_same_ids(path, texts)
    assert agrees_with_tiktoken(path, stories)


@pytest.mark.parametrize("bos", [None, 0, 5])
def test_encoded_texts_are_joined(tokenizer_dir: Path, stories: list[str], bos: int | None) -> None:
    path = tokenizer_dir / "tokenizer.json"
    assert_same_ids(path, stories, bos)
    assert_same_ids(path, stories[:1], bos)
    # A text may contain the characters that separate texts.
    assert_same_ids(path, [f"a {tokenizers.DOCUMENT_BREAK} b", "c"], bos)


@pytest.mark.parametrize("fast", [True, False])
def test_end_of_text_in_a_text_is_text(tokenizer_dir: Path, fast: bool) -> None:
    """``tokenizers`` alone turns the literal into the special id, tiktoken does not."""
    *ids, end = Encoder(tokenizer_dir / "tokenizer.json", END_ID, fast=fast)([f"a {END} b"]).tolist()
    assert end == END_ID and END_ID not in ids
    assert Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).decode(ids) == f"a {END} b"


def test_a_million_blanks_are_encoded(tokenizer_dir: Path) -> None:
    """tiktoken's regex engine panics there."""
    assert_same_ids(tokenizer_dir / "tokenizer.json", ["before", "x" + "\t\n " * 350_000 + "y", "after"])


@pytest.mark.parametrize("repeated", ["a", "1", "!", "=-", "\U0001f469\u200d\U0001f680", "\u4e2d", "e\u0301"])
def test_long_runs_give_the_same_ids(tokenizer_dir: Path, repeated: str) -> None:
    assert_same_ids(tokenizer_dir / "tokenizer.json", ["x" + repeated * (100_000 // len(repeated)) + " y"])


def _change(tokenizer: Tokenizer, what: str) -> Tokenizer:
    if what == "normalizer":
        tokenizer.normalizer = normalizers.Lowercase()
    elif what == "prefix space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif what == "other pre-tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif what == "added word":
        tokenizer.add_tokens([AddedToken("Once upon", special=False)])
    return tokenizer


@pytest.mark.parametrize("what", ["normalizer", "prefix space", "other pre-tokenizer", "added word", "order", "bytes"])
def test_other_tokenizers_are_not_given_to_tiktoken(tmp_path: Path, stories: list[str], what: str) -> None:
    folder = saved(tmp_path, _change(trained(stories), what))
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if what == "order":  # ids that do not rise with merge rank
        values["model"]["merges"].reverse()
    if what == "bytes":  # not every byte has a token: tiktoken would end the process
        del values["model"]["vocab"]["\u0100"]
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    assert byte_level_bpe(values) is None
    assert not agrees_with_tiktoken(folder / "tokenizer.json", stories)


def test_tiktoken_is_not_used_if_its_ids_differ(tmp_path: Path) -> None:
    """tiktoken joins any two tokens whose bytes are a token; here ``abc`` comes from ``ab`` and ``c`` alone."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    tokenizer = Tokenizer(models.BPE({**vocab, "bc": 256, "ab": 257, "abc": 258}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = saved(tmp_path, tokenizer) / "tokenizer.json"
    assert byte_level_bpe(json.loads(path.read_text(encoding="utf-8"))) is not None
    assert agrees_with_tiktoken(path, ["bc ab"])
    assert not agrees_with_tiktoken(path, ["bc ab", "abc"])


# --- folders ---


def as_stock_tools_read_it(folder: Path) -> None:
    """LitGPT and transformers find the tokens that begin and end a text, and encode alike."""
    from litgpt.tokenizer import Tokenizer as LitTokenizer
    from transformers import AutoTokenizer

    lit, auto = LitTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    info = tokenizers.load(folder)
    assert lit.eos_id == auto.eos_token_id == info.eos_id
    assert lit.bos_id is not None and auto.bos_token is not None
    text = "Once upon a time, Mia went to the sea."
    assert lit.encode(text).tolist() == auto.encode(text, add_special_tokens=False)
    assert lit.decode(lit.encode(text)) == text
    assert max(lit.encode(text)) < info.vocab_size


def test_tokenizer_json_alone_is_completed(tmp_path: Path, stories: list[str]) -> None:
    source = saved(tmp_path / "source", trained(stories))
    files = from_folder(source)
    assert files.config["eos_token"] == END
    install(files, {"name": "source"}, tmp_path / "new")
    assert [path.name for path in source.iterdir()] == ["tokenizer.json"]
    as_stock_tools_read_it(tmp_path / "new")
    assert tokenizers.origin(tmp_path / "new") == {"name": "source"}


def test_config_of_a_folder_is_kept(tmp_path: Path, stories: list[str]) -> None:
    tokenizer = trained(stories, special=("<s>", "</s>", "<pad>"))
    tokenizer.enable_truncation(5)
    eos = {"content": "</s>", "__type": "AddedToken"}
    source = saved(tmp_path / "source", tokenizer, {"eos_token": eos, "bos_token": "<s>", "model_max_length": 99})
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    install(from_folder(source), {"name": "source"}, tmp_path / "new")
    as_stock_tools_read_it(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["model_max_length"]) == ("<s>", "</s>", 99)
    assert (tmp_path / "new" / "generation_config.json").is_file()
    # Somebody's limit of 5 tokens would cut every document.
    assert json.loads((tmp_path / "new" / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is None


@pytest.mark.parametrize(
    ("special", "generation", "found"),
    [
        ((END,), None, END),
        (("<only>",), None, "<only>"),
        (("<pad>", "</s>", "<unk>"), None, "</s>"),
        (("<pad>", "<x>"), {"eos_token_id": 1}, "<x>"),
        (("<pad>", "<x>"), None, None),
        (("</s>", END), None, None),
    ],
)
def test_end_of_text_is_inferred_if_it_is_clear(
    tmp_path: Path, stories: list[str], special: tuple[str, ...], generation: dict | None, found: str | None
) -> None:
    source = saved(tmp_path, trained(stories, special=special))
    if generation:
        (source / "generation_config.json").write_text(json.dumps(generation))
    if found is not None:
        assert from_folder(source).config["eos_token"] == found
    else:
        with pytest.raises(UserError, match="does not say which token ends a text"):
            from_folder(source)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in .*tokenizer.json is missing"),
        ({"tokenizer.json": "{"}, "tokenizer.json is broken"),
        ({"tokenizer.json": "[]"}, "no JSON object"),
        ({"tokenizer.json": '{"model": {}}'}, "is broken"),
    ],
)
def test_missing_or_broken_tokenizer_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "template", "begins"),
    [
        ({}, None, None),
        ({"add_bos_token": True, "bos_token": "<s>"}, None, "<s>"),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, "<s>", "<s>"),
        ({"add_bos_token": False, "bos_token": "<s>"}, "<s>", None),
        ({}, "<s>", "<s>"),
        ({"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"}, None, "<s>"),
        ({"bos_token": "<s>", "tokenizer_class": "GPT2Tokenizer"}, None, None),
    ],
)
def test_begin_of_text_follows_one_rule(
    tmp_path: Path, stories: list[str], config: dict, template: str | None, begins: str | None
) -> None:
    """The same for the corpus, for LitGPT's tokenizer, and for the fingerprint that makes tokens stale."""
    from litgpt.tokenizer import Tokenizer as LitTokenizer

    tokenizer = trained(stories, special=("<s>", "</s>"))
    if template:
        adding = processors.TemplateProcessing(single=f"{template} $A", special_tokens=[(template, 0)])
        tokenizer.post_processor = adding
    files = from_folder(saved(tmp_path / "source", tokenizer, {"eos_token": "</s>", **config}))
    install(files, {"name": "source"}, tmp_path / "new")
    info, lit = tokenizers.load(tmp_path / "new"), LitTokenizer(tmp_path / "new")
    assert (info.bos_token, info.bos_id) == (begins, None if begins is None else 0)
    assert text_ids(lit, "Once upon") == lit.encode("Once upon").tolist()
    plain = tokenizer.encode("Once upon", add_special_tokens=False).ids
    assert text_ids(lit, "Once upon") == ([0, *plain] if begins else plain)
    assert 0 not in text_ids(lit, "Once upon", begin=False)
    assert info.sha256 == files.sha256
    assert (info.sha256 == fingerprint_of(files.tokenizer, "</s>")) is (begins is None)


@pytest.mark.parametrize("name", ["Meta-Llama-3-8B", "SmolLM2-135M-Instruct"])
def test_folder_name_adds_no_token(tmp_path: Path, stories: list[str], name: str) -> None:
    """Nor does a limit that tokenizer.json holds cut or pad a prompt."""
    tokenizer = trained(stories)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    config = {"bos_token": END, "eos_token": END, "tokenizer_class": "GPT2Tokenizer"}
    ids = text_ids(litgpt_tokenizer(saved(tmp_path / name, tokenizer, config)), stories[0])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert ids == tokenizer.encode(stories[0]).ids


@pytest.mark.parametrize(
    ("changes", "complete"),
    [({}, True), ({"tokenizer_class": None}, False), ({"add_bos_token": None}, False), ({"eos_token": None}, False)],
)
def test_complete_folder_has_what_litgpt_reads(
    tmp_path: Path, stories: list[str], changes: dict, complete: bool
) -> None:
    """LitGPT needs a class, and takes null for False where a missing line means True."""
    config = {"bos_token": END, "eos_token": END, "tokenizer_class": "LlamaTokenizer"} | changes
    folder = saved(tmp_path / "new", trained(stories), config)
    assert tokenizers.is_complete(folder) is complete
    install(from_folder(folder), {"name": "new"}, folder)
    assert tokenizers.is_complete(folder)
    assert litgpt_tokenizer(folder).use_bos is ("tokenizer_class" not in changes)


def test_unknown_begin_token_is_refused(tmp_path: Path, stories: list[str]) -> None:
    config = {"eos_token": END, "bos_token": "<s>", "add_bos_token": True}
    with pytest.raises(UserError, match=r"no token '<s>'.*add_bos_token"):
        from_folder(saved(tmp_path, trained(stories), config))


def test_unknown_end_of_text_token_is_refused(tmp_path: Path, stories: list[str]) -> None:
    source = saved(tmp_path, trained(stories), {"eos_token": "<|nothing|>"})
    with pytest.raises(UserError, match=r"no token '<\|nothing\|>'"):
        from_folder(source)


def test_missing_network_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # An address that nobody answers at, on this very machine: as fast as no network at all.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"(?s)'some/tokenizer' is not available.*--source sample --tokenizer train"):
        tokenizers.from_hub("some/tokenizer")


# --- training ---


def test_training_is_deterministic(stories: list[str], tmp_path: Path) -> None:
    first, second = tokenizers.train(stories, 300), tokenizers.train(stories, 300)
    assert first == second
    assert len(first.tokenizer["model"]["vocab"]) == 300
    assert len(tokenizers.train(stories, 100_000).tokenizer["model"]["vocab"]) < 1000
    install(first, {"name": "train"}, tmp_path)
    as_stock_tools_read_it(tmp_path)
    assert agrees_with_tiktoken(tmp_path / "tokenizer.json", stories)
    assert tokenizers.load(tmp_path).vocab_size == 300


# --- fingerprints ---


def test_fingerprint_ignores_formatting(tmp_path: Path, stories: list[str]) -> None:
    source = saved(tmp_path / "a", trained(stories), {"eos_token": END})
    fingerprint = manifest.tokenizer_fingerprint(source)
    copy = shutil.copytree(source, tmp_path / "b")
    values = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")  # another formatting too
    assert manifest.tokenizer_fingerprint(copy) == fingerprint
    values["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    assert manifest.tokenizer_fingerprint(copy) != fingerprint
    (source / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    assert manifest.tokenizer_fingerprint(source) != fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_list_instead_of_mapping_is_reported(tmp_path: Path, tokenizer_dir: Path, name: str) -> None:
    folder = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    (folder / name).write_text("[]")
    if name == "tokenizer.json":
        with pytest.raises(UserError, match=r"tokenizer\.json is broken \(it contains a list"):
            manifest.tokenizer_fingerprint(folder)
    else:
        assert manifest.tokenizer_fingerprint(folder) != manifest.tokenizer_fingerprint(tokenizer_dir)


def test_changed_tokenizer_has_no_origin(tmp_path: Path, stories: list[str]) -> None:
    """Else ``--tokenizer gpt2`` would take a changed folder for GPT-2's."""
    install(tokenizers.train(stories, 300), {"name": "gpt2"}, tmp_path)
    assert tokenizers.origin(tmp_path) == {"name": "gpt2"}
    tokenizer = trained(stories)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.origin(tmp_path) == {}


def test_interrupted_installation_leaves_none(
    tmp_path: Path, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new config next to the old tokenizer.json would give it a wrong name."""
    install(tokenizers.train(stories, 300), {"name": "one"}, tmp_path)
    written = []

    def die_at_the_last(path: Path, value: Any) -> None:
        written.append(path.name)
        if path.name == "tokenizer.json":
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(tokenizers, "write_json", die_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        install(tokenizers.train(stories, 290), {"name": "two"}, tmp_path)
    assert written == ["tokenizer_config.json", "tokenizer.json"]
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        tokenizers.load(tmp_path)
