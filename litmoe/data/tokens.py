"""Text to token folders: worker processes encode parts of the text, this process writes litdata's chunks in order.

What is written stays when the work ends half-way: a journal says how far it is good, and the next call goes on there.
"""

import json
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from litmoe.checksummed_json import read_sealed, write_sealed
from litmoe.cli import UserError
from litmoe.data.documents import Part, PartText, Piece, Rules, first_documents, read
from litmoe.data.files import Unfinished
from litmoe.data.tokenizers import Encoder

# A chunk's last tokens that fill no window are lost, so chunks are long; and there are about 16 of them where the text
# allows it, as litdata's own reader shuffles chunks before windows.
MIN_CHUNK_TOKENS = 1 << 20
MAX_CHUNK_TOKENS = 1 << 24
CHUNKS = 16
BYTES_PER_TOKEN = 4  # of English under a common vocabulary: for the size of chunks alone
LITDATA_DTYPES = {"int32": 16, "uint16": 20}  # litdata.constants._TORCH_DTYPES_MAPPING
SERIAL_PARTS = 3  # so little text is encoded sooner than processes start
WAITING_BYTES = 64 << 20  # of text on its way through the processes, beyond what keeps each at work
JOURNAL_SECONDS = 1.0
BLOCK = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    tokenizer_json: Path
    fast: bool
    """Through tiktoken."""
    eos_id: int
    """Ends each document."""
    bos_id: int | None
    """Begins each document; None for a tokenizer whose texts begin without such a token."""
    dtype: str
    rules: Rules
    held_out: Path | None = None
    """File of the validation documents' hashes: these documents are left out of the training text."""


@dataclass
class Counts:
    """What a split came to."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty_documents: int = 0
    marks: int = 0
    held_out: int = 0
    chunks: int = 0
    broken_rows: int = 0


class Encoded(NamedTuple):
    """A part's tokens and counts for each split."""

    tokens: dict[str, list[np.ndarray]]  # each (n,) of the job's dtype
    documents: dict[str, int]
    bytes: dict[str, int]
    hashes: np.ndarray  # (documents,) uint64, of a part that is validation text
    empty: int
    marks: int
    held_out: int
    broken: int = 0


class HeldOut:
    """The hashes of a validation text's documents: 8 bytes each, so that there may be millions."""

    def __init__(self, path: Path) -> None:
        self._sorted = np.sort(np.fromfile(path, "<u8"))

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, document: object) -> bool:
        assert isinstance(document, int)
        wanted = np.uint64(document)
        at = np.searchsorted(self._sorted, wanted)
        return bool(at < len(self._sorted) and self._sorted[at] == wanted)


