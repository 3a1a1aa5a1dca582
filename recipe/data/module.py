"""The reader: prepared tokens as LitGPT's data module, any context length, resumable to the batch."""

import json
import signal
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer

from recipe.cli import UserError
from recipe.data import manifest
from recipe.data.documents import text_files
from recipe.data.manifest import Manifest


@dataclass
class TokenizedText(DataModule):
    """Batches of the tokens that ``prepare_data.py`` made.

    A batch is ``(B, T + 1)`` int64: windows of ``max_seq_length`` tokens and the next one. Training windows come in an
    order shuffled anew for each epoch from the seed, validation windows in the order of the text. Incomplete batches
    are left out. The state of a loader (``state_dict``, ``load_state_dict``) restores its place exactly.

    Takes the place of ``litgpt.data.TextFiles``: the paths are named as there.
    """

    train_data_path: Path = Path("data/custom_text/train")
    """Folder of the training text; its tokens lie in tokens/train beside it."""
    val_data_path: Path = Path("data/custom_text/val")
    """Folder of the validation text, beside the other."""
    num_workers: int = 2
    """Processes that read ahead; 0 reads in this one."""
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

    def train_dataloader(self) -> StreamingDataLoader:
        """Training batches, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> StreamingDataLoader:
        """Validation batches, always the same ones in the same order."""
        return self._loader("val", shuffle=False)

    def _loader(self, split: str, shuffle: bool) -> StreamingDataLoader:
        dataset = _dataset(self.data_dir, split, self.max_seq_length, shuffle=shuffle, seed=self.seed, drop_last=True)
        world_size = dataset.distributed_env.world_size
        self._require_batches(_manifest(self.data_dir), split, world_size)
        return StreamingDataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
        )

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


def validation_windows(data_dir: Path, split: str, block_size: int) -> StreamingDataset:
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
    if count_windows(data_dir, split, block_size) == 0:
        raise UserError(
            f"{data_dir}: {split} has {found.splits[split].tokens:,} tokens, fewer than one window of "
            f"{block_size + 1}; choose a smaller context length or give more text."
        )
    return _dataset(data_dir, split, block_size, shuffle=False, seed=0, drop_last=False)


def count_windows(data_dir: Path, split: str, block_size: int) -> int:
    """How many windows of ``block_size`` tokens and the next one a split has. A window never spans two chunks."""
    index = json.loads((manifest.tokens_dir(data_dir, split) / "index.json").read_text(encoding="utf-8"))
    return sum(chunk["dim"] // (block_size + 1) for chunk in index["chunks"])


def _dataset(
    data_dir: Path, split: str, block_size: int, *, shuffle: bool, seed: int, drop_last: bool
) -> StreamingDataset:
    _silence_litdata()
    return StreamingDataset(
        str(manifest.tokens_dir(data_dir, split)),
        item_loader=TokensLoader(block_size=block_size + 1),
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        item_shuffle_window="full",  # litdata's default, blocks of 256 items, saves decoding: there is none here
        transform=to_int64,
    )


def to_int64(window: torch.Tensor) -> torch.Tensor:
    """``uint16`` saves disk; few operations of torch know it."""
    return window.to(torch.int64)


def _silence_litdata() -> None:
    """litdata makes a tensor from a read-only file and copies it at once; torch warns of the first half."""
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


def start_worker(_index: int) -> None:
    """Lets the main process save and stop: a signal to the whole group would end the workers first."""
    _silence_litdata()
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def moved_here(state: dict[str, Any], loader: StreamingDataLoader) -> dict[str, Any]:
    """The saved state of a loader for tokens that lie elsewhere now; litdata refuses any other absolute path.

    Args:
        state: what ``state_dict`` of a loader of the same tokens gave; left as it is.
        loader: the loader that is to go on from there.
    """
    return {**state, "dataset": {**state["dataset"], "input_dir_path": loader.dataset.input_dir.path}}
