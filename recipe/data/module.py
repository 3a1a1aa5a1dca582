"""The reader: prepared tokens as LitGPT's data module, any context length, resumable to the batch.

All devices together read one sequence of micro batches, which depends on the tokens, the micro batch, the context
length and the seed alone: not on how many devices or workers there are.
"""

import atexit
import json
import signal
from bisect import bisect_right
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from recipe.cli import UserError
from recipe.data import manifest
from recipe.data.documents import text_files
from recipe.data.manifest import Manifest

OPEN_CHUNKS = 128  # each takes a file handle, of which macOS gives a process 256


@dataclass
class TokenizedText(DataModule):
    """Batches of the tokens that ``prepare_data.py`` made.

    A batch is ``(B, T + 1)`` int64: windows of ``max_seq_length`` tokens and the next one. Training windows come in an
    order shuffled anew for each epoch from the seed, validation windows in the order of the text. Incomplete batches
    are left out. Each device gets its share (``MicroBatches``); a loader knows its place (``TokenLoader``).

    Takes the place of ``litgpt.data.TextFiles``: the paths are named as there.
    """

    train_data_path: Path = Path("data/custom_text/train")
    """Folder of the training text; its tokens lie in tokens/train beside it."""
    val_data_path: Path = Path("data/custom_text/val")
    """Folder of the validation text, beside the other."""
    num_workers: int = 2
    """Processes that read training batches ahead; 0 reads in this one, as validation always does."""
    seed: int = 42
    """Decides the training order."""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.train_data_path, self.val_data_path = Path(self.train_data_path), Path(self.val_data_path)
        self.data_dir = self.train_data_path.parent
        if self.train_data_path.name != "train" or self.val_data_path != self.data_dir / "val":
            raise UserError(
                f"train_data_path {self.train_data_path} and val_data_path {self.val_data_path}: expected the folders "
                "train and val of one prepared corpus, such as data/custom_text/train and data/custom_text/val."
            )

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        """Called by LitGPT with what the batches are to be; the tokenizer must be the one that made the tokens."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = max_seq_length

    def prepare_data(self) -> None:
        """Checks that there are tokens, of the text and the tokenizer as they are now, and enough for a batch.

        Raises:
            UserError: where not.
        """
        found = checked_manifest(self.data_dir)
        if self.tokenizer is not None and self.tokenizer.eos_id != found.tokenizer.eos_id:
            raise UserError(
                f"the tokens of {self.data_dir} were made with the tokenizer {found.tokenizer.name}, whose end-of-text "
                f"id is {found.tokenizer.eos_id}; the run's tokenizer has {self.tokenizer.eos_id}. Name its folder "
                f"(--tokenizer_dir), or tokenize anew: `uv run python prepare_data.py --data_dir {self.data_dir}`."
            )
        for split in manifest.SPLITS:
            self._require_batches(found, split, world_size=1)

    def train_dataloader(self) -> "TokenLoader":
        """This device's training batches, shuffled."""
        return self._loader("train", seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> "TokenLoader":
        """This device's validation batches, always the same ones in the same order."""
        return self._loader("val", seed=None, num_workers=0)  # starting processes takes longer than reading

    def _loader(self, split: str, *, seed: int | None, num_workers: int) -> "TokenLoader":
        launched = distributed.is_available() and distributed.is_initialized()
        rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if launched else (0, 1)
        self._require_batches(_manifest(self.data_dir), split, world_size)
        windows = TokenWindows(self.data_dir, split, self.max_seq_length)
        batches = MicroBatches(len(windows), self.batch_size, seed=seed, rank=rank, world_size=world_size)
        return TokenLoader(windows, batches, num_workers)

    def _require_batches(self, found: Manifest, split: str, world_size: int) -> None:
        windows = count_windows(self.data_dir, split, self.max_seq_length)
        if windows < self.batch_size * world_size:
            raise UserError(
                f"{self.data_dir}: {split} has {found.splits[split].tokens:,} tokens, {windows} windows of "
                f"{self.max_seq_length + 1}; expected {self.batch_size * world_size} or more (micro_batch_size "
                f"{self.batch_size} on {world_size} device{'s' if world_size > 1 else ''}). Give more text"
                + (" or a larger --val_fraction" if split == "val" else "")
                + ", or a smaller --max-seq-length or --micro-batch-size."
            )


def checked_manifest(data_dir: Path) -> Manifest:
    """The manifest of tokens that are whole and made from the text as it lies there now.

    Text that is gone (removed to save space) is no contradiction.

    Raises:
        UserError: for missing, incomplete or stale tokens.
    """
    found = _manifest(data_dir)
    for split, entry in found.splits.items():
        # A split without text of its own was made from the other's.
        folders = {record.path.split("/")[0] for record in entry.text} | {split}
        files = [file for name in sorted(folders) for file in text_files(data_dir / name)]
        if not files:
            continue
        if changes := manifest.changed_files(entry.text, manifest.refresh(files, data_dir, entry.text)):
            raise UserError(
                f"the text of {data_dir} changed since it was tokenized ({'; '.join(changes[:3])}); "
                f"`uv run python prepare_data.py --data_dir {data_dir}` tokenizes it anew."
            )
    return found


def _manifest(data_dir: Path) -> Manifest:
    found = manifest.read(data_dir)
    if found is None:
        state = "are not complete" if manifest.tokens_dir(data_dir).is_dir() else "do not exist"
        raise UserError(
            f"the tokens of {data_dir} {state}; `uv run python prepare_data.py --data_dir {data_dir}` makes them."
        )
    return found


# ------------------------------------------------------------------------------------------------------------- windows


def validation_windows(data_dir: Path, split: str, block_size: int) -> "TokenWindows":
    """A split as windows that follow and do not overlap each other, in the order of the text.

    Args:
        data_dir: a prepared corpus.
        split: ``train`` or ``val``.
        block_size: context length T.

    Returns:
        A dataset with ``len``; each item is ``(T + 1,)`` int64. The same windows that training validates on.

    Raises:
        UserError: for missing, incomplete or stale tokens, or fewer than one window.
    """
    found = checked_manifest(data_dir)
    windows = TokenWindows(data_dir, split, block_size)
    if len(windows) == 0:
        raise UserError(
            f"{data_dir}: {split} has {found.splits[split].tokens:,} tokens, fewer than one window of "
            f"{block_size + 1}; choose a smaller context length or give more text."
        )
    return windows


def count_windows(data_dir: Path, split: str, block_size: int) -> int:
    """How many windows of ``block_size`` tokens and the next one a split has. A window never spans two chunks."""
    return len(TokenWindows(data_dir, split, block_size))


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
    """The chunks of a split in the order of the text.

    Raises:
        UserError: for missing or incomplete tokens.
    """
    folder = manifest.tokens_dir(data_dir, split)
    dtype = _manifest(data_dir).splits[split].dtype
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return [
        # The header: the number of items, and where each of them begins and the last one ends, as uint32.
        Chunk(folder / chunk["filename"], dtype, header=4 * (chunk["chunk_size"] + 2), length=chunk["dim"])
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


# ------------------------------------------------------------------------------------------------------------- batches


class MicroBatches(Sampler[list[int]]):
    """One sequence of micro batches, epoch after epoch, for all devices: number r of W takes r, r + W, r + 2W, ...

    So an optimizer step has the very same micro batches on any number of devices. Windows that fill no micro batch are
    left out of an epoch; other ones in the next.

    Args:
        windows: how many there are.
        batch_size: windows in a micro batch.
        seed: decides with the epoch the order of the windows. None is for validation: the order of the text, and as
            many micro batches for each device; those that do not fill all devices are left out.
        rank: this device.
        world_size: devices.
    """

    def __init__(self, windows: int, batch_size: int, *, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        self._windows, self._batch_size, self._seed = windows, batch_size, seed
        self._rank, self.world_size = rank, world_size
        self._per_epoch = windows // batch_size
        if seed is None:
            self._per_epoch -= self._per_epoch % world_size
        self.epoch = 0
        self.taken = 0
        """Micro batches that this device has got, in all epochs"""

    def __len__(self) -> int:
        """Of one device in one epoch, rounded down: the devices take turns in having one more."""
        return self._per_epoch // self.world_size

    def next_epoch(self) -> None:
        """Goes to the next epoch, also from the middle of this one."""
        self.epoch += 1
        self.taken = max(self.taken, -((self._rank - self.epoch * self._per_epoch) // self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the epoch."""
        order = self._order()
        first = self._rank + self.taken * self.world_size - self.epoch * self._per_epoch
        for number in range(first, self._per_epoch, self.world_size):
            yield order[number * self._batch_size : (number + 1) * self._batch_size].tolist()

    def _order(self) -> Tensor:
        """8 bytes a window in each main process: 80 MB for 10 billion tokens in windows of 1,024."""
        if self._seed is None:
            return torch.arange(self._windows)
        generator = torch.Generator().manual_seed(self._seed)
        # Of its own for each epoch: seed + epoch would give seed 1 the orders of seed 0, an epoch earlier.
        epoch_seed = int(torch.randint(1 << 62, (self.epoch + 1,), generator=generator)[-1])
        return torch.randperm(self._windows, generator=generator.manual_seed(epoch_seed))


class TokenLoader(DataLoader[Tensor]):
    """Torch's loader with a position: batches ``(B, T + 1)`` int64. Each pass is the next epoch.

    ``state_dict`` counts the batches that were handed out, not those that workers have read ahead, over all devices:
    plain numbers, good in any folder, for any number of workers, and for any number of devices that divides them.
    """

    batch_sampler: MicroBatches

    def __init__(self, windows: TokenWindows, batches: MicroBatches, num_workers: int) -> None:
        super().__init__(
            windows,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # each pass draws a seed for workers; the run's random state stays as it is
        )
        self._begun = False

    def __iter__(self) -> Generator[Tensor]:  # type: ignore[override]
        batches = self._next_pass()
        _passes.add(batches)
        return batches

    def _next_pass(self) -> Generator[Tensor]:
        position = self.batch_sampler
        if self._begun:
            position.next_epoch()
        self._begun = True
        for batch in super().__iter__():
            position.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where it is: the epoch, and how many micro batches all devices have got since the first."""
        position = self.batch_sampler
        return {"epoch": position.epoch, "micro_batches": position.taken * position.world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next pass the rest of the one in which ``state`` was taken.

        Raises:
            UserError: the position is another reader's, or between two rounds of these devices.
        """
        position = self.batch_sampler
        if state.keys() != self.state_dict().keys():
            raise UserError(
                "the checkpoint's position in the data is that of another reader (of an older version of this project,"
                " or another data module), which this one can't go on from. Start a new run from its weights:"
                " --initial_checkpoint_dir CHECKPOINT --out_dir NEW"
            )
        taken, rest = divmod(state["micro_batches"], position.world_size)
        if rest:
            raise UserError(
                f"the checkpoint lies after {state['micro_batches']:,} micro batches, which {position.world_size}"
                " devices do not divide; resume it on as many devices as it was saved with."
            )
        position.epoch, position.taken, self._begun = state["epoch"], taken, False


_passes: WeakSet[Generator[Tensor]] = WeakSet()


@atexit.register
def _end_workers() -> None:
    """An error leaves a pass open, and multiprocessing would wait for ever for workers that ignore its SIGTERM."""
    for batches in list(_passes):
        batches.close()


def start_worker(_index: int) -> None:
    """Lets the main process save and stop: a signal to the whole group would end the workers first."""
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
