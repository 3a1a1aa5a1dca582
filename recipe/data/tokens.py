"""Text to token folders: worker processes encode parts of the text, this process writes litdata's chunks in order."""

import json
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.cli import UserError
from recipe.data.documents import Part, Piece, Rules, read
from recipe.data.tokenizers import Encoder

# A chunk's last tokens that fill no window are lost, so chunks are long; and there are about 16 of them where the text
# allows it, so that shuffling their order mixes the text. litdata divides a chunk among readers where it must.
MIN_CHUNK_TOKENS = 1 << 20
MAX_CHUNK_TOKENS = 1 << 24
CHUNKS = 16
BYTES_PER_TOKEN = 4  # of English under a common vocabulary: for the size of chunks alone
LITDATA_DTYPES = {"int32": 16, "uint16": 20}  # litdata.constants._TORCH_DTYPES_MAPPING
SERIAL_PARTS = 3  # so little text is encoded sooner than processes start


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    tokenizer_json: Path
    fast: bool
    """Through tiktoken."""
    eos_id: int
    dtype: str
    rules: Rules


@dataclass
class Counts:
    """What a split came to."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty_documents: int = 0
    marks: int = 0
    chunks: int = 0


class Encoded(NamedTuple):
    """A part's tokens and counts for each split."""

    tokens: dict[str, np.ndarray]  # (n,) of the job's dtype
    documents: dict[str, int]
    bytes: dict[str, int]
    empty: int
    marks: int


def encode_part(part: Part, job: Job, encoder: Encoder) -> Encoded:
    """Reads and encodes a part; each document ends with the end-of-text id."""
    text = read(part, job.rules)
    ids: dict[str, list[int]] = {}
    documents: dict[str, int] = {}
    size: dict[str, int] = {}
    for piece, piece_ids in zip(text.pieces, encoder([piece.text for piece in text.pieces]), strict=True):
        found = ids.setdefault(piece.split, [])
        found += piece_ids
        if piece.closes:
            found.append(job.eos_id)
        documents[piece.split] = documents.get(piece.split, 0) + piece.closes
        size[piece.split] = size.get(piece.split, 0) + _utf8_size(piece)
    tokens = {split: np.array(found, dtype=job.dtype) for split, found in ids.items()}
    return Encoded(tokens, documents, size, text.empty, text.marks)


def _utf8_size(piece: Piece) -> int:
    return len(piece.text) if piece.text.isascii() else len(piece.text.encode())


def encode(parts: list[Part], job: Job, num_workers: int) -> Generator[Encoded]:
    """Encodes parts in their order, by ``num_workers`` processes (0: in this one); memory does not grow with the text.

    Raises:
        UserError: for text that cannot be read, or when a worker was killed.
    """
    workers = min(num_workers, len(parts))
    if workers == 0 or len(parts) <= SERIAL_PARTS:
        encoder = Encoder(job.tokenizer_json, job.fast)
        yield from (encode_part(part, job, encoder) for part in parts)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (job,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        with _quiet_start():
            # The first call starts all processes.
            waiting.extend(pool.submit(_encode_in_worker, part) for part in parts[: 4 * workers])
        for part in parts[4 * workers :]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(_encode_in_worker, part))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, most likely for want of memory; run the same command with fewer of them "
            f"(--num_workers {max(1, workers // 2)})."
        ) from None
    except BaseException:
        # Not to wait for what nobody wants any more; the end of a process ends the pool.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_job: Job
_encoder: Encoder


def _start_worker(job: Job) -> None:
    global _job, _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _job, _encoder = job, Encoder(job.tokenizer_json, job.fast)


