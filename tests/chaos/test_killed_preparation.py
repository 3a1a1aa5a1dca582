"""Kill prepare_data.py while it writes text, trains a tokenizer, reads the Hub, tokenizes or writes manifests.

The same command, called again, gives the same bytes, and leaves nothing else behind.
"""

import io
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litmoe.checksummed_json import read_checksummed
from tests.chaos.conftest import Moment, share
from tests.chaos.processes import Death, Life, Operation, Watched
from tests.data.hub_server import serve

ALL = "()"
KILLS_PER_FOLDER = 2
"""How often a preparation is killed before it may finish"""


@dataclass(frozen=True)
class Preparation:
    """A call of ``prepare_data.py``."""

    flags: tuple[str, ...]
    text: Path | None = None
    """Text that is put into the folder's ``train`` first"""
    more: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``Life``"""

    def begin(self, folder: Path, place: Path, death: Death | None = None) -> Life:
        """Start a process that prepares into ``place``."""
        if self.text and not place.exists():
            shutil.copytree(self.text, place / "data" / "train")
        command = [*self.flags, "--data_dir", str(place / "data"), "--tokenizer_dir", str(place / "tokenizer")]
        return Life(folder, "prepare_data.py", command, watched=Watched(place, ALL), death=death, **self.more)


def chaos(folder: Path, preparation: Preparation, kills: int, note: Callable[[Moment], None]) -> None:
    """Kill preparations ``kills`` times, evenly over their file operations and their time."""
    complete = preparation.begin(folder / "life", folder / "complete")
    assert complete.end() == 0, complete.said
    operations, draw, done = complete.operations, random.Random(f"{folder.name} {kills}"), 0
    for number in count():
        if done >= kills:
            return
        place = folder / str(number) / "place"
        for again in range(KILLS_PER_FOLDER):
            even = draw.random() if again else (done + draw.random()) / kills
            death = even_moment(operations, even, by_time=bool(done // KILLS_PER_FOLDER % 2))
            life = preparation.begin(place.with_name(f"life-{again}"), place, death)
            if not life.was_killed:  # a resumed call has less to do
                assert life.end() == 0, life.said
                break
            note(Moment("preparation", life.operations[-1].number / len(operations), what(life.operations[-1])))
            done += 1
        last = preparation.begin(place.with_name("last"), place)
        assert last.end() == 0, last.said
        assert contents(place) == contents(folder / "complete")


def even_moment(operations: list[Operation], even: float, *, by_time: bool) -> Death:
    if not by_time:
        return Death("", int(even * len(operations)))
    begun, ended = operations[0].seconds, operations[-1].seconds
    seconds = begun + even * (ended - begun)
    last = max(number for number, operation in enumerate(operations) if operation.seconds <= seconds)
    return Death("", last, seconds - operations[last].seconds)


def what(operation: Operation) -> str:
    """Return the activity that an operation belongs to."""
    parts = operation.what.split()[1].split("/")
    if ".incoming" in parts:
        return "writing text"
    if "tokenizer" in parts:
        return "the tokenizer"
    if "units" in parts or "cut" in parts:
        return "tokens"
    if parts[-1].endswith((".json", ".tmp")):
        return "manifests"
    return "reading text" if parts[-1].endswith(".txt") else "folders"


def contents(folder: Path) -> dict[str, Any]:
    """The content of all files below a folder, without the times of text files and the checksums over them."""

    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: untimed(item) for key, item in value.items() if key != "mtime_ns"}
        return [untimed(item) for item in value] if isinstance(value, list) else value

    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: untimed(read_checksummed(path)) if path.suffix == ".json" else path.read_bytes()
        for name, path in found.items()
        if path.name != ".prepare.lock"
    }


@pytest.fixture
def texts(tmp_path: Path, stories: list[str]) -> Path:
    """A folder of text files."""
    for number in range(6):
        path = tmp_path / "texts" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        rows = [f"{number}, {row}: {story}" for row in range(8) for story in stories]
        path.write_text("\n<|endoftext|>\n".join(rows), encoding="utf-8", newline="\n")
    return tmp_path / "texts"


TRAINED = ("--tokenizer", "train", "--vocab_size", "320")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_own_text(tmp_path: Path, texts: Path, moments: Callable[[Moment], None]) -> None:
    preparation = Preparation(("--source", str(texts), *TRAINED, "--num_workers", "0"))
    chaos(tmp_path / "own", preparation, share(1), moments)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_text_in_place(tmp_path: Path, texts: Path, moments: Callable[[Moment], None]) -> None:
    preparation = Preparation((*TRAINED, "--num_workers", "2"), texts)
    chaos(tmp_path / "in place", preparation, share(2), moments)


@pytest.fixture
def hub(tmp_path: Path, stories: list[str]) -> Iterator[dict[str, str]]:
    """The environment of processes that read ``org/stories`` from a Hub on this machine."""
    files = {}
    for number in range(3):
        buffer = io.BytesIO()
        rows = [f"{number}, {row}: {story}" for row in range(8) for story in stories]
        pq.write_table(pa.table({"text": rows}), buffer, row_group_size=200)
        files[f"data/train-{number:05d}-of-00003.parquet"] = buffer.getvalue()
    with serve({"org/stories": {"main": files}}) as server:
        yield {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kept", "kills"), [((), 1), (("--keep_text",), 1)], ids=["tokens alone", "text too"])
def test_hub_corpus(
    tmp_path: Path,
    hub: dict[str, str],
    tokenizer_dir: Path,
    moments: Callable[[Moment], None],
    kept: tuple[str, ...],
    kills: int,
) -> None:
    flags = ("--source", "hf:org/stories", "--tokenizer", str(tokenizer_dir), "--num_workers", "0", *kept)
    # A new process for each call: the Hub's client reads its address when it is imported.
    chaos(tmp_path / "hub", Preparation(flags, more={"environment": hub, "warm": False}), share(kills), moments)
