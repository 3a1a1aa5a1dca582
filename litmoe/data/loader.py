"""Read prepared tokens as micro batches, in one order for any number of devices and workers, with a saved position.

All devices together read one sequence of micro batches. It depends only on the tokens, the context length, the micro
batch size and the seed. The position is counted in items, so a run also resumes with another micro batch size.

This file does not import LitGPT: worker processes that are spawned instead of forked (Windows, macOS) import it.
"""

import atexit
import json
import signal
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from litmoe.cli import UserError
from litmoe.data import manifest

# Each open chunk takes a file handle, and macOS allows 256 per process.
MAX_OPEN_CHUNKS = 128
# The signals that ask a run to stop, on this system.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


# --- windows of tokens ---


@dataclass(frozen=True)
class Chunk:
    """A file with a part of a split's tokens, in the layout of litdata's ``TokensLoader``."""

    path: Path
    dtype: str
    header: int
    """Bytes before the first token"""
    length: int
    """Tokens"""

    def open(self) -> np.ndarray:
        """Return the tokens ``(n,)`` as a memory map, which reads from the disk on access."""
        return np.memmap(self.path, np.dtype(self.dtype).newbyteorder("<"), "r", self.header, self.length)


def token_chunks(data_dir: Path, split: str) -> list[Chunk]:
    """Return the chunks of a split in the order of the text."""
    metadata = manifest.read(data_dir)
    assert metadata is not None, "the caller has checked the metadata"
    folder = manifest.tokens_dir(data_dir, split)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    chunks = []
    for entry in index["chunks"]:
        # The header holds the number of items and their boundaries, all as uint32.
        header = 4 * (entry["chunk_size"] + 2)
        chunks.append(Chunk(folder / entry["filename"], metadata.splits[split].dtype, header, entry["dim"]))
    return chunks


