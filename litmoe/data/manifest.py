"""The metadata of a data folder, ``tokens/manifest.json``: what the tokens were made from, and their checksums.

It is written last: without it the tokens are not complete. The files of version 0.1.0 can be read. This file does not
import torch or LitGPT.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from litmoe.checksummed_json import file_sha256, known_fields, read_checksummed, read_json, write_checksummed
from litmoe.cli import UserError, command, quoted
from litmoe.data.files import text_files

FORMAT = 1
"""Of the tokens and their manifest. Tokens of another format are not used."""
SPLITS = ("train", "val")
FILES = "files"
"""Recorded name of the corpus of ``--source PATH``."""
TEXT = "text"
"""Recorded name of the text that the user put into DATA_DIR/train and DATA_DIR/val."""
DEFAULT_TOKENIZER_DIR = Path("data/tokenizer")
QUIET_TOKENS = 1 << 30
"""Verifying the checksums of more tokens takes seconds and is reported."""
# Raised for JSON that is missing, corrupt, or of another program.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class FileRecord:
    """A text file as it was when it was read."""

    path: str
    """Relative to the data folder or the source, with forward slashes."""
    bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the text came from."""

    name: str
    """The name of a corpus, ``files`` for ``--source PATH``, ``text`` for text that the user put in place."""
    location: str | None
    """The name of the file or folder, or a dataset and its revision."""
    sha256: str
    """``text_fingerprint`` of the text files."""
    path_sha256: str | None = None
    """Of the path of ``--source PATH``, to tell two folders with one name apart. The path itself is private."""

    @property
    def flag(self) -> str | None:
        """The value of ``--source``; None for text in place, which needs none."""
        return {TEXT: None, FILES: self.location}.get(self.name, self.name)


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the tokens."""

    name: str
    """A Hub name, a folder, or ``train``."""
    sha256: str
    """``tokenizer_fingerprint`` of its folder."""
    vocab_size: int
    """Its largest id plus one: what a model's vocabulary must hold."""
    eos_token: str
    eos_id: int


@dataclass(frozen=True)
class Settings:
    """What decided how text became documents and splits."""

    val_fraction: float | None
    """None: the corpus has its own validation text."""
    document_separator: str | None
    text_column: str | None
    max_documents: int | None
    skip_broken: bool = False
    extensions: str | None = None
    """Endings of the files that are read as text, such as ``.c,.py``; None for the known formats."""


@dataclass(frozen=True)
class Split:
    """The counts of a split and the text that it was made from."""

    documents: int
    tokens: int
    """With the end-of-text token after each document, and the begin-of-text token before it if there is one."""
    bytes: int
    """UTF-8 bytes of the documents, for bits per byte."""
    empty_documents: int
    """Left out."""
    chunks: int
    dtype: str
    """``uint16`` below 65,536 ids, else ``int32``."""
    text: tuple[FileRecord, ...]
    """The source's files; none for the built-in stories."""
    dropped_duplicates: int = 0
    """Training documents left out, since they also occur in the validation text."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each chunk and of their index, by name."""
    broken_rows: int = 0
    """Rows left out, since they could not be read."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``tokens/manifest.json``."""

    format: int
    source: Source
    tokenizer: TokenizerRecord
    settings: Settings
    splits: dict[str, Split]
    versions: dict[str, str]
    keeps_text: bool = False
    """The text of the tokens is in tokens/text (``--keep_text``)."""

    @property
    def text(self) -> list[FileRecord]:
        """The files of both splits."""
        return [record for split in self.splits.values() for record in split.text]

    def made_from(self, *splits: str) -> tuple[Any, ...]:
        """Return everything that the tokens depend on, to compare it: tokenizer, settings, text and counts.

        The counts are needed because a part of a Hub corpus has the same files as all of it.
        """
        entries = [self.splits[split] for split in splits]
        texts = [(text_fingerprint(entry.text), entry.documents, entry.tokens, entry.bytes) for entry in entries]
        return self.tokenizer.sha256, astuple(self.settings), *texts


# --- reading and writing ---


def tokens_dir(data_dir: Path, split: str | None = None) -> Path:
    """Return the folder of all tokens, or of a split's."""
    return data_dir / "tokens" / split if split else data_dir / "tokens"


def manifest_path(data_dir: Path) -> Path:
    """Return the path of the manifest of ``data_dir``."""
    return tokens_dir(data_dir) / "manifest.json"