class PartEncoder:
    """Turns parts into tokens, one after the other."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._encoder = Encoder(job.tokenizer_json, job.fast)
        self._held_out = HeldOut(job.held_out) if job.held_out else ()

    def __call__(self, part: Part, limit: int | None = None) -> Encoded:
        """Reads and encodes a part, or its first ``limit`` documents; with the ids that begin and end each."""
        tokens: dict[str, list[np.ndarray]] = {}
        documents: dict[str, int] = {}
        size: dict[str, int] = {}
        hashes: list[int] = []
        empty = marks = held_out = broken = 0
        texts: Iterable[PartText] = read(part, self.job.rules, self._held_out)
        for text in texts if limit is None else first_documents(texts, limit):
            ids: dict[str, list[int]] = {}
            encoded = self._encoder([piece.text for piece in text.pieces])
            for piece, piece_ids in zip(text.pieces, encoded, strict=True):
                found = ids.setdefault(piece.split, [])
                if piece.opens and self.job.bos_id is not None:
                    found.append(self.job.bos_id)
                found += piece_ids
                if piece.closes:
                    found.append(self.job.eos_id)
                documents[piece.split] = documents.get(piece.split, 0) + piece.closes
                size[piece.split] = size.get(piece.split, 0) + _utf8_size(piece)
            for split, found in ids.items():
                tokens.setdefault(split, []).append(np.array(found, dtype=self.job.dtype))
            hashes += text.hashes
            empty, marks, held_out = empty + text.empty, marks + text.marks, held_out + text.held_out
            broken += text.broken
        return Encoded(tokens, documents, size, np.array(hashes, "<u8"), empty, marks, held_out, broken)


def _utf8_size(piece: Piece) -> int:
    return len(piece.text) if piece.text.isascii() else len(piece.text.encode())


def encode(parts: Iterable[Part], job: Job, num_workers: int) -> Generator[tuple[Part, Encoded]]:
    """Encodes parts in their order, by ``num_workers`` processes (0: in this one); memory does not grow with the text.

    Raises:
        UserError: for text that cannot be read, or when a worker was killed.
    """
    parts = iter(parts)
    first = list(islice(parts, SERIAL_PARTS + 1))
    todo = chain(first, parts)
    if num_workers == 0 or len(first) <= SERIAL_PARTS:
        encode_part = PartEncoder(job)
        yield from ((part, _encode_named(encode_part, part)) for part in todo)
        return
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (job,))
    waiting: deque[tuple[Part, Future[Encoded]]] = deque()
    size = 0

    def fill() -> None:
        nonlocal size
        while len(waiting) < 2 * num_workers or (len(waiting) < 4 * num_workers and size < WAITING_BYTES):
            part = next(todo, None)
            if part is None:
                return
            waiting.append((part, pool.submit(_encode_in_worker, part)))
            size += part.size

    try:
        with _quiet_start():
            fill()  # starts all processes
        while waiting:
            part, future = waiting.popleft()
            encoded = future.result()
            size -= part.size
            del future  # it would keep the tokens
            yield part, encoded
            del encoded
            fill()
    except BrokenProcessPool:
        raise Unfinished(
            "a tokenizing process was killed, most likely for want of memory; run the same command with fewer of them "
            f"(--num_workers {max(1, num_workers // 2)}): it goes on where this one was."
        ) from None
    except BaseException:
        # Not to wait for what nobody wants any more; the end of a process ends the pool.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_encode_part: PartEncoder


def _start_worker(job: Job) -> None:
    global _encode_part
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encode_part = PartEncoder(job)


def _encode_in_worker(part: Part) -> Encoded:
    return _encode_named(_encode_part, part)


def _encode_named(encode_part: PartEncoder, part: Part) -> Encoded:
    """Encodes a part; an error that is not the user's says which one it was."""
    try:
        return encode_part(part)
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"While encoding {part.path}, {part.start:,} to {part.stop:,}.")
        raise


def _end_with_parent() -> None:
    """Ends this process when the one that started it was killed: nobody else would."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _quiet_start() -> Iterator[None]:
    """While processes start, hides the running script from them and Ctrl-C.

    They would import the script again: with torch and all else that it imports, and to no end but errors where it has
    no ``if __name__ == "__main__"``. Ctrl-C goes to all processes of a terminal; one that is still importing would
    answer with a traceback. That it is ignored is inherited.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    can_ignore = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if can_ignore else None
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


# --- chunks ---


