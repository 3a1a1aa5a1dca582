"""Conversations as LitGPT's data module: padded micro batches whose targets are the answers, resumable to the batch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from litgpt.data import DataModule
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from torch import Tensor, distributed
from torch.utils.data import Dataset

from litmoe.cli import UserError
from litmoe.data import instructions
from litmoe.data.conversations import (
    DEFAULT_STYLE,
    EncodedConversation,
    encode_conversation,
    prompt_style,
    without_special_tokens,
)
from litmoe.data.manifest import SPLITS
from litmoe.data.reader import MicroBatches, TokenLoader

IGNORED = -100  # a target without loss, as PyTorch's cross-entropy and LitGPT's finetuning have it
MULTIPLE = 8  # of T, so that a GPU sees few lengths and matrices that fill its tiles


class Conversations(NamedTuple):
    """A micro batch."""

    input_ids: Tensor
    """``(B, T)`` int64, padded at the end with the end-of-text token; T is the longest's length or a little more"""
    targets: Tensor
    """``(B, T)`` int64, one position ahead; -100 where the next token is none of the answer"""
    lengths: Tensor
    """``(B,)`` int64: how many of the T inputs are real"""


@dataclass
class Counts:
    """What became of a split's conversations."""

    conversations: int = 0
    """That batches are made of"""
    tokens: int = 0
    answer_tokens: int = 0
    """Tokens with loss: the answers and the end-of-text token after each"""
    cut: int = 0
    """Longer than the context: their end is left out"""
    left_out: int = 0
    """Whose answer would begin beyond the context"""
    prompts: tuple[int, int] = (0, 0)
    """The fewest and the most tokens before the first answer of those"""


class EncodedConversations(Dataset[EncodedConversation]):
    """Conversations in memory, five bytes a token; an item is ``(T + 1,)`` token ids and as many marks."""

    def __init__(self, encoded: Iterable[EncodedConversation], max_seq_length: int) -> None:
        self.counts = Counts()
        ids, marks = [torch.empty(0, dtype=torch.int32)], [torch.empty(0, dtype=torch.bool)]
        size = max_seq_length + 1 if max_seq_length > 0 else None  # the last token is a target only
        prompts = []
        for conversation in encoded:
            is_answer = conversation.is_answer[:size]
            if not any(is_answer):
                prompts.append(conversation.is_answer.index(True))
                continue
            self.counts.cut += len(is_answer) < len(conversation.is_answer)
            ids.append(torch.tensor(conversation.input_ids[:size], dtype=torch.int32))
            marks.append(torch.tensor(is_answer))
        self._ids, self._is_answer = torch.cat(ids), torch.cat(marks)
        self._ends = torch.tensor([len(found) for found in ids]).cumsum(0).tolist()
        self.counts.left_out, self.counts.prompts = len(prompts), (min(prompts, default=0), max(prompts, default=0))
        self.counts.conversations = len(self)
        self.counts.tokens, self.counts.answer_tokens = len(self._ids), int(self._is_answer.sum())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        part = slice(self._ends[index], self._ends[index + 1])
        return self._ids[part].long(), self._is_answer[part]