class TokenWindows(Dataset[Tensor]):
    """A split as consecutive windows ``(T + 1,)`` int64 that do not overlap.

    A window never spans two chunks; the tokens after the last complete window of a chunk are unused.
    """

    def __init__(self, data_dir: Path, split: str, block_size: int) -> None:
        self._chunks = token_chunks(data_dir, split)
        self._size = block_size + 1
        self._ends = list(accumulate(chunk.length // self._size for chunk in self._chunks))
        self._opened: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        # The chunk with this window, and the place of the window in it.
        number = bisect_right(self._ends, index)
        first_index = self._ends[number - 1] if number > 0 else 0
        start = self._size * (index - first_index)
        return torch.from_numpy(self._tokens(number)[start : start + self._size].astype(np.int64))

    def _tokens(self, number: int) -> np.ndarray:
        # Chunks are opened by the process that reads them, on first use.
        if number not in self._opened:
            if len(self._opened) >= MAX_OPEN_CHUNKS:
                oldest = next(iter(self._opened))
                del self._opened[oldest]
            self._opened[number] = self._chunks[number].open()
        return self._opened[number]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would contain all tokens.
        return {**self.__dict__, "_opened": {}}


# --- micro batches ---


class MicroBatches(Sampler[list[int]]):
    """The shuffled micro batches of one device; each pass yields the rest of an epoch.

    All devices share one sequence of micro batches, epoch after epoch, and device r of W takes the numbers r, r + W,
    r + 2W, ... So an optimizer step has the same micro batches on any number of devices. Items that do not fill a micro
    batch at the end of an epoch are skipped; the next epoch skips others.

    Args:
        items: number of items (windows, conversations).
        batch_size: items per micro batch.
        seed: determines the order, together with the epoch.
        rank: number of this device.
        world_size: number of devices.
    """

    def __init__(self, items: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.items, self._batch_size, self._seed = items, batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._start = (0, 0)  # the position at which micro batch number 0 begins
        self.taken = 0
        """Micro batches that this device received since the start"""

    def __len__(self) -> int:
        """Return the micro batches per epoch and device, rounded down."""
        return self.items // self._batch_size // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        # Micro batch number n of all devices belongs to device n mod W.
        number = self.taken * self._world_size + self._rank
        epoch, first = self._place_of(number)
        order = self._order(epoch)
        current_epoch = epoch
        while epoch == current_epoch:
            yield order[first : first + self._batch_size].tolist()
            number += self._world_size
            epoch, first = self._place_of(number)

    @property
    def position(self) -> tuple[int, int]:
        """The epoch, and the items of it that were used, when every device has taken as many micro batches."""
        # The end of the last micro batch and not the start of the next one, which may be in the next epoch.
        number = self.taken * self._world_size
        if number == 0:
            return self._start
        epoch, first = self._place_of(number - 1)
        return epoch, first + self._batch_size

    @position.setter
    def position(self, position: tuple[int, int]) -> None:
        self._start, self.taken = position, 0

    @property
    def next_epoch(self) -> int:
        """The epoch of this device's next micro batch."""
        return self._place_of(self.taken * self._world_size + self._rank)[0]

    def _place_of(self, number: int) -> tuple[int, int]:
        """Return the epoch and the first item of a micro batch, by its number in the sequence of all devices."""
        epoch, item = self._start
        # A resumed epoch has a rest only. All later epochs have the same number of micro batches.
        left_in_epoch = (self.items - item) // self._batch_size
        if number < left_in_epoch:
            return epoch, item + number * self._batch_size
        epochs, number = divmod(number - left_in_epoch, self.items // self._batch_size)
        return epoch + 1 + epochs, number * self._batch_size

    def _order(self, epoch: int) -> Tensor:
        """Return the shuffled items ``(items,)`` int64: 80 MB for 10 billion tokens in windows of 1,024."""
        generator = torch.Generator().manual_seed(self._seed)
        # Each epoch draws its own seed: with seed + epoch, seed 1 would repeat the orders of seed 0.
        epoch_seed = int(torch.randint(1 << 62, (epoch + 1,), generator=generator)[-1])
        return torch.randperm(self.items, generator=generator.manual_seed(epoch_seed))


def full_batches(items: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[range]:
    """Return a device's micro batches for validation: in order, all full, equally many for each device.

    The last items are skipped if they do not fill a micro batch for every device.
    """
    count = items // (batch_size * world_size) * world_size
    return [range(number * batch_size, (number + 1) * batch_size) for number in range(rank, count, world_size)]


def even_batches(items: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[range]:
    """Return a device's micro batches for validation: every item once, equally many micro batches for each device.

    Sizes differ by at most 1 and are at most ``batch_size`` (2 if ``batch_size`` is 1 and the devices do not divide the
    items). There must be at least one item per device.
    """
    # As few rounds as the micro batch size allows, but no more than every device has items for.
    rounds = min(-(-items // (batch_size * world_size)), items // world_size)
    count = rounds * world_size
    starts = [number * items // count for number in range(count + 1)]
    return [range(starts[number], starts[number + 1]) for number in range(rank, count, world_size)]


def rank_and_world_size() -> tuple[int, int]:
    """Return the number of this device and of all devices; (0, 1) without ``torch.distributed``."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


# --- loaders ---


class TokenLoader(DataLoader[Any]):
    """A ``DataLoader`` over micro batches that were divided over the devices already.

    Args:
        dataset: the items.
        batches: the item numbers of each micro batch of this device.
        num_workers: processes that read ahead.
        collate_fn: as in ``DataLoader``; by default equal tensors are stacked to ``(B, T + 1)``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Iterable[Any],
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,  # a list of ranges is enough
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            # Each pass draws a seed for its workers; the global random state must not depend on it.
            generator=torch.Generator(),
        )

    @property
    def items(self) -> int:
        """Number of items in the dataset."""
        return len(self.dataset)  # type: ignore[arg-type]


class TrainLoader(TokenLoader):
    """A loader that knows its position. A pass ends with the epoch; the next pass continues with the next one.

    The position counts what was handed out over all devices, not what workers have read ahead. It is valid for any
    folder, number of workers, number of devices and micro batch size.
    """

    batch_sampler: MicroBatches

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: MicroBatches,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__(dataset, batches, num_workers, collate_fn)
        self._open_passes: WeakSet[Generator[Any]] = WeakSet()
        atexit.register(_close_passes, self._open_passes)

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        batches = self._counted_batches()
        self._open_passes.add(batches)
        return batches

    def _counted_batches(self) -> Generator[Any]:
        for batch in super().__iter__():
            # Counted before it is handed out: a checkpoint after this step must not read it again.
            self.batch_sampler.taken += 1
            yield batch

    @property
    def position(self) -> tuple[int, int]:
        """The epoch, and the items of it that were handed out to all devices."""
        return self.batch_sampler.position

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        epoch, items = self.position
        return {"epoch": epoch, "items": items}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position in ``state``.

        Raises:
            UserError: ``state`` was not saved by this class.
        """
        if state.keys() != {"epoch", "items"}:
            raise UserError(
                f"the checkpoint's position in the data has the entries {', '.join(map(str, state))}; expected epoch "
                "and items. It was saved by another data module or an older version. Start a new run from its weights: "
                "--initial_checkpoint_dir CHECKPOINT --out_dir NEW"
            )
        self.batch_sampler.position = (state["epoch"], state["items"])


def start_worker(_index: int) -> None:
    """Ignore stop signals in a worker: one sent to the process group would end it before the main process can save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _close_passes(passes: WeakSet[Generator[Any]]) -> None:
    # At exit, multiprocessing sends SIGTERM to the workers, which ignore it, and would wait for them forever.
    for batches in list(passes):
        batches.close()
