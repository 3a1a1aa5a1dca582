"""The tokens that ``prepare_data.py`` wrote, as a LitGPT data module for any context length."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer

from litmoe.cli import UserError, command
from litmoe.data import manifest
from litmoe.data.loader import (
    MicroBatches,
    TokenLoader,
    TokenWindows,
    TrainLoader,
    full_batches,
    rank_and_world_size,
)
from litmoe.data.manifest import checked_manifest, complete_manifest


@dataclass
class TokenizedText(DataModule):
    """Micro batches ``(B, T + 1)`` int64: windows of ``max_seq_length`` tokens and the next one.

    Training windows are shuffled by the seed, differently in each epoch; validation windows are in the order of the
    text. Each device reads its share (``MicroBatches``). The paths have the names of ``litgpt.data.TextFiles``.
    """

    train_data_path: Path = Path("data/custom_text/train")
    """Folder of the training text; its tokens are in ../tokens/train."""
    val_data_path: Path = Path("data/custom_text/val")
    """Folder of the validation text, next to the training text."""
    num_workers: int = 2
    """Processes that read training batches ahead; 0 reads in the main process, as validation always does."""
    seed: int = 42
    """Determines the training order."""

    # Set by ``connect``. init=False keeps these fields out of run files and of the help.
    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        # A dataclass does not call the constructor of its base class.
        super().__init__()
        # A script may pass str. LitGPT's TextFiles fails for it.
        self.train_data_path, self.val_data_path = Path(self.train_data_path), Path(self.val_data_path)
        self.data_dir = self.train_data_path.parent
        # The tokens of both splits are in one folder next to them, as prepare_data.py writes them.
        if self.train_data_path.name != "train" or self.val_data_path != self.data_dir / "val":
            raise UserError(
                f"train_data_path {self.train_data_path} and val_data_path {self.val_data_path}: expected the folders "
                "train and val of one prepared corpus, such as data/custom_text/train and data/custom_text/val."
            )

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        """Set the tokenizer that made the tokens, the micro batch size and the context length; LitGPT calls this."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = max_seq_length

    def prepare_data(self) -> None:
        """Check the tokens: complete, undamaged, made from today's text and by this tokenizer, enough for a batch.

        Raises:
            UserError: one of the checks failed.
        """
        metadata = checked_manifest(self.data_dir)
        # The end-of-text id identifies the tokenizer well enough here; preflight compares the complete files.
        if self.tokenizer is not None and self.tokenizer.eos_id != metadata.tokenizer.eos_id:
            raise UserError(
                f"the tokens of {self.data_dir} were made with the tokenizer {metadata.tokenizer.name} (end-of-text id "
                f"{metadata.tokenizer.eos_id}); the run's tokenizer has the end-of-text id {self.tokenizer.eos_id}. "
                "Name the folder of the right one (--tokenizer_dir), or tokenize again: "
                f"`{command('prepare_data.py', '--data_dir', self.data_dir)}`."
            )
        # Reading all tokens for their checksums is enough once per machine.
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        if local_rank == "0":
            manifest.verify(self.data_dir)
        # Checked for one device now, because the number of devices is known only when the loaders are made.
        for split in manifest.SPLITS:
            self._windows(split, world_size=1)

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of this device's training batches, shuffled.

        Raises:
            UserError: there are too few windows for one micro batch per device.
        """
        rank, world_size = rank_and_world_size()
        windows = self._windows("train", world_size)
        batches = MicroBatches(len(windows), self.batch_size, seed=self.seed, rank=rank, world_size=world_size)
        return TrainLoader(windows, batches, self.num_workers)

    def val_dataloader(self) -> TokenLoader:
        """Return the loader of this device's validation batches, always the same ones in the same order.

        Raises:
            UserError: there are too few windows for one micro batch per device.
        """
        rank, world_size = rank_and_world_size()
        windows = self._windows("val", world_size)
        # A short text has fewer windows than a training step.
        batch_size = min(self.batch_size, len(windows) // world_size)
        # Without workers: starting processes takes longer than reading the windows.
        return TokenLoader(windows, full_batches(len(windows), batch_size, rank, world_size))

    def _windows(self, split: str, world_size: int) -> TokenWindows:
        """Return the windows of a split, which are enough for each device: for training a micro batch, else one."""
        metadata, batch_size = complete_manifest(self.data_dir), self.batch_size if split == "train" else 1
        windows, needed = TokenWindows(self.data_dir, split, self.max_seq_length), batch_size * world_size
        if len(windows) >= needed:
            return windows
        larger_split = " or a larger --val_fraction" if split == "val" else ""
        devices = f"{world_size} device{'s' if world_size > 1 else ''}"
        raise UserError(
            f"{self.data_dir}: {split} has {metadata.splits[split].tokens:,} tokens, {len(windows)} windows of "
            f"{self.max_seq_length + 1}; expected {needed} or more (micro_batch_size {batch_size} on {devices}). "
            f"Give more text{larger_split}, or a smaller --max-seq-length or --micro-batch-size."
        )
