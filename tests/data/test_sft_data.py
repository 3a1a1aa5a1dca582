"""Micro batches of conversations: the answers are the targets, each answer occurs once, exact resume."""

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from litgpt import Tokenizer
from litgpt.data import SFTDataset
from torch import distributed

from litmoe.cli import UserError
from litmoe.data import InstructionData
from litmoe.data.conversations import DEFAULT_STYLE, EncodedConversation, encode_conversation, prompt_style
from litmoe.data.instructions import InstructArgs, conversations, prepare_instructions
from litmoe.data.packing import row_length, row_lengths
from litmoe.data.sft_data import Conversations
from tests.data.instruction_helpers import jsonl, turn
from tests.data.token_helpers import endless, take

T = 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Path:
    """91 training and 30 validation conversations of one to three turns; tests must not write there."""
    folder = tmp_path_factory.mktemp("instruct")
    for split, texts in (("train", stories[:91]), ("val", stories[100:130])):
        chats = [turn(f"{split} {i}: a story", story) for i, story in enumerate(texts)]
        for i, messages in enumerate(chats):
            messages += [message for number in range(i % 3) for message in turn(f"And {number}?", "The end.")]
        jsonl(folder / f"{split}.jsonl", chats)
    prepare_instructions(InstructArgs(str(folder), folder / "data"))
    return folder / "data"


def module(
    folder: Path, tokenizer: Tokenizer, batch_size: int = 4, max_seq_length: int = -1, style: str = DEFAULT_STYLE
) -> InstructionData:
    data = InstructionData(folder, prompt_style=style)
    data.connect(tokenizer, batch_size, max_seq_length)
    data.prepare_data()
    data.setup()
    return data


