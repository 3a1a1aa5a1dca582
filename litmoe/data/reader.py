"""Tokens on disk into micro batches: windows, one order for all devices, a loader that knows its position.

All devices together read one sequence of micro batches, which depends on the tokens, the micro batch, the context
length and the seed alone: not on how many devices or workers there are; and where it has got to is counted in windows,
so that a run goes on with another micro batch too. Worker processes import this file, so LitGPT
stays out of it: where they are not forked (Windows, macOS), they would wait for it at each epoch.
"""

import atexit
import json
import signal
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from litmoe.cli import UserError
from litmoe.data import manifest

OPEN_CHUNKS = 128  # each takes a file handle, of which macOS gives a process 256


@dataclass(frozen=True)
class Chunk:
    """One of the files that hold a split's tokens, as litdata's ``TokensLoader`` lays them out."""

    path: Path
    dtype: str
    header: int
    """Bytes before the first token"""
    length: int
    """Tokens"""

    def open(self) -> np.ndarray:
        """Its tokens ``(n,)``, mapped: read from the disk when they are used."""
        return np.memmap(self.path, np.dtype(self.dtype).newbyteorder("<"), "r", self.header, self.length)


def token_chunks(data_dir: Path, split: str) -> list[Chunk]:
    """The chunks of a split in the order of the text."""
    found = manifest.read(data_dir)
    assert found is not None, "the caller has checked the manifest"
    folder = manifest.tokens_dir(data_dir, split)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return [
        # The header: the number of items, and where each of them begins and the last one ends, as uint32.
        Chunk(
            folder / chunk["filename"],
            found.splits[split].dtype,
            header=4 * (chunk["chunk_size"] + 2),
            length=chunk["dim"],
        )
        for chunk in index["chunks"]
    ]


class TokenWindows(Dataset[Tensor]):
    """A split as windows of T + 1 tokens, one after the other; what fills no window at a chunk's end is left out.

    Each item is ``(T + 1,)`` int64. Files are opened by the process that reads them, when it does.
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
        number = bisect_right(self._ends, index)
        start = self._size * (index - (self._ends[number - 1] if number else 0))
        return torch.from_numpy(self._tokens(number)[start : start + self._size].astype(np.int64))

    def _tokens(self, number: int) -> np.ndarray:
        if number not in self._opened:
            if len(self._opened) >= OPEN_CHUNKS:
                self._opened.pop(next(iter(self._opened)))
            self._opened[number] = self._chunks[number].open()
        return self._opened[number]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: pickled, they would be all of the tokens."""
        return {**self.__dict__, "_opened": {}}


def count_windows(data_dir: Path, split: str, block_size: int) -> int:
    """How many windows of ``block_size`` tokens and the next one a split has. A window never spans two chunks."""
    return len(TokenWindows(data_dir, split, block_size))


# ------------------------------------------------------------------------------------------------------------- batches


