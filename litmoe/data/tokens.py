"""Tokenize a corpus unit by unit, and join the tokens to litdata chunks.

One thread reads documents, a pool of threads encodes them, and the reading thread writes the results in order. Threads
are enough, because both encoders release Python's lock. Every unit is written to its own files, its record last.
A restarted call skips the units that have a record, so an interrupted preparation resumes and gives the same bytes.
"""

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from litmoe.checksummed_json import read_json, write_json
from litmoe.data import manifest
from litmoe.data.corpora import Corpus
from litmoe.data.documents import END_OF_TEXT, Batch, Counts, Rules, Unit, UnitEnd, read_unit
from litmoe.data.files import Unfinished
from litmoe.data.manifest import SPLITS
from litmoe.renaming import rename

# The last tokens of a chunk that fill no window are not used, so chunks are long. litdata's own reader shuffles chunks,
# so there are about 16 of them if the corpus is large enough.
MIN_CHUNK_TOKENS = 1 << 20
MAX_CHUNK_TOKENS = 1 << 24
CHUNKS = 16
LITDATA_DTYPES = {"int32": 16, "uint16": 20}  # litdata.constants._TORCH_DTYPES_MAPPING
BLOCK = 1 << 20
# Waits before a unit on the Hub is read again after its connection was lost. huggingface_hub does not repeat a request
# that the server closed.
RETRY_SECONDS = (1.0, 5.0)

PROGRESS_SECONDS = 10
PARTS = (*SPLITS, *(f"{split}.txt" for split in SPLITS))
"""The names of a unit's files."""


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit contains; stored as ``000012.json``."""

    counts: Counts
    sizes: dict[str, int]
    """Bytes of each of its part files: the tokens ``train`` and ``val``, and the text ``train.txt`` and ``val.txt``."""


# --- a corpus ---


def tokenize_corpus(
    corpus: Corpus,
    encode: Callable[[list[str]], bytes],
    folder: Path,
    *,
    inputs: list[str],
    keep_text: bool,
    num_workers: int | None,
) -> tuple["UnitStore", list[UnitRecord]]:
    """Tokenize all units of a corpus.

    If the documents are so few that all of them are in one split, each of them is cut in two instead.

    Args:
        corpus: the text.
        encode: makes the stored tokens of documents.
        folder: where the units are stored.
        inputs: what the tokens depend on, in addition to the corpus.
        keep_text: also store the text of the documents.
        num_workers: threads; None for one for each core.

    Returns:
        The finished units and their records.
    """
    if num_workers is None:
        num_workers = _available_cores()

    def tokenize(cut: bool) -> tuple[UnitStore, list[UnitRecord]]:
        limit = corpus.settings.max_documents
        contents = {split: manifest.contents(records) for split, records in corpus.records.items()}
        rules = replace(corpus.rules, cut=cut)
        # Everything that decides the bytes of a unit: if it changes, units are made again. The number of threads
        # is not among them, because results are written in order.
        values = json.dumps([contents, asdict(rules), limit, keep_text, inputs])
        # Both attempts have a folder, so that a restarted call does not repeat the first one.
        store = UnitStore(folder / ("cut" if cut else "units"), sha256(values.encode()).hexdigest())
        groups = corpus.unit_groups()
        return store, process_units(groups, rules, encode, store, num_workers, limit, keep_text, Progress(corpus))

    store, records = tokenize(cut=False)
    documents = totals_of(records).documents
    if "val" in corpus.files or all(documents.values()) or not any(documents.values()):
        # Of an interrupted call, when the corpus had fewer documents. Only one folder may have results.
        shutil.rmtree(folder / "cut", ignore_errors=True)
        return store, records
    number = sum(documents.values())
    print(
        f"{number} document{'s' if number != 1 else ''}: too few to split by document, so the last "
        f"{100 * corpus.rules.val_fraction:g}% of each becomes validation text."
    )
    return tokenize(cut=True)


def _available_cores() -> int:
    # Of all cores, a container or a batch system may have given this process only some. Not every system can tell.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Progress:
    """Prints a line every ten seconds: what was tokenized, and how long the rest takes."""

    def __init__(self, corpus: Corpus) -> None:
        self._started = self._last = time.perf_counter()
        # How much of the corpus a limited number of documents needs is not known.
        self._total = sum(record.bytes for record in corpus.all_records) if not corpus.settings.max_documents else 0
        self._documents = self._text = 0
        self._finished_units = self._text_of_unit = self._skipped = 0

    def skip(self, unit: Unit) -> None:
        """Count a unit that an earlier call has finished."""
        self._skipped += unit.size

    def add(self, item: Batch | UnitEnd) -> None:
        """Count a batch or a finished unit."""
        if isinstance(item, Batch):
            size = sum(map(len, item.texts))
            self._documents += len(item.texts)
            self._text += size
            self._text_of_unit += size
        else:
            self._finished_units += item.unit.size
            self._text_of_unit = 0
        now = time.perf_counter()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            # A compressed file has more text than bytes.
            done = self._finished_units + min(self._text_of_unit, item.unit.size)
            print(self._line(done, now - self._started), flush=True)

    def _line(self, done: int, seconds: float) -> str:
        line = f"  {self._documents:,} documents, {self._text / 1e6:,.1f} MB of text"
        if not done or not self._total:
            return line
        left = max(self._total - self._skipped - done, 0)
        return f"{line}, {100 * (1 - left / self._total):.0f}%, {seconds * left / done:,.0f} s left"


# --- units ---


class UnitStore:
    """The folder with the finished units of one preparation.

    Args:
        folder: emptied if it holds the units of other inputs.
        inputs: fingerprint of everything that the results depend on.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        self.folder = folder
        marker = folder / "inputs"
        if not marker.is_file() or marker.read_bytes() != inputs.encode():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            marker.write_bytes(inputs.encode())
        elif any(folder.glob("0*.json")):
            print("Resuming an interrupted preparation.")

    def part(self, number: int, name: str) -> Path:
        """Return the path of a part file of a unit (see ``UnitRecord.sizes``)."""
        return self.folder / f"{number:06}.{name}"

    def read(self, number: int) -> UnitRecord | None:
        """Return the record of a finished unit, None if the unit must be processed."""
        for record in self._read_records(f"{number:06}.json"):
            # After a power failure a record may have outlived its data.
            if all(self._size(number, name) == size for name, size in record.sizes.items()):
                return record
        return None

    def _size(self, number: int, name: str) -> int:
        path = self.part(number, name)
        return path.stat().st_size if path.exists() else 0

    def write(self, number: int, counts: Counts) -> UnitRecord:
        """Write the record of a unit after its data."""
        record = UnitRecord(counts, {name: self._size(number, name) for name in PARTS})
        self._write_records(f"{number:06}.json", [record])
        return record

    def finish(self, records: list[UnitRecord]) -> None:
        """Note that all units are finished. From now on their data may be consumed."""
        self._write_records("complete.json", records)

    def finished(self) -> list[UnitRecord]:
        """Return the records of all units, none if some are missing."""
        return self._read_records("complete.json")

    def _write_records(self, name: str, records: list[UnitRecord]) -> None:
        write_json(self.folder / name, [asdict(record) for record in records])

    def _read_records(self, name: str) -> list[UnitRecord]:
        """Return the records in a file, none if it is missing, damaged or of another version."""
        try:
            return [UnitRecord(Counts(**entry["counts"]), entry["sizes"]) for entry in read_json(self.folder / name)]
        except manifest.UNREADABLE:
            return []


