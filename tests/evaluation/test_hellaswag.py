"""HellaSwag: the numbers of lm-eval, for checkpoints and during training."""

import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt import GPT, Config, Tokenizer
from torch import Tensor

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError, run_cli
from litmoe.config import PROJECT
from litmoe.data import TokenizedText
from litmoe.evaluation import common, hellaswag
from litmoe.evaluation.hellaswag import (
    Question,
    accuracy,
    encode,
    encode_question,
    evaluate,
    log_probabilities,
    read_questions,
)
from tests.helpers import (
    CPU_FP32,
    DENSE_FIELDS,
    NEOX_FIELDS,
    convert_for_transformers,
    load_script,
    metric_rows,
    save_tiny,
    tiny_gpt,
)


def make_rows() -> list[dict[str, Any]]:
    """Rows in the original format, as from ActivityNet and WikiHow; rows 10 to 16 are special cases."""
    draw = random.Random(0)
    words = "Mia Tom the cat dog went to sea hill. wood, was happy sad and brave [step] [substeps] é 🦊 x"

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words.split(), k=draw.randint(least, most)))

    rows = []
    for index in range(40):
        wikihow = index % 2 == 1
        rows.append(
            {
                "ind": index,
                "activity_label": "Personal Care" if wikihow else "Feeding a dog",
                "ctx_a": f"[header] How to {text(1, 4)} [title] {text(2, 60)}" if wikihow else text(2, 60),
                "ctx_b": "" if wikihow else "the DOG",
                "label": index % 4,
                "endings": [f"{text(1, 12)} [title] {text(1, 8)}" if wikihow else text(1, 20) for _ in range(4)],
            }
        )
    rows[10]["endings"][2] = "[header]"  # empty after the preparation
    rows[11]["endings"][1] = "[header] A space is left before it."
    rows[12]["endings"][0] = "  many   spaces  "
    rows[13]["ctx_a"] += " [unfinished"
    rows[14] |= {"ctx_a": "a context", "ctx_b": "[only brackets]"}  # ends with a space
    rows[15]["label"] = "1"  # as on the Hub
    rows[16] |= {"ctx_a": "", "ctx_b": ""}
    return rows


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "hellaswag_val.jsonl", make_rows())


@pytest.fixture
def questions(file: Path) -> list[Question]:
    return read_questions(str(file))


@pytest.fixture
def fields(moe_fields: dict) -> dict:
    return moe_fields | {"block_size": 128}


def one_by_one(gpt: GPT, questions: list[Question], tokenizer: Tokenizer, max_length: int) -> Tensor:
    """By the definition, with LitGPT's forward pass: one ending at a time, without padding."""
    scores = []
    for question in questions:
        context, endings = encode_question(question, tokenizer)
        for ending in endings:
            ids = torch.tensor((context + ending)[-(max_length + 1) :])
            with torch.no_grad():
                log_probabilities = gpt(ids[None, :-1])[0].double().log_softmax(-1)
            scores.append(log_probabilities.gather(1, ids[1:, None])[-len(ending) :].sum())
    return torch.stack(scores).view(-1, 4)


# ----------------------------------------------------------------------------------------------------------- questions


