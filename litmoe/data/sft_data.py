"""Prepared conversations as a LitGPT data module: packed micro batches with the answers as targets."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from litmoe.cli import UserError
from litmoe.data import instructions
from litmoe.data.conversations import DEFAULT_STYLE, EncodedConversation, encode_conversation, prompt_style
from litmoe.data.loader import MicroBatches, TokenLoader, TrainLoader, even_batches, rank_and_world_size
from litmoe.data.packing import one_per_row, pack

# A target without loss, as in PyTorch's cross-entropy and in LitGPT's finetuning.
IGNORE_INDEX = -100


class Conversations(NamedTuple):
    """A micro batch: rows of conversations one after the other, padded at the end with the end-of-text token.

    The fields are those of ``litmoe.train.model.Batch``.
    """

    input_ids: Tensor
    """``(B, T)`` int64"""
    targets: Tensor
    """``(B, T)`` int64, one position ahead; ``IGNORE_INDEX`` if the next token does not belong to an answer"""
    lengths: Tensor
    """``(B,)`` int64: the inputs of each row that are not padding"""
    documents: Tensor | None
    """``(B, T)`` int64: the number of each token's conversation in the micro batch, and for padding the number of
    conversations; None if row i is conversation i"""


@dataclass
class SplitCounts:
    """How the conversations of a split fit into the context."""

    conversations: int = 0
    """Conversations in the micro batches"""
    tokens: int = 0
    answer_tokens: int = 0
    """Tokens with loss: the answers, and the end-of-text token after each"""
    cut: int = 0
    """Conversations longer than the context, which lose their end"""
    left_out: int = 0
    """Conversations left out because the first answer would begin after the end of the context"""
    left_out_prompts: tuple[int, int] = (0, 0)
    """The fewest and the most tokens before the first answer, over those left out"""
    with_special_tokens: int = 0
    """Conversations that contained special tokens of the tokenizer as text, which were removed"""


class EncodedConversations(Dataset[tuple[Tensor, Tensor]]):
    """Conversations in memory, 5 bytes per token.

    An item is the token ids ``(T + 1,)`` int64 and whether each belongs to an answer ``(T + 1,)`` bool.

    Args:
        encoded: the conversations.
        max_seq_length: longer conversations are cut; -1 for no limit.
    """

    def __init__(self, encoded: Iterable[EncodedConversation], max_seq_length: int) -> None:
        size = max_seq_length + 1 if max_seq_length > 0 else None  # the last token is a target only
        self.counts = SplitCounts()
        ids, is_answer, left_out_prompts = [], [], []
        for conversation in encoded:
            self.counts.with_special_tokens += conversation.removed_special_tokens
            # Without a token to train on, a conversation would only take up a place in a micro batch.
            if not any(conversation.is_answer[:size]):
                left_out_prompts.append(conversation.is_answer.index(True))
                continue
            # int32 in memory, half of the int64 that the loss needs.
            ids.append(torch.tensor(conversation.input_ids[:size], dtype=torch.int32))
            is_answer.append(torch.tensor(conversation.is_answer[:size]))
            self.counts.cut += len(ids[-1]) < len(conversation.input_ids)
        # One tensor for all: thousands of small ones would take more memory for their headers than for the tokens.
        self._ids = torch.cat([torch.empty(0, dtype=torch.int32), *ids])
        self._is_answer = torch.cat([torch.empty(0, dtype=torch.bool), *is_answer])
        self._ends = torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
        self.counts.conversations = len(ids)
        self.counts.tokens, self.counts.answer_tokens = len(self._ids), int(self._is_answer.sum())
        self.counts.left_out = len(left_out_prompts)
        self.counts.left_out_prompts = min(left_out_prompts, default=0), max(left_out_prompts, default=0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = slice(self._ends[index], self._ends[index + 1])
        return self._ids[tokens].long(), self._is_answer[tokens]


def collate(
    items: list[tuple[Tensor, Tensor]], pad_id: int, max_seq_length: int, packed: bool = False
) -> Conversations:
    """Make a micro batch of items of ``EncodedConversations``.

    Args:
        items: the conversations.
        pad_id: the token of the padding.
        max_seq_length: the longest row; -1: the longest conversation is.
        packed: put several conversations into a row, which the model must keep apart by ``documents``.
    """
    lengths = [len(ids) - 1 for ids, _ in items]
    context = max_seq_length if max_seq_length > 0 else max(lengths)
    rows, length = pack(lengths, context) if packed else one_per_row(lengths, context)
    # Padding comes after the conversations of a row, so causal attention never reads it, and it has no target.
    input_ids = torch.full((len(rows), length), pad_id)
    targets = torch.full((len(rows), length), IGNORE_INDEX)
    documents = torch.full((len(rows), length), len(items))
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            ids, is_answer = items[index]
            place = slice(start, start + lengths[index])
            # The target of an input is the token after it, so the last token is no input and the first no target.
            input_ids[row, place] = ids[:-1]
            targets[row, place] = ids[1:].masked_fill(~is_answer[1:], IGNORE_INDEX)
            documents[row, place] = index
            start = place.stop
    row_sizes = torch.tensor([sum(lengths[index] for index in indices) for indices in rows])
    # Causal attention without a mask is faster.
    is_one_per_row = len(rows) == len(items)
    return Conversations(input_ids, targets, row_sizes, None if is_one_per_row else documents)


def longer_context(context: int, block_size: int | None = None) -> str:
    """Return the advice for conversations that do not fit a context.

    Args:
        context: in tokens.
        block_size: the longest context of the model; None if it is unknown.
    """
    if block_size is not None and context >= block_size:
        return "The model can read no more: give shorter conversations, or a checkpoint with a longer context."
    limit = "" if block_size is None else f" (the model can read {block_size:,} tokens)"
    return f"Give a longer --max_seq_length{limit}, or shorter conversations."


@dataclass
class InstructionData(DataModule):
    """Micro batches (``Conversations``) of the folder that ``prepare_data.py --instruct`` made.

    Training conversations are shuffled by the seed, differently in each epoch. Validation reads each conversation once,
    on any number of devices, so its loss is the mean over every answer token. The conversations of a micro batch are
    packed into few rows (``litmoe.data.packing``).
    """

    data_dir: Path = Path("data/instruct")
    """Folder of the prepared conversations."""
    prompt_style: str = DEFAULT_STYLE
    """Name of the LitGPT prompt style that surrounds each prompt."""
    seed: int = 42
    """Determines the training order."""

    # Set by ``connect``. init=False keeps these fields out of run files and of the help.
    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    # Set by finetuning.
    packed: bool = field(default=True, init=False, repr=False)
    """False for models whose attention cannot keep the conversations of a row apart: one conversation per row."""

    def __post_init__(self) -> None:
        # A dataclass does not call the constructor of its base class.
        super().__init__()
        self.data_dir = Path(self.data_dir)
        self._encoded: dict[str, EncodedConversations] = {}

    @property
    def manifest_path(self) -> Path:
        """The metadata file of the folder."""
        return self.data_dir / instructions.MANIFEST

    @property
    def counts(self) -> dict[str, SplitCounts]:
        """The counts of each split, after ``setup``."""
        return {split: encoded.counts for split, encoded in self._encoded.items()}

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        """Set the model's tokenizer, the micro batch size and the context length."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = max_seq_length
        # Tokens and their cut depend on all three.
        self._encoded = {}

    def prepare_data(self) -> None:
        """Check the name of the style, the prepared folder, and that the tokenizer can end an answer.

        Raises:
            UserError: one of the checks failed.
        """
        # Both raise for a mistake, which is reported before the model is loaded.
        instructions.read(self.data_dir)
        prompt_style(self.prompt_style)
        if self.tokenizer is not None and self.tokenizer.eos_id is None:
            raise UserError(
                "the checkpoint's tokenizer has no end-of-text token, so no answer could end. Name it next to the "
                'weights, in tokenizer_config.json ("eos_token") and generation_config.json ("eos_token_id").'
            )

    def setup(self, stage: str = "") -> None:
        """Encode all conversations, once after each ``connect``."""
        assert self.tokenizer is not None, "connect comes first"
        # In memory, because encoding takes seconds and most data sets for finetuning have a few million tokens.
        tokenizer, style = self.tokenizer, prompt_style(self.prompt_style)
        for split in instructions.SPLITS:
            if split not in self._encoded:
                messages = instructions.conversations(self.data_dir, split)
                # A generator, so that the lists of ids exist for one conversation at a time.
                encoded = (encode_conversation(one, tokenizer, style) for one in messages)
                self._encoded[split] = EncodedConversations(encoded, self.max_seq_length)

    def summary(self) -> str:
        """Return what the micro batches contain, and what they lack, in one to four lines; after ``setup``."""
        train, val = self.counts["train"], self.counts["val"]
        lines = [
            f"{train.conversations:,} training conversations ({train.answer_tokens:,} answer tokens of "
            f"{train.tokens:,}), {val.conversations:,} for validation ({val.answer_tokens:,} answer tokens)."
        ]
        if cut := train.cut + val.cut:
            lines.append(f"{cut:,} are longer than {self.max_seq_length} tokens: their end is cut off.")
        if left_out := train.left_out + val.left_out:
            lines.append(f"{left_out:,} left out: their first {self.max_seq_length} tokens hold no answer.")
        if altered := train.with_special_tokens + val.with_special_tokens:
            lines.append(f"{altered:,} contained special tokens of the tokenizer as text, which were removed.")
        return "\n".join(lines)

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of this device's training batches, shuffled.

        Raises:
            UserError: there are too few conversations for one micro batch per device.
        """
        rank, world_size = rank_and_world_size()
        encoded = self._encoded["train"]
        self._require("train", needed=world_size * self.batch_size, world_size=world_size)
        batches = MicroBatches(len(encoded), self.batch_size, seed=self.seed, rank=rank, world_size=world_size)
        return TrainLoader(encoded, batches, collate_fn=self._collate())

    def val_dataloader(self) -> TokenLoader:
        """Return the loader of this device's validation batches, always the same ones in the same order.

        Raises:
            UserError: there are fewer conversations than devices.
        """
        # No conversation is left out, even if micro batches become smaller: the loss is over every answer.
        rank, world_size = rank_and_world_size()
        encoded = self._encoded["val"]
        self._require("val", needed=world_size, world_size=world_size)
        batches = even_batches(len(encoded), self.batch_size, rank, world_size)
        return TokenLoader(encoded, batches, collate_fn=self._collate())

    def _collate(self) -> partial[Conversations]:
        assert self.tokenizer is not None
        pad_id = self.tokenizer.eos_id
        return partial(collate, pad_id=pad_id, max_seq_length=self.max_seq_length, packed=self.packed)

    def _require(self, split: str, needed: int, world_size: int) -> None:
        """Raise ``UserError`` if a split has fewer conversations than needed."""
        counts = self._encoded[split].counts
        if counts.conversations >= needed:
            return
        # Conversations that do not fit the context are the likely reason, so say how much they would need.
        misfits, advice = "", "Give more conversations, a smaller micro batch or fewer devices."
        if counts.left_out:
            shortest, longest = counts.left_out_prompts
            misfits = (
                f" ({counts.left_out} do not: {shortest:,} to {longest:,} tokens come before their first answer, and "
                f"the context has {self.max_seq_length:,})"
            )
            advice = longer_context(self.max_seq_length)
        devices = f"micro batch {self.batch_size} on {world_size} device{'s' if world_size > 1 else ''}"
        raise UserError(
            f"{self.data_dir}: {split} has {counts.conversations} conversations that fit{misfits}; expected {needed} "
            f"or more ({devices}). {advice}"
        )