def process_units(
    groups: Iterable[Iterable[Unit]],
    rules: Rules,
    encode: Callable[[list[str]], bytes],
    store: UnitStore,
    num_workers: int,
    max_documents: int | None,
    keep_text: bool,
    progress: Progress,
) -> list[UnitRecord]:
    """Read, encode and store the units that are not finished yet.

    Args:
        groups: the units of the corpus, one group for each split with files of its own; validation comes first if its
            documents are dropped from the training text.
        rules: how files become documents.
        encode: makes the stored tokens of documents; runs in the threads.
        store: where the results go.
        num_workers: threads; 0 encodes in the calling thread.
        max_documents: read at most so many documents of each group.
        keep_text: also store the text of the documents.
        progress: counts what was done.

    Returns:
        The records of all units in order.

    Raises:
        UserError: the text cannot be read.
        Unfinished: the connection to the Hub was lost.
    """
    finished = store.finished()
    if finished:
        # Their data may be in chunks already.
        return finished
    # By number: a unit that is read again may end after later units that were finished.
    records: dict[int, UnitRecord] = {}
    items = _unfinished_items(groups, rules, store, max_documents, records, progress)
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        open_parts: dict[str, BinaryIO] = {}
        # A limit on the batches in advance keeps memory constant, however fast the reader is.
        for item, data in _encode_in_order(items, encode, pool if num_workers else None, 2 * num_workers):
            if isinstance(item, Batch):
                parts = {item.split: data}
                if keep_text:
                    parts[f"{item.split}.txt"] = encode_text(item)
                for name, content in parts.items():
                    # Opened at the first document, because a unit may have none for a split.
                    if name not in open_parts:
                        open_parts[name] = open(store.part(item.unit.number, name), "wb")  # noqa: SIM115
                    open_parts[name].write(content)
            else:
                # The record comes after the data, so a unit with a record is complete.
                _close(open_parts)
                records[item.unit.number] = store.write(item.unit.number, item.counts)
            progress.add(item)
    finished = [records[number] for number in sorted(records)]
    store.finish(finished)
    return finished


