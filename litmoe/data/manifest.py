"""What a folder of tokens was made from, and whether that still holds.

Each split's token folder carries ``split.json`` (what went in, what came out), moved into place together with the
tokens; ``manifest.json`` joins the splits and is written last. No manifest: not complete. Both carry a checksum of
themselves, and checksums of the chunks and their index.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, astuple, dataclass, field
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from litmoe.checksummed_json import file_sha256, known_fields, read_json, read_sealed, write_sealed
from litmoe.cli import UserError, command, quoted

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""What comes of reading JSON that is missing, damaged, of another version, or a stranger's."""
FORMAT = 1  # of the tokens and their manifests; another one makes tokens stale
SPLITS = ("train", "val")
QUIET_SECONDS = 5  # reading the tokens through is told where it takes longer


@dataclass(frozen=True)
class FileRecord:
    """A text file as it was when it was read."""

    path: str
    """Below the corpus's folder (or the source's), with forward slashes."""
    bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the text came from."""

    name: str
    """A corpus's name, ``files`` for the user's own (``--source PATH``), ``text`` for text that lay in place."""
    location: str | None
    """The path given, or a dataset and its revision."""
    sha256: str
    """Fingerprint of the text in train/ and val/."""
    empty_documents: int
    """Left out when the text was written from the source."""
    held_out: int = 0
    """Training documents left out then, since they also stand in the validation text."""
    broken_rows: int = 0
    """Rows left out then, since they could not be read (``skip_broken``)."""


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the tokens."""

    name: str
    """A hub name, a folder, or ``train``."""
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
    """None: the text came with validation text of its own."""
    document_separator: str | None
    text_column: str | None
    max_documents: int | None
    skip_broken: bool = False


@dataclass(frozen=True)
class Split:
    """A split's counts and the text that it was made from."""

    documents: int
    tokens: int
    """With the end-of-text token after each document, and the begin-of-text token before it where there is one."""
    bytes: int
    """UTF-8 bytes of the documents, what bits per byte divides by."""
    empty_documents: int
    """Left out."""
    chunks: int
    dtype: str
    """``uint16`` below 65,536 ids, else ``int32``."""
    text: tuple[FileRecord, ...]
    """For a corpus streamed from the Hub its files there: none of them lies in the folder."""
    held_out: int = 0
    """Training documents left out, since they also stand in the validation text."""
    files: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each chunk and of their index, by name; older tokens have none."""
    broken_rows: int = 0
    """Rows left out, since they could not be read (``skip_broken``)."""


@dataclass(frozen=True)
class BuiltSplit:
    """``split.json``: what a split's token folder was built from."""

    format: int
    tokenizer: str
    """Fingerprint."""
    rules: dict[str, Any]
    """How the text was read (``documents.Rules``)."""
    counts: Split


@dataclass(frozen=True)
class Manifest:
    """What ``tokens/manifest.json`` says."""

    format: int
    source: Source
    tokenizer: TokenizerRecord
    settings: Settings
    splits: dict[str, Split]
    versions: dict[str, str]

    def made_from(self, *splits: str) -> tuple[Any, ...]:
        """What the tokens follow from: fingerprints of the tokenizer and of each split's text, with the settings that
        made documents of it, and how many came of it (a part of a corpus of the Hub has the whole one's files)."""
        found = (self.splits[split] for split in splits)
        texts = ((text_fingerprint(split.text), split.documents, split.tokens, split.bytes) for split in found)
        return self.tokenizer.sha256, astuple(self.settings), *texts


def tokens_dir(data_dir: Path, split: str | None = None) -> Path:
    """The folder of all tokens, or of a split's."""
    return data_dir / "tokens" / split if split else data_dir / "tokens"


def manifest_path(data_dir: Path) -> Path:
    """Where the manifest of ``data_dir`` stands."""
    return tokens_dir(data_dir) / "manifest.json"


