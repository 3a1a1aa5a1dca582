"""Micro batches of tokens: one order for all devices and workers, exact resume."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader

import litmoe.data.loader
from litmoe.cli import UserError
from litmoe.data.loader import MicroBatches, TokenWindows, TrainLoader, even_batches, full_batches, token_chunks
from tests.data.token_helpers import T, rows_of, take, windows_of


def loader_on(folder: Path, rank: int, world_size: int, batch_size: int = 2, num_workers: int = 0) -> TrainLoader:
    windows = TokenWindows(folder, "train", T)
    batches = MicroBatches(len(windows), batch_size, seed=7, rank=rank, world_size=world_size)
    return TrainLoader(windows, batches, num_workers)


# --- windows ---


def test_windows_follow_each_other(chunked: Path) -> None:
    windows = TokenWindows(chunked, "train", T)
    assert [tuple(windows[i].tolist()) for i in range(len(windows))] == windows_of(chunked, "train")
    assert windows[0].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_chunks_of_many_items_are_read(chunked: Path, tmp_path: Path) -> None:
    """LitGPT writes one item per document, and the header grows with the number of items."""
    from litdata.streaming.writer import BinaryWriter

    chunks = token_chunks(chunked, "train")
    ids = np.concatenate([chunk.open() for chunk in chunks])
    writer = BinaryWriter(str(tmp_path), chunk_size=500, item_loader=TokensLoader())
    for i, item in enumerate(np.array_split(ids, 60)):
        writer.add_item(i, torch.from_numpy(item))
    writer.done()
    index = json.loads((tmp_path / f"{writer.rank}.index.json").read_text())
    headers = [4 * (chunk["chunk_size"] + 2) for chunk in index["chunks"]]
    assert len(headers) > 1 and all(header > 12 for header in headers)
    parts = [
        litmoe.data.loader.Chunk(tmp_path / chunk["filename"], "uint16", header, chunk["dim"]).open()
        for chunk, header in zip(index["chunks"], headers, strict=True)
    ]
    assert np.concatenate(parts).tolist() == ids.tolist()


def test_few_chunks_are_open_at_once(chunked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litmoe.data.loader, "MAX_OPEN_CHUNKS", 2)
    windows = TokenWindows(chunked, "train", T)
    order = torch.randperm(len(windows)).tolist()
    expected = windows_of(chunked, "train")
    assert [tuple(windows[i].tolist()) for i in order] == [expected[i] for i in order]
    assert len(windows._opened) == 2
    copy = pickle.loads(pickle.dumps(windows))  # as a spawned worker receives it
    assert not copy._opened and copy[0].equal(windows[0])
    assert len(pickle.dumps(windows)) < 4000


# --- one order ---


def epochs(batches: MicroBatches, number: int) -> list[list[int]]:
    """The micro batches of some epochs, taken as a loader takes them."""
    result = []
    for _ in range(number):
        for batch in batches:
            batches.taken += 1
            result.append(batch)
    return result


@pytest.mark.parametrize("world_size", [2, 3, 8, 33])
def test_devices_share_the_sequence_of_one_device(world_size: int) -> None:
    alone = epochs(MicroBatches(101, 3, seed=7), 3)
    assert len(alone) == 3 * 33 and all(len(batch) == 3 for batch in alone)
    for epoch in range(3):
        seen = [item for batch in alone[33 * epoch : 33 * (epoch + 1)] for item in batch]
        assert len(set(seen)) == 99 and set(seen) <= set(range(101))
    devices = [MicroBatches(101, 3, seed=7, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(batches) for batches in devices} == {33 // world_size}
    shares = [epochs(batches, 3) for batches in devices]
    assert [batch for turn in itertools.zip_longest(*shares) for batch in turn if batch] == alone


def test_each_seed_and_epoch_has_its_own_order() -> None:
    orders = set()
    for seed in (-1, 0, 1, 2, 42):
        orders |= {tuple(batch) for batch in epochs(MicroBatches(50, 50, seed=seed), 4)}
    assert len(orders) == 20


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_full_batches(world_size: int) -> None:
    shares = [full_batches(101, 3, rank, world_size) for rank in range(world_size)]
    seen = [item for turn in zip(*shares, strict=True) for batch in turn for item in batch]
    assert seen == list(range(33 // world_size * world_size * 3))


@pytest.mark.parametrize(("items", "batch_size"), [(101, 3), (101, 1), (8, 1), (9, 2), (16, 100)])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_even_batches(items: int, batch_size: int, world_size: int) -> None:
    shares = [even_batches(items, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert [item for batch in batches for item in batch] == list(range(items))
    sizes = {len(batch) for batch in batches}
    assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 2 if world_size > 1 else 1)


# --- resume ---


@pytest.mark.parametrize("taken", [16, 28, 32, 60])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_resume_on_other_devices(chunked: Path, before: int, after: int, taken: int) -> None:
    """An epoch has 29 micro batches, so it ends earlier on some devices than on others."""
    alone = rows_of(take(loader_on(chunked, 0, 1, batch_size=5), taken + 24)[taken:])
    assert len(loader_on(chunked, 0, 1, batch_size=5)) == 29
    saving = loader_on(chunked, 0, before, batch_size=5)
    take(saving, taken // before)
    resumed = [loader_on(chunked, rank, after, batch_size=5) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(saving.state_dict())
    shares = [take(loader, 24 // after) for loader in resumed]
    assert [row for turn in zip(*shares, strict=True) for row in rows_of(turn)] == alone


def run_sessions(items: int, *sessions: tuple[int, int, int]) -> tuple[list[list[int]], dict[str, int]]:
    """The items of resumed sessions, each (micro batch size, devices, micro batches per device), and the position."""
    batches: list[list[int]] = []
    state = {"epoch": 0, "items": 0}
    for batch_size, world_size, rounds in sessions:
        shares, states = [], []
        for rank in range(world_size):
            order = MicroBatches(items, batch_size, seed=7, rank=rank, world_size=world_size)
            loader = TrainLoader(list(range(items)), order)  # type: ignore[arg-type]
            loader.load_state_dict(state)
            shares.append([batch.tolist() for batch in take(loader, rounds)])
            states.append(loader.state_dict())
        assert all(other == states[0] for other in states)
        state = states[0]
        batches += [batch for turn in zip(*shares, strict=True) for batch in turn]
    return batches, state


def test_resume_with_other_micro_batches() -> None:
    """Each epoch is its order from the first item to the last, without a rest that fills no micro batch."""
    draw = random.Random(0)
    orders = {items: run_sessions(items, (items, 1, 100))[0] for items in (20, 23, 101)}
    for _ in range(60):
        items = draw.choice([20, 23, 101])
        parts = [(draw.choice([1, 2, 3, 4, 5]), draw.choice([1, 2, 4]), draw.randint(0, 25)) for _ in range(4)]
        batches, state = run_sessions(items, *parts)
        epoch = taken = 0
        sizes = [size for size, devices, rounds in parts for _ in range(devices * rounds)]
        for batch, size in zip(batches, sizes, strict=True):
            if items - taken < size:
                epoch, taken = epoch + 1, 0
            assert batch == orders[items][epoch][taken : taken + size]
            taken += size
        assert state == {"epoch": epoch, "items": taken}


def test_resume_rejects_the_state_of_litdata(chunked: Path) -> None:
    data = StreamingDataset(str(chunked / "tokens/train"), item_loader=TokensLoader(block_size=T + 1))
    with pytest.raises(UserError, match="expected epoch and items"):
        loader_on(chunked, 0, 1).load_state_dict(StreamingDataLoader(data, batch_size=2).state_dict())


# --- workers ---


def test_workers_ignore_stop_signals(chunked: Path) -> None:
    """A signal to the process group must not end the workers before the main process has saved."""
    loader = loader_on(chunked, 0, 1, num_workers=2)
    iterator = iter(loader)
    next(iterator), next(iterator)  # one from each worker: both have started
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(iterator)) == len(loader) - 2


@pytest.mark.slow
def test_program_ends_in_the_middle_of_a_pass(chunked: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from litmoe.data.loader import MicroBatches, TrainLoader, TokenWindows\n"
        "windows = TokenWindows(pathlib.Path(sys.argv[1]), 'train', 16)\n"
        "batches = iter(TrainLoader(windows, MicroBatches(len(windows), 2, seed=0), num_workers=2))\n"
        "next(batches), next(batches)\n"
        "raise RuntimeError('as a bug does')\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(chunked)], capture_output=True, text=True, timeout=280)
    assert process.returncode == 1
    assert "as a bug does" in process.stderr


@pytest.mark.slow
def test_spawned_workers_read_the_same(chunked: Path) -> None:
    """On Windows and macOS, workers import this module again: torch, but not LitGPT, which takes longer."""
    loader = loader_on(chunked, 0, 1, num_workers=1)
    loader.multiprocessing_context = "spawn"
    assert rows_of(loader) == rows_of(loader_on(chunked, 0, 1))
    code = "import sys, litmoe.data.loader; sys.exit(bool({'litgpt', 'lightning', 'litdata'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=280, check=False).returncode == 0
