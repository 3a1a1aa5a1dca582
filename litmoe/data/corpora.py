"""Where text comes from: corpora known by name, the user's own files, and the folder that it is written into.

A new corpus is one entry in ``CORPORA``.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from litmoe.checksummed_json import known_fields, read_sealed, write_sealed
from litmoe.cli import UserError, nearest, quoted
from litmoe.data import manifest
from litmoe.data.documents import (
    END_OF_TEXT,
    READABLE,
    Part,
    PartText,
    Rules,
    documents_of,
    first_documents,
    is_readable,
    kinds,
    part_text,
    parts,
    read,
    text_files,
    unread_files,
)
from litmoe.data.files import HUB, Location, Unfinished, in_short, is_compressed, is_remote, reading, suffix
from litmoe.data.manifest import SPLITS, FileRecord, Settings
from litmoe.data.tokenizers import OFFLINE_WAYS

SHARD_BYTES = 16 << 20  # of text a file: stock LitGPT's TextFiles holds a whole file in memory, at 180 times its size
SAMPLE_BYTES = 20 << 20
VALIDATION_FOLDERS = ("val", "validation", "valid", "dev")
SPLIT_NAMES = {  # as the datasets library has them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(VALIDATION_FOLDERS, "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_NAME = re.compile(rf"(?:.*[^a-z])?({'|'.join(SPLIT_NAMES)})(?:set|data|split)?(?:[^a-z].*)?", re.I)
TEXT_FORMAT = 2  # of the text that is written: from 2 on white space at the ends of documents is kept
PARQUET_BRANCH = "refs/convert/parquet"  # where the Hub puts its own conversion of a dataset
JOURNAL = "journal.json"
JOURNAL_SECONDS = 1.0
INCOMING = ".incoming"  # text on its way, below data_dir

FOOTERS_AT_ONCE = 16  # requests to the Hub

OnProgress = Callable[[int, int, int | None], None]


@dataclass(frozen=True)
class Stories:
    """The built-in corpus: made here, from a seed."""

    about: str
    location = "generate_stories(seed=0)"
    val_fraction = 0.1

    def documents(self) -> Iterator[str]:
        """Needs nothing."""
        from litmoe.data.stories import generate_stories

        size = 0
        for story in generate_stories():
            yield story
            size += len(story.encode())
            if size >= SAMPLE_BYTES:
                return


@dataclass(frozen=True)
class Files:
    """A source that is there: files by split."""

    location: str
    """What exactly it is, for the manifest."""
    files: dict[str, list[Location]]
    """``train``, and ``val`` where the source has validation text of its own."""
    records: dict[str, tuple[FileRecord, ...]]
    """The same, as they are noted."""
    column: str | None = None
    articles: bool = False
    """See ``documents.Part``."""
    revision: str | None = None
    """What ``HubDataset.open`` takes to find the same files again."""
    _known: dict[str, list[Part]] = field(default_factory=dict)
    """Parts that were asked for: on the Hub they follow from the files alone."""

    def parts(self, split: str, rules: Rules, *, may_cut: bool, lazily: bool = False) -> Iterable[Part]:
        """The parts of a split's files; lazily: a file is asked for its parts when those before it are used up."""
        files, into = self.files[split], split if "val" in self.files else None

        def parts_of(i: int) -> list[Part]:
            rest = tuple(files[i + 1 :]) if self.articles else None
            found = list(parts(files[i], rules, into, may_cut=may_cut, articles=rest))
            return [replace(part, opens=(i, part.start) == (0, 0)) for part in found] if self.articles else found

        if lazily or not any(map(is_remote, files)):
            return (part for i in range(len(files)) for part in parts_of(i))
        if split not in self._known:
            self._known[split] = self._all_parts(parts_of, len(files))
        return self._known[split]

    def _all_parts(self, parts_of: Callable[[int], list[Part]], number: int) -> list[Part]:
        if number > 1:
            print(f"Asking {number} files of the Hub how they are divided")
        said = time.monotonic()
        found: list[Part] = []
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            try:
                for i, more in enumerate(pool.map(parts_of, range(number)), 1):
                    found += more
                    if time.monotonic() - said >= 10:
                        said = time.monotonic()
                        print(f"  {i} of {number} files", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, or a local folder in the Hub's layout."""

    about: str
    path: str
    """``owner/name`` on the Hub."""
    config: str | None = None
    column: str | None = "text"
    """None: ``text``, or the only column with text."""
    val_fraction: float = 0.01
    """Where it has no validation text."""
    articles: bool = False
    """Its rows are lines of articles (WikiText)."""
    flag: str = "--source"
    """What names it on the command line."""

    def open(self, settings: Settings, revision: str | None = None) -> Files:
        """Finds its files; on the Hub that begins with one short question, so that a missing network shows at once.

        Args:
            settings: ``text_column`` goes before the corpus's own.
            revision: of an earlier ``Files``, to find the same ones; the newest where the Hub no longer has it.

        Raises:
            UserError: without a network, for a dataset that cannot be read or has no such config.
        """
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import datasets  # here alone: it takes seconds

        datasets.disable_progress_bars()
        if Path(self.path).is_dir():
            location, branch, sha = Path(self.path).name, "", None
            found = self._find(None)
        else:
            branch, _, pinned = (revision or "").rpartition("@")
            sha = self._ask(pinned or branch or None, newest=branch or None)
            found = None if branch else self._find(sha)
            if found is None and not branch:
                branch, sha = PARQUET_BRANCH, self._ask(PARQUET_BRANCH)
            location = f"{self.path}@{sha}"
        with reading(f"{HUB}datasets/{self.path}" if sha else Path(self.path)):
            if found is None:
                found = self._find_converted(str(sha))
            files = {split: found[name] for split, name in self._splits(found).items()}
            records = {split: self._records(paths, sha) for split, paths in files.items()}
        if unused := [name for name in found if name not in self._splits(found).values()]:
            print(f"Splits of {self.path} that are not used: {', '.join(unused)}")
        pin = f"{branch}@{sha}" if branch else sha
        return Files(location, files, records, settings.text_column or self.column, self.articles, pin)

    def _ask(self, revision: str | None, newest: str | None = None) -> str:
        """The commit that a revision is; where it is gone (a history made short), the newest."""
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.path, revision=revision, timeout=10).sha)
        except RevisionNotFoundError:
            if revision in (None, newest, PARQUET_BRANCH):
                raise UserError(self._unreadable("and the Hub has no parquet of it")) from None
            return self._ask(newest)
        except GatedRepoError:
            raise UserError(f"{self.path} is gated: accept its terms on the Hub and `uv run hf auth login`.") from None
        except RepositoryNotFoundError:
            raise UserError(
                f"the Hub has no dataset {self.path}, or it is private (then: `uv run hf auth login`)."
            ) from None
        except Exception as error:  # the transport has many ways to say that there is no network
            raise UserError(
                f"{self.path} cannot be had from the Hugging Face Hub ({in_short(error)}).\n{OFFLINE_WAYS}"
            ) from None

    def _unreadable(self, why: str) -> str:
        return (
            f"{self.path} holds neither .parquet nor plain .jsonl files, {why}. Name another dataset, or bring its "
            f"rows into one of these forms and name the files: {self.flag} PATH."
        )

    def _find(self, sha: str | None) -> dict[str, list[Location]] | None:
        """The files of each split by the dataset's card and the Hub's conventions; None where they can't be read."""
        import datasets

        try:
            config = datasets.load_dataset_builder(self.path, self.config, revision=sha).config
        except ValueError as error:  # no such config, or several and none named
            known = re.search(r"\[.*?\]", str(error))
            if not known or "onfig" not in str(error):
                raise UserError(f"{self.path} cannot be read ({in_short(error)}).") from None
            raise UserError(
                f"{self.path} has the configs {known.group()}, "
                + (f"but no {self.config!r}" if self.config else "and none is named")
                + f"; name one: {self.flag} hf:{self.path}:CONFIG"
            ) from None
        except RuntimeError:  # a script, which the datasets library no longer runs
            return None
        except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError):
            return None
        except Exception as error:
            raise UserError(f"{self.path} cannot be had ({in_short(error)}).\n{OFFLINE_WAYS}") from None
        files = {str(split): [str(file) for file in found] for split, found in (config.data_files or {}).items()}
        plain = all(
            suffix(file) in (".parquet", ".jsonl") and not is_compressed(file)
            for found in files.values()
            for file in found
        )
        if not files or not plain:
            if sha is None:
                raise UserError(
                    f"{self.path} is a folder here and holds neither .parquet nor plain .jsonl files, all that hf:"
                    f" reads; name the folder itself, without hf: {self.flag} {quoted(self.path)}"
                )
            return None
        return {split: [file if is_remote(file) else Path(file) for file in found] for split, found in files.items()}

    def _find_converted(self, sha: str) -> dict[str, list[Location]]:
        """The files of each split in the Hub's own conversion to parquet, CONFIG/SPLIT/NNNN.parquet."""
        from huggingface_hub import HfApi

        configs: dict[str, dict[str, list[Location]]] = {}
        for entry in sorted(HfApi().list_repo_files(self.path, revision=sha, repo_type="dataset")):
            config, *middle, name = entry.split("/")
            if len(middle) == 1 and suffix(name) == ".parquet":
                split = middle[0].removeprefix("partial-")
                configs.setdefault(config, {}).setdefault(split, []).append(f"{HUB}datasets/{self.path}@{sha}/{entry}")
                if split != middle[0] and split == "train" and name.startswith("0000."):
                    print(
                        f"Of {self.path} the Hub has only the beginning as parquet ({config}/{middle[0]}): it is taken."
                    )
        wanted = self.config or ("default" if "default" in configs else next(iter(configs), ""))
        if wanted not in configs or (self.config is None and wanted != "default" and len(configs) > 1):
            if not configs:
                raise UserError(self._unreadable("and the Hub has no parquet of it"))
            raise UserError(
                f"{self.path} has the configs {', '.join(configs)}; name one: {self.flag} hf:{self.path}:CONFIG"
            )
        return configs[wanted]

    def _splits(self, found: dict[str, list[Location]]) -> dict[str, str]:
        """Our name of a split to the dataset's; a test split is never taken."""
        if "train" not in found:
            raise UserError(f"{self.path} has no split called train, but {', '.join(found)}; name another dataset.")
        validation = next((name for name in ("validation", "valid", "val", "dev") if name in found), None)
        return {"train": "train", **({"val": validation} if validation else {})}

    def _records(self, files: list[Location], sha: str | None) -> tuple[FileRecord, ...]:
        if sha is None:
            folder = Path(self.path).resolve()
            found = [manifest.record(Path(file).resolve(), folder) for file in files]
            return tuple(replace(entry, path=f"{folder.name}/{entry.path}", mtime_ns=0) for entry in found)
        from huggingface_hub import HfApi

        prefix = f"{HUB}datasets/{self.path}@{sha}/"
        names, sizes = [str(file).removeprefix(prefix) for file in files], {}
        for some in (names[i : i + 500] for i in range(0, len(names), 500)):
            for entry in HfApi().get_paths_info(self.path, some, revision=sha, repo_type="dataset"):
                sizes[entry.path] = getattr(entry, "size", 0)
        return tuple(
            FileRecord(
                f"{self.path}@{sha}/{name}", sizes[name], 0, sha256(f"{self.path}@{sha}/{name}".encode()).hexdigest()
            )
            for name in names
        )


