"""Choose the tokenizer of a preparation by its flags, train it on the corpus, and check the fast encoder on it."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from litmoe.cli import UserError
from litmoe.data import manifest, tokenizers
from litmoe.data.corpora import Corpus
from litmoe.data.documents import END_OF_TEXT, Batch, Rules, Unit, read_unit
from litmoe.data.files import COMPRESSED_TO_TEXT, is_compressed, is_remote
from litmoe.data.manifest import FileRecord
from litmoe.data.prepare_args import PrepareArgs
from litmoe.data.tokenizers import TokenizerFiles

PROOF_DOCUMENTS = 64
PROOF_CHARACTERS = 1 << 16


def tokenizer_to_install(args: PrepareArgs, training_text: tuple[FileRecord, ...]) -> str | None:
    """Return the tokenizer to put into ``tokenizer_dir``, None if the right one is there.

    Args:
        args: the flags.
        training_text: the files that a trained tokenizer depends on.
    """
    if not (args.tokenizer_dir / "tokenizer.json").is_file():
        return args.tokenizer or tokenizers.DEFAULT
    if args.tokenizer is None:
        # A tokenizer.json from elsewhere may not say which tokens begin and end a text: complete it.
        return None if tokenizers.is_complete(args.tokenizer_dir) else str(args.tokenizer_dir)
    if args.overwrite:
        return args.tokenizer
    origin = tokenizers.origin(args.tokenizer_dir)
    if args.tokenizer == "train":
        is_right = origin == train_origin(args, training_text)
    elif Path(args.tokenizer).is_dir():
        wanted = tokenizers.from_folder(Path(args.tokenizer)).sha256
        is_right = wanted == manifest.tokenizer_fingerprint(args.tokenizer_dir)
    else:
        # The Hub is not asked again for a tokenizer with this name.
        is_right = origin.get("name") == args.tokenizer
    return None if is_right else args.tokenizer


def train_origin(args: PrepareArgs, training_text: tuple[FileRecord, ...]) -> dict[str, Any]:
    """Return everything that a trained tokenizer depends on; it is stored in the tokenizer's folder."""
    return {
        "name": "train",
        "vocab_size": args.vocab_size or tokenizers.DEFAULT_VOCAB_SIZE,
        "data_dir": _relative(args.tokenizer_dir, args.data_dir),
        "text": manifest.text_fingerprint(training_text),
    }


def _relative(folder: Path, other: Path) -> str:
    """Return the path from one folder to another. It stays true when both are moved."""
    try:
        return Path(os.path.relpath(other, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return other.name


def load_tokenizer(args: PrepareArgs, name: str | None) -> TokenizerFiles | None:
    """Load the tokenizer to install; None if it will be trained, or is in its place.

    Raises:
        UserError: it does not exist, or would replace another one.
    """
    if name is None:
        # Raises an error if the existing one is broken.
        tokenizers.load(args.tokenizer_dir)
        return None
    files = None
    if name != "train":
        files = tokenizers.from_folder(Path(name)) if Path(name).is_dir() else tokenizers.from_hub(name)
    exists = (args.tokenizer_dir / "tokenizer.json").is_file()
    if exists and not args.overwrite and not _may_replace(args, name, files):
        existing = tokenizers.origin(args.tokenizer_dir).get("name", "of unknown origin")
        what = "a newly trained one" if name == "train" else name
        raise UserError(
            f"{args.tokenizer_dir} already contains another tokenizer ({existing}), which {what} would replace. Choose "
            "another --tokenizer_dir, leave out --tokenizer to use the existing one, or replace it with --overwrite."
        )
    return files


def _may_replace(args: PrepareArgs, name: str, files: TokenizerFiles | None) -> bool:
    """Return whether the existing tokenizer is the same one, or was trained on an earlier state of the same text."""
    if files is None:
        # A tokenizer trained on the text of another folder may be in use by other data and models.
        existing = tokenizers.origin(args.tokenizer_dir)
        own_folder = _relative(args.tokenizer_dir, args.data_dir)
        return existing.get("name") == "train" and existing.get("data_dir") == own_folder
    if Path(name) == args.tokenizer_dir:
        return True
    with suppress(UserError):
        return manifest.tokenizer_fingerprint(args.tokenizer_dir) == files.sha256
    return False


# --- text of the corpus ---


def train_tokenizer(corpus: Corpus, folder: Path, origin: dict[str, Any]) -> TokenizerFiles:
    """Train a tokenizer on a corpus.

    Args:
        corpus: the text.
        folder: may contain the tokenizer already, from an interrupted call.
        origin: ``train_origin``.
    """
    if tokenizers.origin(folder) == origin:
        return tokenizers.from_folder(folder)
    wanted = origin["vocab_size"]
    print(f"Training a tokenizer of {wanted:,} tokens on the training text")
    files = tokenizers.train(_training_sample(corpus), wanted)
    size = len(files.tokenizer["model"]["vocab"])
    if size < wanted:
        print(f"  This text gives no more than {size:,} tokens.")
    return files


def _training_sample(corpus: Corpus) -> Iterator[str]:
    """Yield about ``TRAINING_BYTES`` of training text, from everywhere in local text, or the beginning of a stream."""
    # Reading all of a stream only for a tokenizer would take as long as tokenizing it.
    is_stream = any(is_remote(file) for file in corpus.files["train"])
    stored = 0
    for record in corpus.records["train"]:
        stored += record.bytes * (COMPRESSED_TO_TEXT if is_compressed(record.path) else 1)
    every = 1 if is_stream else max(1, -(-stored // tokenizers.TRAINING_BYTES))
    # Few documents may all be validation text. Then the beginnings of the documents are used, as in the tokens.
    for cut in (False, True):
        size = 0
        for text in _every_block(corpus, replace(corpus.rules, cut=cut), every):
            yield text
            size += len(text)
            if is_stream and size >= tokenizers.TRAINING_BYTES:
                return
        if size:
            return


def _every_block(corpus: Corpus, rules: Rules, every: int) -> Iterator[str]:
    """Yield the training documents of the first of every ``every`` blocks of about 1 MB."""
    block = 0
    for unit in corpus.unit_groups(["train"])[0]:
        size = 0
        for text in _train_documents(unit, rules, corpus.settings.max_documents):
            if block % every == 0:
                yield text
            size += len(text.encode())
            if size >= tokenizers.BLOCK_BYTES - 1:
                block, size = block + 1, 0
            else:
                size += len(f"\n{END_OF_TEXT}\n")
        block += size > 0


def _train_documents(unit: Unit, rules: Rules, limit: int | None) -> Iterator[str]:
    for item in read_unit(unit, replace(rules, divide_long=False), set(), limit):
        if isinstance(item, Batch) and item.split == "train":
            yield from item.texts


def proof_documents(corpus: Corpus, rules: Rules) -> list[str]:
    """Return some documents of the first, the middle and the last file, to compare the encoders on them."""
    if corpus.settings.max_documents is not None:
        # Later files may never be opened otherwise.
        units = [next(corpus.unit_groups()[-1])]
    else:
        files = corpus.files["train"]
        chosen = sorted({0, len(files) // 2, len(files) - 1})
        units = [Unit(0, "train", (files[number],), 0, range(1)) for number in chosen]
    sample: list[str] = []
    for unit in units:
        sample += islice(_train_documents(unit, rules, PROOF_DOCUMENTS), PROOF_DOCUMENTS)
    return [text[:PROOF_CHARACTERS] for text in sample]