def read(data_dir: Path) -> Manifest | None:
    """Return the manifest of complete tokens; None without one, or if token files are missing or have another size.

    Raises:
        UserError: a newer version of this project made the tokens.
    """
    path = manifest_path(data_dir)
    try:
        values = read_checksummed(path)
        version = values["format"]
        # A newer format may lack fields that this version expects.
        manifest = _from_dict(values) if version <= FORMAT else None
    except UNREADABLE:
        return None
    if manifest is None:
        raise UserError(
            f"{path} has format {version}, but this version of the project knows only {FORMAT}. Use the newer version "
            "that made these tokens, or another --data_dir."
        )
    # Sizes only, because this is asked often. ``verify`` compares the checksums.
    complete = all(_chunk_tokens(tokens_dir(data_dir, name)) == split.tokens for name, split in manifest.splits.items())
    return manifest if complete else None


def read_file(path: Path) -> Manifest | None:
    """Return the manifest in a file, such as the copy in a checkpoint; None if it cannot be read."""
    try:
        return _from_dict(read_checksummed(path))
    except UNREADABLE:
        return None


def _from_dict(values: dict[str, Any]) -> Manifest:
    # Unknown fields, of newer versions, are ignored.
    parts = {
        "source": Source(**known_fields(Source, values["source"])),
        "tokenizer": TokenizerRecord(**known_fields(TokenizerRecord, values["tokenizer"])),
        "settings": Settings(**known_fields(Settings, values["settings"])),
        "splits": {name: _split(values["splits"][name]) for name in SPLITS},
    }
    return Manifest(**{**known_fields(Manifest, values), **parts})


def _split(values: dict[str, Any]) -> Split:
    text = tuple(FileRecord(**known_fields(FileRecord, entry)) for entry in values["text"])
    # 0.1.0 called dropped duplicates "held_out".
    renamed = {"dropped_duplicates": values.get("held_out", 0)}
    split = Split(**{**renamed, **known_fields(Split, values), "text": text})
    # Checked when the manifest is read, so that no later step can leave the folder: datasets of W&B and copied folders
    # come from elsewhere.
    if not all(map(lies_inside, [*contents(text), *split.files])):
        raise ValueError("a file is outside of the data folder")
    return split


def write_file(path: Path, manifest: Manifest) -> None:
    """Write a manifest atomically."""
    write_checksummed(path, asdict(manifest))


def lies_inside(name: str) -> bool:
    """Return whether a path from an untrusted file stays inside of its folder, on any system."""
    # Knows both kinds of slashes, and drives.
    path = PureWindowsPath(name)
    return not (path.drive or path.root or ".." in path.parts)


def _chunk_tokens(folder: Path) -> int:
    """Return the tokens in the chunks of a split; -1 if a chunk is missing or has another size than its index says."""
    try:
        chunks = read_json(folder / "index.json")["chunks"]
        for chunk in chunks:
            name = chunk["filename"]
            # The index may come from somebody else, as in a downloaded data set.
            if not lies_inside(name) or (folder / name).stat().st_size != chunk["chunk_bytes"]:
                return -1
        # litdata calls the number of tokens of a chunk its dim.
        return sum(chunk["dim"] for chunk in chunks)
    except UNREADABLE:
        return -1


# --- checks before the tokens are used ---


def complete_manifest(data_dir: Path) -> Manifest:
    """Return the manifest of complete tokens.

    Raises:
        UserError: the tokens are missing or incomplete.
    """
    manifest = read(data_dir)
    if manifest is None:
        state = "are not complete" if tokens_dir(data_dir).is_dir() else "do not exist"
        raise UserError(
            f"the tokens of {data_dir} {state}. Make them: `{command('prepare_data.py', '--data_dir', data_dir)}`"
        )
    return manifest


def checked_manifest(data_dir: Path) -> Manifest:
    """Return the manifest of tokens that are complete and were made from the text in place as it is now.

    Text that was removed to save space is not an error.

    Raises:
        UserError: the tokens are missing, incomplete or stale.
    """
    manifest = complete_manifest(data_dir)
    files = text_in_place(data_dir)
    # The text of another source is not in this folder, and may be on another machine.
    if manifest.source.name != TEXT or not files:
        return manifest
    changes = changed_files(manifest.text, refresh(files, data_dir, manifest.text))
    if changes:
        raise UserError(
            f"the text of {data_dir} changed since it was tokenized ({'; '.join(changes[:3])}). Tokenize it again: "
            f"`{command('prepare_data.py', '--data_dir', data_dir)}`"
        )
    return manifest