Corpus = Stories | HubDataset
CORPORA: dict[str, Corpus] = {
    "sample": Stories("20 MB of short children's stories, made here: no network needed"),
    "tinystories": HubDataset("2.1 million short stories, 1.9 GB (Eldan & Li 2023)", "roneneldan/TinyStories"),
    "shakespeare": HubDataset("Shakespeare's plays, 1 MB", "karpathy/tiny_shakespeare"),
    "wikitext-103": HubDataset(
        "28,000 articles of Wikipedia, 0.5 GB", "Salesforce/wikitext", "wikitext-103-v1", articles=True
    ),
    "openwebtext": HubDataset(
        "8.0 million web pages, 9.0 B GPT-2 tokens, what GPT-2 was trained on, made again",
        "Skylion007/openwebtext",
        val_fraction=0.0005,
    ),
    "fineweb-edu": HubDataset(
        "9.7 million educational web pages, 10 B GPT-2 tokens (28 GB of parquet)",
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        val_fraction=0.001,
    ),
}
DEFAULT = "tinystories"
HUB_NAME = re.compile(r"hf:(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]+))?")


@dataclass(frozen=True)
class TextOrigin:
    """``source.json``: where the text in train/ and val/ came from, written when it was put there."""

    name: str
    location: str
    settings: Settings
    source_files: tuple[FileRecord, ...]
    """The user's files as they were read, for ``--source PATH``."""
    text: dict[str, tuple[FileRecord, ...]]
    """What was written, for each split."""
    empty_documents: int
    """Left out."""
    held_out: int = 0
    """Training documents left out, since they also stand in the validation text."""
    broken_rows: int = 0
    """Rows left out, since they could not be read (``Settings.skip_broken``)."""
    format: int = TEXT_FORMAT


