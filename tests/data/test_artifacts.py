"""Dataset artifacts: W&B's own client against a server on this machine."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb_server import WandbServer, serve

from litmoe.cli import UserError
from litmoe.config import parse_run
from litmoe.data import manifest
from litmoe.data.artifacts import fetch_dataset, log_dataset, parse_reference
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.train.preflight import ready
from litmoe.train.pretrain import pretrain

PROJECT = Path(__file__).resolve().parents[2]
KEY = "0123456789" * 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer_dir: Path) -> Path:
    """A prepared data folder, with its tokenizer in the folder next to it."""
    folder = tmp_path_factory.mktemp("prepared")
    for split, documents in (("train", stories[20:]), ("val", stories[:20])):
        (folder / "corpus" / split).mkdir(parents=True)
        text = "\n<|endoftext|>\n".join(documents)
        (folder / "corpus" / split / "stories.txt").write_text(text, encoding="utf-8", newline="\n")
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    prepare(PrepareArgs(data_dir=folder / "corpus", tokenizer_dir=folder / "tokenizer", num_workers=0))
    return folder / "corpus"


@pytest.fixture(autouse=True)
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A W&B client without the account, settings and caches of the user."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serve() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()
        yield running
        wandb.teardown()


@pytest.fixture
def logged(server: WandbServer, prepared: Path) -> WandbServer:
    """A server with the prepared folder as ``me/tales/dataset-corpus:v0``."""
    reference = log_dataset(prepared, tokenizer_dir=prepared.parent / "tokenizer", project="tales")
    assert reference == "me/tales/dataset-corpus:v0"
    return server


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "wandb artifacts"


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def expected(prepared: Path) -> dict[str, bytes]:
    tokenizer = contents(prepared.parent / "tokenizer")
    return contents(prepared) | {f"tokenizer/{name}": content for name, content in tokenizer.items()}


def offline_artifact(run: Path) -> Any:
    """The artifact that an offline run recorded, in a LevelDB log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("run-*.wandb")
    data, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or the last part
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "artifact":
                return record.artifact
    raise AssertionError(f"no artifact in {path}")


