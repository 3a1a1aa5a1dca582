"""The reader: prepared tokens as LitGPT's data module, any context length, resumable to the batch."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch import distributed

from litmoe.cli import UserError, command
from litmoe.data import manifest
from litmoe.data.documents import text_files
from litmoe.data.manifest import Manifest
from litmoe.data.reader import MicroBatches, TokenLoader, TokenWindows, count_windows


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
        """Checks that there are tokens, undamaged, of the text and the tokenizer as they are now, enough for a batch.

        Raises:
            UserError: where not.
        """
        found = checked_manifest(self.data_dir)
        if self.tokenizer is not None and self.tokenizer.eos_id != found.tokenizer.eos_id:
            raise UserError(
                f"the tokens of {self.data_dir} were made with the tokenizer {found.tokenizer.name}, whose end-of-text "
                f"id is {found.tokenizer.eos_id}; the run's tokenizer has {self.tokenizer.eos_id}. Name its folder "
                f"(--tokenizer_dir), or tokenize again: `{command('prepare_data.py', '--data_dir', self.data_dir)}`."
            )
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":  # once on each machine
            manifest.verify(self.data_dir)
        for split in manifest.SPLITS:
            self._require_batches(found, split, world_size=1)

    def train_dataloader(self) -> TokenLoader:
        """This device's training batches, shuffled."""
        return self._loader("train", seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> TokenLoader:
        """This device's validation batches, always the same ones in the same order."""
        return self._loader("val", seed=None, num_workers=0)  # starting processes takes longer than reading

    def _loader(self, split: str, *, seed: int | None, num_workers: int) -> TokenLoader:
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
                f"`{command('prepare_data.py', '--data_dir', data_dir)}` tokenizes it again."
            )
    return found


def _manifest(data_dir: Path) -> Manifest:
    found = manifest.read(data_dir)
    if found is None:
        state = "are not complete" if manifest.tokens_dir(data_dir).is_dir() else "do not exist"
        raise UserError(
            f"the tokens of {data_dir} {state}; `{command('prepare_data.py', '--data_dir', data_dir)}` makes them."
        )
    return found


def validation_windows(data_dir: Path, split: str, block_size: int) -> TokenWindows:
    """A split as windows that follow and do not overlap each other, in the order of the text.

    Args:
        data_dir: a prepared corpus.
        split: ``train`` or ``val``.
        block_size: context length T.

    Returns:
        A dataset with ``len``; each item is ``(T + 1,)`` int64. The same windows that training validates on.

    Raises:
        UserError: for missing, incomplete, stale or damaged tokens, or fewer than one window.
    """
    found = checked_manifest(data_dir)
    manifest.verify(data_dir, [split])
    windows = TokenWindows(data_dir, split, block_size)
    if len(windows) == 0:
        raise UserError(
            f"{data_dir}: {split} has {found.splits[split].tokens:,} tokens, fewer than one window of "
            f"{block_size + 1}; choose a smaller context length or give more text."
        )
    return windows
