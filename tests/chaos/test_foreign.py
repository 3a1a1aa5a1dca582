"""Checkpoints and data folders from others: no code in them is run, and no file outside of them is touched."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from litgpt import Tokenizer

from litmoe import checkpoints, load
from litmoe.checksummed_json import read_checksummed, write_checksummed
from litmoe.cli import UserError, exit_with_message
from litmoe.config import parse_run
from litmoe.data import manifest
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.finetune_config import parse_finetuning
from litmoe.inference.chat import Chat
from tests.helpers import DENSE_FIELDS, load_script, renew_checksums, save_tiny, tiny_gpt

HARM = "harm-done"


class Harmful:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (HARM,)


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Check after each test that no code was run. A module ``evil`` can be imported."""
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({HARM!r})\nclass Evil: pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / HARM).exists()
    assert "evil" not in sys.modules


@pytest.fixture
def dense_fields(moe_fields: dict) -> dict:
    return {**moe_fields, **DENSE_FIELDS, "moe_intermediate_size": None}


@pytest.fixture
def stranger(tmp_path: Path, dense_fields: dict, tokenizer_dir: Path) -> Path:
    """A complete checkpoint from someone else, with correct checksums."""
    return save_tiny(tmp_path / "stranger" / "final", tiny_gpt(dense_fields), tokenizer_dir)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    row = {"ind": 1, "ctx": "Mia went", "activity_label": "", "endings": ["a", "b", "c", "d"], "label": 1}
    row |= {"ctx_a": "Mia went", "ctx_b": "", "source_id": "x", "split": "val"}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


READERS = ["generate", "chat", "loss", "hellaswag", "tasks", "experts", "export_hf", "upcycle"]
TRAINING = ["initial", "finetune"]


@pytest.mark.parametrize(
    ("reader", "form"),
    [
        *((reader, "zip") for reader in READERS),
        *(pytest.param(reader, "zip", marks=pytest.mark.slow) for reader in TRAINING),
        *(("generate", form) for form in ("bare", "inside a list", "a list")),
    ],
)
def test_scripts_refuse_pickled_code(
    reader: str,
    form: str,
    stranger: Path,
    questions: Path,
    prepared: Path,
    run_file: Path,
    train: Callable[..., Path],
    tune: Callable[..., Path],
    tmp_path: Path,
    dense_fields: dict,
    moe_fields: dict,
    tokenizer_dir: Path,
) -> None:
    if reader == "experts":
        shutil.rmtree(stranger)
        save_tiny(stranger, tiny_gpt(moe_fields), tokenizer_dir)
    if form == "bare":
        (stranger / "lit_model.pth").write_bytes(pickle.dumps({"model": Harmful()}))
    else:
        content: Any = {"zip": {"model": Harmful()}, "inside a list": {"model": [Harmful()]}, "a list": [torch.ones(1)]}
        torch.save(content[form], stranger / "lit_model.pth")
    renew_checksums(stranger)
    model = tmp_path / "dense.yaml"
    model.write_text(yaml.safe_dump(dense_fields), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    task = {"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}}}
    task |= {
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "endings",
    }
    (tmp_path / "tasks" / "t.yaml").write_text(yaml.safe_dump({**task, "doc_to_target": "label"}), encoding="utf-8")
    evaluate = load_script("evaluate").main
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: load_script("generate").main(checkpoint=stranger, device="cpu"),
        "chat": lambda: load_script("chat").main(checkpoint=stranger, device="cpu"),
        "loss": lambda: evaluate(checkpoint=stranger, data_dir=prepared / "data", device="cpu", max_seq_length=16),
        "hellaswag": lambda: evaluate(checkpoint=stranger, hellaswag=str(questions), device="cpu"),
        "tasks": lambda: evaluate(checkpoint=stranger, tasks="t", tasks_dir=tmp_path / "tasks", device="cpu"),
        "experts": lambda: evaluate(checkpoint=stranger, experts=True, data_dir=prepared / "data", device="cpu"),
        "export_hf": lambda: load_script("export_hf").main(stranger, tmp_path / "exported"),
        "initial": lambda: train("--initial_checkpoint_dir", str(stranger), "--model", str(model)),
        "upcycle": lambda: train("--upcycle", str(stranger), "--train.tie_embeddings=true"),
        "finetune": lambda: tune("--checkpoint_dir", str(stranger)),
    }
    if reader == "upcycle":
        settings = yaml.safe_load(run_file.read_text(encoding="utf-8"))
        del settings["model"]
        run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"lit_model\.pth (is refused|holds|is damaged)") as refused:
        calls[reader]()
    assert "weights_only" not in str(refused.value), "torch's message names the way around it"
    assert "\n" not in str(refused.value)