def known_corpora() -> str:
    """The names, a line each."""
    lines = [f"  {name:12} {corpus.about}" for name, corpus in CORPORA.items()]
    return "\n".join([*lines, "  hf:ORG/NAME[:CONFIG]  any dataset of the Hugging Face Hub with a column of text"])


def find(source: str) -> Corpus | Path:
    """The corpus of that name, or the path.

    Raises:
        UserError: for a name or path that there is none of.
    """
    if source in CORPORA:
        return CORPORA[source]
    if source.startswith("hf:"):
        if not (named := HUB_NAME.fullmatch(source)):
            raise UserError(f"--source {source}: expected hf:ORG/NAME or hf:ORG/NAME:CONFIG, as the Hub calls them.")
        return HubDataset("a dataset of the Hub", named["path"], named["config"], column=None)
    path = Path(source)
    if path.exists():
        return path
    likely = nearest(source, CORPORA)
    raise UserError(
        f"--source {source}: no such file, folder or corpus."
        + (f" Did you mean {likely}?" if likely else "")
        + f" Known corpora:\n{known_corpora()}\nor a file of your own ({READABLE}), or a folder of them."
    )


class SourceFiles(NamedTuple):
    """The files of a user's folder, by what their names say."""

    train: list[Path]
    val: list[Path]
    test: list[Path]
    """Left out."""
    unnamed: list[Path]
    """Left out, since the folder has training text by name."""
    unread: list[Path]
    """Of kinds that are not read."""

    def report(self, folder: Path) -> str:
        """What becomes of the files, a line for each kind of them; empty where all of them are training text."""

        def named(paths: list[Path]) -> str:
            return _some(folder, paths)

        names = split_names(folder, [*self.train, *self.val, *self.test])
        taken = [path for path in self.train if names[path] == "test"]
        lines = [
            f"Validation text, by name: {named(self.val)}" * bool(self.val),
            f"Left out as test text, by name: {named(self.test)}" * bool(self.test),
            f"Left out, named neither train nor validation: {named(self.unnamed)}" * bool(self.unnamed),
            not_read(folder, self.unread),
            f"Training text like the rest, as nothing is named train or validation: {named(taken)}" * bool(taken),
        ]
        return "\n".join(line for line in lines if line)


