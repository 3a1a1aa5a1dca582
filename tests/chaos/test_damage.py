"""Changed bytes, truncated and missing files: each is detected and named in a message, or has no effect.

Disk errors do not change a file's size and time, so the damaged files keep theirs.
"""

import csv
import hashlib
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt import Tokenizer

from litmoe import checkpoints, load
from litmoe.checksummed_json import file_sha256, read_checksummed, write_checksummed
from litmoe.cli import UserError, run_cli
from litmoe.config import parse_run
from litmoe.data import InstructionData, manifest
from litmoe.data.instructions import InstructArgs, prepare_instructions
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.train.logs import COLUMNS, MetricsCSV
from litmoe.train.preflight import ready
from litmoe.train.pretrain import pretrain
from litmoe.train.resume import check_same_tokens
from litmoe.validation import check
from tests.helpers import write_run_file

STEP = "step-00000002"
MODEL = dict(
    **{"name": "tiny-moe", "block_size": 64, "vocab_size": 384, "padded_vocab_size": 384, "n_layer": 1, "n_embd": 16},
    **{"n_head": 2, "mlp_class_name": "LLaMAMoE", "moe_intermediate_size": 16, "n_expert": 2, "n_expert_per_token": 2},
    **{"norm_class_name": "RMSNorm", "bias": False, "parallel_residual": False, "rotary_percentage": 1.0},
)


class World:
    """A corpus, its tokens and tokenizer, conversations, and a run's checkpoints; ``restore`` undoes all damage."""

    def __init__(self, folder: Path, prepared: Path) -> None:
        self.folder, self._full = folder / "world", folder / "full"
        shutil.copytree(prepared, self.folder)
        prepare(PrepareArgs(data_dir=self.folder / "data", tokenizer_dir=self.folder / "tokenizer", num_workers=0))
        (folder / "pairs.jsonl").write_text(
            "".join(f'{{"prompt": "Who is {i}?", "response": "It is {i}."}}\n' for i in range(40)), encoding="utf-8"
        )
        prepare_instructions(InstructArgs(instruct=str(folder / "pairs.jsonl"), data_dir=self.folder / "instruct"))
        flags = ["--config", str(write_run_file(folder, self.folder, MODEL)), "--out_dir", str(self.folder / "out")]
        flags += ["--global_batch_size", "2", "--train.max_steps", "4", "--train.save_interval", "2"]
        flags += ["--train.lr_warmup_steps", "1", "--eval.max_iters", "1", "--sample.prompt", "null"]
        run = parse_run(flags)
        check(run.settings, run.optimizer)
        pretrain(*ready(run)[:1], resume_from=None)
        shutil.move(self.folder / "out" / "final", self.folder / "model")
        for later in self.folder.glob("out/step-*"):
            if later.name != STEP:
                shutil.rmtree(later)
        self.run = parse_run([*flags, "--resume", str(self.folder / "out" / STEP)])
        shutil.copytree(self.folder, self._full)

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self._full, self.folder)
        manifest._tokenizer_fingerprint.cache_clear()  # another process would have read nothing yet

    def files(self, *below: str) -> list[Path]:
        names = ("filelock", ".lock", ".prepare.lock")
        return [
            path
            for name in below
            for path in sorted((self.folder / name).rglob("*"))
            if path.is_file() and not path.name.endswith(names)
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> World:
    return World(tmp_path_factory.mktemp("damage"), prepared)


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file as disks and people do. Return a description of the damage."""
    data, times = bytearray(path.read_bytes()), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    how = rng.choice(["a bit", "a bit", "a bit", "bytes", "cut off", "emptied", "lost", "zeros"])
    if how == "lost" or not data:
        path.unlink()
        return "lost"
    at = rng.randrange(len(data))
    if how == "a bit":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "bytes":
        data[at : at + 16] = rng.randbytes(len(data[at : at + 16]))
    elif how == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    else:
        del data[0 if how == "emptied" else at :]
    path.write_bytes(data)
    os.utime(path, ns=times)
    return f"{how} at {at}"


def content(value: Any, digest: Any) -> None:
    """Add nested values, tensors included, to a hash."""
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8)
        digest.update(str((value.dtype, value.shape)).encode() + bits.numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            digest.update(repr(key).encode())
            content(value[key], digest)
    elif isinstance(value, list | tuple):
        for item in value:
            content(item, digest)
    else:
        digest.update(repr(value).encode())


def hashed(*values: Any) -> str:
    digest = hashlib.sha256()
    content(values, digest)
    return digest.hexdigest()


def resumed(world: World) -> str:
    """Return a hash of what a resumed run reads: weights, state, settings, every batch."""
    run, folder = ready(world.run)
    assert folder is not None
    check_same_tokens(folder, run.settings)
    data = run.settings.data
    data.connect(Tokenizer(run.settings.tokenizer_dir), 2, 16)
    data.prepare_data()
    state = (checkpoints.load_weights(folder), checkpoints.load_training_state(folder))
    settings = (checkpoints.load_config(folder), checkpoints.load_hyperparameters(folder))
    return hashed(
        state,
        settings,
        checkpoints.read_metadata(folder).step,
        list(data.train_dataloader()),
        list(data.val_dataloader()),
    )


def written(world: World) -> str:
    """Return a hash of the final model's text."""
    return hashed(load(world.folder / "model", device="cpu").generate("Mia went", max_new_tokens=12))


def tuned_on(world: World) -> str:
    """Return a hash of every batch of conversations."""
    data = InstructionData(data_dir=world.folder / "instruct")
    data.connect(Tokenizer(world.folder / "tokenizer"), 2, 64)
    data.prepare_data()
    data.setup()
    return hashed(list(map(tuple, data.train_dataloader())), list(map(tuple, data.val_dataloader())))


# Not the text: users may change it, and then tokens are prepared again with a message.
MANY = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("use", "below", "times"),
    [
        pytest.param(resumed, (f"out/{STEP}", "data/tokens", "tokenizer"), 40, id="resumed"),
        pytest.param(written, ("model",), 20, id="written"),
        pytest.param(tuned_on, ("instruct",), 12, id="tuned on"),
        pytest.param(resumed, (f"out/{STEP}", "data/tokens", "tokenizer"), 500, id="resumed, many", marks=MANY),
        pytest.param(written, ("model",), 150, id="written, many", marks=MANY),
        pytest.param(tuned_on, ("instruct",), 100, id="tuned on, many", marks=MANY),
    ],
)
def test_damage_is_detected_or_harmless(
    use: Callable[[World], str], below: tuple[str, ...], times: int, world: World
) -> None:
    world.restore()
    full = use(world)
    rng = random.Random(times)
    found = 0
    for number in range(times):
        world.restore()
        files = world.files(*below)
        path = files[number % len(files)]
        how = f"{path.relative_to(world.folder)}: {damage(path, rng)}"
        try:
            result = use(world)
        except UserError as error:
            found += 1
            message = str(error)
            assert path.name in message or str(path.parent) in message, (how, message)
        else:
            assert result == full, f"{how} went unnoticed"
    world.restore()
    assert found > times / 4
    print(f"{times} damages: {found} found, {times - found} without effect")