class MicroBatches(Sampler[list[int]]):
    """One sequence of micro batches, epoch after epoch, for all devices: number r of W takes r, r + W, r + 2W, ...

    So an optimizer step has the very same micro batches on any number of devices. Items (windows, conversations) that
    fill no micro batch are left out of an epoch; other ones in the next.

    Args:
        items: how many there are.
        batch_size: items in a micro batch.
        seed: decides with the epoch the order of the items. None is for validation: the order in which they lie, and
            as many micro batches for each device; those that do not fill all devices are left out.
        rank: this device.
        world_size: devices.
        keep_all: leaves no item out, and takes none twice: micro batches are of equal size as far as that goes, at
            most ``batch_size`` (two, where that is one and the devices do not divide the items). At least one item a
            device must be there.
    """

    def __init__(
        self,
        items: int,
        batch_size: int,
        *,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        keep_all: bool = False,
    ) -> None:
        self.items, self._batch_size, self._seed = items, batch_size, seed
        self._rank, self._world_size, self._keep_all = rank, world_size, keep_all
        self.taken = 0
        """Micro batches that this device has got, in all epochs"""
        self._start(0, 0, began=0)

    def __len__(self) -> int:
        """Of one device in one epoch, rounded down: the devices take turns in having one more."""
        return self._divided(self.items) // self._world_size

    def next_epoch(self) -> None:
        """Goes to the next epoch, also from the middle of this one."""
        self._start(self._epoch + 1, 0, began=self._began + self._micro_batches)
        self.taken = max(self.taken, -((self._rank - self._began) // self._world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the epoch."""
        order = self._order()[self._skipped :]
        first = self._rank + self.taken * self._world_size - self._began
        for number in range(first, self._micro_batches, self._world_size):
            yield order[self._begin(number) : self._begin(number + 1)].tolist()

    @property
    def position(self) -> tuple[int, int]:
        """After as many micro batches for each device: the epoch, and how many items of its order were given out."""
        number = self.taken * self._world_size - self._began
        if number > self._micro_batches:  # other devices are in the next epoch already
            return self._epoch + 1, (number - self._micro_batches) * self._batch_size
        return self._epoch, self._skipped + self._begin(number)

    @position.setter
    def position(self, position: tuple[int, int]) -> None:
        self.taken = 0
        self._start(*position, began=0)

    def _start(self, epoch: int, skipped: int, *, began: int) -> None:
        """Divides an epoch without its first ``skipped`` items, after ``began`` micro batches of all devices."""
        self._epoch, self._skipped, self._began = epoch, skipped, began
        self._micro_batches = self._divided(self.items - skipped)

    def _divided(self, items: int) -> int:
        """How many micro batches so many items make."""
        if self._keep_all:
            return min(-(-items // (self._batch_size * self._world_size)), items // self._world_size) * self._world_size
        micro_batches = items // self._batch_size
        return micro_batches - micro_batches % self._world_size if self._seed is None else micro_batches

    def _begin(self, number: int) -> int:
        if self._keep_all:
            return number * (self.items - self._skipped) // self._micro_batches
        return number * self._batch_size

    def _order(self) -> Tensor:
        """8 bytes an item in each main process: 80 MB for 10 billion tokens in windows of 1,024."""
        if self._seed is None:
            return torch.arange(self.items)
        generator = torch.Generator().manual_seed(self._seed)
        # Of its own for each epoch: seed + epoch would give seed 1 the orders of seed 0, an epoch earlier.
        epoch_seed = int(torch.randint(1 << 62, (self._epoch + 1,), generator=generator)[-1])
        return torch.randperm(self.items, generator=generator.manual_seed(epoch_seed))


class TokenLoader(DataLoader[Any]):
    """Torch's loader with a position: batches ``(B, T + 1)`` int64 of windows. Each pass is the next epoch.

    ``state_dict`` counts what was handed out, not what workers have read ahead, over all devices: two plain numbers,
    good in any folder, for any number of workers and devices and any micro batch.
    """

    batch_sampler: MicroBatches

    def __init__(
        self,
        items: Dataset[Any],
        batches: MicroBatches,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__(
            items,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # each pass draws a seed for workers; the run's random state stays as it is
        )
        self._begun = False
        self._passes: WeakSet[Generator[Any]] = WeakSet()
        atexit.register(_end_workers, self._passes)

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        batches = self._next_pass()
        self._passes.add(batches)
        return batches

    def _next_pass(self) -> Generator[Any]:
        position = self.batch_sampler
        if self._begun:
            position.next_epoch()
        self._begun = True
        for batch in super().__iter__():
            position.taken += 1
            yield batch

    @property
    def items(self) -> int:
        """Of the whole set: windows, conversations."""
        return self.batch_sampler.items

    @property
    def position(self) -> tuple[int, int]:
        """The epoch, and how many items of it all devices have got."""
        return self.batch_sampler.position

    def state_dict(self) -> dict[str, int]:
        """The position by name."""
        return dict(zip(("epoch", "items"), self.position, strict=True))

    def load_state_dict(self, state: dict[str, int], batch_size: int = 0) -> None:
        """Makes the next pass the rest of the one in which ``state`` was taken.

        Args:
            batch_size: the micro batch that a state of an older version counts by.

        Raises:
            UserError: the position is another reader's.
        """
        if state.keys() == {"epoch", "micro_batches"} and batch_size:
            # The first device's epoch, while others may have been in the next, and a count since the first epoch.
            epoch, per_epoch = state["epoch"], self.items // batch_size
            epoch += state["micro_batches"] > (epoch + 1) * per_epoch
            state = {"epoch": epoch, "items": (state["micro_batches"] - epoch * per_epoch) * batch_size}
        if state.keys() != self.state_dict().keys():
            raise UserError(
                "the checkpoint's position in the data is that of another reader (of an older version of this project,"
                " or another data module), which this one can't go on from. Start a new run from its weights:"
                " --initial_checkpoint_dir CHECKPOINT --out_dir NEW"
            )
        self.batch_sampler.position, self._begun = (state["epoch"], state["items"]), False


def _end_workers(passes: WeakSet[Generator[Any]]) -> None:
    """An error leaves a pass open, and multiprocessing would wait for ever for workers that ignore its SIGTERM."""
    for batches in list(passes):
        batches.close()


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""What asks a run to stop, on this system."""


def start_worker(_index: int) -> None:
    """Lets the main process save and stop: a signal to the whole group would end the workers first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