def collate(conversations: list[tuple[Tensor, Tensor]], pad_id: int, max_seq_length: int) -> Conversations:
    """Conversations side by side; see ``Conversations``."""
    lengths = torch.tensor([len(ids) - 1 for ids, _ in conversations])
    longest = int(lengths.max())
    width = -(-longest // MULTIPLE) * MULTIPLE
    width = min(width, max_seq_length) if max_seq_length > 0 else width
    input_ids = torch.full((len(conversations), width), pad_id)
    targets = torch.full((len(conversations), width), IGNORED)
    for row, (ids, is_answer) in enumerate(conversations):
        input_ids[row, : lengths[row]] = ids[:-1]
        targets[row, : lengths[row]] = ids[1:].masked_fill(~is_answer[1:], IGNORED)
    return Conversations(input_ids, targets, lengths)


def longer_context(context: int, block_size: int | None = None) -> str:
    """What to do where conversations do not fit a context.

    Args:
        context: in tokens.
        block_size: the longest context that the model can read.
    """
    if block_size is not None and context >= block_size:
        return "The model can read no more: give shorter conversations, or a checkpoint with a longer context."
    most = "" if block_size is None else f" (the model can read {block_size:,} tokens)"
    return f"Give a longer --max_seq_length{most}, or shorter conversations."


@dataclass
class InstructionData(DataModule):
    """Micro batches (``Conversations``) of what ``prepare_data.py --instruct`` made.

    Training conversations come in an order shuffled anew for each epoch from the seed; validation is all conversations,
    each once, on any number of devices, so its loss is over every answer token. Each device gets its share
    (``MicroBatches``); a loader knows its place (``TokenLoader``).
    """

    data_dir: Path = Path("data/instruct")
    """Folder of the prepared conversations."""
    prompt_style: str = DEFAULT_STYLE
    """One of LitGPT's styles by name: what stands around a prompt."""
    seed: int = 42
    """Decides the training order."""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.data_dir = Path(self.data_dir)
        self._encoded: dict[str, EncodedConversations] = {}
        self.altered: dict[str, int] = {}

    @property
    def manifest_path(self) -> Path:
        """What the folder says of itself."""
        return self.data_dir / instructions.MANIFEST

    @property
    def style(self) -> PromptStyle:
        """The style itself."""
        return prompt_style(self.prompt_style)

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        """Called with what the batches are to be; the tokenizer is the model's."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = max_seq_length
        self._encoded = {}

    def prepare_data(self) -> None:
        """Checks the style's name, that there are conversations as they were prepared, and that an answer can end.

        Raises:
            UserError: where not.
        """
        instructions.read(self.data_dir)
        prompt_style(self.prompt_style)
        if self.tokenizer is not None and self.tokenizer.eos_id is None:
            raise UserError(
                "the checkpoint's tokenizer has no end-of-text token, so no answer could end; name it in "
                'tokenizer_config.json ("eos_token") and generation_config.json ("eos_token_id") beside the weights.'
            )

    def setup(self, stage: str = "") -> None:
        """Encodes all conversations, once.

        Raises:
            UserError: too few conversations for a micro batch.
        """
        assert self.tokenizer is not None, "connect comes first"
        for split in SPLITS:
            if split not in self._encoded:
                self._encoded[split] = EncodedConversations(self._encode(split), self.max_seq_length)

    def _encode(self, split: str) -> Iterable[EncodedConversation]:
        assert self.tokenizer is not None
        style = self.style
        self.altered[split] = 0
        for messages in instructions.conversations(self.data_dir, split):
            texts = [without_special_tokens(message, self.tokenizer) for message in messages]
            self.altered[split] += texts != messages
            yield encode_conversation(texts, self.tokenizer, style)

    @property
    def counts(self) -> dict[str, Counts]:
        """By split, after ``setup``."""
        return {split: encoded.counts for split, encoded in self._encoded.items()}

    def summary(self) -> str:
        """What the batches are made of and what is not in them, in a line or two; after ``setup``."""
        train, val = self.counts["train"], self.counts["val"]
        lines = [
            f"{train.conversations:,} conversations to train on ({train.answer_tokens:,} answer tokens of "
            f"{train.tokens:,}), {val.conversations:,} held out ({val.answer_tokens:,} answer tokens)."
        ]
        if train.cut + val.cut:
            lines.append(f"{train.cut + val.cut:,} are longer than {self.max_seq_length} tokens: their end is cut off.")
        if train.left_out + val.left_out:
            lines.append(
                f"{train.left_out + val.left_out:,} left out: their first {self.max_seq_length} tokens hold no answer."
            )
        if altered := sum(self.altered.values()):
            lines.append(
                f"{altered:,} have special tokens of the tokenizer written out in their messages (its end of"
                " text, say), which are left out of them."
            )
        return "\n".join(lines)

    def train_dataloader(self) -> TokenLoader:
        """This device's training batches, shuffled.

        Raises:
            UserError: fewer conversations than fill a micro batch of each device.
        """
        return self._loader("train", self.seed)

    def val_dataloader(self) -> TokenLoader:
        """This device's validation batches, always the same ones in the same order, as many as each other device's.

        Raises:
            UserError: fewer conversations than devices.
        """
        return self._loader("val", None)

    def _loader(self, split: str, seed: int | None) -> TokenLoader:
        launched = distributed.is_available() and distributed.is_initialized()
        rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if launched else (0, 1)
        encoded = self._encoded[split]
        needed = world_size if seed is None else world_size * self.batch_size
        if len(encoded) < needed:
            devices = f"micro batch {self.batch_size} on {world_size} device{'s' if world_size > 1 else ''}"
            left_out, (shortest, longest) = encoded.counts.left_out, encoded.counts.prompts
            why = (
                f": {shortest:,} to {longest:,} tokens come before their first answer, and the context has "
                f"{self.max_seq_length:,}"
            )
            if len(encoded) + left_out >= needed:
                remedy = longer_context(self.max_seq_length)
            elif split == "val":
                remedy = "Give more conversations, or a larger --val_fraction."
            else:
                remedy = "Give more conversations, or a smaller micro batch."
            raise UserError(
                f"{self.data_dir}: {split} has {len(encoded)} conversations that fit ({left_out} do "
                f"not{why if left_out else ''}); expected {needed} or more ({devices}). {remedy}"
            )
        batches = MicroBatches(
            len(encoded), self.batch_size, seed=seed, rank=rank, world_size=world_size, keep_all=seed is None
        )
        assert self.tokenizer is not None
        together = partial(collate, pad_id=self.tokenizer.eos_id, max_seq_length=self.max_seq_length)
        return TokenLoader(encoded, batches, collate_fn=together)
