"""Micro batches of conversations: the answers are the targets and nothing else, all of them once, resumable."""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from litgpt import Tokenizer
from litgpt.data import SFTDataset
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from litmoe.cli import UserError
from litmoe.data import InstructionData
from litmoe.data.conversations import DEFAULT_STYLE, EncodedConversation, encode_conversation, prompt_style
from litmoe.data.instruction_module import Conversations
from litmoe.data.instructions import InstructArgs, conversations, prepare_instructions

T = 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Path:
    """91 conversations to train on and 30 held out, of one to three turns; don't write there."""
    folder = tmp_path_factory.mktemp("instruct")
    for split, texts in (("train", stories[:91]), ("val", stories[100:130])):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for i, story in enumerate(texts):
                messages = [
                    {"role": "user", "content": f"{split} {i}: a story"},
                    {"role": "assistant", "content": story},
                ]
                for turn in range(i % 3):
                    messages += [
                        {"role": "user", "content": f"And {turn}?"},
                        {"role": "assistant", "content": "The end."},
                    ]
                file.write(json.dumps({"messages": messages}) + "\n")
    prepare_instructions(InstructArgs(str(folder), folder / "data"))
    return folder / "data"


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


def module(
    folder: Path, tokenizer: Tokenizer, batch_size: int = 4, max_seq_length: int = -1, style: str = DEFAULT_STYLE
) -> InstructionData:
    data = InstructionData(folder, prompt_style=style)
    data.connect(tokenizer, batch_size, max_seq_length)
    data.prepare_data()
    data.setup()
    return data


def rows(batches: Iterable[Conversations]) -> list[tuple[int, ...]]:
    """The real inputs of each conversation, in order."""
    return [
        tuple(ids[:length].tolist())
        for batch in batches
        for ids, length in zip(batch.input_ids, batch.lengths, strict=True)
    ]