def test_log_offline_sync_fetch_and_reuse(
    prepared: Path, into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged offline without an account, uploaded later, fetched elsewhere, used without tokenizing again."""
    flags = ["--data-dir", prepared, "--wandb-artifact", "dataset-tales", "--wandb-project", "tales"]
    flags += ["--tokenizer-dir", prepared.parent / "tokenizer"]
    command = [sys.executable, *map(str, [PROJECT / "wandb_dataset.py", *flags])]
    env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "WANDB_DIR" / "wandb").glob("offline-run-*")
    artifact = offline_artifact(run)
    assert (artifact.name, artifact.type, artifact.project) == ("dataset-tales", "dataset", "tales")
    assert json.loads(artifact.metadata)["splits"]["train"]["documents"] == 124
    sizes = {name: len(content) for name, content in expected(prepared).items()}
    assert {entry.path: entry.size for entry in artifact.manifest.contents} == sizes

    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        sync = [sys.executable, "-m", "wandb", "sync", str(run)]
        result = subprocess.run(sync, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        wandb.teardown()
        folder = fetch_dataset("me/tales/dataset-tales:latest", into)
    assert contents(folder) == expected(prepared)
    times = {path: path.stat().st_mtime_ns for path in (folder / "tokens").rglob("*")}
    metadata = prepare(PrepareArgs(data_dir=folder, tokenizer_dir=folder / "tokenizer", num_workers=0))
    assert metadata == manifest.read(prepared)
    assert {path: path.stat().st_mtime_ns for path in (folder / "tokens").rglob("*")} == times


def test_training_on_an_artifact(
    logged: WandbServer, into: Path, tmp_path: Path, moe_fields: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "max_seq_length": 16, "save_interval": None}
    run_file = tmp_path / "run.yaml"
    settings = {"model": moe_fields, "train": train, "out_dir": str(tmp_path / "out"), "eval": {"max_iters": 1}}
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    flags = ["--wandb-dataset", "me/tales/dataset-corpus:latest", "--wandb-artifacts-dir", str(into)]
    run, resume_from = ready(parse_run(["--config", str(run_file), *flags]))
    pretrain(run, resume_from=resume_from)
    assert "Tokenizing" not in capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "out" / "final" / "hyperparameters.yaml").read_text(encoding="utf-8"))
    assert Path(saved["data"]["init_args"]["train_data_path"]).is_relative_to(into)
    assert (tmp_path / "out" / "final" / "manifest.json").is_file()


def test_versions_are_fetched_once(
    logged: WandbServer, prepared: Path, into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(3) as pool:
        (first,) = set(pool.map(lambda _: fetch_dataset("me/tales/dataset-corpus", into), range(3)))
    assert len(logged.downloads) == len(logged.versions[0].files)
    changed = shutil.copytree(prepared, tmp_path / "corpus")
    with open(changed / "train" / "stories.txt", "a", encoding="utf-8") as file:
        file.write("\n<|endoftext|>\nOne more story.")
    tokenizer = prepared.parent / "tokenizer"
    prepare(PrepareArgs(data_dir=changed, tokenizer_dir=tokenizer, num_workers=0))
    assert log_dataset(changed, tokenizer_dir=tokenizer, project="tales").endswith("dataset-corpus:v1")
    monkeypatch.setenv("WANDB_ENTITY", "me")
    second = fetch_dataset("tales/dataset-corpus:latest", into)
    assert second != first and b"One more story." in (second / "train" / "stories.txt").read_bytes()
    # A version that is there needs no network.
    logged.shutdown()
    logged.server_close()
    assert fetch_dataset("tales/dataset-corpus:v0", into) == first


def test_damaged_copy_is_fetched_again(logged: WandbServer, prepared: Path, into: Path) -> None:
    folder = fetch_dataset("me/tales/dataset-corpus:v0", into)
    chunk = next((folder / "tokens" / "train").glob("*.bin"))
    chunk.write_bytes(chunk.read_bytes()[:-2])
    assert fetch_dataset("me/tales/dataset-corpus:v0", into) == folder
    assert contents(folder) == expected(prepared)
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == ["v0"]


# --- errors ---


@pytest.mark.parametrize("content", [None, b"tampered!"], ids=["missing", "changed"])
def test_incomplete_download_is_removed(logged: WandbServer, into: Path, content: bytes | None) -> None:
    files = logged.versions[0].files
    del files["val/stories.txt"]
    if content is not None:
        files["val/stories.txt"] = content
    with pytest.raises(UserError, match="could not be fetched completely"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert contents(into) == {}


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "..\\outside.txt", "C:\\a.txt"])
def test_artifact_cannot_write_outside_its_folder(logged: WandbServer, into: Path, name: str) -> None:
    version = logged.versions[0]
    version.manifest["contents"][name] = version.manifest["contents"]["val/stories.txt"]
    version.files[name] = version.files["val/stories.txt"]
    with pytest.raises(UserError, match="is refused"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert not into.exists() and logged.downloads == []


def test_artifact_cannot_refer_to_local_files(logged: WandbServer, into: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    entry = {"digest": (tmp_path / "secret").as_uri(), "ref": (tmp_path / "secret").as_uri(), "size": 6}
    logged.versions[0].manifest["contents"]["train/secret.txt"] = entry
    with pytest.raises(UserError, match="is refused"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert not into.exists()


def test_missing_artifact(logged: WandbServer, into: Path) -> None:
    for reference in ("me/nowhere/dataset-corpus:v0", "me/tales/dataset-other", "me/tales/dataset-corpus:v7"):
        with pytest.raises(UserError, match=r"could not be fetched: .*not found.*Check the names"):
            fetch_dataset(reference, into)
    del logged.versions[0].manifest["contents"]["tokens/manifest.json"]
    with pytest.raises(UserError, match=r"not a dataset to train on.*wandb_dataset\.py"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)


def test_missing_key_and_offline(prepared: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"could not be fetched: .*uv run wandb login"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    with pytest.raises(UserError, match=r"did not accept dataset-corpus.*uv run wandb login.*WANDB_MODE=offline"):
        log_dataset(prepared, tokenizer_dir=prepared.parent / "tokenizer")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    with pytest.raises(UserError, match=r"offline \(WANDB_MODE\)"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("dataset", "names no project"),
        ("tales/dataset", "names no entity"),
        ("https://wandb.ai/me/tales/dataset:v0", "expected entity/project/name:alias"),
        ("a/b/c/d:v0", "expected entity/project/name:alias"),
        ("me/../dataset:v0", "expected entity/project/name:alias"),
        ("me/tales/dataset:../v0", "expected entity/project/name:alias"),
        ("", "expected entity/project/name:alias"),
    ],
)
def test_invalid_reference(reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_reference(reference)


def test_reference_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "team")
    monkeypatch.setenv("WANDB_PROJECT", "tales")
    references = [str(parse_reference(name)) for name in ("dataset", "other/dataset:v3", "me/other/dataset:best")]
    assert references == ["team/tales/dataset:latest", "team/other/dataset:v3", "me/other/dataset:best"]


def test_only_complete_data_is_logged(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tokenizer = prepared.parent / "tokenizer"
    with pytest.raises(UserError, match=r"prepare_data\.py"):
        log_dataset(tmp_path / "nothing")
    stale = shutil.copytree(prepared, tmp_path / "stale")
    (stale / "val" / "stories.txt").write_text("changed", encoding="utf-8")
    with pytest.raises(UserError, match=r"changed since it was tokenized.*prepare_data\.py"):
        log_dataset(stale, tokenizer_dir=tokenizer)
    other = shutil.copytree(tokenizer, tmp_path / "other")
    values = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=r"the tokenizer that made the tokens .*--tokenizer-dir"):
        log_dataset(prepared, tokenizer_dir=other)
    with pytest.raises(UserError, match="did not accept a/b"):
        log_dataset(prepared, tokenizer_dir=tokenizer, name="a/b")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    with pytest.raises(UserError, match="W&B is disabled"):
        log_dataset(prepared, tokenizer_dir=tokenizer)
    assert not (tmp_path / "WANDB_DIR" / "wandb").exists()


def test_server_refuses(
    prepared: Path, server: WandbServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wandb_server.Handler.CreateArtifact", None)
    with pytest.raises(UserError, match=r"W&B did not accept dataset-corpus in the project 'litmoe'.*CreateArtifact"):
        log_dataset(prepared, tokenizer_dir=prepared.parent / "tokenizer")
    assert "Traceback" not in capfd.readouterr().err