def _close(parts: dict[str, BinaryIO]) -> None:
    """Close files so that their content survives a crash of the machine."""
    for file in parts.values():
        file.flush()
        os.fsync(file.fileno())
        file.close()
    parts.clear()


def _unfinished_items(
    groups: Iterable[Iterable[Unit]],
    rules: Rules,
    store: UnitStore,
    max_documents: int | None,
    records: dict[int, UnitRecord],
    progress: Progress,
) -> Iterator[Batch | UnitEnd]:
    """Yield the batches and ends of units without a record; add the records of the others to ``records``."""
    val_hashes: set[int] = set()
    for units in groups:
        left = max_documents or inf
        for unit in units:
            record = store.read(unit.number)
            if record is not None:
                counts = record.counts
                val_hashes.update(counts.hashes)
                records[unit.number] = record
                progress.skip(unit)
            else:
                # Part files of an interrupted call are overwritten: the same unit writes the same files.
                for item in _read_with_retries(unit, rules, val_hashes, left):
                    if isinstance(item, UnitEnd):
                        counts = item.counts
                    yield item
            left -= counts.read
            # Stop here: asking for the next unit would open the next file.
            if left == 0:
                break


def _read_with_retries(unit: Unit, rules: Rules, val_hashes: set[int], limit: float) -> Iterator[Batch | UnitEnd]:
    """Read a unit; if the connection to the Hub is lost, read it again and skip what was already given out."""
    given = 0
    for wait in RETRY_SECONDS:
        try:
            # Reading a unit again gives the same batches.
            for item in islice(read_unit(unit, rules, val_hashes, limit), given, None):
                given += 1
                yield item
            return
        except Unfinished:
            time.sleep(wait)
    yield from islice(read_unit(unit, rules, val_hashes, limit), given, None)


