"""Prepare a data folder: text to tokens, with a manifest that says what the tokens were made from.

``prepare`` runs these steps in order. Each step compares its inputs with what the folder contains, and is skipped if
nothing changed. Flags are never taken over from an earlier call.

1. Find the corpus: built in, on the Hub, the user's own files, or text in place in DATA_DIR/train and DATA_DIR/val.
2. Write its text to DATA_DIR/train and DATA_DIR/val, unless it is streamed or in place already.
3. Get the tokenizer: from the Hub, a folder, or trained on the text.
4. Tokenize the text to DATA_DIR/tokens, and write the manifest last.

Everything is built in hidden folders and moved into place at the end. A killed call leaves nothing that looks complete,
and the same command resumes it.
"""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from litmoe.checksummed_json import write_json
from litmoe.cli import UserError
from litmoe.data import corpora, manifest, tokenizers, tokens
from litmoe.data.choose_tokenizer import (
    load_tokenizer,
    proof_documents,
    tokenizer_to_install,
    train_origin,
    train_tokenizer,
)
from litmoe.data.corpora import Corpus, HubDataset
from litmoe.data.data_dir import (
    BUILDING,
    INCOMING,
    DataDir,
    read_stream,
    reasons_to_read_source,
    settings_of,
    stale_splits,
)
from litmoe.data.documents import END_OF_TEXT, SPLITS
from litmoe.data.files import Unfinished, text_files, unread_files, visible_files
from litmoe.data.manifest import Manifest, Settings, Source, Split, TextOrigin, TokenizerRecord
from litmoe.data.prepare_args import PrepareArgs
from litmoe.data.tokenizers import TokenizerFiles, TokenizerInfo

LOCK = ".prepare.lock"
PACKAGES = ("litdata", "tokenizers", "tiktoken", "datasets", "pyarrow")


def prepare(args: PrepareArgs) -> Manifest:
    """Make ``data_dir`` contain the complete tokens of the text, and ``tokenizer_dir`` the tokenizer.

    Does nothing if they are up to date. Several processes may call it for the same folder: one of them builds, and the
    others wait.

    Returns:
        The manifest of the tokens.

    Raises:
        UserError: the text, the tokenizer or the flags have a mistake. Nothing is written or lost then.
    """
    args.check()
    unfinished = (args.data_dir / INCOMING, manifest.tokens_dir(args.data_dir) / BUILDING)
    found = None
    if not any(folder.exists() for folder in unfinished):
        # Without the lock, so that a read-only folder can be used. If another process is writing, ask again below.
        with suppress(UserError, OSError):
            found = _if_up_to_date(args, DataDir.read(args.data_dir))
    if found is None:
        with locked(args.data_dir):
            _publish_text(args.data_dir)
            _publish_tokens(args.data_dir, args.tokenizer_dir)
            data = DataDir.read(args.data_dir)
            found = _if_up_to_date(args, data)
            try:
                found = found or _build(args, data)
            except KeyboardInterrupt:
                print("\nStopped. Finished parts are kept; run the same command again to resume.")
                raise
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
    if args.log_to_wandb or os.environ.get("WANDB_LOG_DATASET") == "1":
        _log_to_wandb(args)
    return found


def _if_up_to_date(args: PrepareArgs, data: DataDir) -> Manifest | None:
    """Return the manifest if nothing must be done, and print that."""
    found = data.manifest
    if found is None or args.overwrite or tokenizer_to_install(args, data.training_text) is not None:
        return None
    fingerprint = manifest.tokenizer_fingerprint(args.tokenizer_dir)
    if reasons_to_read_source(args, data, fingerprint) is not None:
        return None
    corpus = data.corpus(args)
    if corpus is None:
        is_stale = found.tokenizer.sha256 != fingerprint
    else:
        is_stale = any(stale_splits(corpus, found, fingerprint).values())
    if is_stale:
        return None
    print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
    print(_summary(found))
    return found


# --- building ---


