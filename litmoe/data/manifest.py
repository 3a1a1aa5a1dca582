"""The metadata of a data folder, ``tokens/manifest.json``: what the tokens were made from, and their checksums.

It is written last: without it the tokens are not complete. The files of version 0.1.0 can be read. This file does not
import torch or LitGPT.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
QUIET_SECONDS = 5
"""Verifying the checksums is reported only if it takes longer."""
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
        # Read alone first: a newer format may lack fields that this version expects.
        version = read_json(path)["format"]
        manifest = read_file(path)
        # Inside of the try: in a file of another program, the format may be no number.
        is_newer = version > FORMAT
    except UNREADABLE:
        return None
    if is_newer:
        raise UserError(
            f"{path} has format {version}, but this version of the project knows only {FORMAT}. Use the newer version "
            "that made these tokens, or another --data_dir."
        )
    if manifest is None or manifest.format != FORMAT:
        return None
    # Sizes only, because this is asked often. ``verify`` compares the checksums.
    complete = all(_chunk_tokens(tokens_dir(data_dir, name)) == split.tokens for name, split in manifest.splits.items())
    return manifest if complete else None


def read_file(path: Path) -> Manifest | None:
    """Return the manifest in a file, such as the copy in a checkpoint; None if it cannot be read."""
    try:
        return from_dict(read_checksummed(path))
    except UNREADABLE:
        return None


def from_dict(values: dict[str, Any]) -> Manifest:
    """Return the manifest in the result of ``json.load``. Unknown fields, of newer versions, are ignored."""
    parts = {
        "source": Source(**_fields(Source, values["source"])),
        "tokenizer": TokenizerRecord(**_fields(TokenizerRecord, values["tokenizer"])),
        "settings": Settings(**_fields(Settings, values["settings"])),
        "splits": {name: _split(values["splits"][name]) for name in SPLITS},
    }
    return Manifest(**{**known_fields(Manifest, values), **parts})


def _split(values: dict[str, Any]) -> Split:
    # Checked when the manifest is read, so that no later step can leave the folder: datasets of W&B and copied folders
    # come from elsewhere.
    text = _records(values["text"])
    for name in (*(record.path for record in text), *values.get("files", {})):
        if not lies_inside(name):
            raise ValueError(f"{name!r} is outside of the data folder")
    return Split(**{**_fields(Split, values), "text": text})


def _records(entries: list[dict[str, Any]]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(**_fields(FileRecord, entry)) for entry in entries)


def _fields(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    # 0.1.0 called dropped duplicates "held_out".
    if "held_out" in values:
        values = {**values, "dropped_duplicates": values["held_out"]}
    return known_fields(kind, values)


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


def replace_folder(new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``old``. Windows cannot rename over a folder, so the old one is deleted first."""
    if old.exists():
        # A kill between the two steps leaves neither folder, so the caller deletes the manifest before.
        shutil.rmtree(old)
    os.replace(new, old)


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
    files = [path for split in SPLITS for path in text_files(data_dir / split)]
    # The text of another source is not in this folder, and may be on another machine.
    if manifest.source.name != TEXT or not files:
        return manifest
    # Without validation text both splits were made from the same files.
    recorded = {record.path: record for record in manifest.text}.values()
    changes = changed_files(recorded, refresh(files, data_dir, recorded))
    if changes:
        raise UserError(
            f"the text of {data_dir} changed since it was tokenized ({'; '.join(changes[:3])}). Tokenize it again: "
            f"`{command('prepare_data.py', '--data_dir', data_dir)}`"
        )
    return manifest


def verify(data_dir: Path, splits: Collection[str] = SPLITS) -> None:
    """Compare the tokens of ``splits`` with the checksums in the manifest.

    Raises:
        UserError: a file is damaged.
    """
    manifest = read(data_dir)
    assert manifest is not None, "the caller has read the manifest"
    # Sizes do not show a flipped bit, so the contents are compared.
    damaged = _damaged_files(data_dir, manifest, splits)
    if damaged:
        paths = [str(path) for path, _ in damaged[:3]]
        raise UserError(
            f"damaged since it was made: {', '.join(paths)} ({damaged[0][1]}). Remove {tokens_dir(data_dir)} and make "
            f"the tokens again: {command_to_repeat(data_dir, manifest)}. (A dataset of W&B: remove {data_dir}; it is "
            "downloaded again.)"
        )


def _damaged_files(data_dir: Path, manifest: Manifest, splits: Collection[str]) -> list[tuple[Path, str]]:
    """Return the files that differ from their checksum or cannot be read, each with the reason."""
    expected = {tokens_dir(data_dir, s) / name: sha for s in splits for name, sha in manifest.splits[s].files.items()}
    damaged = []
    for path, digest in _hash_in_threads(expected).items():
        if error := digest.exception():
            damaged.append((path, f"it can't be read: {error}"))
        elif digest.result() != expected[path]:
            damaged.append((path, f"its checksum differs from {manifest_path(data_dir)}"))
    return damaged