def _encode_in_order(
    items: Iterable[Batch | UnitEnd], encode: Callable[[list[str]], bytes], pool: ThreadPoolExecutor | None, ahead: int
) -> Iterator[tuple[Batch | UnitEnd, bytes]]:
    """Yield each item with the encoded bytes of a batch, at most ``ahead`` batches encoded in advance."""
    waiting: deque[tuple[Batch | UnitEnd, Callable[[], bytes]]] = deque()
    for item in items:
        # The end of a unit waits in the same queue, behind its batches.
        waiting.append((item, _start_encoding(item, encode, pool)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result()
    for item, result in waiting:
        yield item, result()


def _start_encoding(
    item: Batch | UnitEnd, encode: Callable[[list[str]], bytes], pool: ThreadPoolExecutor | None
) -> Callable[[], bytes]:
    """Return a function that returns the encoded bytes; without a pool it encodes when it is called."""
    if isinstance(item, UnitEnd):
        return bytes
    if pool is None:
        return partial(encode, item.texts)
    return pool.submit(encode, item.texts).result


def totals_of(records: list[UnitRecord]) -> Counts:
    """Return the sums over all units."""
    totals = Counts()
    for record in records:
        totals.add(record.counts)
    return totals


# --- tokens ---


def dtype_for(vocab_size: int) -> str:
    """Return the smallest type of litdata's token reader that holds these ids."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def write_chunks(store: UnitStore, records: list[UnitRecord], split: str, dtype: str) -> tuple[int, int]:
    """Join the tokens of all units to chunks that litdata's ``TokensLoader`` reads, one item in each chunk.

    The format is written here, since litdata's own writer, which gives the same bytes (held by a test), imports torch:
    2 s of CPU time. A unit is deleted as soon as all of its tokens are in finished chunks, so that the tokens never
    take twice their room.

    Args:
        store: where the units are. The chunks go into its folder; finished chunks of an interrupted call are kept.
        records: of all units.
        split: the split to write.
        dtype: ``uint16`` or ``int32``.

    Returns:
        The number of tokens and of chunks.
    """
    folder = store.folder / split
    folder.mkdir(exist_ok=True)
    item_bytes = np.dtype(dtype).itemsize
    # The sizes come from the records, because used parts are deleted.
    parts = [(store.part(number, split), record.sizes[split]) for number, record in enumerate(records)]
    tokens = sum(size for _, size in parts) // item_bytes
    lengths = _chunk_lengths(tokens)
    start = 0
    for number, length in enumerate(lengths):
        path = folder / f"chunk-0-{number}.bin"
        stop = start + length * item_bytes
        # A chunk under its final name is complete: an interrupted call has written it.
        if not path.exists():
            partial = path.with_suffix(".tmp")
            with open(partial, "wb") as file:
                # The number of items, where the first one begins and where the last one ends.
                file.write(np.array([1, 12, 12 + length * item_bytes], "<u4").tobytes())
                _copy_range(parts, start, stop, file)
                file.flush()
                os.fsync(file.fileno())
            rename(partial, path)
        # Only now, when the chunk is on the disk, can the parts that it was made from go.
        _delete_before(parts, stop)
        start = stop
    _write_index(folder, lengths, dtype)
    return tokens, len(lengths)


def _chunk_lengths(tokens: int) -> list[int]:
    """Return the tokens of each chunk. A short rest is added to the chunk before it."""
    size = min(max(tokens // CHUNKS, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)
    full, rest = divmod(tokens, size)
    lengths = [size] * full
    # A short chunk would lose a larger share of its tokens.
    if full and rest < size // 2:
        lengths[-1] += rest
    elif rest:
        lengths.append(rest)
    return lengths


def _copy_range(parts: list[tuple[Path, int]], start: int, stop: int, target: BinaryIO) -> None:
    """Copy the bytes from ``start`` to ``stop`` of all parts joined."""
    begin = 0
    for path, size in parts:
        end = begin + size
        left = min(stop, end) - max(start, begin)
        if left > 0:
            with open(path, "rb") as source:
                source.seek(max(start - begin, 0))
                # In blocks, so that memory does not depend on the size of a unit.
                while left:
                    block = source.read(min(left, BLOCK))
                    if not block:
                        raise OSError(f"{path} is shorter than its record says")
                    target.write(block)
                    left -= len(block)
        begin = end


def _delete_before(parts: list[tuple[Path, int]], stop: int) -> None:
    """Delete the parts of which every byte comes before ``stop``."""
    end = 0
    for path, size in parts:
        end += size
        if end > stop:
            return
        path.unlink(missing_ok=True)


def _write_index(folder: Path, lengths: list[int], dtype: str) -> None:
    # litdata's writer stores these keys too, without a value. A test compares the bytes.
    unused = ("chunk_bytes", "compression", "compression_batch_size", "compression_level", "encryption")
    config: dict[str, Any] = dict.fromkeys((*unused, "ipc_compression"))
    config |= {
        "chunk_size": 1,
        "data_format": [f"no_header_tensor:{LITDATA_DTYPES[dtype]}"],
        "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',  # a single tensor
        "item_loader": "TokensLoader",
        "types": "tensor",
    }
    item_bytes = np.dtype(dtype).itemsize
    chunks = [
        # 12 bytes: the three numbers at the beginning of a chunk.
        {"chunk_bytes": 12 + length * item_bytes, "chunk_size": 1, "dim": length, "filename": f"chunk-0-{number}.bin"}
        for number, length in enumerate(lengths)
    ]
    index = json.dumps({"chunks": chunks, "config": config}, sort_keys=True)
    (folder / "index.json").write_text(index, encoding="utf-8")


# --- text ---


def encode_text(batch: Batch) -> bytes:
    """Make the stored text of a batch: UTF-8, every document followed by a line ``<|endoftext|>``."""
    return "".join(f"{text}\n{END_OF_TEXT}\n" for text in batch.texts).encode()


def move_text(store: UnitStore, records: list[UnitRecord]) -> None:
    """Move the text of each unit to text/train/train-00000.txt and so on, also after an interrupted call."""
    # In the folder of the units, so that it is removed with them if the inputs change.
    folder = store.folder / "text"
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
        units = [number for number, record in enumerate(records) if record.sizes[f"{split}.txt"]]
        for file_number, number in enumerate(units):
            part = store.part(number, f"{split}.txt")
            # A part that an interrupted call has moved is gone from here.
            if part.exists():
                rename(part, folder / split / f"{split}-{file_number:05}.txt")