def not_read(folder: Path, paths: list[Path]) -> str:
    """Counts and names the files below ``folder`` that are left out for their kind; empty where there are none."""
    if not paths:
        return ""
    return f"Not read: {len(paths):,} file{'s' if len(paths) > 1 else ''} ({kinds(paths)}): {_some(folder, paths)}"


def _some(folder: Path, paths: list[Path]) -> str:
    more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
    return ", ".join(path.relative_to(folder).as_posix() for path in paths[:5]) + more


def split_name(name: str) -> str | None:
    """The split that the name of a folder, or of a file without its endings, says: train, val, test or None.

    It is a word of the name, in any letter case, as in ``train``, ``valid-0``, ``testset``, ``train_sft``,
    ``dev-v2.0``, ``TinyStories-train`` and ``c4-validation.00000-of-00008``.
    """
    found = SPLIT_NAME.fullmatch(name)
    return SPLIT_NAMES[found.group(1).lower()] if found else None


def split_of_path(path: Path) -> str | None:
    """The split that the outermost folder says that has such a name, else the file's own name."""
    stem = Path(path.stem).stem if is_compressed(path) else path.stem
    return next(filter(None, map(split_name, (*path.parts[:-1], stem))), None)


def split_names(folder: Path, files: list[Path]) -> dict[Path, str | None]:
    """The split that the name of each file below ``folder`` says (``split_of_path``).

    A folder that holds all files with such names, as ``train_data`` around train/ and test/, tells none of them apart:
    it counts only where the names below it say nothing.
    """
    names = {file: split_of_path(file.relative_to(folder)) for file in files}
    named = [file for file in files if names[file]]
    if len({names[file] for file in named}) != 1:
        return names
    shared = Path(os.path.commonpath([file.parent for file in named]))
    below = {file: split_of_path(file.relative_to(shared)) for file in named}
    return names | below if any(below.values()) else names