def _build(args: PrepareArgs, data: DataDir) -> Manifest:
    """Build everything that is missing or out of date, then move it into place."""
    started = time.perf_counter()
    # The tokenizer comes first: it may not be available, and reading the text may take long.
    name = tokenizer_to_install(args, data.training_text)
    files = load_tokenizer(args, name)
    existing = manifest.tokenizer_fingerprint(args.tokenizer_dir) if name is None else None
    reasons = reasons_to_read_source(args, data, files.sha256 if files else existing)
    try:
        corpus = data.corpus(args)
        if reasons is not None:
            corpus, data = _read_source(args, data, reasons)
        if corpus is None:
            return _bring_back_tokenizer(args, data, name, files)
        found = _tokenize(args, data, corpus, name, files)
    except Unfinished:
        raise
    except UserError:
        # The same mistake would stop the next call too, so there is nothing to resume.
        shutil.rmtree(manifest.tokens_dir(args.data_dir) / BUILDING, ignore_errors=True)
        shutil.rmtree(args.data_dir / INCOMING, ignore_errors=True)
        raise
    print(_summary(found))
    print(f"Prepared in {time.perf_counter() - started:.1f} s. The tokens can be used with any context length.")
    return found


def _read_source(args: PrepareArgs, data: DataDir, changes: list[str]) -> tuple[Corpus, DataDir]:
    """Open the source as a stream, or write its text to the data folder.

    Returns:
        The corpus to tokenize, and the data folder with the text.
    """
    source = args.source or corpora.DEFAULT
    settings = settings_of(args, source)
    _refuse_foreign_files(data)
    again = f" again ({'; '.join(changes)})" if changes else ""
    if corpora.is_hub(source):
        print(f"Streaming {source}{again}")
        corpus = _open_stream(args, source, settings)
        # Text that was kept earlier is written again, so that it stays the text of these tokens.
        has_text = data.origin is not None and bool(data.text) and not args.overwrite
        if not args.keep_text and not has_text:
            return corpus, data
    else:
        print(f"Writing the text of {source} to {args.data_dir}{again}")
        corpus = corpora.open_local(source, settings)
        if Path(source).is_dir():
            print(corpora.sort_files(Path(source)).report(Path(source)))
    _write_text(args, corpus)
    data = DataDir.read(args.data_dir)
    in_place = data.corpus(args)
    assert in_place is not None, "the text was just written"
    return in_place, data


def _open_stream(args: PrepareArgs, source: str, settings: Settings) -> Corpus:
    """Open a Hub corpus. An interrupted call is resumed with the same revision of the dataset."""
    dataset = corpora.find(source)
    assert isinstance(dataset, HubDataset), "the caller has checked the kind of the source"
    interrupted = read_stream(args.data_dir)
    revision = interrupted.get("revision") if interrupted.get("source") == source else None
    corpus = dataset.open(settings, revision)
    building = manifest.tokens_dir(args.data_dir) / BUILDING
    building.mkdir(parents=True, exist_ok=True)
    write_json(building / "stream.json", {"source": source, "revision": corpus.revision})
    return corpus


def _refuse_foreign_files(data: DataDir) -> None:
    """Raise ``UserError`` if new text would replace files that this project did not read or write."""
    known = {data.path / record.path for records in data.text.values() for record in records}
    foreign = [path for split in SPLITS for path in visible_files(data.path / split) if path not in known]
    if data.origin is None and (data.path / "source.json").exists():
        foreign.append(data.path / "source.json")
    if foreign:
        names = ", ".join(path.relative_to(data.path).as_posix() for path in foreign[:3])
        raise UserError(
            f"{data.path} contains files that are not this project's ({names}), in the place of the text; choose "
            "another --data_dir, or move them away."
        )


def _write_text(args: PrepareArgs, corpus: Corpus) -> None:
    """Write the documents of a corpus to DATA_DIR/train and DATA_DIR/val."""
    incoming = args.data_dir / INCOMING
    rules = replace(corpus.rules, divide_long=False)
    store, records = tokens.process_corpus(
        corpus, list(SPLITS), rules, tokens.encode_text, incoming, inputs=["text"], num_workers=args.num_workers
    )
    totals = tokens.totals_of(records)
    for split in SPLITS:
        if not totals.documents[split]:
            raise UserError(_no_text(corpus, split))
        tokens.write_shards(store, records, split, incoming / split)
    text = {split: manifest.refresh(text_files(incoming / split), incoming, ()) for split in SPLITS}
    source_files = tuple(record for split in corpus.files for record in corpus.records[split])
    counts = totals.empty_documents, totals.dropped_duplicates, totals.broken_rows
    origin = TextOrigin(corpus.name, corpus.location, corpus.settings, source_files, text, *counts)
    manifest.write_origin(incoming, origin)  # last: from here on the text counts as complete
    _publish_text(args.data_dir)