def test_reads_the_hub_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: list[Question]) -> None:
    """Parquet, labels as text and named splits, as in Rowan/hellaswag."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [row | {"label": str(row["label"])} for row in make_rows()]
    for split, content in (("validation", rows), ("test", [row | {"label": ""} for row in rows])):
        datasets.Dataset.from_list(content).to_parquet(f"Rowan/hellaswag/data/{split}-00000-of-00001.parquet")
    assert read_questions("Rowan/hellaswag") == questions
    assert read_questions("Rowan/hellaswag", limit=2) == questions[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n\n", "contains no questions"),
        ("no JSON\n", "is not a JSONL file"),
        (b"\n\xff{", "is not a JSONL file in UTF-8"),
        ("[1, 2]\n", "does not contain HellaSwag questions"),
        ({"endings": None}, "does not contain HellaSwag questions"),
        ({"endings": ["a", "b", "c"]}, "question 2 has 3 endings"),
        ({"label": 4}, "question 2 has 4 endings and label 4"),
        ({"label": ""}, "does not contain HellaSwag questions"),  # as in the test set
        ({"ctx_b": None}, "does not contain HellaSwag questions"),
    ],
)
def test_refuses_bad_questions(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    if isinstance(content, dict):
        good = make_rows()[0]
        write_rows(path, [good, good | content])
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        read_questions(str(path))
    assert "Rowan/hellaswag" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere.jsonl", "found no file nowhere.jsonl"), ("unknown/nothing", "is not a file, and could not be loaded")],
)
def test_refuses_a_missing_source(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read_questions(source)


# -------------------------------------------------------------------------------------------------------------- tokens


def test_tokenizes_context_and_ending_together(questions: list[Question], tokenizer: Tokenizer) -> None:
    for question in questions:
        context, endings = encode_question(question, tokenizer)
        assert context == tokenizer.encode(question.context.rstrip()).tolist()
        for text, ids in zip(question.endings, endings, strict=True):
            assert context + ids == tokenizer.encode(f"{question.context} {text}").tolist()
    empty = encode_question(questions[10], tokenizer)[1][2]
    assert (questions[10].endings[2], empty) == ("", tokenizer.encode(" ").tolist())
    assert encode_question(Question("", ["a"] * 4, 0), tokenizer)[0] == [tokenizer.bos_id]


def test_refuses_an_ending_that_does_not_fit(questions: list[Question], tokenizer: Tokenizer, fields: dict) -> None:
    with pytest.raises(UserError, match=r"of HellaSwag question \d+ has \d+ tokens; expected 1 to 8.* up to 128\."):
        encode(questions, tokenizer, Config(**fields), 8)


def test_refuses_another_tokenizer(questions: list[Question], tokenizer: Tokenizer, fields: dict) -> None:
    with pytest.raises(UserError, match="vocabulary of the model has 300 tokens"):
        encode(questions, tokenizer, Config(**fields | {"vocab_size": 300, "padded_vocab_size": 300}), 128)


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**DENSE_FIELDS, "scale_embeddings": True, "final_logit_softcapping": 2.0, "norm_qk": True},
        {"sliding_window_size": 9, "sliding_window_indices": [0, 1]},
    ],
    ids=["moe", "gemma-like", "sliding"],
)
def test_scores_equal_one_ending_at_a_time(
    questions: list[Question], tokenizer: Tokenizer, fields: dict, changes: dict
) -> None:
    """Compared with LitGPT's forward pass; some contexts are too long and cut."""
    gpt = tiny_gpt(fields | changes)
    encoded = encode(questions, tokenizer, gpt.config, 96)
    scores = log_probabilities(gpt, encoded.batches, encoded)
    expected = one_by_one(gpt, questions, tokenizer, 96)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-5)
    assert expected.std() > 1, "equal numbers would show nothing"