def unpack(batch: Conversations) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The inputs and targets of each conversation without padding."""
    if batch.documents is None:
        fields = zip(batch.input_ids, batch.targets, batch.lengths, strict=True)
        return [(ids[:length], targets[:length]) for ids, targets, length in fields]
    places = [batch.documents == number for number in range(int(batch.documents.max()) + 1)]
    conversations = [(batch.input_ids[place], batch.targets[place]) for place in places]
    # The highest number is that of the padding, if there is any.
    return conversations[:-1] if (conversations[-1][1] < 0).all() else conversations


def rows(batches: Iterable[Conversations]) -> list[tuple[int, ...]]:
    """The inputs of each conversation without padding."""
    return [tuple(ids.tolist()) for batch in batches for ids, _ in unpack(batch)]


def encoded_conversations(folder: Path, split: str, tokenizer: Tokenizer) -> list[EncodedConversation]:
    style = prompt_style(DEFAULT_STYLE)
    return [encode_conversation(messages, tokenizer, style) for messages in conversations(folder, split)]


def inputs(folder: Path, split: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    return [tuple(one.input_ids[:-1]) for one in encoded_conversations(folder, split, tokenizer)]


# --- a micro batch ---


@pytest.mark.parametrize("style", ["phi-2", "alpaca", "llama3"])
def test_targets_are_the_answers(prepared: Path, tokenizer: Tokenizer, style: str) -> None:
    data = module(prepared, tokenizer, batch_size=7, style=style)
    messages = iter(conversations(prepared, "val"))
    for batch in data.val_dataloader():
        assert {tensor.dtype for tensor in batch if tensor is not None} == {torch.int64}
        for ids, targets in unpack(batch):
            answers = [message["content"] for message in next(messages) if message["role"] == "assistant"]
            text = tokenizer.processor.decode(targets[targets >= 0].tolist(), skip_special_tokens=False)
            assert text == "".join(f"{answer}<|endoftext|>" for answer in answers)
            ahead = torch.cat((ids[1:], torch.tensor([tokenizer.eos_id])))
            has_loss = targets >= 0
            assert targets[has_loss].equal(ahead[has_loss])
        for ids, targets, length in zip(batch.input_ids, batch.targets, batch.lengths, strict=True):
            assert (targets[length:] == -100).all() and (ids[length:] == tokenizer.eos_id).all()
    assert next(messages, None) is None


def test_single_turn_equals_litgpt(prepared: Path, tokenizer: Tokenizer) -> None:
    data = module(prepared, tokenizer, batch_size=1)
    pairs = [one for one in conversations(prepared, "val") if len(one) == 2]
    samples = SFTDataset(
        [{"instruction": question["content"], "output": answer["content"]} for question, answer in pairs],
        tokenizer,
        DEFAULT_STYLE,
    )
    ours = {row: batch for batch in data.val_dataloader() for row in rows([batch])}
    for sample in samples:
        batch = ours[tuple(sample["input_ids"][:-1].tolist())]
        assert batch.targets[0, : batch.lengths[0]].equal(sample["labels"][1:])


def test_conversations_are_packed(prepared: Path, tokenizer: Tokenizer) -> None:
    shapes = set()
    for batch in module(prepared, tokenizer, max_seq_length=1000).train_dataloader():
        (B, T), lengths = batch.input_ids.shape, [len(row) for row in rows([batch])]
        assert len(lengths) == 4 and sum(lengths) == batch.lengths.sum()
        # All would fit into one row.
        assert row_length(sum(lengths), 1000) >= B * T and T in row_lengths(1, 1000)
        assert batch.targets.shape == batch.documents.shape == (B, T)
        for row, length in enumerate(batch.lengths.tolist()):
            assert (batch.documents[row, length:] == 4).all() and (batch.documents[row, :length] < 4).all()
        shapes.add((B, T))
    assert len(shapes) > 1


def test_models_without_masks_get_one_conversation_per_row(prepared: Path, tokenizer: Tokenizer) -> None:
    data = module(prepared, tokenizer, max_seq_length=1000)
    packed = list(data.train_dataloader())
    data.packed = False
    for batch, other in zip(data.train_dataloader(), packed, strict=True):
        assert batch.documents is None
        assert batch.input_ids.shape == (4, row_length(int(batch.lengths.max()), 1000))
        assert rows([batch]) == rows([other])


def test_long_conversations_are_cut(prepared: Path, tokenizer: Tokenizer) -> None:
    lengths = [len(row) for row in inputs(prepared, "train", tokenizer)]
    assert min(lengths) < T < max(lengths)
    data = module(prepared, tokenizer, batch_size=1, max_seq_length=T)
    assert data.counts["train"].conversations == 91
    assert data.counts["train"].cut == sum(length > T for length in lengths)
    assert sorted(rows(data.train_dataloader())) == sorted(row[:T] for row in inputs(prepared, "train", tokenizer))
    # The token after the last input is a target, as in pretraining.
    cut = [batch for batch in data.train_dataloader() if batch.lengths[0] == T]
    assert all(batch.input_ids.shape == (1, T) and (batch.targets[0] >= 0).any() for batch in cut)
    assert f"are longer than {T} tokens" in data.summary()
    uncut = module(prepared, tokenizer).summary()
    assert "longer" not in uncut and "left out" not in uncut


def test_late_answers_are_left_out(prepared: Path, tokenizer: Tokenizer) -> None:
    prompts = [one.is_answer.index(True) for one in encoded_conversations(prepared, "val", tokenizer)]
    shortest = min(prompts)  # inputs that predict the first answer token after the shortest prompt
    data = module(prepared, tokenizer, batch_size=1, max_seq_length=shortest)
    n_fit = sum(prompt == shortest for prompt in prompts)
    assert 0 < n_fit < 30
    counts = data.counts["val"]
    assert (counts.conversations, counts.left_out, counts.answer_tokens) == (n_fit, 30 - n_fit, n_fit)
    assert f"left out: their first {shortest} tokens hold no answer" in data.summary()


def test_removed_special_tokens_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["Mia.", "a <|endoftext|> b", "Tom.", "c <|endoftext|>", "The sea."] * 4
    pairs = [{"prompt": f"What is {number}?", "response": text} for number, text in enumerate(texts)]
    (tmp_path / "rows.json").write_text(json.dumps(pairs), encoding="utf-8")
    prepare_instructions(InstructArgs(str(tmp_path / "rows.json"), tmp_path / "data", val_fraction=0.3))
    data = module(tmp_path / "data", tokenizer)
    assert sum(counts.with_special_tokens for counts in data.counts.values()) == 8
    assert "8 contained special tokens" in data.summary()


def test_counts_equal_the_micro_batches(prepared: Path, tokenizer: Tokenizer) -> None:
    data = module(prepared, tokenizer, batch_size=1)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        assert data.counts[split].answer_tokens == sum(int((batch.targets >= 0).sum()) for batch in loader)
    assert "91 training conversations" in data.summary() and "30 for validation" in data.summary()


# --- order ---


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30, 64])
def test_validation_reads_each_conversation_once(prepared: Path, tokenizer: Tokenizer, batch_size: int) -> None:
    loader = module(prepared, tokenizer, batch_size).val_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert rows(batches) == inputs(prepared, "val", tokenizer)
        assert len(batches) == len(loader) == -(-30 // batch_size)
        assert max(len(unpack(batch)) for batch in batches) <= batch_size


def test_each_epoch_has_its_own_order(prepared: Path, tokenizer: Tokenizer) -> None:
    loader = module(prepared, tokenizer, batch_size=1).train_dataloader()
    first, second = rows(loader), rows(loader)
    assert first != second != inputs(prepared, "train", tokenizer)
    assert sorted(first) == sorted(second) == sorted(inputs(prepared, "train", tokenizer))
    assert rows(module(prepared, tokenizer, batch_size=1).train_dataloader()) == first


@pytest.mark.parametrize("taken", [0, 5, 22, 30])
def test_resume(prepared: Path, tokenizer: Tokenizer, taken: int) -> None:
    """In the middle of an epoch, at its end (22 micro batches), and in the second."""
    loader = module(prepared, tokenizer).train_dataloader()
    uninterrupted = endless(loader)
    list(itertools.islice(uninterrupted, taken))
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {"epoch": (taken - 1) // 22 if taken else 0, "items": 4 * ((taken - 1) % 22 + 1) if taken else 0}
    rest = rows(itertools.islice(uninterrupted, 30))
    resumed = module(prepared, tokenizer).train_dataloader()
    resumed.load_state_dict(state)
    assert rows(take(resumed, 30)) == rest


def test_ranks_share_one_sequence(prepared: Path, tokenizer: Tokenizer, rank: int) -> None:
    data = module(prepared, tokenizer)
    share = [rows([batch]) for batch in take(data.train_dataloader(), 15)]
    validation = [row for batch in data.val_dataloader() for row in rows([batch])]
    distributed.destroy_process_group()
    alone = [rows([batch]) for batch in take(data.train_dataloader(), 30)]
    assert share == alone[rank::2]
    # 30 conversations in micro batches of at most 4: four for each device.
    everything = inputs(prepared, "val", tokenizer)
    assert validation == [row for i in range(rank, 8, 2) for row in everything[30 * i // 8 : 30 * (i + 1) // 8]]


# --- mistakes ---


def test_too_few_conversations(prepared: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"train has 91 conversations .* expected 92 or more \(micro batch 92 on 1 dev"):
        module(prepared, tokenizer, batch_size=92).train_dataloader()
    prompts = [one.is_answer.index(True) for one in encoded_conversations(prepared, "val", tokenizer)]
    data = module(prepared, tokenizer, max_seq_length=4)
    with pytest.raises(UserError, match=r"train has 0 conversations that fit .*--max_seq_length"):
        data.train_dataloader()
    with pytest.raises(UserError, match=rf"\(30 do not: {min(prompts)} to {max(prompts)} tokens come before"):
        data.val_dataloader()


def test_missing_or_changed_folder(prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist.*`uv run python prepare_data\.py"):
        module(tmp_path / "none", tokenizer)
    copy = shutil.copytree(prepared, tmp_path / "data")
    assert module(copy, tokenizer).manifest_path.is_file()
    with open(copy / "train.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"train\.jsonl changed"):
        module(copy, tokenizer)


def test_tokenizer_without_end_of_text(prepared: Path, tokenizer: Tokenizer) -> None:
    tokenizer.eos_id = None
    with pytest.raises(UserError, match="no end-of-text token, so no answer could end"):
        module(prepared, tokenizer)


def test_unknown_style(prepared: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="did you mean alpaca"):
        module(prepared, tokenizer, style="alpacca")