def _no_text(corpus: Corpus, split: str) -> str:
    source = corpus.location if corpus.name == "files" else corpus.name
    if split == "val" and "val" not in corpus.files:
        return f"{source}: too little text to take validation text from; give more, or a larger --val_fraction."
    return f"{source}: no text for {split}; every document is empty or left out."


def _publish_text(data_dir: Path) -> None:
    """Move text that was written completely into place; also finishes this for a killed call."""
    incoming = data_dir / INCOMING
    if not (incoming / "source.json").is_file():
        return
    # The manifest is deleted first, so that tokens of another text never look complete.
    manifest.manifest_path(data_dir).unlink(missing_ok=True)
    for split in SPLITS:
        if (incoming / split).is_dir():
            manifest.replace_folder(incoming / split, data_dir / split)
    os.replace(incoming / "source.json", data_dir / "source.json")
    shutil.rmtree(incoming)


def _bring_back_tokenizer(args: PrepareArgs, data: DataDir, name: str | None, files: TokenizerFiles | None) -> Manifest:
    """Install the tokenizer of tokens without text.

    Raises:
        UserError: the tokens need another tokenizer, and there is no text to make them again.
    """
    found = data.manifest
    assert found is not None, "without text and tokens a source is read"
    if name == "train":
        raise UserError(f"there is no text in {data.path} to train a tokenizer on; name a --source.")
    fingerprint = files.sha256 if files else manifest.tokenizer_fingerprint(args.tokenizer_dir)
    if fingerprint != found.tokenizer.sha256:
        raise UserError(
            f"the tokens of {data.path} were made with another tokenizer ({found.tokenizer.name}), and its text is not "
            "there. Bring back the text or that tokenizer (--tokenizer), or name a --source."
        )
    if files is not None:
        tokenizers.install(files, {"name": _shown_name(str(name))}, args.tokenizer_dir)
        found = replace(found, tokenizer=_tokenizer_record(tokenizers.load(args.tokenizer_dir)))
        manifest.write(args.data_dir, found)
    return found


def _shown_name(tokenizer: str) -> str:
    """Return the name of a tokenizer without the path of its folder: manifests are shared."""
    return Path(tokenizer).resolve().name if Path(tokenizer).is_dir() else tokenizer


def _tokenizer_record(info: TokenizerInfo) -> TokenizerRecord:
    return TokenizerRecord(info.name, info.sha256, info.vocab_size, info.eos_token, info.eos_id)