def test_scoring_keeps_the_training_state(
    questions: list[Question], tokenizer: Tokenizer, fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of a run, with its output layer in several steps and one row per batch."""
    gpt = tiny_gpt(fields)
    expected = one_by_one(gpt, questions, tokenizer, 128)
    monkeypatch.setattr(common, "_LOGITS", 384 * 5)
    monkeypatch.setattr(hellaswag, "_BATCH_TOKENS", 1)
    with use_custom_moe():
        live = GPT(gpt.config).train()
    live.load_state_dict(gpt.state_dict())
    random_state = torch.get_rng_state()
    encoded = encode(questions, tokenizer, gpt.config, 128)
    assert len(encoded.batches) == len(encoded.rows)
    scores = log_probabilities(live, encoded.batches, encoded)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-5)
    assert all(module.training for module in live.modules())
    assert all(parameter.grad is None for parameter in live.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_shares_of_ranks_add_up(questions: list[Question], tokenizer: Tokenizer, fields: dict) -> None:
    gpt = tiny_gpt(fields)
    encoded = encode(questions, tokenizer, gpt.config, 128)
    assert len(encoded.batches) > 2
    complete = log_probabilities(gpt, encoded.batches, encoded)
    shares = [log_probabilities(gpt, encoded.batches[rank::3], encoded) for rank in range(3)]
    assert torch.equal(sum(shares), complete)
    assert all((share == 0).any() for share in shares)


def test_accuracies_by_hand() -> None:
    questions = [Question("", ["a", "bbbb", "cc", "dd"], label) for label in (0, 1)]
    questions.append(Question("", ["", "bbbb", "cc", "dd"], 0))
    scores = torch.tensor([[-3.0, -10.0, -11.0, -11.0]] * 2 + [[-1.0, -10.0, -11.0, -11.0]], dtype=torch.float64)
    result = accuracy(questions, scores)
    assert (result.acc, result.acc_norm) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert result.acc_stderr == pytest.approx(statistics.stdev([1, 0, 1]) / math.sqrt(3))
    assert result.acc_norm_stderr == pytest.approx(statistics.stdev([0, 1, 0]) / math.sqrt(3))
    assert accuracy(questions[:1], scores[:1]).acc_stderr is None


@pytest.mark.filterwarnings("ignore:divide by zero")  # an ending of length 0
@pytest.mark.parametrize(
    ("changes", "block_size"), [({}, 64), pytest.param(NEOX_FIELDS, 128, marks=pytest.mark.slow)], ids=["moe", "gpt2"]
)
def test_numbers_equal_lm_eval(
    tmp_path: Path, file: Path, questions: list[Question], moe_fields: dict, tokenizer_dir: Path, changes, block_size
) -> None:
    """Compared with lm-eval's task and ``HFLM`` on the same weights in transformers, and the same file."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields | {"block_size": block_size} | changes), tokenizer_dir)
    convert_for_transformers(folder, tmp_path / "converted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "converted"), batch_size=8, device="cpu")
    assert lm.max_length == block_size
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml")
    config |= {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "training_split": None,
    }
    result = lm_eval.evaluate(lm, {"hellaswag": ConfigurableTask(config=config)}, bootstrap_iters=1)
    theirs = result["results"]["hellaswag"]
    ours = evaluate(folder, str(file), **CPU_FP32)
    for name in ("acc", "acc_norm"):
        assert getattr(ours, name) == theirs[f"{name},none"]
        assert getattr(ours, f"{name}_stderr") == pytest.approx(theirs[f"{name}_stderr,none"])
    gpt = checkpoints.load_model(folder, torch.device("cpu"), torch.float32)
    encoded = encode(questions, Tokenizer(tokenizer_dir), gpt.config, block_size)
    scores = log_probabilities(gpt, encoded.batches, encoded)
    samples = sorted(result["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    expected = torch.tensor([[answer[0] for answer in sample["filtered_resps"]] for sample in samples]).double()
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


# --- script


@pytest.fixture
def checkpoint(tmp_path: Path, fields: dict, tokenizer_dir: Path) -> Path:
    return save_tiny(tmp_path / "checkpoints" / "final", tiny_gpt(fields), tokenizer_dir)


def test_script(checkpoint: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--hellaswag", file.name, "--device=cpu", "--limit", "30", "--json-file", "result.json"]
    run_cli(load_script("evaluate").main, flags, optional_positional="checkpoint")
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown == json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    expected = asdict(evaluate(Path("checkpoints") / "final", file.name, limit=30, **CPU_FP32))
    assert {**shown, "seconds": 0} == {**expected, "seconds": 0}
    assert (shown["questions"], shown["step"], shown["source"]) == (30, 1, file.name)
    assert (shown["protocol"], shown["context"]) == ("lm-eval, 0-shot", 128)
    for part in (f"{shown['acc']:.4f} ±", f"{shown['acc_norm_stderr']:.4f}", "30 questions"):
        assert part in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hellaswag", "x.jsonl", "--data_dir", "data"], "--data_dir has no effect on --hellaswag"),
        (["--limit", "3"], "--limit has no effect on the loss; it is used by --hellaswag and --tasks"),
        (["--hellaswag", "x.jsonl", "--limit", "0"], "--limit is 0"),
        (["--hellaswag", "x.jsonl"], "found no file x.jsonl"),
        (["--hellaswag", "x.jsonl", "--max_seq_length", "129"], "expected 1 to 128"),
    ],
)
def test_script_refuses_flags(checkpoint: Path, flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(load_script("evaluate").main, [str(checkpoint), *flags], optional_positional="checkpoint")
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_uses_the_context_of_training(tmp_path: Path, file: Path, fields: dict, tokenizer_dir: Path) -> None:
    settings = {"train": {"max_seq_length": 70}}
    folder = save_tiny(tmp_path / "short", tiny_gpt(fields), tokenizer_dir, hyperparameters=settings)
    assert evaluate(folder, str(file), **CPU_FP32).context == 70
    assert evaluate(folder, str(file), max_seq_length=128, **CPU_FP32).context == 128


def test_refuses_a_diverged_model(tmp_path: Path, file: Path, fields: dict, tokenizer_dir: Path) -> None:
    gpt = tiny_gpt(fields)
    torch.nn.init.constant_(gpt.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        evaluate(save_tiny(tmp_path / "final", gpt, tokenizer_dir), str(file), **CPU_FP32)


# ------------------------------------------------------------------------------------------------------------ training


class OnlyTraining(TokenizedText):
    """A corpus without validation batches."""

    def val_dataloader(self) -> None:  # type: ignore[override]
        return None


FLAGS = ("--max-seq-length", "64", "--eval.hellaswag_interval", "3")


def scores_of(out_dir: Path) -> dict[int, tuple[float, float]]:
    """Both accuracies by step."""
    rows = [row for row in metric_rows(out_dir) if row["hellaswag_acc"]]
    return {int(row["step"]): (float(row["hellaswag_acc"]), float(row["hellaswag_acc_norm"])) for row in rows}


def test_scoring_does_not_change_a_run(train, tmp_path: Path, file: Path, capsys) -> None:
    without = train(*FLAGS[:2], "--out_dir", str(tmp_path / "without"))
    capsys.readouterr()
    flags = (*FLAGS, "--eval.hellaswag", str(file), "--eval.hellaswag_limit", "20")
    out = train(*flags, "--eval.initial_validation", "true", "--loggers", "[csv,tensorboard]")
    scores = scores_of(out)
    assert list(scores) == [0, 3, 6, 9, 12]
    printed = capsys.readouterr().out
    acc, acc_norm = scores[12]
    line = f"step 12/12 | hellaswag acc {acc:.4f}, acc_norm {acc_norm:.4f} (lm-eval, 0-shot, 20 questions, "
    assert printed.count(line) == 1
    assert [int(row["step"]) for row in metric_rows(out) if row["val_loss"]] == [0, 4, 8, 12]
    at_the_end = evaluate(out / "final", str(file), limit=20, **CPU_FP32)
    assert (at_the_end.acc, at_the_end.acc_norm) == scores[12]
    one, other = (checkpoints.read_metadata(path / "final").files["lit_model.pth"] for path in (without, out))
    assert one == other


def test_resumed_run_has_the_same_scores(train, tmp_path: Path, file: Path) -> None:
    flags = (*FLAGS, "--eval.hellaswag", str(file), "--train.max_steps", "8")
    complete = train(*flags, "--out_dir", str(tmp_path / "complete"))
    resumed = train(*flags, "--out_dir", str(tmp_path / "resumed"))
    train(*flags, "--out_dir", str(resumed), "--resume", str(resumed / "step-00000004"), "--overwrite")
    one, other = (checkpoints.read_metadata(path / "final").files["lit_model.pth"] for path in (complete, resumed))
    assert one == other
    same = ("step", "train_loss", "val_loss", "grad_norm", "hellaswag_acc", "hellaswag_acc_norm")
    assert [[row[name] for name in same] for row in metric_rows(complete)] == [
        [row[name] for name in same] for row in metric_rows(resumed)
    ]
    assert list(scores_of(resumed)) == [3, 6, 8]


def test_scores_without_validation_text(train, file: Path) -> None:
    flags = ("--data.class_path", f"{__name__}.OnlyTraining", "--max-seq-length", "64")
    out = train(*flags, "--eval.hellaswag", str(file), "--train.max_steps", "6", "--eval.final_validation", "false")
    assert list(scores_of(out)) == [4]
    assert not any(row["val_loss"] for row in metric_rows(out))


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"ctx_a": "x"}], [], "does not contain HellaSwag questions"),
        (make_rows(), ["--max-seq-length", "16"], "expected 1 to 16"),
    ],
    ids=["fields", "too long"],
)
def test_bad_questions_stop_a_run_at_the_start(train, tmp_path: Path, rows, flags, message: str) -> None:
    file = write_rows(tmp_path / "questions.jsonl", rows)
    with pytest.raises(UserError, match=message):
        train("--eval.hellaswag", str(file), *flags)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(train, run_file: Path, tmp_path: Path, file: Path) -> None:
    flags = [*FLAGS, "--eval.hellaswag", str(file), "--eval.initial_validation", "true", "--train.max_steps", "5"]
    one = train(*flags, "--out_dir", str(tmp_path / "one"))
    command = [sys.executable, str(PROJECT / "run_train.py"), "--config", str(run_file), *flags, "--devices", "2"]
    done = subprocess.run(
        [*command, "--out_dir", str(tmp_path / "two")], capture_output=True, text=True, encoding="utf-8", timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| hellaswag acc") == 3
    scores = scores_of(tmp_path / "two")
    assert list(scores) == [0, 3, 5]
    assert scores[0] == scores_of(one)[0], "from the same weights"
    at_the_end = evaluate(tmp_path / "two" / "final", str(file), **CPU_FP32)
    assert (at_the_end.acc, at_the_end.acc_norm) == scores[5]