def sort_files(folder: Path) -> SourceFiles:
    """Sorts the files of a folder into splits by the names of folders and files (``split_name``).

    The names count where some file is named validation, where some are named train and others test, and where a folder
    is named test. Then training text is what is named train, or where nothing is, what is named nothing; test text is
    left out. Elsewhere all is training text: a file that happens to be called test.txt among others is text like them.

    Raises:
        UserError: there is no training text.
    """
    files, unread = text_files(folder), unread_files(folder)
    if not files:
        found = f"it has {kinds(unread)}" if unread else "it is empty"
        raise UserError(f"--source {folder}: nothing there can be read ({found}); expected files of {READABLE}.")
    names = split_names(folder, files)
    by_name: dict[str | None, list[Path]] = {}
    for path, name in names.items():
        by_name.setdefault(name, []).append(path)
    if not {"train", None} & set(by_name):
        raise UserError(
            f"--source {folder}: by their names all files are validation or test text, such as {files[0].name};"
            f" expected some named train. To train on one of them all the same, name it: --source {quoted(files[0])}"
        )
    test_folder = any("test" in map(split_name, path.relative_to(folder).parts[:-1]) for path in files)
    if "val" not in by_name and not {"train", "test"} <= set(by_name) and not test_folder:
        return SourceFiles(files, [], [], [], unread)
    unnamed = by_name.get(None, [])
    train = by_name.get("train", unnamed)
    left_out = unnamed if "train" in by_name else []
    return SourceFiles(train, by_name.get("val", []), by_name.get("test", []), left_out, unread)


def source_files(path: Path) -> dict[str, list[Path]]:
    """The user's files by split: ``train`` alone, or ``train`` and ``val`` where names say so (``sort_files``).

    Raises:
        UserError: where there is no file to read.
    """
    if path.is_file():
        if not is_readable(path):
            raise UserError(f"--source {path}: a {path.suffix or 'nameless'} file; expected {READABLE}.")
        return {"train": [path]}
    found = sort_files(path)
    return {"train": found.train, "val": found.val} if found.val else {"train": found.train}


