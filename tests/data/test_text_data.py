"""TokenizedText: every window once per epoch, resumable, and clear errors for missing or stale tokens."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from litgpt.tokenizer import Tokenizer

import litmoe.data
from litmoe.cli import UserError
from litmoe.data import tokenizers
from litmoe.data.loader import TokenWindows
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.data.text_data import TokenizedText
from tests.data.token_helpers import T, endless, rows_of, take, windows_of


def module(folder: Path, batch_size: int = 4, length: int = T, **settings: int) -> TokenizedText:
    data = TokenizedText(folder / "train", folder / "val", **{"num_workers": 0, **settings})
    data.connect(None, batch_size=batch_size, max_seq_length=length)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_holds_every_window_once(chunked: Path, num_workers: int) -> None:
    loader = module(chunked, num_workers=num_workers).train_dataloader()
    first, second = list(loader), rows_of(loader)
    assert first[0].shape == (4, T + 1) and first[0].dtype == torch.int64
    epoch, windows = rows_of(first), windows_of(chunked, "train")
    assert set(epoch) <= set(windows) and len(epoch) == len(windows) // 4 * 4 == len(loader) * 4
    assert len(windows) - 4 < len(set(epoch)) <= len(windows)
    assert epoch != second and len(second) == len(epoch)
    ordered = [row for row in windows if row in set(epoch)]
    assert sum(a == b for a, b in zip(epoch, ordered, strict=False)) < len(epoch) // 4


def test_seed_determines_the_order(chunked: Path) -> None:
    random_state = torch.get_rng_state()
    first = rows_of(module(chunked).train_dataloader())
    assert rows_of(module(chunked, num_workers=1).train_dataloader()) == first
    assert rows_of(module(chunked, seed=1).train_dataloader()) != first
    assert torch.equal(torch.get_rng_state(), random_state)


def test_validation_keeps_the_order_of_the_text(chunked: Path) -> None:
    loader = module(chunked, batch_size=1, num_workers=2).val_dataloader()
    assert rows_of(loader) == windows_of(chunked, "val")
    next(iter(loader))  # an abandoned pass
    assert rows_of(loader) == windows_of(chunked, "val")


@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_any_context_length(chunked: Path, length: int) -> None:
    data = module(chunked, batch_size=1, length=length)
    assert sorted(rows_of(data.train_dataloader())) == sorted(windows_of(chunked, "train", length))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("batches", [0, 5, "epoch", "second epoch"])
def test_resume_with_other_workers(chunked: Path, num_workers: int, batches: int | str) -> None:
    """The position is what was handed out, not what workers have read ahead."""
    loader = module(chunked, num_workers=num_workers).train_dataloader()
    count = {"epoch": len(loader), "second epoch": len(loader) + 3}.get(batches, batches)
    uninterrupted = endless(loader)
    list(itertools.islice(uninterrupted, count))  # type: ignore[arg-type]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = rows_of(itertools.islice(uninterrupted, len(loader) + 2))
    resumed = module(chunked, num_workers=2 - num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert rows_of(take(resumed, len(loader) + 2)) == rest


def test_ranks_share_the_windows(chunked: Path, rank: int) -> None:
    windows = windows_of(chunked, "val")
    share = [row for i, row in enumerate(windows[: len(windows) // 4 * 4]) if i // 2 % 2 == rank]
    assert rows_of(module(chunked, batch_size=2).val_dataloader()) == share
    # A short validation text is one batch for each rank.
    (batch,) = module(chunked, batch_size=len(windows)).val_dataloader()
    assert len(batch) == len(windows) // 2
    size = len(TokenWindows(chunked, "train", T))
    with pytest.raises(UserError, match=rf"expected {2 * size} or more .*on 2 devices"):
        module(chunked, batch_size=size).train_dataloader()


def test_too_few_windows(chunked: Path) -> None:
    size = len(TokenWindows(chunked, "train", T))
    (batch,) = module(chunked, batch_size=size).val_dataloader()
    assert rows_of([batch]) == windows_of(chunked, "val"), "all of a shorter text"
    with pytest.raises(UserError, match=rf"{size} windows of {T + 1}; expected {size + 1} or more"):
        module(chunked, batch_size=size + 1)


def test_missing_and_stale_tokens(chunked: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"do not exist.*`uv run python prepare_data.py --data_dir .*none`"):
        module(tmp_path / "none")
    copy = shutil.copytree(chunked, tmp_path / "data")
    module(copy)
    text = (copy / "train/a.txt").read_text()
    (copy / "train/a.txt").write_text(text + "More.")
    with pytest.raises(UserError, match=r"changed since it was tokenized \(train/a.txt changed\)"):
        module(copy)
    (copy / "train/a.txt").write_text(text)  # another time, the same text
    (copy / "val/b.txt").write_text("More.")
    with pytest.raises(UserError, match=r"val/b.txt is new"):
        module(copy)
    shutil.rmtree(copy / "train")  # the text may be removed to save space
    shutil.rmtree(copy / "val")
    module(copy)
    (copy / "tokens/val/chunk-0-0.bin").unlink()
    with pytest.raises(UserError, match="are not complete"):
        module(copy)


def test_new_validation_text_is_noticed(tmp_path: Path, stories: list[str], tokenizer_dir: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.txt").write_text("\n<|endoftext|>\n".join(stories))
    prepare(PrepareArgs(data_dir=tmp_path, tokenizer_dir=tokenizer_dir, num_workers=0, val_fraction=0.3))
    module(tmp_path)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a.txt").write_text("Text.")
    with pytest.raises(UserError, match=r"val/a.txt is new"):
        module(tmp_path)


def test_another_tokenizer_is_refused(chunked: Path, stories: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    data = TokenizedText(chunked / "train", chunked / "val", num_workers=0)
    data.connect(Tokenizer(tokenizer_dir), batch_size=1, max_seq_length=T)
    data.prepare_data()
    files = tokenizers.train(stories, 300)
    tokenizers.install(replace(files, config={**files.config, "eos_token": "a"}), {"name": "other"}, tmp_path)
    data.connect(Tokenizer(tmp_path), batch_size=1, max_seq_length=T)
    with pytest.raises(UserError, match=r"end-of-text id 0\); the run's tokenizer has"):
        data.prepare_data()


def test_paths_of_two_corpora_are_refused() -> None:
    assert litmoe.data.TokenizedText is TokenizedText
    with pytest.raises(UserError, match="expected the folders train and val of one prepared corpus"):
        TokenizedText(Path("a/train"), Path("b/val"))
