"""Fixtures that several test files share: a corpus and its tokenizer, tiny models, real training in this process."""

import os

# Several tests run at the same time, so each gets one thread. Small matrices gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jsonargparse._optionals
import pytest

import litmoe.config  # before litgpt, as in the scripts
import litmoe.finetune_config

# Fixtures import torch and LitGPT when they are used: pytest's main process with workers never needs them.
pytest_plugins = ["tests.no_skips"]

# Parsing takes most of the time of a tiny run: help texts are read from the sources of the same classes, and the
# parsers are the same each time.
jsonargparse._optionals.parse_docstring = cache(jsonargparse._optionals.parse_docstring)
litmoe.config.run_parser = cache(litmoe.config.run_parser)
litmoe.finetune_config.finetuning_parser = cache(litmoe.finetune_config.finetuning_parser)

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


MOE_FIELDS = dict(
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


@pytest.fixture
def moe_fields() -> dict:
    """Fields of a tiny LitGPT mixture-of-experts config: ``litgpt.Config(**moe_fields)``."""
    return dict(MOE_FIELDS)


@pytest.fixture
def gpt(moe_fields: dict) -> Any:
    """The tiny model of ``moe_fields`` with random weights."""
    from tests.helpers import tiny_gpt

    return tiny_gpt(moe_fields)


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Any:
    """LitGPT's tokenizer of ``tokenizer_dir``."""
    from litgpt import Tokenizer

    return Tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer_dir: Path) -> Path:
    """A folder with data/ (tokens of the tiny stories) and tokenizer/; don't write there."""
    from litmoe.data.prepare import PrepareArgs, prepare

    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    for split, texts in (("train", stories[:120]), ("val", stories[120:])):
        (folder / "data" / split).mkdir(parents=True)
        text = "\n<|endoftext|>\n".join(texts)
        (folder / "data" / split / "stories.txt").write_text(text, encoding="utf-8", newline="\n")
    prepare(PrepareArgs(data_dir=folder / "data", tokenizer_dir=folder / "tokenizer", num_workers=0))
    return folder


@pytest.fixture
def run_file(tmp_path: Path, prepared: Path, moe_fields: dict) -> Path:
    """A run file of a tiny model: 12 steps of 2 x 2 sequences of 16 tokens into ``tmp_path/out``."""
    from tests.helpers import write_run_file

    return write_run_file(tmp_path, prepared, moe_fields)


@pytest.fixture
def train(run_file: Path) -> Callable[..., Path]:
    """``train("--flag", "value")`` does what ``run_train.py`` does and returns the ``out_dir``."""
    from tests.helpers import train_here

    return partial(train_here, run_file)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The ``out_dir`` of ``train()``, uninterrupted and trained once. Read only: see ``trained_copy``."""
    from tests.helpers import train_here, write_run_file

    folder = tmp_path_factory.mktemp("trained")
    return train_here(write_run_file(folder, prepared, MOE_FIELDS))


@pytest.fixture
def trained_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run in the ``out_dir`` of ``run_file``."""
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions, of long and short answers, prepared; don't write there."""
    from litmoe.data.instructions import InstructArgs, prepare_instructions

    folder = tmp_path_factory.mktemp("instructions")
    rows = [
        {"instruction": f"Where is {name} {day}?", "output": f"{name} went to the {place}." * times}
        for name in ("Mia", "Tom", "Lily", "Ben")
        for day in ("now", "today", "at noon")
        for place, times in (("sea", 1), ("wood", 3), ("hill", 1), ("sea again", 2), ("wood again", 1))
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_instructions(InstructArgs(str(folder / "rows.json"), folder / "data", val_fraction=0.2))
    return folder / "data"


@pytest.fixture
def base(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> Path:
    """A checkpoint to tune."""
    from tests.helpers import save_tiny, tiny_gpt

    return save_tiny(tmp_path / "base", tiny_gpt({**moe_fields, "block_size": 48}), tokenizer_dir)


@pytest.fixture
def roomy_base(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> Path:
    """A checkpoint to tune with a context for several of the ``instructions``; in that of ``base`` no two fit."""
    from tests.helpers import save_tiny, tiny_gpt

    return save_tiny(tmp_path / "roomy", tiny_gpt({**moe_fields, "block_size": 144}), tokenizer_dir)


@pytest.fixture
def tune(tmp_path: Path, base: Path, instructions: Path) -> Callable[..., Path]:
    """``tune("--flag", "value")`` does what ``finetune.py`` does and returns the ``out_dir``."""
    from tests.helpers import tune_here, write_tune_file

    run_file = write_tune_file(tmp_path, instructions)
    return partial(tune_here, run_file, base, tmp_path / "out")