def test_damaged_chunk_is_named_and_rebuilt(world: World) -> None:
    """After the command of the message, the resumed run is the same as before the damage."""
    world.restore()
    full = resumed(world)
    chunk = manifest.tokens_dir(world.folder / "data", "train") / "chunk-0-0.bin"
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=r"chunk-0-0\.bin ") as error:
        resumed(world)
    run_the_suggested_command(world, str(error.value))
    assert resumed(world) == full
    world.restore()


def run_the_suggested_command(world: World, message: str, data: str = "data") -> None:
    """Run the command that the message about damaged tokens suggests."""
    assert f"Remove {world.folder / data / 'tokens'}" in message
    shutil.rmtree(world.folder / data / "tokens")
    (command,) = re.findall(r"`uv run python prepare_data\.py (.*?)`", message)
    prepare(run_cli(PrepareArgs, [*shlex.split(command, posix=os.name != "nt"), "--num_workers", "0"]))


def test_damaged_tokens_are_rebuilt_from_source(
    world: World, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same source with the same settings, not from the default corpus."""
    world.restore()
    (world.folder / "own").mkdir()
    text = "\n***\n".join(stories[:60])
    (world.folder / "own" / "a.txt").write_text(text, encoding="utf-8", newline="\n")
    settings = {"document_separator": "***", "val_fraction": 0.3, "max_documents": 40}
    monkeypatch.chdir(world.folder)
    data = world.folder / "own-tokens"
    args = PrepareArgs("own", data_dir=data, tokenizer_dir=world.folder / "tokenizer", num_workers=0, **settings)
    then = prepare(args)
    for chunk in (data / "tokens").rglob("*.bin"):
        chunk.write_bytes(bytes(chunk.stat().st_size))
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.chdir(world.folder.parent)
        manifest.verify(data)
    assert "came from own, which is not in" in str(error.value)
    with pytest.raises(UserError) as error:
        manifest.verify(data)
    assert "is not in" not in str(error.value)
    run_the_suggested_command(world, str(error.value), data.name)
    manifest.verify(data)
    now = manifest.read(data)
    assert now is not None and now.made_from("train", "val") == then.made_from("train", "val")
    assert all(now.splits[split].files == then.splits[split].files for split in ("train", "val"))


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_unreadable_tokens_are_damaged(world: World) -> None:
    """A link to itself, which raises OSError like a disk with errors."""
    world.restore()
    data = world.folder / "data"
    index = manifest.tokens_dir(data, "train") / "index.json"
    values = read_checksummed(manifest.manifest_path(data))
    values["splits"]["train"]["files"]["circle"] = "0" * 64
    write_checksummed(manifest.manifest_path(data), values)
    (index.parent / "circle").symlink_to("circle")
    with pytest.raises(UserError, match=r"circle \(it can't be read: "):
        manifest.verify(data)
    (index.parent / "circle").unlink()
    (index.parent / "circle").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"circle \(it can't be read: .*no regular file"):
        manifest.verify(data)


@pytest.mark.parametrize("below", ["data/tokens/manifest", f"out/{STEP}/manifest", f"out/{STEP}/complete"])
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "[1]", '{"splits": []}', '{"splits": {"train": {"text": 1}}}']
)
def test_invalid_json_gives_one_message(text: str, below: str, world: World) -> None:
    """Also with correct checksums. Tokens are prepared again if their text exists."""
    world.restore()
    full = resumed(world)
    path = world.folder / f"{below}.json"
    path.write_text(text, encoding="utf-8")
    if below.startswith("data"):
        assert resumed(world) == full
    else:
        if path.name == checkpoints.MANIFEST:
            mark = read_checksummed(path.with_name(checkpoints.COMPLETE_FILE))
            mark["files"][path.name] = {"size": len(text), "sha256": file_sha256(path)}
            write_checksummed(path.with_name(checkpoints.COMPLETE_FILE), mark)
        with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
            resumed(world)
    world.restore()


def test_deeply_nested_index_is_ignored(world: World) -> None:
    world.restore()
    (manifest.tokens_dir(world.folder / "data", "train") / "index.json").write_text("[" * 200_000, encoding="utf-8")
    assert manifest.read(world.folder / "data") is None
    world.restore()


@pytest.mark.parametrize("times", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_metrics_keep_readable_rows(times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run continues after the readable rows. The other rows are kept in a second file."""
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path, None)
    for step in range(1, 11):
        first.log_metrics({"train_loss": 1 / step, "total_tokens": 64 * step, "expert": 0.5}, step)
    full = path.read_bytes()
    rows = full.decode().splitlines()
    for number in range(times):
        path.write_bytes(full)
        rng = random.Random(number)
        how = damage(path, rng)
        damaged = path.read_bytes() if path.exists() else b""
        kept = path.with_name("metrics.csv.damaged")
        kept.unlink(missing_ok=True)
        MetricsCSV(path, 8).log_metrics({"train_loss": 0.1, "total_tokens": 9 * 64, "expert": 0.5}, 9)
        now = path.read_text(encoding="utf-8").splitlines()
        table = list(csv.DictReader(now))
        assert (table[-1]["step"], table[-1]["train_loss"]) == ("9", "0.1") and set(COLUMNS) <= table[-1].keys(), how
        steps = [row["step"] for row in table]
        assert len(set(steps)) == len(steps) and all(step.isdigit() for step in steps), how
        # A bit in the header makes another column of one, which stays; the right one is added behind all others.
        lost = [row for row in rows[1:9] if row.encode() in damaged and row not in now and f"{row}," not in now]
        assert not lost or kept.read_bytes() == damaged, how
        assert kept.exists() is (f"A copy of it is kept: {kept}" in capsys.readouterr().out)
