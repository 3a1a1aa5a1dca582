"""Small real things that tests share: a tokenizer trained here, a text, a tiny model config."""

import json
import os
from pathlib import Path

import pytest

# Two tests run side by side on two cores: one thread each, or they fight (and small matrices gain nothing from more).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

pytest_plugins = ["tests.no_skips", "tests.training_fixtures"]

END_OF_TEXT = "<|endoftext|>"
STORIES = [
    f"Once upon a time, {name} the {animal} went to the {place}. {name} was {mood}. The end."
    for name in ("Mia", "Tom", "Lily", "Ben")
    for animal in ("cat", "dog", "fox")
    for place in ("sea", "wood", "hill")
    for mood in ("happy", "sad", "brave", "shy")
]


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """144 different short documents, about 9 kB."""
    return STORIES


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of at most 384 tokens in the form that LitGPT and transformers read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        STORIES, trainers.BpeTrainer(vocab_size=384, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def llama_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece-like BPE of 512 tokens, as of Llama: words begin with ``▁``, decoding strips the first space,
    unknown characters are bytes, and ``<s>`` begins each text (by its template and by ``add_bos_token``)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    folder = tmp_path_factory.mktemp("llama_tokenizer")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for story in STORIES for word in story.split()]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=512, special_tokens=tokens, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def moe_fields() -> dict:
    """Fields of a tiny LitGPT mixture-of-experts config: ``litgpt.Config(**moe_fields)``."""
    return dict(
        name="tiny-moe",
        block_size=64,
        vocab_size=384,
        padded_vocab_size=384,
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_query_groups=2,
        mlp_class_name="LLaMAMoE",
        moe_intermediate_size=48,
        n_expert=4,
        n_expert_per_token=2,
        norm_class_name="RMSNorm",
        bias=False,
        parallel_residual=False,
        rotary_percentage=1.0,
    )