TUNING = (
    *("--train.max_steps", "2", "--train.save_interval", "1", "--global_batch_size", "2", "--max_seq_length", "64"),
    *("--sample.prompt", "Who?", "--sample.max_new_tokens", "4"),
)


def test_resume_refuses_pickled_code(train: Callable[..., Path]) -> None:
    out = train("--train.max_steps", "4")
    folder = out / "step-00000004" if (out / "step-00000004").is_dir() else out / "final"
    torch.save({"progress": Harmful()}, folder / "training_state.pth")
    renew_checksums(folder)
    with pytest.raises(UserError, match=r"training_state\.pth is refused, and nothing in it was run"):
        train("--train.max_steps", "8", "--resume", str(folder))


@pytest.mark.slow
def test_lora_resume_refuses_pickled_code(tune: Callable[..., Path], stranger: Path) -> None:
    flags = ("--checkpoint_dir", str(stranger), "--lora_r", "2", *TUNING)
    folder = checkpoints.newest_undamaged(tune(*flags))[0]
    assert folder is not None
    torch.save({"lora": Harmful()}, folder / "lit_model.pth.lora")
    renew_checksums(folder)
    with pytest.raises(UserError, match=r"lit_model\.pth\.lora is refused, and nothing in it was run"):
        tune(*flags, "--resume", str(folder))


CODE = f"!!python/object/apply:os.mkdir ['{HARM}']"


@pytest.mark.parametrize("name", ["model_config.yaml", "prompt_style.yaml", "hyperparameters.yaml"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(CODE, marks=pytest.mark.slow),
        pytest.param(f"class_path: {CODE}", marks=pytest.mark.slow),
        "class_path: evil.Evil",
    ],
)
def test_checkpoint_yaml_runs_no_code(name: str, text: str, stranger: Path, prepared: Path, tmp_path: Path) -> None:
    """Each reader either reports a damaged file or does not read it."""
    (stranger / name).write_text(text, encoding="utf-8")
    renew_checksums(stranger)
    evaluate = load_script("evaluate").main
    calls: list[Callable[[], Any]] = [
        lambda: Chat(load(stranger, device="cpu")),
        lambda: evaluate(checkpoint=stranger, device="cpu", max_seq_length=16, data_dir=prepared / "data"),
        lambda: checkpoints.load_hyperparameters(stranger),
        lambda: parse_finetuning([str(stranger)]),
    ]
    if name == "model_config.yaml":  # what the others read of it as well
        calls += [
            lambda: load_script("export_hf").main(stranger, tmp_path / "exported"),
            lambda: parse_run(["--upcycle", str(stranger)]),
        ]
    for call in calls:
        try:
            call()
        except UserError as error:
            assert name in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["data", "optimizer"])