def encoded(folder: Path, split: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    return [tuple(one.input_ids[:-1]) for one in encoded_conversations(folder, split, tokenizer)]


def encoded_conversations(folder: Path, split: str, tokenizer: Tokenizer) -> list[EncodedConversation]:
    style = prompt_style(DEFAULT_STYLE)
    return [encode_conversation(messages, tokenizer, style) for messages in conversations(folder, split)]


# --- a micro batch ---


@pytest.mark.parametrize("style", ["phi-2", "alpaca", "llama3"])
def test_targets_are_the_answers_and_only_they(prepared: Path, tokenizer: Tokenizer, style: str) -> None:
    data = module(prepared, tokenizer, batch_size=7, style=style)
    wanted = iter(conversations(prepared, "val"))
    for batch in data.val_dataloader():
        assert {tensor.dtype for tensor in batch} == {torch.int64}
        for ids, targets, length in zip(*batch, strict=True):
            answers = [m["content"] for m in next(wanted) if m["role"] == "assistant"]
            text = tokenizer.processor.decode(targets[targets >= 0].tolist(), skip_special_tokens=False)
            assert text == "".join(f"{answer}<|endoftext|>" for answer in answers)
            # One position ahead of the input, wherever the next token is an answer's.
            ahead = torch.cat((ids[1:length], torch.tensor([tokenizer.eos_id])))
            marked = targets[:length] >= 0
            assert targets[:length][marked].equal(ahead[marked])
            assert (targets[length:] == -100).all() and (ids[length:] == tokenizer.eos_id).all()
    assert next(wanted, None) is None


def test_a_single_turn_is_what_litgpt_finetunes_on(prepared: Path, tokenizer: Tokenizer) -> None:
    data = module(prepared, tokenizer, batch_size=1)
    messages = [one for one in conversations(prepared, "val") if len(one) == 2]
    theirs = SFTDataset(
        [{"instruction": asked["content"], "output": answer["content"]} for asked, answer in messages],
        tokenizer,
        DEFAULT_STYLE,
    )
    ours = {row: batch for batch in data.val_dataloader() for row in rows([batch])}
    for sample in theirs:
        batch = ours[tuple(sample["input_ids"][:-1].tolist())]
        assert batch.targets[0, : batch.lengths[0]].equal(sample["labels"][1:])


def test_little_padding(prepared: Path, tokenizer: Tokenizer) -> None:
    widths = set()
    for batch in module(prepared, tokenizer, max_seq_length=1000).train_dataloader():
        width = batch.input_ids.shape[1]
        assert batch.targets.shape == batch.input_ids.shape == (4, width)
        assert width % 8 == 0 and width - 8 < batch.lengths.max() <= width
        widths.add(width)
    assert len(widths) > 1


def test_long_ones_are_cut_and_those_without_an_answer_left_out(prepared: Path, tokenizer: Tokenizer) -> None:
    whole = module(prepared, tokenizer)
    lengths = [len(row) for row in encoded(prepared, "train", tokenizer)]
    assert min(lengths) < T < max(lengths)
    data = module(prepared, tokenizer, batch_size=1, max_seq_length=T)
    assert data.counts["train"].conversations == 91
    assert data.counts["train"].cut == sum(length > T for length in lengths)
    assert sorted(rows(data.train_dataloader())) == sorted(row[:T] for row in encoded(prepared, "train", tokenizer))
    # The token after the last input is a target, as in pretraining.
    cut = [batch for batch in data.train_dataloader() if batch.lengths[0] == T]
    assert all(batch.input_ids.shape == (1, T) and (batch.targets[0] >= 0).any() for batch in cut)
    assert f"are longer than {T} tokens: their end is cut off" in data.summary()
    assert "longer" not in whole.summary() and "left out" not in whole.summary()
    prompts = [int(batch.targets[0].ge(0).long().argmax()) for batch in module(prepared, tokenizer, 1).val_dataloader()]
    shortest = min(prompts) + 1  # inputs that predict the first answer token of those with the shortest prompt
    few = module(prepared, tokenizer, batch_size=1, max_seq_length=shortest)
    fit = sum(prompt < shortest for prompt in prompts)
    assert 0 < fit < 30
    assert (few.counts["val"].conversations, few.counts["val"].left_out) == (fit, 30 - fit)
    assert few.counts["val"].answer_tokens == fit
    assert f"left out: their first {shortest} tokens hold no answer" in few.summary()


def test_special_tokens_left_out_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["Mia.", "a <|endoftext|> b", "Tom.", "c <|endoftext|>", "The sea."] * 4
    rows = [{"prompt": f"What is {number}?", "response": text} for number, text in enumerate(texts)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_instructions(InstructArgs(str(tmp_path / "rows.json"), tmp_path / "data", val_fraction=0.3))
    data = module(tmp_path / "data", tokenizer)
    assert sum(data.altered.values()) == 8
    assert "8 have special tokens" in data.summary()


def test_the_summary_counts_answer_tokens(prepared: Path, tokenizer: Tokenizer) -> None:
    data = module(prepared, tokenizer, batch_size=1)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        assert data.counts[split].answer_tokens == sum(int((batch.targets >= 0).sum()) for batch in loader)
    train, val = data.counts["train"], data.counts["val"]
    assert data.summary() == (
        f"91 conversations to train on ({train.answer_tokens:,} answer tokens of {train.tokens:,}), "
        f"30 held out ({val.answer_tokens:,} answer tokens)."
    )


# --- order ---


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30, 64])
def test_validation_is_everything_in_order(prepared: Path, tokenizer: Tokenizer, batch_size: int) -> None:
    loader = module(prepared, tokenizer, batch_size).val_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert rows(batches) == encoded(prepared, "val", tokenizer)
        assert len(batches) == len(loader) == -(-30 // batch_size)
        assert max(len(batch.lengths) for batch in batches) <= batch_size


def test_each_epoch_is_shuffled_anew(prepared: Path, tokenizer: Tokenizer) -> None:
    loader = module(prepared, tokenizer, batch_size=1).train_dataloader()
    first, second = rows(loader), rows(loader)
    assert first != second != encoded(prepared, "train", tokenizer)
    assert sorted(first) == sorted(second) == sorted(encoded(prepared, "train", tokenizer))
    assert rows(module(prepared, tokenizer, batch_size=1).train_dataloader()) == first


def endless(loader: Iterable[Conversations]) -> Iterator[Conversations]:
    while True:
        yield from loader


@pytest.mark.parametrize("taken", [0, 5, 22, 30])
def test_a_resumed_reader_goes_on_where_it_was(prepared: Path, tokenizer: Tokenizer, taken: int) -> None:
    """In the middle of an epoch, at its end (22 micro batches), and in the second."""
    loader = module(prepared, tokenizer).train_dataloader()
    wanted = endless(loader)
    list(itertools.islice(wanted, taken))
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {"epoch": (taken - 1) // 22 if taken else 0, "items": 4 * ((taken - 1) % 22 + 1) if taken else 0}
    rest = rows(itertools.islice(wanted, 30))
    resumed = module(prepared, tokenizer).train_dataloader()
    resumed.load_state_dict(state)
    assert rows(itertools.islice(endless(resumed), 30)) == rest


@pytest.fixture(params=[0, 1])
def launched_as(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of two devices, as torch knows it; its backend without the other one serves where nothing is sent."""
    distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    distributed.destroy_process_group()


def test_launched_processes_take_turns_in_one_sequence(prepared: Path, tokenizer: Tokenizer, launched_as: int) -> None:
    data = module(prepared, tokenizer)
    share = [rows([batch]) for batch in itertools.islice(endless(data.train_dataloader()), 15)]
    held_out = [rows([batch]) for batch in data.val_dataloader()]
    distributed.destroy_process_group()
    alone = [rows([batch]) for batch in itertools.islice(endless(data.train_dataloader()), 30)]
    assert share == alone[launched_as::2]
    assert len(held_out) == 4  # 30 in micro batches of at most 4: as many for each device
    everything = encoded(prepared, "val", tokenizer)
    assert [row for batch in held_out for row in batch] == [
        row for i in range(launched_as, 8, 2) for row in everything[30 * i // 8 : 30 * (i + 1) // 8]
    ]
    distributed.init_process_group("fake", store=FakeStore(), rank=launched_as, world_size=2)  # for the fixture's end


# --- mistakes ---


def test_too_few_conversations_are_told(prepared: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"train has 91 conversations .* expected 92 or more \(micro batch 92 on 1 device"
    ):
        module(prepared, tokenizer, batch_size=92).train_dataloader()
    prompts = [one.is_answer.index(True) for one in encoded_conversations(prepared, "val", tokenizer)]
    for split in ("val", "train"):
        with pytest.raises(UserError) as raised:
            getattr(module(prepared, tokenizer, max_seq_length=4), f"{split}_dataloader")()
        assert f"{split} has 0 conversations that fit" in str(raised.value)
        assert "context has 4); expected" in str(raised.value) and "--max_seq_length" in str(raised.value)
        if split == "val":
            assert f"(30 do not: {min(prompts)} to {max(prompts)} tokens come before" in str(raised.value)


def test_a_folder_that_is_not_as_it_was_prepared(prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"does not exist; expected prepared instructions: `uv run python prepare_data\.py"
    ):
        module(tmp_path / "none", tokenizer)
    copy = shutil.copytree(prepared, tmp_path / "data")
    assert module(copy, tokenizer).manifest_path.is_file()
    with open(copy / "train.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"not as it was prepared: train\.jsonl changed"):
        module(copy, tokenizer)
    (copy / "instructions.json").unlink()
    with pytest.raises(UserError, match=r"holds no instructions\.json"):
        module(copy, tokenizer)


def test_a_tokenizer_without_an_end_of_text(prepared: Path, tokenizer: Tokenizer) -> None:
    tokenizer.eos_id = None
    with pytest.raises(UserError, match="no end-of-text token, so no answer could end"):
        module(prepared, tokenizer)


def test_an_unknown_style(prepared: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="did you mean alpaca"):
        module(prepared, tokenizer, style="alpacca")
