"""Choose the tokenizer of a preparation by its flags, and train one on the corpus."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from litmoe.cli import UserError
from litmoe.data import manifest, tokenizers
from litmoe.data.corpora import Corpus
from litmoe.data.documents import Batch, Rules, Unit, read_unit
from litmoe.data.files import is_remote
from litmoe.data.manifest import FileRecord, Settings
from litmoe.data.tokenizers import TokenizerFiles

TRAIN = "train"
"""The value of ``--tokenizer`` that trains one on the text."""
# The built-in stories use few words: 1 MB gives 0.1% more tokens than 4 MB, in a quarter of the time.
STORY_BYTES = 1 << 20
# The comparison of the two encoders runs in every call, so it must be short.
PROOF_DOCUMENTS = 64
PROOF_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer that a preparation uses."""

    files: TokenizerFiles | None
    """What to put into ``tokenizer_dir``; None if the right one is there, or it will be trained."""
    origin: dict[str, Any]
    """What is stored with ``files``."""
    sha256: str | None
    """Its fingerprint; None if it will be trained."""


def choose_tokenizer(name: str | None, folder: Path, trained: dict[str, Any], *, overwrite: bool) -> TokenizerChoice:
    """Return the tokenizer for the flags, downloaded if it must be.

    Args:
        name: ``--tokenizer``.
        folder: ``--tokenizer_dir``.
        trained: ``train_origin`` of the text, for ``--tokenizer train``.
        overwrite: replace another tokenizer in ``folder``.

    Raises:
        UserError: the tokenizer does not exist, is broken, or would replace another one.
    """
    if not (folder / "tokenizer.json").is_file():
        return _new(name or tokenizers.DEFAULT)
    if name is None or Path(name) == folder:
        # A tokenizer.json from elsewhere may not say which tokens begin and end a text: complete it.
        return _existing(folder) if tokenizers.is_complete(folder) else _new(str(folder))
    if overwrite:
        return _new(name)
    choice = _without_replacing(folder, name, trained)
    if choice is None:
        existing = tokenizers.origin(folder).get("name", "of unknown origin")
        raise UserError(
            f"{folder} already contains another tokenizer ({existing}), which --tokenizer {name} would replace. Choose "
            "another --tokenizer_dir, leave out --tokenizer to use the existing one, or replace it with --overwrite."
        )
    return choice


def _without_replacing(folder: Path, name: str, trained: dict[str, Any]) -> TokenizerChoice | None:
    """Return the tokenizer of this name if ``folder`` has it already, or an earlier state of it; None otherwise."""
    origin = tokenizers.origin(folder)
    if name == TRAIN:
        if origin == trained:
            return _existing(folder)
        # A tokenizer trained on the text of another folder may be in use by other data and models.
        is_earlier = (origin.get("name"), origin.get("data_dir")) == (TRAIN, trained["data_dir"])
        return _new(name) if is_earlier else None
    # The Hub is not asked again for a tokenizer with this name.
    if origin == {"name": name} and not Path(name).is_dir():
        return _existing(folder)
    return _existing(folder) if _new(name).sha256 == manifest.tokenizer_fingerprint(folder) else None


def _existing(folder: Path) -> TokenizerChoice:
    """Keep the tokenizer that is there."""
    return TokenizerChoice(None, {}, manifest.tokenizer_fingerprint(folder))


def _new(name: str) -> TokenizerChoice:
    """Read a folder or download from the Hub. ``TRAIN`` is left to the time when the text is open."""
    if name == TRAIN:
        return TokenizerChoice(None, {}, None)
    if Path(name).is_dir():
        files = tokenizers.from_folder(Path(name))
        # Without its path: token folders are shared.
        name = Path(name).resolve().name
    else:
        files = tokenizers.from_hub(name)
    return TokenizerChoice(files, {"name": name}, files.sha256)


# --- training ---