def test_checkpoint_cannot_choose_classes(
    setting: str, stranger: Path, prepared: Path, tmp_path: Path, train: Any, tune: Any
) -> None:
    """Its hyperparameters name classes, but only classes of the user's run file and flags are instantiated."""
    settings = {"data": {"class_path": "litmoe.data.TokenizedText", "init_args": {}}, "optimizer": {}}
    settings[setting] = {"class_path": "evil.Evil", "init_args": {}}
    (stranger / "hyperparameters.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    renew_checksums(stranger)
    load_script("evaluate").main(checkpoint=stranger, device="cpu", max_seq_length=16, data_dir=prepared / "data")
    tune("--checkpoint_dir", str(stranger), "--out_dir", str(tmp_path / "tuned"), *TUNING)
    flags = ("--model", str(stranger / "model_config.yaml"), "--train.max_steps", "1")
    train("--initial_checkpoint_dir", str(stranger), *flags)


@pytest.mark.parametrize(
    ("parse", "text"),
    [*((parse_run, text) for text in (CODE, f"optimizer: {CODE}", f"a: &a [*a, {CODE}]")), (parse_finetuning, CODE)],
)
def test_run_file_yaml_runs_no_code(parse: Callable[[list[str]], Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.yaml is not valid YAML"):
        parse(["--config", str(path)])


def test_flags_run_no_code(run_file: Path) -> None:
    assert parse_run(["--config", str(run_file), "--model.name", CODE]).settings.model.name == CODE, "it is a text"
    with pytest.raises(UserError):
        parse_run(["--config", str(run_file), "--optimizer", CODE])


# --- what is shown ---


def test_terminal_output_has_no_control_characters(
    stranger: Path,
    dense_fields: dict,
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control characters could change the title, the colours or earlier lines. Files get the unchanged text."""
    gpt, tokenizer = tiny_gpt(dense_fields), Tokenizer(tokenizer_dir)
    escape, bell = (int(tokenizer.encode(byte)[0]) for byte in "\x1b\x07")
    with torch.no_grad():
        row = gpt.lm_head.weight[escape].clone()
        gpt.lm_head.weight.zero_()
        gpt.lm_head.weight[escape], gpt.lm_head.weight[bell] = row, -row  # one of them is always the likeliest
    folder = save_tiny(tmp_path / "control" / "final", gpt, tokenizer_dir)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        load_script("generate").main(
            checkpoint=folder, prompt="Mia\x1b[2J", temperature=0.0, max_new_tokens=5, device="cpu"
        )
        shown = capsys.readouterr().out
        assert any(character in shown for character in "\x1b\x07") is not terminal
        assert len(shown.rstrip("\n")) == len("Mia\x1b[2J") + 5


def test_messages_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise UserError("the model \x1b]0;owned\x07\x9b2J\r is none\nof ours")

    with pytest.raises(SystemExit):
        exit_with_message(refuse)
    assert capsys.readouterr().err == "error: the model \ufffd]0;owned\ufffd\ufffd2J\ufffd is none\nof ours\n"


# --- data folders ---

OUTSIDE = ["../outside", "/outside", "a/../../outside", "..\\outside", "C:\\outside", "C:outside", "\\\\host\\outside"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_folder_names_no_outside_file(name: str, prepared: Path, tmp_path: Path) -> None:
    """Neither as a chunk (its bytes would be read and logged) nor as text (its time would be set)."""
    data = shutil.copytree(prepared / "data", tmp_path / "data")
    (tmp_path / "outside").write_bytes(b"secret")
    index = data / "tokens" / "train" / "index.json"
    values = json.loads(index.read_text(encoding="utf-8"))
    values["chunks"][0] |= {"filename": name, "chunk_bytes": 6}
    index.write_text(json.dumps(values), encoding="utf-8")
    assert manifest.read(data) is None
    shutil.copy(prepared / "data" / "tokens" / "train" / "index.json", index)
    assert manifest.read(data) is not None
    for place in ("text", "files"):
        values = read_checksummed(manifest.manifest_path(prepared / "data"))
        split = values["splits"]["train"]
        if place == "text":
            split["text"][0]["path"] = name
        else:
            split["files"][name] = "0" * 64
        write_checksummed(manifest.manifest_path(data), values)
        assert manifest.read(data) is None, place


@pytest.mark.parametrize("name", [*OUTSIDE, "..", "", "a/b", "/dev/zero"])
def test_checkpoint_names_no_outside_file(name: str, stranger: Path) -> None:
    """Its checksum would be computed, and a device is endless."""
    values = read_checksummed(stranger / checkpoints.COMPLETE_FILE)
    values["files"][name] = {"size": 0, "sha256": "0" * 64}
    write_checksummed(stranger / checkpoints.COMPLETE_FILE, values)
    with pytest.raises(UserError, match=r"complete\.json is damaged"):
        checkpoints.verify(stranger)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_device_behind_link_is_not_read(stranger: Path) -> None:
    values = read_checksummed(stranger / checkpoints.COMPLETE_FILE)
    values["files"]["zeros"] = {"size": 0, "sha256": "0" * 64}
    write_checksummed(stranger / checkpoints.COMPLETE_FILE, values)
    (stranger / "zeros").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"zeros can't be read"):
        checkpoints.verify(stranger)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_tokens_are_not_written_through_a_link(tmp_path: Path, tokenizer_dir: Path, stories: list[str]) -> None:
    """The token folder of a data folder is a link: the files behind the link do not change."""
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "a.txt").write_text(stories[0] + "\n", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "chunk-0-0.bin").write_bytes(b"theirs")
    (tmp_path / "data" / "tokens").mkdir()
    (tmp_path / "data" / "tokens" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((UserError, OSError)):
        prepare(PrepareArgs(data_dir=tmp_path / "data", tokenizer_dir=tokenizer_dir, num_workers=0))
    assert (tmp_path / "elsewhere" / "chunk-0-0.bin").read_bytes() == b"theirs"
    assert os.listdir(tmp_path / "elsewhere") == ["chunk-0-0.bin"]
