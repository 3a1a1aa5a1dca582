"""Choose the tokenizer of a preparation by its flags, and train one on the corpus."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litmoe.cli import UserError
from litmoe.data import manifest, tokenizers
from litmoe.data.corpora import Corpus
from litmoe.data.documents import Batch, Rules, Unit, read_unit
from litmoe.data.files import is_remote
from litmoe.data.manifest import FileRecord, Settings
from litmoe.data.tokenizers import TokenizerFiles

if TYPE_CHECKING:
    from litmoe.data.prepare import PrepareArgs

TRAIN = "train"
"""The value of ``--tokenizer`` that trains one on the text."""
# The built-in stories use few words: 4 MB give nearly the same tokens as all of them, in a quarter of the time.
STORY_BYTES = 4 << 20
# The comparison of the two encoders runs in every call, so it must be short.
PROOF_DOCUMENTS = 64
PROOF_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer that a preparation uses."""

    name: str | None
    """A Hub name, a folder or ``TRAIN``, to be put into ``tokenizer_dir``; None: the right one is there."""
    files: TokenizerFiles | None
    """What to put there; None if the right one is there, or it will be trained."""
    sha256: str | None
    """Its fingerprint; None if it will be trained."""

    @property
    def origin(self) -> dict[str, Any]:
        """What is stored in the folder of the tokenizer."""
        name = str(self.name)
        # The name of a folder without its path: token folders are shared.
        return {"name": Path(name).resolve().name if Path(name).is_dir() else name}


def choose_tokenizer(args: "PrepareArgs", text: tuple[FileRecord, ...], settings: Settings | None) -> TokenizerChoice:
    """Return the tokenizer for the flags, downloaded if it must be.

    Args:
        args: the flags.
        text: the training files. A trained tokenizer depends on them and on ``settings``.
        settings: how the files are read; None if that is not known yet.

    Raises:
        UserError: the tokenizer does not exist, is broken, or would replace another one.
    """
    name = _name_to_install(args, text, settings)
    if name is None:
        return TokenizerChoice(None, None, tokenizers.load(args.tokenizer_dir).sha256)
    files = None
    if name != TRAIN:
        files = tokenizers.from_folder(Path(name)) if Path(name).is_dir() else tokenizers.from_hub(name)
    exists = (args.tokenizer_dir / "tokenizer.json").is_file()
    # Other data and checkpoints may depend on the tokenizer that is there.
    if exists and not args.overwrite and not _may_replace(args, name, files):
        existing = tokenizers.origin(args.tokenizer_dir).get("name", "of unknown origin")
        what = "a newly trained one" if name == TRAIN else name
        raise UserError(
            f"{args.tokenizer_dir} already contains another tokenizer ({existing}), which {what} would replace. Choose "
            "another --tokenizer_dir, leave out --tokenizer to use the existing one, or replace it with --overwrite."
        )
    return TokenizerChoice(name, files, files.sha256 if files else None)


def _name_to_install(args: "PrepareArgs", text: tuple[FileRecord, ...], settings: Settings | None) -> str | None:
    """Return the tokenizer to put into ``tokenizer_dir``, None if the right one is there."""
    wanted = args.tokenizer
    if not (args.tokenizer_dir / "tokenizer.json").is_file():
        return wanted or tokenizers.DEFAULT
    if wanted is None:
        # A tokenizer.json from elsewhere may not say which tokens begin and end a text: complete it.
        return None if tokenizers.is_complete(args.tokenizer_dir) else str(args.tokenizer_dir)
    if args.overwrite:
        return wanted
    origin = tokenizers.origin(args.tokenizer_dir)
    if wanted == TRAIN:
        is_right = settings is not None and origin == train_origin(args, text, settings)
    elif Path(wanted).is_dir():
        is_right = tokenizers.from_folder(Path(wanted)).sha256 == manifest.tokenizer_fingerprint(args.tokenizer_dir)
    else:
        # The Hub is not asked again for a tokenizer with this name.
        is_right = origin.get("name") == wanted
    return None if is_right else wanted


def _may_replace(args: "PrepareArgs", name: str, files: TokenizerFiles | None) -> bool:
    """Return whether the existing tokenizer is the same one, or was trained on an earlier state of the same text."""
    if files is None:
        # A tokenizer trained on the text of another folder may be in use by other data and models.
        existing = tokenizers.origin(args.tokenizer_dir)
        own_folder = _relative(args.tokenizer_dir, args.data_dir)
        return existing.get("name") == TRAIN and existing.get("data_dir") == own_folder
    if Path(name) == args.tokenizer_dir:
        return True
    with suppress(UserError):
        return manifest.tokenizer_fingerprint(args.tokenizer_dir) == files.sha256
    return False


# --- training ---


def train_origin(args: "PrepareArgs", text: tuple[FileRecord, ...], settings: Settings) -> dict[str, Any]:
    """Return everything that a trained tokenizer depends on; it is stored in the tokenizer's folder."""
    return {
        "name": TRAIN,
        "vocab_size": args.vocab_size or tokenizers.DEFAULT_VOCAB_SIZE,
        "data_dir": _relative(args.tokenizer_dir, args.data_dir),
        "text": manifest.text_fingerprint(text),
        "settings": asdict(settings),
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
    if any(is_remote(file) for file in corpus.files["train"]):
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
    sample: list[str] = []
    for unit in units:
        sample += islice(_train_documents([unit], corpus.rules, PROOF_DOCUMENTS), PROOF_DOCUMENTS)
    return [text[:PROOF_CHARACTERS] for text in sample]