def read(data_dir: Path) -> Manifest | None:
    """The manifest of complete tokens; None where there is none, or where the token files are not those it counts.

    Raises:
        UserError: a newer version of this project made the tokens.
    """
    _refuse_newer(manifest_path(data_dir))
    manifest = read_file(manifest_path(data_dir))
    whole = (
        manifest is not None
        and manifest.format == FORMAT
        and all(_chunk_tokens(tokens_dir(data_dir, name)) == split.tokens for name, split in manifest.splits.items())
    )
    return manifest if whole else None


def read_file(path: Path) -> Manifest | None:
    """A manifest wherever it lies, such as the copy in a checkpoint; None where it is none that can be read."""
    try:
        return from_dict(read_sealed(path))
    except _UNREADABLE:
        return None


def write(data_dir: Path, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all."""
    write_sealed(manifest_path(data_dir), asdict(manifest))


def read_split(data_dir: Path, split: str) -> BuiltSplit | None:
    """What a split's token folder says of itself; None where it is not there, not whole or of an older format.

    Raises:
        UserError: a newer version of this project made the tokens.
    """
    folder = tokens_dir(data_dir, split)
    _refuse_newer(folder / "split.json")
    try:
        values = read_sealed(folder / "split.json")
        found = BuiltSplit(**{**known_fields(BuiltSplit, values), "counts": _split(values["counts"])})
    except _UNREADABLE:
        return None
    return found if found.format == FORMAT and _chunk_tokens(folder) == found.counts.tokens else None


def _refuse_newer(path: Path) -> None:
    """Tokens of a format that is not known here would count as stale, and be replaced."""
    try:
        newer = read_json(path)["format"] > FORMAT
    except _UNREADABLE:
        return
    if newer:
        raise UserError(
            f"{path} is of a format that this version of the project does not know (it knows {FORMAT}): a newer one"
            " made these tokens. Use that version, or another --data_dir."
        )


def write_split(folder: Path, built: BuiltSplit) -> None:
    """Writes ``split.json`` into a token folder."""
    write_sealed(folder / "split.json", asdict(built))


def lies_inside(name: str) -> bool:
    """Whether a name that somebody else wrote stays in its folder, on any system."""
    path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    return not (path.drive or path.root or ".." in path.parts)


def _split(values: dict[str, Any]) -> Split:
    names = (*(entry["path"] for entry in values["text"]), *values.get("files", {}))
    if outside := [name for name in names if not lies_inside(name)]:
        raise ValueError(f"{outside[0]!r} lies outside of the folder")
    text = tuple(FileRecord(**known_fields(FileRecord, entry)) for entry in values["text"])
    return Split(**{**known_fields(Split, values), "text": text})


def from_dict(values: dict[str, Any]) -> Manifest:
    """A manifest from what ``json.load`` gives."""
    splits = {name: _split(values["splits"][name]) for name in SPLITS}
    return Manifest(
        **{
            **known_fields(Manifest, values),
            "source": Source(**known_fields(Source, values["source"])),
            "tokenizer": TokenizerRecord(**known_fields(TokenizerRecord, values["tokenizer"])),
            "settings": Settings(**known_fields(Settings, values["settings"])),
            "splits": splits,
        }
    )


def _chunk_tokens(folder: Path) -> int:
    """The tokens of a split's chunks; -1 where a chunk is missing or of another size than its index says."""
    try:
        chunks = read_json(folder / "index.json")["chunks"]
        whole = all(
            lies_inside(name := chunk["filename"]) and (folder / name).stat().st_size == chunk["chunk_bytes"]
            for chunk in chunks
        )
        return sum(chunk["dim"] for chunk in chunks) if whole else -1
    except _UNREADABLE:
        return -1


def verify(data_dir: Path, splits: Collection[str] = SPLITS) -> None:
    """Reads the tokens of ``splits`` through and compares them with the checksums that were taken when they were made.

    Says so where that takes long, and where older tokens have no checksums.

    Raises:
        UserError: a file is damaged.
    """
    found = read(data_dir)
    assert found is not None, "the caller has read the manifest"
    wanted = {tokens_dir(data_dir, s) / name: sha for s in splits for name, sha in found.splits[s].files.items()}
    if unknown := [split for split in splits if not found.splits[split].files]:
        print(
            f"The tokens of {data_dir} ({' and '.join(unknown)}) were made by an older version, without checksums:"
            f" damage to them can't be noticed. Remove {tokens_dir(data_dir)} and make them anew for some."
        )
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        sums = {path: threads.submit(file_sha256, path) for path in wanted}
        try:
            if wait(sums.values(), QUIET_SECONDS).not_done:
                counts = [found.splits[split] for split in splits]
                size = sum(split.tokens * (2 if split.dtype == "uint16" else 4) for split in counts)
                print(
                    f"Reading {size / 1e9:,.1f} GB of tokens through, to know that they are undamaged ...", flush=True
                )
            wait(sums.values())
        except KeyboardInterrupt:
            threads.shutdown(cancel_futures=True)
            raise
    if damaged := [path for path, digest in sums.items() if digest.exception() or digest.result() != wanted[path]]:
        error = sums[damaged[0]].exception()
        why = f"it can't be read: {error}" if error else f"its checksum is not the one in {manifest_path(data_dir)}"
        raise UserError(
            f"damaged since it was made: {', '.join(map(str, damaged[:3]))} ({why}). Remove {tokens_dir(data_dir)}"
            f" and make the tokens anew: {_made_anew_by(data_dir, found)}. (A dataset of W&B: remove {data_dir}, it is"
            " fetched anew.)"
        )


def _made_anew_by(data_dir: Path, found: Manifest) -> str:
    """The command that makes the same tokens once more when their folder is removed."""
    flags: list[object] = ["--data_dir", data_dir]
    places = (Path("data/tokenizer"), data_dir / "tokenizer", data_dir.parent / "tokenizer")
    same = [folder for folder in places if _is_tokenizer(folder, found.tokenizer.sha256)]
    flags += ["--tokenizer_dir", same[0] if same else "FOLDER_OF_THEIR_TOKENIZER"]
    settings = {key: value for key, value in asdict(found.settings).items() if value is not None}
    first = ""
    if any((data_dir / entry.path).is_file() for split in found.splits.values() for entry in split.text):
        settings.pop("max_documents", None)  # the text that lies there is what they left of it
    elif found.source.name == "text":
        first = f"put its text back into {data_dir}, then "
    else:
        source = found.source.location if found.source.name == "files" else found.source.name
        flags += ["--source", source]
        if found.source.name == "files" and not Path(str(source)).exists():
            first = f"their text came from {source}, which is not there (seen from {Path.cwd()}); bring it back, then "
    if settings.get("document_separator") == "":
        settings["document_separator"] = r"\n"
    if settings.pop("skip_broken"):
        flags.append("--skip_broken")
    for name, value in settings.items():
        flags += [f"--{name}", value]
    return f"{first}`{command('prepare_data.py', *flags)}`"


def _is_tokenizer(folder: Path, sha256: str) -> bool:
    try:
        return tokenizer_fingerprint(folder) == sha256
    except UserError:
        return False


def replace_folder(new: Path, old: Path) -> None:
    """Puts ``new`` in the place of ``old``. Windows renames no folder onto another, so the old one goes first."""
    if old.exists():
        shutil.rmtree(old)
    os.replace(new, old)


# --- fingerprints ---


def checksums(folder: Path) -> dict[str, str]:
    """Of a split's chunks and their index, by name."""
    paths = [*sorted(folder.glob("chunk-*.bin")), folder / "index.json"]
    with ThreadPoolExecutor() as threads:
        return {path.name: digest for path, digest in zip(paths, threads.map(file_sha256, paths), strict=True)}


def record(path: Path, folder: Path) -> FileRecord:
    """Reads a file for its fingerprint."""
    status = path.stat()
    return FileRecord(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns, file_sha256(path))


def refresh(paths: Iterable[Path], folder: Path, known: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    """The records of files; one whose size and time are those of a known record is not read again."""
    records = {(entry.path, entry.bytes, entry.mtime_ns): entry for entry in known}
    fresh = []
    for path in paths:
        status = path.stat()
        found = records.get((path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
        fresh.append(found or record(path, folder))
    return tuple(fresh)


def contents(records: Iterable[FileRecord]) -> dict[str, str]:
    """Path to content: what makes two sets of files the same text."""
    return {entry.path: entry.sha256 for entry in records}


def changed_files(old: Iterable[FileRecord], new: Iterable[FileRecord]) -> list[str]:
    """Names what differs, one phrase a file."""
    before, after = contents(old), contents(new)
    return (
        [f"{path} changed" for path in before if path in after and before[path] != after[path]]
        + [f"{path} is gone" for path in before if path not in after]
        + [f"{path} is new" for path in after if path not in before]
    )


def text_fingerprint(records: Iterable[FileRecord]) -> str:
    """One fingerprint of many files."""
    return hashlib.sha256(json.dumps(sorted(contents(records).items())).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer_dir: Path) -> str:
    """Fingerprint of what a tokenizer does: ``tokenizer.json`` in any formatting, and what begins and ends a text.

    Truncation and padding, which change no id here, are left out. The same for ``data/tokenizer`` and for the copy in
    a checkpoint.

    Raises:
        UserError: for a folder without a readable ``tokenizer.json``.
    """
    path = Path(tokenizer_dir) / "tokenizer.json"
    try:
        status = path.stat()
        eos_token, bos_token = end_of_text_token(Path(tokenizer_dir)), begin_of_text_token(Path(tokenizer_dir))
        return _tokenizer_fingerprint(path, status.st_size, status.st_mtime_ns, status.st_ino, eos_token, bos_token)
    except OSError:
        raise UserError(
            f"no tokenizer at {tokenizer_dir}: {path.name} is missing. `uv run python prepare_data.py --tokenizer "
            f"NAME|FOLDER|train --tokenizer_dir {quoted(tokenizer_dir)}` puts one there."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}); prepare the tokenizer anew with --overwrite.") from None


@cache
def _tokenizer_fingerprint(
    path: Path, size: int, mtime_ns: int, inode: int, eos_token: str | None, bos_token: str | None
) -> str:
    # Asked for many times in a run; size, time and inode only tell one state of the file from another.
    if not isinstance(content := read_json(path), dict):
        raise ValueError(f"it holds a {type(content).__name__} where a mapping was expected")
    return fingerprint_of(content, eos_token, bos_token)


def fingerprint_of(tokenizer_json: dict[str, Any], eos_token: str | None, bos_token: str | None = None) -> str:
    """See ``tokenizer_fingerprint``; ``bos_token`` is None where texts do not begin with one."""
    essence = {key: value for key, value in tokenizer_json.items() if key not in ("truncation", "padding")}
    tokens = [eos_token] if bos_token is None else [eos_token, bos_token]
    return hashlib.sha256(json.dumps([essence, *tokens], sort_keys=True).encode()).hexdigest()


def end_of_text_token(tokenizer_dir: Path) -> str | None:
    """Return the end-of-text token that ``tokenizer_config.json`` names, None where it names none."""
    return token_text(_tokenizer_config(tokenizer_dir).get("eos_token"))


def begin_of_text_token(tokenizer_dir: Path) -> str | None:
    """Return the token that begins every text, None where texts begin without one.

    The rule is that of ``litgpt.Tokenizer.check_if_bos_token_used``, without its folder names: ``add_bos_token`` in
    ``tokenizer_config.json``, else whether the class is LlamaTokenizer.
    """
    config = _tokenizer_config(tokenizer_dir)
    used = config.get("add_bos_token", config.get("tokenizer_class") == "LlamaTokenizer")
    return token_text(config.get("bos_token")) if used else None


def token_text(token: Any) -> Any:
    """Return a token of ``tokenizer_config.json`` as text; transformers also writes ``{"content": ...}``."""
    return token.get("content") if isinstance(token, dict) else token


def _tokenizer_config(tokenizer_dir: Path) -> dict[str, Any]:
    try:
        config = read_json(tokenizer_dir / "tokenizer_config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