def text_in_place(data_dir: Path) -> list[Path]:
    """Return the text files in DATA_DIR/train and DATA_DIR/val."""
    return [*text_files(data_dir / "train"), *text_files(data_dir / "val")]


def verify(data_dir: Path) -> None:
    """Compare the tokens with the checksums in the manifest.

    Raises:
        UserError: a file is damaged.
    """
    manifest = read(data_dir)
    assert manifest is not None, "the caller has read the manifest"
    tokens = sum(split.tokens for split in manifest.splits.values())
    if tokens > QUIET_TOKENS:
        print(f"Verifying the checksums of {tokens:,} tokens ...", flush=True)
    expected = {
        tokens_dir(data_dir, name) / file: sha256
        for name, split in manifest.splits.items()
        for file, sha256 in split.files.items()
    }
    # Sizes do not show a flipped bit, so the contents are compared. Hashing releases Python's lock, so threads use all
    # cores.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        damages = [damage for damage in threads.map(_damage, expected, expected.values()) if damage]
    if damages:
        raise UserError(
            f"damaged since it was made: {', '.join(damages[:3])}. Remove {tokens_dir(data_dir)} and make the tokens "
            f"again: {command_to_repeat(data_dir, manifest)}. (A dataset of W&B: remove {data_dir}; it is downloaded "
            "again.)"
        )


def _damage(path: Path, sha256: str) -> str | None:
    """Name a file that differs from its checksum, with the reason; None for an undamaged one."""
    try:
        same = file_sha256(path) == sha256
    except OSError as error:
        return f"{path} (it can't be read: {error})"
    return None if same else f"{path} (its checksum differs from the manifest's)"


def flags_to_repeat(manifest: Manifest) -> dict[str, Any]:
    """Return the flags of ``prepare_data.py`` that decide which text becomes which documents."""
    flags = asdict(manifest.settings) | {"source": manifest.source.flag}
    # An empty value on the command line means no separator.
    if flags["document_separator"] == "":
        flags["document_separator"] = r"\n"
    return {name: value for name, value in flags.items() if value not in (None, False)}


def command_to_repeat(
    data_dir: Path, manifest: Manifest, tokenizer_dir: Path = DEFAULT_TOKENIZER_DIR, *, overwrite: bool = False
) -> str:
    """Return the command that makes the same tokens again after their folder was removed.

    Args:
        data_dir: the data folder.
        manifest: the manifest of the tokens.
        tokenizer_dir: where their tokenizer may be, in addition to the usual places.
        overwrite: the tokens are still there.
    """
    # The manifest does not contain the path of the tokenizer, because token folders are shared.
    places = (tokenizer_dir, DEFAULT_TOKENIZER_DIR, data_dir / "tokenizer", data_dir.parent / "tokenizer")
    tokenizer = find_tokenizer(places, manifest.tokenizer.sha256) or "FOLDER_OF_THEIR_TOKENIZER"
    arguments: list[object] = ["--data_dir", data_dir, "--tokenizer_dir", tokenizer]
    for name, value in flags_to_repeat(manifest).items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", value]
    if overwrite:
        arguments.append("--overwrite")
    # Where the text was, unless it is on the Hub or built in.
    text = {TEXT: data_dir / "train", FILES: Path(manifest.source.location or "")}.get(manifest.source.name)
    first = ""
    if text is not None and not text.exists():
        first = f"its text came from {text}, which is not in {Path.cwd()}; bring it back, then "
    return f"{first}`{command('prepare_data.py', *arguments)}`"


def find_tokenizer(places: Iterable[Path], sha256: str) -> Path | None:
    """Return the first folder that contains the tokenizer with this fingerprint, None if there is none."""
    for folder in places:
        # A folder without a tokenizer, or with a broken one.
        with suppress(UserError):
            if tokenizer_fingerprint(folder) == sha256:
                return folder
    return None