def write_text(
    source: str,
    data_dir: Path,
    settings: Settings,
    on_progress: OnProgress = lambda documents, size, total: None,
) -> TextOrigin:
    """Writes a source's documents as text under ``train/`` and ``val/``, all or nothing; interrupted, it can go on.

    Documents are divided by lines of ``<|endoftext|>``. Without validation text of its own the source is split by
    document hash; one whose few documents all fall on one side gives the end of each document instead.

    Args:
        source: a known corpus or a path.
        data_dir: text that lies there is replaced.
        settings: ``val_fraction`` is ignored for a source with validation text.
        on_progress: called with the documents and bytes so far, and how many bytes there are, about, or None.

    Raises:
        UserError: for a source that cannot be had or read, or that holds no text.
    """
    found = find(source)
    incoming = data_dir / INCOMING
    try:
        if isinstance(found, Stories):
            origin = _write_stories(found, source, incoming, settings, on_progress)
        else:
            origin = _write_files(found, source, incoming, settings, on_progress)
        for split in SPLITS:
            if not origin.text.get(split):
                raise UserError(_no_text(source, split, origin.settings))
    except Unfinished:
        raise  # what is written stays, as after Ctrl-C or any other error: the next call goes on
    except UserError:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    write_sealed(incoming / "source.json", asdict(origin))  # last: from here on the text counts as complete
    publish(data_dir)
    return origin


def publish(data_dir: Path) -> None:
    """Moves text that was written to its end into its place; text that was not stays if it can be gone on with.

    Called again after a call that was killed half-way.
    """
    incoming = data_dir / INCOMING
    if (incoming / "source.json").is_file():
        # The manifest goes first, so that never tokens of one text lie beside another one.
        manifest.manifest_path(data_dir).unlink(missing_ok=True)
        (incoming / JOURNAL).unlink(missing_ok=True)
        for split in SPLITS:
            if (incoming / split).is_dir():
                manifest.replace_folder(incoming / split, data_dir / split)
        os.replace(incoming / "source.json", data_dir / "source.json")
    if not (incoming / JOURNAL).is_file():
        shutil.rmtree(incoming, ignore_errors=True)


def read_origin(data_dir: Path) -> TextOrigin | None:
    """Where the text came from, None for text that was put there by hand."""
    try:
        values = read_sealed(data_dir / "source.json")
        return TextOrigin(
            values["name"],
            values["location"],
            Settings(**known_fields(Settings, values["settings"])),
            _records(values["source_files"]),
            {split: _records(entries) for split, entries in values["text"].items()},
            values["empty_documents"],
            values.get("held_out", 0),
            values.get("broken_rows", 0),
            values.get("format", 1),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _records(entries: list[dict[str, Any]]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(**known_fields(FileRecord, entry)) for entry in entries)


# --- writing ---


class TextWriter:
    """Writes the documents of a split into files of about 16 MB.

    ``records`` and ``size`` (of the file after those) are what a writer before this one had written; what it wrote
    beyond is cut off.
    """

    def __init__(self, folder: Path, split: str, records: Iterable[FileRecord] = (), size: int = 0) -> None:
        self.folder, self.split = folder / split, split
        self.records = list(records)
        self.size = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        if size:
            os.truncate(self._path(), size)
            self._digest.update(self._path().read_bytes())
            self._file, self.size = open(self._path(), "ab"), size  # noqa: SIM115
        for path in sorted(self.folder.glob("*"))[len(self.records) + bool(size) :]:
            path.unlink()

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.records):05d}.txt"

    def write(self, text: str, closes: bool) -> int:
        """Appends a document, or a part of one; returns its bytes."""
        data = text.encode()
        if closes:
            data += f"\n{END_OF_TEXT}\n".encode()
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path(), "wb")  # noqa: SIM115
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        if closes and self.size >= SHARD_BYTES:
            self.close()
        return len(data)

    def flush(self) -> None:
        """Sees to it that all that was written outlives this process and the machine's power."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the file."""
        if self._file is None:
            return
        self._file.close()
        path = Path(self._file.name)
        mtime = path.stat().st_mtime_ns
        name = path.relative_to(self.folder.parent).as_posix()
        self.records.append(FileRecord(name, self.size, mtime, self._digest.hexdigest()))
        self._file, self.size, self._digest = None, 0, hashlib.sha256()