def _encode_in_worker(part: Part) -> Encoded:
    return encode_part(part, _job, _encoder)


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
        folder: empty or not there yet.
        text_bytes: how much text there is, about: the chunks' size follows from it, and from nothing else.
        dtype: ``uint16`` or ``int32``.
    """

    def __init__(self, folder: Path, text_bytes: int, dtype: str) -> None:
        tokens = text_bytes // (BYTES_PER_TOKEN * CHUNKS)
        self.chunk_tokens = min(max(tokens, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)
        self.chunks: list[dict[str, Any]] = []
        self._folder, self._dtype = folder, dtype
        self._waiting: list[np.ndarray] = []
        self._length = 0

    def append(self, tokens: np.ndarray) -> None:
        """Takes the next tokens, ``(n,)``."""
        self._waiting.append(tokens)
        self._length += len(tokens)
        # Half a chunk is kept back, so that the last one is never a scrap.
        while self._length >= self.chunk_tokens * 3 // 2:
            joined = np.concatenate(self._waiting)
            self._write(joined[: self.chunk_tokens])
            self._waiting = [joined[self.chunk_tokens :]]
            self._length -= self.chunk_tokens

    def close(self) -> None:
        """Writes the rest and the index."""
        if self._length:
            self._write(np.concatenate(self._waiting))
        unused = ("chunk_bytes", "compression", "compression_batch_size", "compression_level", "encryption")
        config = dict.fromkeys((*unused, "ipc_compression")) | {
            "chunk_size": 1,
            "data_format": [f"no_header_tensor:{LITDATA_DTYPES[self._dtype]}"],
            "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',  # a lone tensor
            "item_loader": "TokensLoader",
            "types": "tensor",
        }
        if self.chunks:
            index = json.dumps({"chunks": self.chunks, "config": config}, sort_keys=True)
            (self._folder / "index.json").write_text(index, encoding="utf-8")

    def _write(self, tokens: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        data = tokens.astype(np.dtype(self._dtype).newbyteorder("<")).tobytes()
        header = np.array([1, 12, 12 + len(data)], "<u4")  # number of items, where they begin, where the last one ends
        name = f"chunk-0-{len(self.chunks)}.bin"
        with open(self._folder / name, "wb") as file:
            file.write(header.tobytes())
            file.write(data)
        self.chunks.append(
            {"chunk_bytes": 12 + len(data), "chunk_size": 1, "dim": len(tokens), "filename": name},
        )


def build(
    parts: list[Part],
    job: Job,
    folders: dict[str, Path],
    num_workers: int,
    on_progress: Callable[[int, int, int, int | None], None],
) -> dict[str, Counts]:
    """Encodes parts into one token folder for each split.

    Args:
        parts: all of the text.
        job: how.
        folders: split to (new) folder.
        num_workers: processes; 0 encodes in this one.
        on_progress: called with the documents, tokens and bytes of text so far, and the bytes in all, about.

    Returns:
        What was counted for each split.
    """
    writers = {
        split: ChunkWriter(folder, sum(part.size for part in parts if part.split in (split, None)), job.dtype)
        for split, folder in folders.items()
    }
    counts = {split: Counts() for split in folders}
    done, total = 0, total_size(parts)
    with closing(encode(parts, job, num_workers)) as encoded_parts:
        for part, encoded in zip(parts, encoded_parts, strict=True):
            first = next(iter(counts)) if part.split is None else part.split
            counts[first].empty_documents += encoded.empty
            counts[first].marks += encoded.marks
            for split, tokens in encoded.tokens.items():
                writers[split].append(tokens)
                counts[split].documents += encoded.documents[split]
                counts[split].tokens += len(tokens)
                counts[split].bytes += encoded.bytes[split]
            done += part.size
            on_progress(sum(c.documents for c in counts.values()), sum(c.tokens for c in counts.values()), done, total)
    for split, writer in writers.items():
        writer.close()
        counts[split].chunks = len(writer.chunks)
    return counts


def dtype_for(vocab_size: int) -> str:
    """The smallest type that litdata's token reader knows for these ids."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def total_size(parts: Iterable[Part]) -> int:
    """Bytes of text, about."""
    return sum(part.size for part in parts)
