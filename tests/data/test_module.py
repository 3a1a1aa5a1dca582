"""Batches from tokens: every window once, the right order, exact resume, any number of workers and devices."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming.writer import BinaryWriter
from litgpt.tokenizer import Tokenizer as LitTokenizer
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

import litmoe.data.reader
from litmoe.cli import UserError
from litmoe.data import tokenizers, tokens
from litmoe.data.documents import END_OF_TEXT
from litmoe.data.module import TokenizedText, validation_windows
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.data.reader import MicroBatches, TokenLoader, TokenWindows, count_windows, token_chunks

T = 16  # context length of these tests


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer_dir: Path) -> Path:
    """A corpus of several chunks in train and one in val."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    for split, texts in (("train", stories[:120]), ("val", stories[120:])):
        (folder / split).mkdir(parents=True)
        (folder / split / "a.txt").write_text(f"\n{END_OF_TEXT}\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "MIN_CHUNK_TOKENS", 400)
        found = prepare(PrepareArgs(data_dir=folder, tokenizer_dir=tokenizer_dir, num_workers=0))
    assert found.splits["train"].chunks > 4 and found.splits["val"].chunks == 1
    return folder


def module(folder: Path, batch_size: int = 4, length: int = T, **settings: int) -> TokenizedText:
    data = TokenizedText(folder / "train", folder / "val", **{"num_workers": 0, **settings})
    data.connect(None, batch_size=batch_size, max_seq_length=length)
    data.prepare_data()
    data.setup()
    return data


def stream(folder: Path, split: str) -> list[np.ndarray]:
    """Tokens of each chunk, from the files."""
    files = sorted((folder / "tokens" / split).glob("*.bin"), key=lambda path: int(path.stem.split("-")[-1]))
    return [np.fromfile(path, np.uint16, offset=12) for path in files]


def windows(folder: Path, split: str, length: int = T) -> list[tuple[int, ...]]:
    """What a reader must give: windows of T + 1 tokens, one after the other."""
    size = length + 1
    return [
        tuple(chunk[i * size : (i + 1) * size].tolist())
        for chunk in stream(folder, split)
        for i in range(len(chunk) // size)
    ]


def rows(batches: object) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch]  # type: ignore[attr-defined]


def test_batches_are_what_litgpt_takes(prepared: Path) -> None:
    assert litmoe.data.TokenizedText is TokenizedText
    batch = next(iter(module(prepared).train_dataloader()))
    assert batch.shape == (4, T + 1) and batch.dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_gives_every_window_once_an_epoch_in_new_order(prepared: Path, num_workers: int) -> None:
    loader = module(prepared, num_workers=num_workers).train_dataloader()
    first, second = rows(loader), rows(loader)
    wanted = windows(prepared, "train")
    assert set(first) <= set(wanted) and len(first) == len(wanted) // 4 * 4 == len(loader) * 4
    assert len(wanted) - 4 < len(set(first)) <= len(wanted)
    assert first != second and len(second) == len(first)
    ordered = [row for row in wanted if row in set(first)]
    assert sum(a == b for a, b in zip(first, ordered, strict=False)) < len(first) // 4


def test_the_seed_decides_the_order(prepared: Path) -> None:
    first = rows(module(prepared).train_dataloader())
    assert rows(module(prepared).train_dataloader()) == first
    assert rows(module(prepared, seed=1).train_dataloader()) != first


def test_validation_keeps_the_order_of_the_text(prepared: Path) -> None:
    loader = module(prepared, batch_size=1, num_workers=2).val_dataloader()
    assert rows(loader) == windows(prepared, "val")
    next(iter(loader))  # a pass that is left in the middle
    assert rows(loader) == windows(prepared, "val")


@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_the_same_tokens_serve_any_context_length(prepared: Path, length: int) -> None:
    data = module(prepared, batch_size=1, length=length)
    assert sorted(rows(data.train_dataloader())) == sorted(windows(prepared, "train", length))
    assert count_windows(prepared, "train", length) == len(windows(prepared, "train", length))


def test_chunks_of_many_items_are_read_too(prepared: Path, tmp_path: Path) -> None:
    """As litdata writes them where a document is an item: the header grows with their number."""
    copy = shutil.copytree(prepared, tmp_path / "data")
    ids = np.concatenate(stream(prepared, "train"))
    shutil.rmtree(copy / "tokens/train")
    theirs = BinaryWriter(str(copy / "tokens/train"), chunk_size=500, item_loader=TokensLoader())
    for i, item in enumerate(np.array_split(ids, 60)):
        theirs.add_item(i, torch.from_numpy(item))
    theirs.done()
    (copy / "tokens/train" / f"{theirs.rank}.index.json").rename(copy / "tokens/train/index.json")
    found = token_chunks(copy, "train")
    assert len(found) > 1 and all(chunk.header > 12 for chunk in found)
    assert np.concatenate([chunk.open() for chunk in found]).tolist() == ids.tolist()


def test_few_files_are_open_at_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litmoe.data.reader, "OPEN_CHUNKS", 2)
    found = TokenWindows(prepared, "train", T)
    order = torch.randperm(len(found)).tolist()
    wanted = windows(prepared, "train")
    assert [tuple(found[i].tolist()) for i in order] == [wanted[i] for i in order]
    assert len(found._opened) == 2
    copy = pickle.loads(pickle.dumps(found))  # as a spawned worker gets it
    assert not copy._opened and copy[0].equal(found[0])
    assert len(pickle.dumps(found)) < 4000