def train_origin(
    vocab_size: int | None, folder: Path, data_dir: Path, text: tuple[FileRecord, ...], settings: Settings
) -> dict[str, Any]:
    """Return everything that a trained tokenizer depends on; it is stored in its ``folder``."""
    values = asdict(settings)
    # Tokenizers of 0.1.0 were stored without this setting.
    if settings.extensions is None:
        del values["extensions"]
    return {
        "name": TRAIN,
        "vocab_size": vocab_size or tokenizers.DEFAULT_VOCAB_SIZE,
        "data_dir": _relative(folder, data_dir),
        "text": manifest.text_fingerprint(text),
        "settings": values,
    }


def _relative(folder: Path, other: Path) -> str:
    """Return the path from one folder to another. It stays true when both are moved."""
    try:
        return Path(os.path.relpath(other, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return other.name


def train_tokenizer(corpus: Corpus, vocab_size: int) -> TokenizerFiles:
    """Train a tokenizer on a corpus."""
    print(f"Training a tokenizer of {vocab_size:,} tokens on the training text")
    files = tokenizers.train(_training_sample(corpus), vocab_size)
    size = len(files.tokenizer["model"]["vocab"])
    if size < vocab_size:
        print(f"  This text gives no more than {size:,} tokens.")
    return files


def _training_sample(corpus: Corpus) -> Iterator[str]:
    """Yield the text to train on."""
    is_empty = True
    for text in _sample(corpus, corpus.rules):
        is_empty = False
        yield text
    if is_empty:
        # Few documents may all be validation text. Then the beginning of each is training text, as in the tokens.
        yield from _sample(corpus, replace(corpus.rules, cut=True))


def _sample(corpus: Corpus, rules: Rules) -> Iterator[str]:
    """Return documents from everywhere in the user's files, or the first ones of a stream or of the stories."""
    documents = _train_documents(corpus.unit_groups()[-1], rules, corpus.settings.max_documents)
    if corpus.generate is not None:
        return _first(documents, STORY_BYTES)
    if is_remote(corpus.files["train"][0]):
        # Reading all of a stream only for a tokenizer would take as long as tokenizing it.
        return _first(documents, tokenizers.TRAINING_BYTES)
    # One block of so many: rounded up, so that no more than the limit is taken.
    every = max(1, -(-corpus.training_bytes // tokenizers.TRAINING_BYTES))
    return _every_block(documents, every)


def _first(texts: Iterator[str], limit: int) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= limit:
            return


def _every_block(texts: Iterator[str], every: int) -> Iterator[str]:
    """Yield the texts of the first of every ``every`` blocks of about 1 MB."""
    block = size = 0
    for text in texts:
        if block % every == 0:
            yield text
        size += len(text)
        if size >= tokenizers.BLOCK_BYTES:
            block, size = block + 1, 0


def _train_documents(units: Iterable[Unit], rules: Rules, limit: int | None) -> Iterator[str]:
    # Documents beyond --max_documents are not part of the corpus.
    left = limit
    for unit in units:
        for item in read_unit(unit, rules, set(), left):
            if isinstance(item, Batch):
                yield from item.texts if item.split == "train" else []
            elif left is not None:
                left -= item.counts.read
        # Asking for the next unit would open the next file.
        if left == 0:
            return


def proof_documents(corpus: Corpus) -> list[str]:
    """Return some documents of the first, the middle and the last file, to compare two encoders on them."""
    if corpus.generate is not None or corpus.settings.max_documents is not None:
        # Later files may never be opened otherwise.
        units = [next(corpus.unit_groups()[-1])]
    else:
        files = corpus.files["train"]
        chosen = sorted({0, len(files) // 2, len(files) - 1})
        # range(1): of a .parquet only the first row group, because a file may be large.
        units = [Unit(0, "train", (files[number],), 0, range(1)) for number in chosen]
    documents = [text for unit in units for text in _train_documents([unit], corpus.rules, PROOF_DOCUMENTS)]
    return [text[:PROOF_CHARACTERS] for text in documents]
