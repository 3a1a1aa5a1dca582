"""Dataset artifacts: W&B's own client against a server on this machine, and every way that it can fail."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb_server import Version, WandbServer, serve

from litmoe.cli import UserError
from litmoe.config import parse_run
from litmoe.data import manifest
from litmoe.data.artifacts import RECORD, fetch_dataset, log_dataset, parse_reference
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.train.preflight import ready
from litmoe.train.pretrain import pretrain

PROJECT = Path(__file__).resolve().parents[2]
KEY = "0123456789" * 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer_dir: Path) -> Path:
    """A prepared data folder; its tokenizer lies beside it, in ``tokenizer``."""
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
    """A W&B client that knows nothing of this user's account, settings and caches."""
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
    """A server that has the prepared folder as ``me/tales/dataset-corpus:v0``."""
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
    """The artifact that an offline run recorded (its file is a LevelDB log of protobuf records)."""
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
        if kind in (1, 4):  # whole, or the last part
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "artifact":
                return record.artifact
    raise AssertionError(f"no artifact in {path}")


def test_offline_without_account_then_sync_then_fetch_and_train(
    prepared: Path, into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way by the commands of the README: logged offline, sent later, fetched elsewhere, used as it lies."""
    command = [
        sys.executable,
        PROJECT / "wandb_dataset.py",
        "--data-dir",
        prepared,
        "--wandb-artifact",
        "dataset-tales",
    ]
    command += ["--tokenizer-dir", prepared.parent / "tokenizer", "--wandb-project", "tales"]
    env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(PROJECT)}
    result = subprocess.run([str(part) for part in command], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "WANDB_DIR" / "wandb").glob("offline-run-*")
    artifact = offline_artifact(run)
    assert (artifact.name, artifact.type, artifact.project) == ("dataset-tales", "dataset", "tales")
    assert json.loads(artifact.metadata) == json.loads(json.dumps(asdict(manifest.read(prepared))))
    whole = expected(prepared)
    assert {entry.path: entry.size for entry in artifact.manifest.contents} == {k: len(v) for k, v in whole.items()}

    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        sync = [sys.executable, "-m", "wandb", "sync", str(run)]
        result = subprocess.run(sync, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        wandb.teardown()
        folder = fetch_dataset("me/tales/dataset-tales:latest", into)
    fetched = contents(folder)
    assert fetched.pop(RECORD) and fetched == whole
    tokens = {path: path.stat().st_mtime_ns for path in (folder / "tokens").rglob("*")}
    found = prepare(PrepareArgs(data_dir=folder, tokenizer_dir=folder / "tokenizer", num_workers=0))
    assert found == manifest.read(prepared)
    assert {path: path.stat().st_mtime_ns for path in (folder / "tokens").rglob("*")} == tokens


def test_training_takes_its_text_tokens_and_tokenizer_from_the_artifact(
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


def test_a_version_that_lies_there_is_not_fetched_again(
    logged: WandbServer, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_dataset("me/tales/dataset-corpus", into)
    assert len(logged.downloads) == len(logged.versions[0].files)
    monkeypatch.setenv("WANDB_ENTITY", "me")
    assert fetch_dataset("tales/dataset-corpus:latest", into) == folder
    assert len(logged.downloads) == len(logged.versions[0].files)
    logged.shutdown()
    logged.server_close()
    assert fetch_dataset("tales/dataset-corpus:v0", into) == folder
    with pytest.raises(UserError, match=r"cannot be reached.*me/tales/dataset-corpus:v0"):
        fetch_dataset("tales/dataset-corpus:latest", into)


def test_a_new_version_lies_beside_the_old_one(logged: WandbServer, prepared: Path, into: Path, tmp_path: Path) -> None:
    first = fetch_dataset("me/tales/dataset-corpus:latest", into)
    changed = shutil.copytree(prepared, tmp_path / "corpus")
    with open(changed / "train" / "stories.txt", "a", encoding="utf-8") as file:
        file.write("\n<|endoftext|>\nOne more story.")
    tokenizer = prepared.parent / "tokenizer"
    prepare(PrepareArgs(data_dir=changed, tokenizer_dir=tokenizer, num_workers=0))
    assert log_dataset(changed, tokenizer_dir=tokenizer, project="tales").endswith("dataset-corpus:v1")
    second = fetch_dataset("me/tales/dataset-corpus:latest", into)
    assert second != first and b"One more story." in (second / "train" / "stories.txt").read_bytes()
    assert fetch_dataset("me/tales/dataset-corpus:v0", into) == first


def test_a_damaged_copy_is_fetched_again(logged: WandbServer, prepared: Path, into: Path) -> None:
    folder = fetch_dataset("me/tales/dataset-corpus:v0", into)
    chunk = next((folder / "tokens" / "train").glob("*.bin"))
    chunk.write_bytes(chunk.read_bytes()[:-2])
    left_behind = folder.with_name(".v0.fetching-killed")
    (left_behind / "data").mkdir(parents=True)
    assert fetch_dataset("me/tales/dataset-corpus:v0", into) == folder
    fetched = contents(folder)
    assert fetched.pop(RECORD) and fetched == expected(prepared)
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == ["v0"]


def test_several_at_once_fetch_once(logged: WandbServer, into: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: fetch_dataset("me/tales/dataset-corpus:latest", into), range(3)))
    assert len(folders) == 1 and len(logged.downloads) == len(logged.versions[0].files)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def set_file(version: Version, name: str, content: bytes | None) -> None:
    if content is None:
        del version.files[name]
    else:
        version.files[name] = content


@pytest.mark.parametrize("content", [None, b"", b"tampered!"], ids=["missing", "truncated", "another"])
def test_what_does_not_arrive_whole_is_not_kept(logged: WandbServer, into: Path, content: bytes | None) -> None:
    set_file(logged.versions[0], "val/stories.txt", content)
    with pytest.raises(UserError, match="could not be fetched whole, and nothing of it was kept"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert not into.exists()


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "..\\outside.txt", "C:\\a.txt"]
)
def test_an_artifact_can_not_write_outside_its_folder(logged: WandbServer, into: Path, name: str) -> None:
    version = logged.versions[0]
    version.manifest["contents"][name] = version.manifest["contents"]["val/stories.txt"]
    version.files[name] = version.files["val/stories.txt"]
    with pytest.raises(UserError, match="is refused"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert not into.exists() and logged.downloads == []


def test_an_artifact_can_not_refer_to_files_of_this_machine(logged: WandbServer, into: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    entry = {"digest": (tmp_path / "secret").as_uri(), "ref": (tmp_path / "secret").as_uri(), "size": 6}
    logged.versions[0].manifest["contents"]["train/secret.txt"] = entry
    with pytest.raises(UserError, match="is refused"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert not into.exists()


def test_missing_project_missing_artifact_and_what_is_no_dataset(logged: WandbServer, into: Path) -> None:
    with pytest.raises(UserError, match="knows no project me/nowhere"):
        fetch_dataset("me/nowhere/dataset-corpus:v0", into)
    with pytest.raises(UserError, match="no artifact dataset-other:latest in me/tales"):
        fetch_dataset("me/tales/dataset-other", into)
    with pytest.raises(UserError, match="no artifact dataset-corpus:v7 in me/tales"):
        fetch_dataset("me/tales/dataset-corpus:v7", into)
    del logged.versions[0].manifest["contents"]["tokens/manifest.json"]
    with pytest.raises(UserError, match=r"no dataset that can be trained on.*wandb_dataset\.py"):
        fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert not into.exists()


def test_no_key_no_network_and_offline_are_said_at_once(
    prepared: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # never listens, so nobody can connect
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        for environment, message in (
            ({}, r"no W&B key.*wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"),
            ({"WANDB_API_KEY": "short"}, r"W&B key is not valid.*wandb login"),
            ({"WANDB_API_KEY": KEY}, r"W&B cannot be reached at http://127\.0\.0\.1.*WANDB_MODE=offline"),
        ):
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                wandb.teardown()
                with pytest.raises(UserError, match=message):
                    fetch_dataset("me/tales/dataset-corpus:v0", into)
                with pytest.raises(UserError, match=message):
                    log_dataset(prepared, tokenizer_dir=prepared.parent / "tokenizer")
        monkeypatch.setenv("WANDB_MODE", "offline")
        wandb.teardown()
        with pytest.raises(UserError, match=r"offline \(WANDB_MODE\)"):
            fetch_dataset("me/tales/dataset-corpus:v0", into)
    assert not into.exists()


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
def test_a_bad_reference_is_explained(reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_reference(reference)


def test_entity_and_project_come_from_the_environment_where_they_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "team")
    monkeypatch.setenv("WANDB_PROJECT", "tales")
    references = ["dataset", "other/dataset:v3", "me/other/dataset:best"]
    found = [str(parse_reference(reference)) for reference in references]
    assert found == ["team/tales/dataset:latest", "team/other/dataset:v3", "me/other/dataset:best"]


def test_only_whole_and_fresh_data_is_logged(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tokenizer = prepared.parent / "tokenizer"
    with pytest.raises(UserError, match=r"prepare_data\.py"):
        log_dataset(tmp_path / "nothing")
    half = shutil.copytree(prepared, tmp_path / "half")
    manifest.manifest_path(half).unlink()
    with pytest.raises(UserError, match=r"not complete.*prepare_data\.py"):
        log_dataset(half, tokenizer_dir=tokenizer)
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
    with pytest.raises(UserError, match="no artifact name"):
        log_dataset(prepared, tokenizer_dir=tokenizer, name="a/b")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    with pytest.raises(UserError, match="W&B is disabled"):
        log_dataset(prepared, tokenizer_dir=tokenizer)
    assert not (tmp_path / "WANDB_DIR" / "wandb").exists()


def test_a_refusal_of_the_server_is_one_message(
    prepared: Path, server: WandbServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wandb_server.Handler.CreateArtifact", None)
    with pytest.raises(UserError, match=r"W&B did not take dataset-corpus into the project 'litmoe'.*CreateArtifact"):
        log_dataset(prepared, tokenizer_dir=prepared.parent / "tokenizer")
    assert "Traceback" not in capfd.readouterr().err