def _tokenize(
    args: PrepareArgs, data: DataDir, corpus: Corpus, name: str | None, files: TokenizerFiles | None
) -> Manifest:
    """Make the tokens of a corpus with the right tokenizer, and move both into place."""
    building = manifest.tokens_dir(args.data_dir) / BUILDING
    info = _prepare_tokenizer(args, corpus, building / "tokenizer", name, files)
    is_in_place = corpus.name == "text" or corpus.written_here
    if args.overwrite:
        stale = {split: ["--overwrite"] for split in SPLITS}
    elif is_in_place:
        stale = stale_splits(corpus, data.manifest, info.sha256)
    else:
        stale = {split: ["from the Hub"] for split in SPLITS}
    if is_in_place:
        _report_unread(args.data_dir, corpus)
    splits = _make_splits(args, corpus, info, {split: why for split, why in stale.items() if why}, building)
    for split in SPLITS:
        if split not in splits:
            assert data.manifest is not None, "without a manifest both splits are stale"
            splits[split] = replace(data.manifest.splits[split], text=corpus.records_of(split))
    found = Manifest(
        format=manifest.FORMAT,
        source=_source_of(corpus, data.origin),
        tokenizer=_tokenizer_record(info),
        settings=corpus.settings,
        splits={split: splits[split] for split in SPLITS},
        versions={"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    )
    # From here on the tokens count as complete: a killed call is finished by the next one.
    manifest.write_file(building / "manifest.json", found)
    _publish_tokens(args.data_dir, args.tokenizer_dir)
    return found


def _prepare_tokenizer(
    args: PrepareArgs, corpus: Corpus, folder: Path, name: str | None, files: TokenizerFiles | None
) -> TokenizerInfo:
    """Return the tokenizer for the corpus: the existing one, or a new one in ``folder``."""
    origin = {"name": _shown_name(str(name))}
    if args.tokenizer == "train" and files is None:
        # Decided only now, because the text may have been written again.
        origin = train_origin(args, corpus.records["train"])
        if args.overwrite or tokenizers.origin(args.tokenizer_dir) != origin:
            files = train_tokenizer(corpus, folder, origin)
    if files is None:
        info = tokenizers.load(args.tokenizer_dir)
    else:
        tokenizers.install(files, origin, folder)
        info = tokenizers.load(folder)
    _describe_tokenizer(args, info, files)
    return info


def _describe_tokenizer(args: PrepareArgs, info: TokenizerInfo, files: TokenizerFiles | None) -> None:
    begins = f"begins with {info.bos_token!r}, id {info.bos_id}, and " if info.bos_token else ""
    inferred = " (the tokenizer does not name it, but no other token is possible)" if files and files.inferred else ""
    print(
        f"Tokenizer in {args.tokenizer_dir} ({info.name}): {info.vocab_size:,} tokens, so a model needs a "
        f"padded_vocab_size of that or more. Each document {begins}ends with {info.eos_token!r}, id {info.eos_id}"
        f"{inferred}."
    )


def _report_unread(data_dir: Path, corpus: Corpus) -> None:
    for split in corpus.files:
        unread = unread_files(data_dir / split)
        if unread:
            print(f"{data_dir / split}: {corpora.not_read(data_dir / split, unread)}")


def _source_of(corpus: Corpus, origin: TextOrigin | None) -> Source:
    """Return the manifest's entry about the source."""
    fingerprint = manifest.text_fingerprint(record for records in corpus.records.values() for record in records)
    # Without the path of the user's files: manifests are shared.
    location = Path(corpus.location).name if corpus.name == "files" else corpus.location
    counts = (0, 0, 0)
    if corpus.written_here and origin is not None:
        counts = origin.empty_documents, origin.dropped_duplicates, origin.broken_rows
    return Source(corpus.name, location or None, fingerprint, *counts)


def _make_splits(
    args: PrepareArgs, corpus: Corpus, info: TokenizerInfo, stale: dict[str, list[str]], building: Path
) -> dict[str, Split]:
    """Tokenize the splits with reasons to do so, into folders below ``building``."""
    if not stale:
        return {}
    for split, reasons in stale.items():
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        print(f"Tokenizing {split}: {'; '.join(reasons[:3])}{more}")
    tokenizer_json = info.folder / "tokenizer.json"
    rules = replace(corpus.rules, divide_long=tokenizers.divides_between_words(tokenizer_json))
    fast = tokenizers.agrees_with_tiktoken(tokenizer_json, proof_documents(corpus, rules))
    encoder = tokenizers.Encoder(tokenizer_json, info.eos_id, info.bos_id, fast=fast)
    dtype = tokens.dtype_for(info.vocab_size)
    encode = tokens.TokenEncoder(encoder, dtype, info.bos_id, info.eos_id)
    store, records = tokens.process_corpus(
        corpus, list(stale), rules, encode, building, inputs=[info.sha256], num_workers=args.num_workers
    )
    totals = tokens.totals_of(records)
    if totals.eot_in_text:
        print(f"{totals.eot_in_text:,} times {END_OF_TEXT} inside a line: taken as text, not as the end of a document.")
    splits = {}
    for split in stale:
        if not totals.documents[split]:
            raise UserError(_no_text(corpus, split))
        number, chunks = tokens.write_chunks(store, records, split, dtype)
        is_first = split == next(iter(stale))
        splits[split] = Split(
            documents=totals.documents[split],
            tokens=number,
            bytes=totals.bytes[split],
            # These were counted for all splits together.
            empty_documents=totals.empty_documents if is_first else 0,
            dropped_duplicates=totals.dropped_duplicates if is_first else 0,
            broken_rows=totals.broken_rows if is_first else 0,
            chunks=chunks,
            dtype=dtype,
            text=corpus.records_of(split),
            files=manifest.checksums(store.folder / split),
        )
    return splits


def _publish_tokens(data_dir: Path, tokenizer_dir: Path) -> None:
    """Move complete tokens and their tokenizer into place; also finishes this for a killed call."""
    folder = manifest.tokens_dir(data_dir)
    building = folder / BUILDING
    found = manifest.read_file(building / "manifest.json")
    if found is None:
        return
    # From here to the new manifest nothing counts as complete.
    manifest.manifest_path(data_dir).unlink(missing_ok=True)
    if (building / "tokenizer" / "tokenizer.json").is_file():
        files = tokenizers.from_folder(building / "tokenizer")
        tokenizers.install(files, tokenizers.origin(building / "tokenizer"), tokenizer_dir)
    # A manifest with streamed tokens means that no text belongs to them.
    if corpora.is_hub(found.source.name):
        _remove_text(data_dir, found)
    for split in SPLITS:
        # The chunks are in the folder of the units, "units" or "cut".
        for chunks in building.glob(f"*/{split}"):
            manifest.replace_folder(chunks, folder / split)
    os.replace(building / "manifest.json", manifest.manifest_path(data_dir))
    shutil.rmtree(building)


def _remove_text(data_dir: Path, found: Manifest) -> None:
    """Remove the text of another corpus, which the streamed tokens replace."""
    if any((data_dir / record.path).exists() for split in found.splits.values() for record in split.text):
        return  # the text of these tokens
    for name in ("val", "train", "source.json"):
        path = data_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _summary(found: Manifest) -> str:
    lines = [f"{'':6} {'documents':>12} {'tokens':>15} {'text':>12}"]
    for name, split in found.splits.items():
        lines.append(f"{name:6} {split.documents:>12,} {split.tokens:>15,} {split.bytes / 1e6:>9,.2f} MB")
    counted: list[Source | Split] = [found.source, *found.splits.values()]
    empty = sum(entry.empty_documents for entry in counted)
    dropped = sum(entry.dropped_duplicates for entry in counted)
    broken = sum(entry.broken_rows for entry in counted)
    if empty:
        lines.append(f"{empty:,} empty documents left out.")
    if dropped:
        lines.append(f"{dropped:,} training documents left out that also occur in the validation text.")
    if broken:
        lines.append(f"{broken:,} rows left out that could not be read (--skip_broken).")
    return "\n".join(lines)


def _log_to_wandb(args: PrepareArgs) -> None:
    # In a run on several devices every process prepares.
    if int(os.environ.get("RANK", 0)) > 0:
        return
    from litmoe.data import artifacts

    artifacts.log_dataset(
        args.data_dir,
        tokenizer_dir=args.tokenizer_dir,
        name=args.wandb_artifact,
        project=args.wandb_project,
        entity=args.wandb_entity,
    )


# --- one process at a time ---


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Lock a folder that is being prepared. Folders that the call made and left empty are removed afterwards."""
    from filelock import FileLock, Timeout

    parents = (data_dir, *data_dir.parents)
    made = [folder for folder in parents if not folder.exists()]
    for folder in parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--data_dir {data_dir}: {folder} is a file; expected a folder.")
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {data_dir}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        # After an error nothing is left of folders that did not exist before.
        with suppress(OSError):  # not empty
            (data_dir / "tokens").rmdir()
        is_unused = [entry.name for entry in data_dir.iterdir()] == [LOCK]
        # Windows can't delete an open file, and POSIX must delete it before another process locks it.
        if is_unused and os.name != "nt":
            (data_dir / LOCK).unlink()
        lock.release()
        with suppress(OSError):
            if is_unused and os.name == "nt":
                (data_dir / LOCK).unlink()
            for folder in made:
                folder.rmdir()