# --- one order ---


def loader_on(folder: Path, rank: int, world_size: int, batch_size: int = 2, num_workers: int = 0) -> TokenLoader:
    found = TokenWindows(folder, "train", T)
    batches = MicroBatches(len(found), batch_size, seed=7, rank=rank, world_size=world_size)
    return TokenLoader(found, batches, num_workers)


def endless(loader: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


@pytest.mark.parametrize("world_size", [2, 3, 8, 33])
def test_devices_take_turns_in_the_sequence_of_one(world_size: int) -> None:
    def three_epochs(batches: MicroBatches) -> list[list[int]]:
        found = list(batches)
        for _ in range(2):
            batches.next_epoch()
            found += list(batches)
        return found

    alone = three_epochs(MicroBatches(101, 3, seed=7))
    assert len(alone) == 3 * 33 and all(len(batch) == 3 for batch in alone)
    for epoch in range(3):
        seen = [window for batch in alone[33 * epoch : 33 * (epoch + 1)] for window in batch]
        assert len(set(seen)) == 99 and set(seen) <= set(range(101))
    devices = [MicroBatches(101, 3, seed=7, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(batches) for batches in devices} == {33 // world_size}
    shares = [three_epochs(batches) for batches in devices]
    assert [batch for turn in itertools.zip_longest(*shares) for batch in turn if batch] == alone


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_devices_validate_on_as_many_batches_each(world_size: int) -> None:
    devices = [MicroBatches(101, 3, seed=None, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(3):
        seen = [window for turn in zip(*devices, strict=True) for batch in turn for window in batch]
        assert seen == list(range(33 // world_size * world_size * 3))
        for batches in devices:
            batches.next_epoch()


@pytest.mark.parametrize(("items", "batch_size"), [(101, 3), (101, 1), (8, 1), (9, 2), (16, 100)])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_all_items_once_in_as_many_batches_for_each_device(items: int, batch_size: int, world_size: int) -> None:
    devices = [
        MicroBatches(items, batch_size, seed=None, rank=rank, world_size=world_size, keep_all=True)
        for rank in range(world_size)
    ]
    for _ in range(2):
        turns = list(zip(*devices, strict=True))
        assert {len(batches) for batches in devices} == {len(turns)}
        batches = [batch for turn in turns for batch in turn]
        assert [item for batch in batches for item in batch] == list(range(items))
        sizes = {len(batch) for batch in batches}
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1
        assert max(sizes) <= max(batch_size, 2 if world_size > 1 else 1)
        for batches in devices:
            batches.next_epoch()


def test_each_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = set()
    for seed in (-1, 0, 1, 2, 42):
        batches = MicroBatches(50, 50, seed=seed)
        for _ in range(4):
            orders.add(tuple(next(iter(batches))))
            batches.next_epoch()
    assert len(orders) == 20


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("batches", [0, 1, 5, "epoch", "second epoch"])
def test_a_resumed_reader_goes_on_where_it_was(prepared: Path, num_workers: int, batches: int | str) -> None:
    """To another number of workers too: the position is what was handed out, not what was read ahead."""
    loader = module(prepared, num_workers=num_workers).train_dataloader()
    count = {"epoch": len(loader), "second epoch": len(loader) + 3}.get(batches, batches)
    wanted = endless(loader)
    list(itertools.islice(wanted, count))  # type: ignore[arg-type]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = rows(itertools.islice(wanted, len(loader) + 2))

    resumed = module(prepared, num_workers=2 - num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert rows(itertools.islice(endless(resumed), len(loader) + 2)) == rest


@pytest.mark.parametrize("taken", [16, 28, 32, 60])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_a_resumed_reader_goes_on_with_other_devices(prepared: Path, before: int, after: int, taken: int) -> None:
    """Also where the devices do not divide an epoch, which ends for some of them before it does for others."""
    sequence = endless(loader_on(prepared, 0, 1, batch_size=5))
    alone = rows(itertools.islice(sequence, taken + 24))[5 * taken :]
    assert len(loader_on(prepared, 0, 1, batch_size=5)) == 29
    then = loader_on(prepared, 0, before, batch_size=5)  # the first device saves
    list(itertools.islice(endless(then), taken // before))
    now = [loader_on(prepared, rank, after, batch_size=5) for rank in range(after)]
    for loader in now:
        loader.load_state_dict(then.state_dict())
    shares = [itertools.islice(endless(loader), 24 // after) for loader in now]
    assert [row for turn in zip(*shares, strict=True) for row in rows(turn)] == alone


def test_a_pass_that_was_left_is_followed_by_the_next_epoch(prepared: Path) -> None:
    for rank in range(2):
        left, whole = (loader_on(prepared, rank, 2, batch_size=5) for _ in range(2))
        next(iter(left))
        rows(whole)
        assert rows(left) == rows(whole)


def sessions(items: int, *sessions: tuple[int, int, int]) -> tuple[list[list[int]], dict[str, int]]:
    """Item numbers of the micro batches of sessions of (micro batch, devices, rounds) that follow, and the position."""
    found, state = [], {"epoch": 0, "items": 0}
    for batch_size, world_size, rounds in sessions:
        shares = []
        for rank in range(world_size):
            batches = MicroBatches(items, batch_size, seed=7, rank=rank, world_size=world_size)
            loader = TokenLoader(list(range(items)), batches)  # type: ignore[arg-type]
            loader.load_state_dict(state)
            shares.append(
                ([batch.tolist() for batch in itertools.islice(endless(loader), rounds)], loader.state_dict())
            )
        (state,) = {json.dumps(share[1]): share[1] for share in shares}.values()  # all devices say the same
        found += [batch for turn in zip(*(share[0] for share in shares), strict=True) for batch in turn]
    return found, state


def orders(items: int, epochs: int) -> list[list[int]]:
    return sessions(items, (items, 1, epochs))[0]


def test_other_micro_batches_and_devices_go_on_at_the_same_item() -> None:
    """Each epoch is its order from the first item to the last, but for those at its end that fill no micro batch."""
    draw, order = random.Random(0), {items: orders(items, 100) for items in (20, 23, 101)}
    for _ in range(60):
        items = draw.choice([20, 23, 101])
        parts = [(draw.choice([1, 2, 3, 4, 5]), draw.choice([1, 2, 4]), draw.randint(0, 25)) for _ in range(4)]
        found, state = sessions(items, *parts)
        epoch = taken = 0
        sizes = [size for size, devices, rounds in parts for _ in range(devices * rounds)]
        for batch, size in zip(found, sizes, strict=True):
            if items - taken < size:
                epoch, taken = epoch + 1, 0
            assert batch == order[items][epoch][taken : taken + size]
            taken += size
        assert state == {"epoch": epoch, "items": taken}


@pytest.mark.parametrize("taken", [16, 28, 32, 60])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_position_counted_in_micro_batches_is_read_too(devices: int, taken: int) -> None:
    """As older checkpoints have it: the first device's epoch, and all micro batches since the first. 29 in an epoch."""
    loader = TokenLoader(list(range(147)), MicroBatches(147, 3, seed=7))  # type: ignore[arg-type]
    older = {"epoch": (taken - devices) // 29, "micro_batches": taken}
    loader.load_state_dict(older, 5)
    assert loader.state_dict() == sessions(147, (5, devices, taken // devices))[1]
    with pytest.raises(UserError, match="that of another reader"):
        loader.load_state_dict(older)


def test_a_position_of_litdatas_reader_is_refused(prepared: Path) -> None:
    data = StreamingDataset(str(prepared / "tokens/train"), item_loader=TokensLoader(block_size=T + 1))
    theirs = StreamingDataLoader(data, batch_size=2)
    with pytest.raises(UserError, match="that of another reader"):
        loader_on(prepared, 0, 1).load_state_dict(theirs.state_dict())


def test_reading_leaves_the_random_state_alone(prepared: Path) -> None:
    before = torch.get_rng_state()
    rows(module(prepared, num_workers=1).train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_position_outlives_a_move(prepared: Path, tmp_path: Path) -> None:
    loader = module(prepared).train_dataloader()
    wanted = iter(loader)
    list(itertools.islice(wanted, 5))
    state = loader.state_dict()
    rest = rows(wanted)
    shutil.copytree(prepared, tmp_path / "moved")
    resumed = module(tmp_path / "moved").train_dataloader()
    resumed.load_state_dict(state)
    assert rows(resumed) == rest


@pytest.fixture(params=[0, 1])
def launched_as(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of two devices, as torch knows it; its backend without the other one serves where nothing is sent."""
    distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    distributed.destroy_process_group()


def test_launched_processes_share_the_windows(prepared: Path, launched_as: int) -> None:
    data = module(prepared, batch_size=2)
    wanted = windows(prepared, "val")
    share = [row for i, row in enumerate(wanted[: len(wanted) // 4 * 4]) if i // 2 % 2 == launched_as]
    assert rows(data.val_dataloader()) == share
    size = count_windows(prepared, "val", T)
    with pytest.raises(UserError, match=rf"expected {2 * size} or more .*on 2 devices"):
        module(prepared, batch_size=size).val_dataloader()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2, 5])
def test_one_batch_is_enough(prepared: Path, num_workers: int) -> None:
    """A split of one micro-batch, and more workers than batches."""
    size = count_windows(prepared, "val", T)
    data = module(prepared, batch_size=size, num_workers=num_workers)
    (batch,) = data.val_dataloader()
    assert rows([batch]) == windows(prepared, "val")


def test_fewer_windows_than_a_batch_are_an_error(prepared: Path) -> None:
    size = count_windows(prepared, "val", T)
    with pytest.raises(
        UserError, match=rf"val has [\d,]+ tokens, {size} windows of {T + 1}; expected {size + 1} or more"
    ):
        module(prepared, batch_size=size + 1)
    module(prepared, batch_size=size)


def test_missing_and_stale_tokens_are_errors(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"do not exist; `uv run python prepare_data.py --data_dir .*none`"):
        module(tmp_path / "none")
    copy = shutil.copytree(prepared, tmp_path / "data")
    module(copy)
    text = (copy / "train/a.txt").read_text()
    (copy / "train/a.txt").write_text(text + "More.")
    with pytest.raises(UserError, match=r"changed since it was tokenized \(train/a.txt changed\)"):
        module(copy)
    (copy / "train/a.txt").write_text(text)  # another time, the same text
    (copy / "val/b.txt").write_text("More.")
    with pytest.raises(UserError, match=r"val/b.txt is new"):
        module(copy)
    shutil.rmtree(copy / "train")  # tokens stand on their own
    shutil.rmtree(copy / "val")
    module(copy)
    (copy / "tokens/val/chunk-0-0.bin").unlink()
    with pytest.raises(UserError, match="are not complete"):
        module(copy)


def test_new_validation_text_beside_a_split_corpus_is_noticed(
    tmp_path: Path, stories: list[str], tokenizer_dir: Path
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.txt").write_text(f"\n{END_OF_TEXT}\n".join(stories))
    prepare(PrepareArgs(data_dir=tmp_path, tokenizer_dir=tokenizer_dir, num_workers=0, val_fraction=0.3))
    module(tmp_path)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a.txt").write_text("Text.")
    with pytest.raises(UserError, match=r"val/a.txt is new"):
        module(tmp_path)


def test_another_tokenizers_tokens_are_an_error(
    prepared: Path, stories: list[str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    data = TokenizedText(prepared / "train", prepared / "val", num_workers=0)
    data.connect(LitTokenizer(tokenizer_dir), batch_size=1, max_seq_length=T)
    data.prepare_data()
    files = tokenizers.train(stories, 300)
    tokenizers.install(replace(files, config={**files.config, "eos_token": "a"}), {"name": "other"}, tmp_path)
    data.connect(LitTokenizer(tmp_path), batch_size=1, max_seq_length=T)
    with pytest.raises(UserError, match="whose end-of-text id is 0; the run's tokenizer has"):
        data.prepare_data()


def test_paths_of_two_corpora_are_refused() -> None:
    with pytest.raises(UserError, match="expected the folders train and val of one prepared corpus"):
        TokenizedText(Path("a/train"), Path("b/val"))


def test_validation_windows_follow_each_other(prepared: Path) -> None:
    found = validation_windows(prepared, "val", T)
    wanted = windows(prepared, "val")
    assert len(found) == len(wanted)
    assert rows([[found[i]] for i in range(len(found))]) and [tuple(row.tolist()) for row in found] == wanted
    assert found[0].dtype == torch.int64
    with pytest.raises(UserError, match="fewer than one window"):
        validation_windows(prepared, "val", 10**6)


def test_workers_leave_signals_to_the_main_process(prepared: Path) -> None:
    """A signal to the whole process group ended the workers before the main process could save."""
    loader = module(prepared, num_workers=2).train_dataloader()
    iterator = iter(loader)
    next(iterator), next(iterator)  # one from each: both have started
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(iterator)) == len(loader) - 2


@pytest.mark.slow
def test_a_program_ends_in_the_middle_of_a_pass(prepared: Path) -> None:
    """At its end multiprocessing sends SIGTERM to workers, which ignore it, and waited for them for ever."""
    code = (
        "import sys, pathlib\n"
        "from litmoe.data.reader import MicroBatches, TokenLoader, TokenWindows\n"
        "windows = TokenWindows(pathlib.Path(sys.argv[1]), 'train', 16)\n"
        "batches = iter(TokenLoader(windows, MicroBatches(len(windows), 2, seed=0), num_workers=2))\n"
        "next(batches), next(batches)\n"
        "raise RuntimeError('as a bug does')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(prepared)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert "as a bug does" in done.stderr


@pytest.mark.slow
def test_spawned_workers_read_the_same(prepared: Path) -> None:
    """As on Windows and macOS, where they import what they read with: torch, but not LitGPT, which takes longer."""
    loader = module(prepared, num_workers=1).train_dataloader()
    loader.multiprocessing_context = "spawn"
    assert rows(loader) == rows(module(prepared).train_dataloader())
    code = "import sys, litmoe.data.reader; sys.exit(bool({'litgpt', 'lightning', 'litdata'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=280, check=False).returncode == 0


# --- chunks ---


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 65_535), ("int32", 200_000)])
def test_chunks_keep_every_id(tmp_path: Path, dtype: str, top: int) -> None:
    assert tokens.dtype_for(top + 1) == dtype
    ids = np.random.default_rng(0).integers(0, top + 1, 5000).astype(dtype)
    ids[:2] = (0, top)
    writer = tokens.ChunkWriter(tmp_path / "t", 10**6, dtype)
    for part in np.array_split(ids, 7):
        writer.append(part)
    writer.close()
    data = StreamingDataset(str(tmp_path / "t"), item_loader=TokensLoader(block_size=10))
    assert torch.cat([data[i].long() for i in range(len(data))]).tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_chunks_are_byte_for_byte_litdatas_own(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is written without litdata, whose import takes longer than the work."""
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 100)
    ids = np.arange(330).astype(dtype)
    ours = tokens.ChunkWriter(tmp_path / "ours", 0, dtype)
    ours.append(ids)
    ours.close()
    theirs = BinaryWriter(str(tmp_path / "theirs"), chunk_size=1, item_loader=TokensLoader())
    for i, part in enumerate(np.split(ids, [100, 200])):
        theirs.add_item(i, torch.from_numpy(part))
    theirs.done()
    (tmp_path / "theirs" / f"{theirs.rank}.index.json").rename(tmp_path / "theirs/index.json")
    found = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert found.pop("index.json") == wanted.pop("index.json")
    assert found == wanted and len(found) == 3


@pytest.mark.parametrize("count", [1, 99, 100, 149, 150, 151, 250, 1000])
def test_no_chunk_is_a_scrap(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens after a chunk's last whole window are lost, so there must be no chunk of few tokens."""
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 100)
    writer = tokens.ChunkWriter(tmp_path, 0, "uint16")
    ids = np.arange(count, dtype=np.uint16)
    for part in np.array_split(ids, min(count, 13)):
        writer.append(part)
    writer.close()
    sizes = [len(chunk) for chunk in stream_of(tmp_path)]
    assert sum(sizes) == count and len(sizes) == len(writer.chunks) == max(1, (count + 50) // 100)
    assert all(50 <= size <= 150 for size in sizes) or count < 50
    assert np.concatenate(stream_of(tmp_path)).tolist() == ids.tolist()


def stream_of(folder: Path) -> list[np.ndarray]:
    files = sorted(folder.glob("*.bin"), key=lambda path: int(path.stem.split("-")[-1]))
    return [np.fromfile(path, np.uint16, offset=12) for path in files]


def test_chunks_grow_with_the_text_up_to_32_mb(tmp_path: Path) -> None:
    def size(text_bytes: float) -> int:
        return tokens.ChunkWriter(tmp_path, int(text_bytes), "uint16").chunk_tokens

    assert size(1e6) == 1 << 20
    assert size(1e9) == int(1e9) // 64
    assert size(1e11) == 1 << 24