def _write_files(
    found: HubDataset | Path, source: str, incoming: Path, settings: Settings, on_progress: OnProgress
) -> TextOrigin:
    journal = _read_journal(incoming)
    if isinstance(found, Path):
        own: dict[str, list[Location]] = {split: list(paths) for split, paths in source_files(found).items()}
        files = Files(str(found.resolve()), own, {}, settings.text_column)
        name, base = "files", found.parent if found.is_file() else found
        if found.is_dir() and (report := sort_files(found).report(found)):
            print(report)
        status = {str(path): Path(path).stat() for some in own.values() for path in some}
        state: Any = {path: (now.st_size, now.st_mtime_ns) for path, now in status.items()}
    else:
        files = found.open(settings, journal.get("revision") if journal.get("source") == source else None)
        name, state = source, [manifest.contents(entries) for entries in files.records.values()]
    settings = replace(settings, val_fraction=None if "val" in files.files else settings.val_fraction)
    limit = settings.max_documents

    def contents(cut: bool, done: int) -> Iterator[tuple[int, PartText]]:
        rules = replace(rules_of(settings, files.column), cut=cut)
        held_out: set[int] = set()
        number = 0

        def texts(split: str) -> Iterator[PartText]:
            nonlocal number
            for part in files.parts(split, rules, may_cut=True, lazily=limit is not None):
                if number >= done:
                    yield from read(part, rules, held_out)
                elif split == "val":
                    held_out.update(document for text in read(part, rules) for document in text.hashes)
                number += 1

        for split in sorted(files.files, reverse=True):  # validation first: its documents are left out of the others
            every = texts(split)
            for text in every if limit is None else first_documents(every, limit * (2 if cut else 1)):  # cut: in two
                held_out.update(text.hashes)
                yield number, text

    inputs = {
        "source": source,
        "revision": files.revision,
        "all": sha256(json.dumps([TEXT_FORMAT, state, asdict(settings)]).encode()).hexdigest(),
    }
    total = None
    if limit is None:
        rules = rules_of(settings, files.column)
        total = sum(part.size for split in files.files for part in files.parts(split, rules, may_cut=True))
    text, counts = _write_splits(contents, incoming, settings, on_progress, total, None if limit else inputs)
    if isinstance(found, Path):
        records = tuple(manifest.record(Path(file), base) for some in files.files.values() for file in some)
    else:
        records = tuple(entry for some in files.records.values() for entry in some)
    counted = counts["empty"], counts["held_out"], counts["broken"]
    return TextOrigin(name, files.location, settings, records, text, *counted)


def rules_of(settings: Settings, column: str | None) -> Rules:
    """How the files of a source become documents."""
    return Rules(settings.document_separator, column, settings.val_fraction, skip_broken=settings.skip_broken)


def _write_stories(
    corpus: Stories, source: str, incoming: Path, settings: Settings, on_progress: OnProgress
) -> TextOrigin:
    def contents(cut: bool, _done: int) -> Iterator[tuple[int, PartText]]:
        rules = Rules(val_fraction=settings.val_fraction, cut=cut)
        for story in islice(corpus.documents(), settings.max_documents):
            yield 0, part_text(documents_of(story), rules, None)

    text, counts = _write_splits(contents, incoming, settings, on_progress, SAMPLE_BYTES)
    return TextOrigin(source, corpus.location, settings, (), text, counts["empty"])