class ChunkWriter:
    """Writes a split's tokens as litdata chunks for ``TokensLoader``, one item a chunk.

    The format is written here since ``litdata.streaming.writer.BinaryWriter``, which gives the same bytes (held by a
    test), brings torch with it: 4 s of import on 2 cores, more than tokenizing 20 MB takes.

    Args:
        folder: made if it is not there.
        text_bytes: how much text there is, about: the chunks' size follows from it, and from nothing else.
        dtype: ``uint16`` or ``int32``.
        length: tokens that a writer before this one wrote into the folder; what it wrote beyond them is cut off.

    Raises:
        ValueError: where the folder holds fewer tokens than that.
    """

    def __init__(self, folder: Path, text_bytes: int, dtype: str, length: int = 0) -> None:
        tokens = text_bytes // (BYTES_PER_TOKEN * CHUNKS)
        self.chunk_tokens = min(max(tokens, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)
        self.length = length
        self.chunks: list[dict[str, Any]] = []
        """As the index has them, once it is written."""
        self._folder, self._dtype = folder, np.dtype(dtype).newbyteorder("<")
        self._open: BinaryIO | None = None
        folder.mkdir(parents=True, exist_ok=True)
        number, rest = divmod(length, self.chunk_tokens)
        if rest and number and not self._path(number).exists():  # close() had put it to the end of the one before
            beside = self._path(number).with_suffix(".tmp")
            with open(self._path(number - 1), "rb") as file:
                file.seek(self._size(self.chunk_tokens))
                beside.write_bytes(self._header(self.chunk_tokens) + file.read())
            os.replace(beside, self._path(number))
        left = {self._path(i): self.chunk_tokens for i in range(number)} | ({self._path(number): rest} if rest else {})
        for path, tokens in left.items():
            if not path.exists() or path.stat().st_size < self._size(tokens):
                raise ValueError(f"{path} is shorter than {tokens} tokens")
            os.truncate(path, self._size(tokens))
        for path in set(folder.iterdir()) - set(left):
            path.unlink()

    def append(self, tokens: np.ndarray) -> None:
        """Writes the next tokens, ``(n,)``."""
        while len(tokens):
            number, at = divmod(self.length, self.chunk_tokens)
            if self._open is None:
                self._open = open(self._path(number), "ab")  # noqa: SIM115
                if at == 0:
                    self._open.write(self._header(self.chunk_tokens))
            some = tokens[: self.chunk_tokens - at]
            self._open.write(some.astype(self._dtype, copy=False).tobytes())
            self.length += len(some)
            tokens = tokens[len(some) :]
            if at + len(some) == self.chunk_tokens:
                self.flush()
                self.abandon()

    def flush(self) -> None:
        """Sees to it that all that was appended outlives this process and the machine's power."""
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())

    def abandon(self) -> None:
        """Closes the open file, whatever it holds."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def close(self) -> None:
        """Ends the last chunk and writes the index."""
        self.flush()
        self.abandon()
        number, rest = divmod(self.length, self.chunk_tokens)
        dims = [self.chunk_tokens] * number + ([rest] if rest else [])
        scrap = None
        if number and 0 < rest < self.chunk_tokens // 2:
            # The last chunk is never a scrap: it goes to the end of the one before.
            scrap, dims = self._path(number), [*dims[:-2], dims[-2] + rest]
            with open(scrap, "rb") as source, open(self._path(number - 1), "ab") as target:
                source.seek(self._size(0))
                while block := source.read(BLOCK):
                    target.write(block)
        if dims:
            with open(self._path(len(dims) - 1), "r+b") as file:
                file.write(self._header(dims[-1]))
            self._write_index(dims)
        if scrap:
            scrap.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"chunk-0-{number}.bin"

    def _size(self, tokens: int) -> int:
        return 12 + tokens * self._dtype.itemsize

    def _header(self, tokens: int) -> bytes:
        return np.array(
            [1, 12, self._size(tokens)], "<u4"
        ).tobytes()  # items, where they begin, where the last one ends

    def _write_index(self, dims: list[int]) -> None:
        unused = ("chunk_bytes", "compression", "compression_batch_size", "compression_level", "encryption")
        config = dict.fromkeys((*unused, "ipc_compression")) | {
            "chunk_size": 1,
            "data_format": [f"no_header_tensor:{LITDATA_DTYPES[self._dtype.name]}"],
            "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',  # a lone tensor
            "item_loader": "TokensLoader",
            "types": "tensor",
        }
        self.chunks = [
            {"chunk_bytes": self._size(dim), "chunk_size": 1, "dim": dim, "filename": self._path(i).name}
            for i, dim in enumerate(dims)
        ]
        index = json.dumps({"chunks": self.chunks, "config": config}, sort_keys=True)
        (self._folder / "index.json").write_text(index, encoding="utf-8")


def build(
    parts: Iterable[Part],
    sizes: dict[str, int],
    job: Job,
    folders: dict[str, Path],
    num_workers: int,
    on_progress: Callable[[int, int, int], None],
    *,
    max_documents: int | None = None,
    hashes: Path | None = None,
) -> dict[str, Counts]:
    """Encodes parts into one token folder for each split, or goes on where an earlier call for the same was.

    The folders come out the same however often the work was interrupted, and by however many processes it was done.
    How far it is stands beside them, in ``train-val.json`` or however the splits are called.

    Args:
        parts: all of the text.
        sizes: for each split the bytes of text that it is taken from, about; the length of its chunks follows from it.
        job: how.
        folders: split to folder, new or left by the earlier call.
        num_workers: processes; 0 encodes in this one.
        on_progress: called with the documents, tokens and bytes of text so far.
        max_documents: no more are taken, and no more read.
        hashes: file for the hashes of the documents, for ``Job.held_out``.

    Returns:
        What was counted for each split.
    """
    first = next(iter(folders))
    journal = folders[first].with_name(f"{'-'.join(folders)}.json")
    done, seen, counts, complete = _read_journal(journal, list(folders))
    lost = hashes is not None and done and (not hashes.exists() or hashes.stat().st_size < 8 * counts[first].documents)
    if complete and not lost:
        return counts

    def open_writers() -> dict[str, ChunkWriter]:
        return {s: ChunkWriter(folder, sizes[s], job.dtype, counts[s].tokens) for s, folder in folders.items()}

    try:
        if lost:
            raise ValueError("hashes were lost")
        writers = open_writers()
    except (FileNotFoundError, ValueError):  # the machine went off before all was on the disk
        done, seen, counts = 0, 0, {split: Counts() for split in folders}
        writers = open_writers()
    documents, tokens_seen = (sum(getattr(c, name) for c in counts.values()) for name in ("documents", "tokens"))
    if hashes:
        hashes.touch()
        os.truncate(hashes, 8 * documents)

    def note(complete: bool = False) -> None:
        for writer in writers.values():
            writer.flush()
        if hashes:
            with open(hashes, "ab") as file:
                os.fsync(file.fileno())
        values = {split: asdict(count) for split, count in counts.items()}
        write_sealed(journal, {"parts": done, "bytes": seen, "counts": values, "complete": complete})

    noted = -JOURNAL_SECONDS
    left = None if max_documents is None else max_documents - documents
    try:
        with closing(encode(islice(parts, done, None), job, num_workers)) as encoded_parts:
            for part, encoded in encoded_parts if left != 0 else ():
                if left is not None and sum(encoded.documents.values()) > left:
                    encoded = PartEncoder(job)(part, left)
                counts[part.split or first].empty_documents += encoded.empty
                counts[part.split or first].marks += encoded.marks
                counts[part.split or first].held_out += encoded.held_out
                counts[part.split or first].broken_rows += encoded.broken
                for split, arrays in encoded.tokens.items():
                    for tokens in arrays:
                        writers[split].append(tokens)
                        counts[split].tokens += len(tokens)
                        tokens_seen += len(tokens)
                    counts[split].documents += encoded.documents[split]
                    counts[split].bytes += encoded.bytes[split]
                    documents += encoded.documents[split]
                if hashes:
                    with open(hashes, "ab") as file:
                        file.write(encoded.hashes.tobytes())
                done, seen = done + 1, seen + part.size
                on_progress(documents, tokens_seen, seen)
                if time.monotonic() - noted >= JOURNAL_SECONDS:
                    note()
                    noted = time.monotonic()
                if left is not None:
                    left -= sum(encoded.documents.values())
                    if left == 0:
                        break
        note()
        for split, writer in writers.items():
            writer.close()
            counts[split].chunks = len(writer.chunks)
        note(complete=True)
    finally:
        for writer in writers.values():
            writer.abandon()
    return counts


def _read_journal(path: Path, splits: list[str]) -> tuple[int, int, dict[str, Counts], bool]:
    """(parts done, their bytes, counts, whether that is all) of an earlier call; nothing where there is none."""
    try:
        values = read_sealed(path)
        counts = {split: Counts(**values["counts"][split]) for split in splits}
        return values["parts"], values["bytes"], counts, values["complete"]
    except (OSError, ValueError, KeyError, TypeError):  # also a damaged one: the work begins anew
        return 0, 0, {split: Counts() for split in splits}, False


def dtype_for(vocab_size: int) -> str:
    """The smallest type that litdata's token reader knows for these ids."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def total_size(parts: Iterable[Part], split: str | None = None) -> int:
    """Bytes of text, about, of all parts or of those that may go to a split."""
    return sum(part.size for part in parts if split is None or part.split in (split, None))