# --- fingerprints ---


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the chunks of a split and of their index, by name."""
    paths = [*sorted(folder.glob("chunk-*.bin")), folder / "index.json"]
    # Hashing releases Python's lock, so threads use all cores.
    with ThreadPoolExecutor() as threads:
        return {path.name: digest for path, digest in zip(paths, threads.map(file_sha256, paths), strict=True)}


def record(path: Path, folder: Path) -> FileRecord:
    """Read a file for its fingerprint."""
    # The time is taken before reading: a change during it is noticed by the next call.
    status = path.stat()
    return FileRecord(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns, file_sha256(path))


def refresh(paths: Iterable[Path], folder: Path, known: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    """Return the records of files. A file with the size and time of a known record is not read again."""
    records = {(entry.path, entry.bytes, entry.mtime_ns): entry for entry in known}
    # Reading a large corpus for its checksums takes minutes.
    fresh = []
    for path in paths:
        status = path.stat()
        unchanged = records.get((path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
        fresh.append(unchanged or record(path, folder))
    return tuple(fresh)


def contents(records: Iterable[FileRecord]) -> dict[str, str]:
    """Return path to checksum, to compare two sets of files."""
    # Without times, which differ between two copies of the same file.
    return {entry.path: entry.sha256 for entry in records}


def changed_files(old: Iterable[FileRecord], new: Iterable[FileRecord]) -> list[str]:
    """Name the files that differ, one phrase for each."""
    before, after = contents(old), contents(new)
    different = {path for path, _ in before.items() ^ after.items()}
    # A file that was renamed is both gone and new: the name decides its place in the order of documents.
    states = {(True, True): "changed", (True, False): "was removed", (False, True): "is new"}
    return [f"{path} {states[path in before, path in after]}" for path in sorted(different)]


def text_fingerprint(records: Iterable[FileRecord]) -> str:
    """Return one fingerprint of many files."""
    # Sorted: systems list files in different orders.
    return hashlib.sha256(json.dumps(sorted(contents(records).items())).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer_dir: Path) -> str:
    """Return the fingerprint of what a tokenizer does: ``tokenizer.json``, and the tokens that begin and end a text.

    Formatting, truncation and padding do not count. It is the same for ``data/tokenizer`` and for the copy in a
    checkpoint.

    Raises:
        UserError: the folder has no readable ``tokenizer.json``.
    """
    path = tokenizer_dir / "tokenizer.json"
    try:
        status = path.stat()
        # The tokens are passed to the cached function, because they come from another file, tokenizer_config.json.
        end, begin = special_tokens(tokenizer_config(tokenizer_dir))
        return _tokenizer_fingerprint(path, status.st_size, status.st_mtime_ns, status.st_ino, end, begin)
    except OSError:
        raise UserError(
            f"no tokenizer at {tokenizer_dir}: {path.name} is missing. `uv run python prepare_data.py --tokenizer "
            f"NAME|FOLDER|train --tokenizer_dir {quoted(tokenizer_dir)}` puts one there."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}); replace the tokenizer with --overwrite.") from None


@cache
def _tokenizer_fingerprint(
    path: Path, size: int, mtime_ns: int, inode: int, eos_token: str | None, bos_token: str | None
) -> str:
    # Called many times in a run. Size, time and inode only tell whether the file changed.
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__}; expected a mapping")
    return fingerprint_of(content, eos_token, bos_token)


def fingerprint_of(tokenizer_json: dict[str, Any], eos_token: str | None, bos_token: str | None = None) -> str:
    """Return ``tokenizer_fingerprint`` of a loaded tokenizer; ``bos_token`` is None if texts do not begin with one."""
    # Truncation and padding change no id, since this project switches them off.
    essence = {key: value for key, value in tokenizer_json.items() if key not in ("truncation", "padding")}
    # No entry for a missing begin-of-text token: fingerprints from before such tokens were known stay valid.
    tokens = [eos_token] if bos_token is None else [eos_token, bos_token]
    return hashlib.sha256(json.dumps([essence, *tokens], sort_keys=True).encode()).hexdigest()


def special_tokens(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the tokens that end and begin every text, as a ``tokenizer_config.json`` names them.

    The begin-of-text token is None if texts begin without one. The rule is that of
    ``litgpt.Tokenizer.check_if_bos_token_used``, without its folder names: ``add_bos_token``, or else whether the class
    is LlamaTokenizer.
    """
    begins = config.get("add_bos_token", config.get("tokenizer_class") == "LlamaTokenizer")
    return token_text(config.get("eos_token")), token_text(config.get("bos_token")) if begins else None


def token_text(token: Any) -> Any:
    """Return a token of ``tokenizer_config.json`` as text; transformers also writes ``{"content": ...}``."""
    return token.get("content") if isinstance(token, dict) else token


def tokenizer_config(tokenizer_dir: Path) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``, empty if it is missing or broken."""
    try:
        # ``tokenizers.load`` reports what is missing, with a fix.
        config = read_json(tokenizer_dir / "tokenizer_config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