def _write_splits(
    contents: Callable[[bool, int], Iterable[tuple[int, PartText]]],
    incoming: Path,
    settings: Settings,
    on_progress: OnProgress,
    total: int | None,
    inputs: dict[str, Any] | None = None,
) -> tuple[dict[str, tuple[FileRecord, ...]], dict[str, int]]:
    """Writes both splits; returns their files, and how many documents and rows were taken and left out.

    ``contents`` gives what the parts after a number of them hold, each with its part's number. With ``inputs``, which
    say all that the text follows from, a journal is kept, and what an earlier call had written is gone on with.
    """
    begun = _read_journal(incoming)
    for cut in (False, True):
        if inputs and not cut and begun == {**begun, **inputs, "cut": True}:
            continue
        counts = dict.fromkeys(("documents", "size", "empty", "held_out", "broken"), 0)
        done = 0
        try:
            if not inputs or begun != {**begun, **inputs, "cut": cut}:
                raise ValueError("nothing of this was begun")
            records = {split: [FileRecord(**entry) for entry in begun["records"][split]] for split in SPLITS}
            for split in SPLITS:
                if (incoming / split).is_dir() and sum(
                    path.stat().st_size for path in (incoming / split).iterdir()
                ) < begun["open"][split] + sum(entry.bytes for entry in records[split]):
                    raise ValueError("the machine went off before all was on the disk")
            writers = {split: TextWriter(incoming, split, records[split], begun["open"][split]) for split in SPLITS}
            counts, done = begun["counts"], begun["parts"]
            print("Going on where an interrupted call was.")
        except (OSError, ValueError):
            shutil.rmtree(incoming, ignore_errors=True)
            writers = {split: TextWriter(incoming, split) for split in SPLITS}
        noted = time.monotonic() - JOURNAL_SECONDS
        try:
            for number, text in contents(cut, done):
                if inputs and number != done and time.monotonic() - noted >= JOURNAL_SECONDS:
                    for writer in writers.values():
                        writer.flush()
                    written = {split: [asdict(entry) for entry in writer.records] for split, writer in writers.items()}
                    sizes = {split: writer.size for split, writer in writers.items()}
                    state = {"cut": cut, "parts": number, "counts": counts, "records": written, "open": sizes}
                    write_sealed(incoming / JOURNAL, {**inputs, **state})
                    noted = time.monotonic()
                done = number
                counts["empty"] += text.empty
                counts["held_out"] += text.held_out
                counts["broken"] += text.broken
                for piece in text.pieces:
                    counts["size"] += writers[piece.split].write(piece.text, piece.closes)
                    counts["documents"] += piece.closes
                on_progress(counts["documents"], counts["size"], total)
        finally:
            for writer in writers.values():
                writer.close()
        found = {split: tuple(writer.records) for split, writer in writers.items()}
        if settings.val_fraction is None or all(found.values()) or not any(found.values()):
            break
        if not cut:
            shutil.rmtree(incoming)
            print(few_documents(counts["documents"], settings.val_fraction))
    return found, counts


def _read_journal(incoming: Path) -> dict[str, Any]:
    """What an interrupted call had written; empty where there is nothing."""
    try:
        return read_sealed(incoming / JOURNAL)
    except (OSError, ValueError):
        return {}


def few_documents(documents: int, val_fraction: float) -> str:
    """Why the end of each document becomes validation text."""
    return (
        f"{documents} document{'s' if documents != 1 else ''}: too few to split by document, so the last "
        f"{100 * val_fraction:g}% of each becomes validation text."
    )


def _no_text(source: str, split: str, settings: Settings) -> str:
    if split == "val" and settings.val_fraction is not None:
        return (
            f"--source {source}: too little text to take validation text from; give more, a larger --val_fraction, or "
            "a folder with train/ and val/ in it."
        )
    return f"--source {source}: no text for {split} (all documents are empty or left out); expected text in UTF-8."