def _hash_in_threads(paths: Collection[Path]) -> dict[Path, Future[str]]:
    """Return the SHA-256 of each file, or the error of reading it, as a future that is done."""
    # Hashing releases Python's lock, so threads use all cores.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        sums = {path: threads.submit(file_sha256, path) for path in paths}
        try:
            if wait(sums.values(), QUIET_SECONDS).not_done:
                size = sum(path.stat().st_size for path in paths if path.exists())
                print(f"Verifying checksums of {size / 1e9:,.1f} GB of tokens ...", flush=True)
            wait(sums.values())
        except KeyboardInterrupt:
            # Otherwise leaving the block would wait for all files that are still queued.
            threads.shutdown(cancel_futures=True)
            raise
    return sums


def flags_to_repeat(manifest: Manifest) -> dict[str, Any]:
    """Return the flags of ``prepare_data.py`` that decide which text becomes which documents."""
    flags = {name: value for name, value in asdict(manifest.settings).items() if value not in (None, False)}
    # An empty value on the command line means no separator.
    if flags.get("document_separator") == "":
        flags["document_separator"] = r"\n"
    # Text in place is what a call without --source uses.
    if manifest.source.name != TEXT:
        flags["source"] = manifest.source.location if manifest.source.name == FILES else manifest.source.name
    return flags


def command_to_repeat(
    data_dir: Path, manifest: Manifest, tokenizer_dir: Path | None = None, *, overwrite: bool = False
) -> str:
    """Return the command that makes the same tokens again after their folder was removed.

    Args:
        data_dir: the data folder.
        manifest: the manifest of the tokens.
        tokenizer_dir: where their tokenizer may be, in addition to the usual places.
        overwrite: the tokens are still there.
    """
    # The manifest does not contain the path of the tokenizer: token folders are shared.
    places = (
        *([tokenizer_dir] if tokenizer_dir else []),
        Path("data/tokenizer"),
        data_dir / "tokenizer",
        data_dir.parent / "tokenizer",
    )
    # These places are only guesses; the fingerprint tells whether it is the right tokenizer.
    same = [folder for folder in places if _has_fingerprint(folder, manifest.tokenizer.sha256)]
    arguments: list[object] = ["--data_dir", data_dir]
    arguments += ["--tokenizer_dir", same[0] if same else "FOLDER_OF_THEIR_TOKENIZER"]
    for name, value in flags_to_repeat(manifest).items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", value]
    arguments += ["--overwrite"] if overwrite else []
    first = ""
    if manifest.source.name == TEXT and not (data_dir / "train").exists():
        first = f"put its text back into {data_dir}, then "
    elif manifest.source.name == FILES and not Path(str(manifest.source.location)).exists():
        first = f"its text came from {manifest.source.location}, which is not in {Path.cwd()}; bring it back, then "
    return f"{first}`{command('prepare_data.py', *arguments)}`"


def _has_fingerprint(folder: Path, sha256: str) -> bool:
    try:
        return tokenizer_fingerprint(folder) == sha256
    except UserError:
        return False


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
    # A file that was renamed is both gone and new: the name decides its place in the order of documents.
    before, after = contents(old), contents(new)
    changed = [f"{path} changed" for path in before if path in after and before[path] != after[path]]
    removed = [f"{path} was removed" for path in before if path not in after]
    added = [f"{path} is new" for path in after if path not in before]
    return changed + removed + added


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
    path = Path(tokenizer_dir) / "tokenizer.json"
    try:
        status = path.stat()
        # Both are passed to the cached function, because they come from another file, tokenizer_config.json.
        eos_token, bos_token = end_of_text_token(Path(tokenizer_dir)), begin_of_text_token(Path(tokenizer_dir))
        return _tokenizer_fingerprint(path, status.st_size, status.st_mtime_ns, status.st_ino, eos_token, bos_token)
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


def end_of_text_token(tokenizer_dir: Path) -> str | None:
    """Return the end-of-text token that ``tokenizer_config.json`` names, None if it names none."""
    return token_text(_tokenizer_config(tokenizer_dir).get("eos_token"))


def begin_of_text_token(tokenizer_dir: Path) -> str | None:
    """Return the token that begins every text, None if texts begin without one.

    The rule is that of ``litgpt.Tokenizer.check_if_bos_token_used``, without its folder names: ``add_bos_token`` in
    ``tokenizer_config.json``, or else whether the class is LlamaTokenizer.
    """
    config = _tokenizer_config(tokenizer_dir)
    used = config.get("add_bos_token", config.get("tokenizer_class") == "LlamaTokenizer")
    return token_text(config.get("bos_token")) if used else None


def token_text(token: Any) -> Any:
    """Return a token of ``tokenizer_config.json`` as text; transformers also writes ``{"content": ...}``."""
    return token.get("content") if isinstance(token, dict) else token


def _tokenizer_config(tokenizer_dir: Path) -> dict[str, Any]:
    try:
        # Without a readable file no token is named. ``tokenizers.load`` reports that with a fix.
        config = read_json(tokenizer_dir / "tokenizer_config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
