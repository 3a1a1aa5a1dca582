"""HellaSwag: lm-eval's numbers, whichever way the rows are laid out, at any time and while training."""

import csv
import importlib.util
import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from litgpt import GPT, Config, Tokenizer
from torch import Tensor

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError, run_door
from litmoe.config import PROJECT
from litmoe.data import TokenizedText, tokenizers
from litmoe.evaluation import hellaswag
from litmoe.evaluation.hellaswag import (
    Question,
    accuracy,
    encode,
    encode_question,
    evaluate,
    log_probabilities,
    preprocess,
    read_questions,
    shares_context,
)
from tests.tiny_checkpoint import door, save_tiny, tiny_gpt

CPU = {"device": "cpu", "precision": "32-true"}
DENSE = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "n_expert": 0, "n_expert_per_token": 0}
GPT2_LIKE = {**DENSE, "mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "n_query_groups": 4}


def make_rows() -> list[dict[str, Any]]:
    """Rows in the original form, like those of ActivityNet and WikiHow; those from 10 on have what is rare."""
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
                "ctx": "not read",
                "split": "val",
                "split_type": "indomain",
                "label": index % 4,
                "endings": [f"{text(1, 12)} [title] {text(1, 8)}" if wikihow else text(1, 20) for _ in range(4)],
                "source_id": f"{'wikihow' if wikihow else 'activitynet'}~{index}",
            }
        )
    rows[10]["endings"][2] = "[header]"  # nothing is left of it
    rows[11]["endings"][1] = "[header] A space stays before it."
    rows[12]["endings"][0] = "  many   spaces  "
    rows[13]["ctx_a"] += " [unfinished"
    rows[14] |= {"ctx_a": "a context", "ctx_b": "[brackets alone]"}  # it ends in spaces
    rows[15]["label"] = "1"  # the Hub's form
    rows[16] |= {"ctx_a": "", "ctx_b": ""}
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "hellaswag_val.jsonl", make_rows())


@pytest.fixture
def questions(file: Path) -> list[Question]:
    return read_questions(str(file))


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


@pytest.fixture
def fields(moe_fields: dict) -> dict:
    return moe_fields | {"block_size": 128}


def lm_evals_own_code() -> ModuleType:
    """``lm_eval/tasks/hellaswag/utils.py`` by its path: importing the package takes many seconds."""
    package = importlib.util.find_spec("lm_eval")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "tasks" / "hellaswag" / "utils.py"
    spec = importlib.util.spec_from_file_location("lm_eval_hellaswag", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_by_one(gpt: GPT, questions: list[Question], tokenizer: Tokenizer, max_length: int) -> Tensor:
    """By the definition, with LitGPT's own forward: one ending at a time, nothing shared, nothing padded."""
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


def test_the_texts_are_lm_evals(file: Path, questions: list[Question]) -> None:
    import datasets

    rows = [row | {"label": str(row["label"])} for row in make_rows()]
    processed = lm_evals_own_code().process_docs(datasets.Dataset.from_list(rows))
    assert [(q.context, list(q.endings), q.label) for q in questions] == [
        (row["query"], row["choices"], row["gold"]) for row in processed
    ]
    assert read_questions(str(file), limit=3) == questions[:3]


def test_utf16_and_half_surrogate_pairs_are_read(tmp_path: Path, questions: list[Question]) -> None:
    rows = make_rows()
    rows[3]["ctx_a"] = "a \ud83d"
    lines = "\r\n".join(json.dumps(row) for row in rows)
    (tmp_path / "windows.jsonl").write_bytes(lines.encode("utf-16"))
    found = read_questions(str(tmp_path / "windows.jsonl"))
    assert found[:3] == questions[:3] and "a \ufffd" in found[3].context


def test_texts_by_example() -> None:
    assert preprocess(" [header] How to bow [title] Stand. [step] Bend  down ") == " How to bow. Stand. Bend down"
    assert preprocess("[header]") == ""
    assert preprocess("a [open") == "a [open"


def test_a_dataset_in_the_hubs_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: list[Question]) -> None:
    """Parquet, labels as text, the name of a split: what Rowan/hellaswag has."""
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
        ("", "holds no questions"),
        ("\n\n", "holds no questions"),
        ("no JSON\n", "is no file of JSON lines"),
        (b"\xff\xfe", "holds no questions"),  # the byte order mark of UTF-16
        (b"\n\xff{", r"is no file of JSON lines \(line 2: UnicodeDecodeError"),
        (f"{{}}\n{'9' * 5000}\n", "line 1 has no activity_label"),
        (f'{{"label": {"9" * 5000}}}', r"is no file of JSON lines \(line 1: ValueError: Exceeds the limit"),
        ("[" * 200_000, r"is no file of JSON lines \(line 1: RecursionError"),
        ("null\n", "line 1 has no activity_label"),
        ({"label": float("nan")}, "line 2 has label 'nan', expected 0 to 3"),
        ({"label": [1]}, r"line 2 has label '\[1\]', expected 0 to 3"),
        ("[1, 2]\n", "line 1 has no activity_label, ctx_a, ctx_b, endings, label"),
        ({"endings": None}, "line 2 has other endings than 4 texts"),
        ({"endings": ["a", "b", "c"]}, "line 2 has other endings than 4 texts"),
        ({"endings": ["a", "b", "c", 4]}, "line 2 has other endings than 4 texts"),
        ({"label": 4}, "line 2 has label '4', expected 0 to 3"),
        ({"label": -1}, "line 2 has label '-1', expected 0 to 3"),
        ({"label": ""}, "line 2 has label '', expected 0 to 3"),
        ({"label": 1.5}, "line 2 has label '1.5', expected 0 to 3"),
        ({"label": KeyError}, "line 2 has no label; .* The test set has no labels"),
        ({"ctx_b": None}, "line 2 has activity_label, ctx_a, ctx_b that are no texts"),
        ({"ctx_a": KeyError, "endings": KeyError}, "line 2 has no ctx_a, endings"),
    ],
)
def test_bad_input(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    if isinstance(content, dict):
        good = make_rows()[0]
        write_rows(path, [good, {name: value for name, value in (good | content).items() if value is not KeyError}])
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        read_questions(str(path))
    assert "Rowan/hellaswag" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no file nowhere.jsonl"),
        ("data/nowhere.jsonl", "no file data/nowhere.jsonl"),
        ("hellaswag", "no file hellaswag"),
        ("a/b/c", "no file a/b/c"),
        ("Nobody/nothing", "Nobody/nothing is no file here and cannot be had from the Hugging Face Hub"),
    ],
)
def test_no_such_source(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read_questions(source)


# -------------------------------------------------------------------------------------------------------------- tokens


def test_context_and_ending_are_tokenized_together(questions: list[Question], tokenizer: Tokenizer) -> None:
    for question in questions:
        context, endings = encode_question(question, tokenizer)
        assert context == tokenizer.encode(question.context.rstrip()).tolist()
        for text, ids in zip(question.endings, endings, strict=True):
            assert context + ids == tokenizer.encode(f"{question.context} {text}").tolist()
    empty = encode_question(questions[10], tokenizer)[1][2]
    assert (questions[10].endings[2], empty) == ("", tokenizer.encode(" ").tolist())
    assert questions[14].context.endswith(" ")
    assert all(ids[0] == empty[0] for ids in encode_question(questions[14], tokenizer)[1]), (
        "the context's space is theirs"
    )
    assert encode_question(Question("", ("a",) * 4, 0), tokenizer)[0] == [tokenizer.bos_id]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_beginning_of_text_where_transformers_puts_one(
    tmp_path: Path, tokenizer_dir: Path, questions: list[Question], adds_bos: bool
) -> None:
    """lm-eval takes what transformers' tokenizer gives; a prepared folder says the same to LitGPT's."""
    from transformers import AutoTokenizer

    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    if adds_bos:
        bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())
    tokenizers.install(tokenizers.from_folder(tmp_path), {}, tmp_path / "prepared")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "prepared")
    context, endings = encode_question(questions[1], Tokenizer(tmp_path / "prepared"))
    assert (context[0] == 0) is adds_bos
    assert context == theirs.encode(questions[1].context)
    for text, ids in zip(questions[1].endings, endings, strict=True):
        assert context + ids == theirs.encode(f"{questions[1].context} {text}")


def test_batches_hold_each_ending_once(
    questions: list[Question], tokenizer: Tokenizer, fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hellaswag, "_TOKENS", 500)
    batches = encode(questions, tokenizer, Config(**fields), 128).batches
    held = sorted((row.question, place) for batch in batches for row in batch for place, _ in row.endings)
    assert held == [(question, place) for question in range(40) for place in range(4)]
    sizes = {len(row.endings) for batch in batches for row in batch}
    assert sizes == {1, 4}, "some contexts are too long to be shared"
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 500


def test_an_ending_that_does_not_fit(questions: list[Question], tokenizer: Tokenizer, fields: dict) -> None:
    with pytest.raises(
        UserError, match=r"of HellaSwag's question \d+ has \d+ tokens; expected 1 to 8, the context.* up to 128\."
    ):
        encode(questions, tokenizer, Config(**fields), 8)
    with pytest.raises(UserError, match=r"expected 1 to 8, the context\.$"):  # no flag makes room
        encode(questions, tokenizer, Config(**fields | {"block_size": 8}), 8)


def test_a_vocabulary_too_small(questions: list[Question], tokenizer: Tokenizer, fields: dict) -> None:
    with pytest.raises(UserError, match="the model's vocabulary holds 300 tokens"):
        encode(questions, tokenizer, Config(**fields | {"vocab_size": 300, "padded_vocab_size": 300}), 128)


# ------------------------------------------------------------------------------------------------------------- scoring

LOCAL_AND_GLOBAL = {"rope_local_base_freq": 500.0, "rope_indices": [0, 1], "rope_base": 10000}
LATENT = {
    "n_query_groups": 4,
    "latent_attention": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, True),
        (GPT2_LIKE, True),
        ({**GPT2_LIKE, "parallel_residual": True, "rotary_percentage": 0.25, "padded_vocab_size": 512}, True),
        ({**DENSE, "scale_embeddings": True, "final_logit_softcapping": 2.0, "norm_qk": True}, True),
        ({"rope_interleave": True, "n_query_groups": 1}, True),
        (LOCAL_AND_GLOBAL, True),
        (LATENT, True),
        ({"attention_logit_softcapping": 1.0}, False),
        ({"sliding_window_size": 9, "sliding_window_indices": [0, 1], **LOCAL_AND_GLOBAL}, False),
    ],
    ids=["moe", "gpt2-like", "neox", "gemma-like", "interleaved", "two rotations", "latent", "soft-capped", "sliding"],
)
def test_sharing_the_context_changes_nothing(
    questions: list[Question], tokenizer: Tokenizer, fields: dict, changes: dict, shared: bool
) -> None:
    """Against LitGPT's own forward with one ending at a time; some contexts are too long and cut."""
    gpt = tiny_gpt(fields | changes)
    encoded = encode(questions, tokenizer, gpt.config, 96)
    rows = [row for batch in encoded.batches for row in batch]
    assert shares_context(gpt.config) is shared
    assert {len(row.endings) for row in rows} == ({1, 4} if shared else {1})
    scores = log_probabilities(gpt, encoded.batches, encoded)
    expected = one_by_one(gpt, questions, tokenizer, 96)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-5)
    assert expected.std() > 1, "a test on equal numbers would tell nothing"


def test_our_layer_in_training_and_small_steps(
    questions: list[Question], tokenizer: Tokenizer, fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live model of a run, its output layer in several steps, batches of single rows; the model stays as it is."""
    gpt = tiny_gpt(fields)
    expected = one_by_one(gpt, questions, tokenizer, 128)
    monkeypatch.setattr(hellaswag, "_LOGITS", 384 * 50)
    monkeypatch.setattr(hellaswag, "_TOKENS", 1)
    with use_custom_moe():
        live = GPT(gpt.config).train()
    live.load_state_dict(gpt.state_dict())
    random_state = torch.get_rng_state()
    encoded = encode(questions, tokenizer, gpt.config, 128)
    assert all(len(batch) == 1 for batch in encoded.batches)
    scores = log_probabilities(live, encoded.batches, encoded)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-5)
    assert all(module.training for module in live.modules())
    assert all(parameter.grad is None for parameter in live.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_shares_of_several_processes_add_up(
    questions: list[Question], tokenizer: Tokenizer, fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hellaswag, "_TOKENS", 1000)
    gpt = tiny_gpt(fields)
    encoded = encode(questions, tokenizer, gpt.config, 128)
    assert len(encoded.batches) > 2
    whole = log_probabilities(gpt, encoded.batches, encoded)
    shares = [log_probabilities(gpt, encoded.batches[rank::3], encoded) for rank in range(3)]
    assert torch.equal(sum(shares), whole)
    assert all((share == 0).any() for share in shares)


def test_half_precision_is_close(questions: list[Question], tokenizer: Tokenizer, fields: dict) -> None:
    gpt = tiny_gpt(fields | {"n_embd": 64})
    encoded = encode(questions, tokenizer, gpt.config, 128)
    exact = log_probabilities(gpt, encoded.batches, encoded)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = log_probabilities(gpt, encoded.batches, encoded)
    half = log_probabilities(gpt.bfloat16(), encoded.batches, encoded)
    for scores in (mixed, half):
        assert not torch.equal(scores, exact)
        assert (scores - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_the_accuracies_by_hand() -> None:
    questions = [
        Question("", ("a", "bbbb", "cc", "dd"), 0),
        Question("", ("a", "bbbb", "cc", "dd"), 1),
        Question("", ("", "bbbb", "cc", "dd"), 0),
    ]
    scores = torch.tensor([[-3.0, -10.0, -11.0, -11.0]] * 2 + [[-1.0, -10.0, -11.0, -11.0]], dtype=torch.float64)
    result = accuracy(questions, scores)
    assert (result.acc, result.acc_norm) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert result.acc_stderr == pytest.approx(statistics.stdev([1, 0, 1]) / math.sqrt(3))
    assert result.acc_norm_stderr == pytest.approx(statistics.stdev([0, 1, 0]) / math.sqrt(3))
    assert (result.questions, result.protocol) == (3, "lm-eval, 0-shot")
    assert accuracy(questions[:1], scores[:1]).acc_stderr is None


@pytest.mark.filterwarnings("ignore:divide by zero")  # an ending of length 0
@pytest.mark.parametrize("changes", [{}, GPT2_LIKE], ids=["moe", "gpt2-like"])
@pytest.mark.parametrize("block_size", [128, 64])
def test_the_numbers_are_lm_evals(
    tmp_path: Path, file: Path, questions: list[Question], moe_fields: dict, tokenizer_dir: Path, changes, block_size
) -> None:
    """Its own task and its own ``HFLM`` on the same weights in transformers; the rows come from the same file."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.test_stock_litgpt import convert

    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields | {"block_size": block_size} | changes), tokenizer_dir)
    convert(folder, tmp_path / "converted")
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
    ours = evaluate(folder, str(file), **CPU)
    for name in ("acc", "acc_norm"):
        assert getattr(ours, name) == theirs[f"{name},none"]
        assert getattr(ours, f"{name}_stderr") == pytest.approx(theirs[f"{name}_stderr,none"])
    gpt = checkpoints.load_model(folder, torch.device("cpu"), torch.float32)
    encoded = encode(questions, Tokenizer(tokenizer_dir), gpt.config, block_size)
    scores = log_probabilities(gpt, encoded.batches, encoded)
    samples = sorted(result["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    expected = torch.tensor([[answer[0] for answer in sample["filtered_resps"]] for sample in samples]).double()
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- door


@pytest.fixture
def checkpoint(tmp_path: Path, fields: dict, tokenizer_dir: Path) -> Path:
    return save_tiny(tmp_path / "checkpoints" / "final", tiny_gpt(fields), tokenizer_dir)


def test_the_script(checkpoint: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--hellaswag", file.name, "--device=cpu", "--limit", "30", "--json-file", "result.json"]
    run_door(door("evaluate").main, flags, optional_positional="checkpoint")
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown == json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    expected = asdict(evaluate(Path("checkpoints") / "final", file.name, limit=30, **CPU))
    assert {**shown, "seconds": 0} == {**expected, "seconds": 0}
    assert (shown["questions"], shown["step"], shown["source"]) == (30, 1, file.name)
    assert (shown["protocol"], shown["context"]) == ("lm-eval, 0-shot", 128)
    assert (shown["device"], shown["precision"]) == ("cpu", "32-true")
    for part in (f"{shown['acc']:.4f} ±", f"{shown['acc_norm_stderr']:.4f}", "lm-eval, 0-shot", "30 questions"):
        assert part in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hellaswag", "x.jsonl", "--data_dir", "data"], "with --hellaswag no --data_dir."),
        (
            ["--hellaswag", "x.jsonl", "--max_iters", "3", "--batch_size", "2"],
            "with --hellaswag no --max_iters, --batch_size.",
        ),
        (["--limit", "3"], "without --hellaswag or --tasks no --limit."),
        (["--hellaswag", "x.jsonl", "--limit", "0"], "limit is 0"),
        (["--hellaswag", "x.jsonl"], "no file x.jsonl"),
        (["--hellaswag", "x.jsonl", "--max_seq_length", "129"], "expected 1 to 128"),
    ],
)
def test_flags_that_mean_nothing(checkpoint: Path, flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_door(door("evaluate").main, [str(checkpoint), *flags], optional_positional="checkpoint")
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_the_context_is_that_of_training(tmp_path: Path, file: Path, fields: dict, tokenizer_dir: Path) -> None:
    settings = {"train": {"max_seq_length": 70}}
    folder = save_tiny(tmp_path / "short", tiny_gpt(fields), tokenizer_dir, hyperparameters=settings)
    assert evaluate(folder, str(file), **CPU).context == 70
    assert evaluate(folder, str(file), max_seq_length=128, **CPU).context == 128


def test_a_diverged_model_is_told(tmp_path: Path, file: Path, fields: dict, tokenizer_dir: Path) -> None:
    gpt = tiny_gpt(fields)
    torch.nn.init.constant_(gpt.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        evaluate(save_tiny(tmp_path / "final", gpt, tokenizer_dir), str(file), **CPU)


# ------------------------------------------------------------------------------------------------------------ training


class OnlyTraining(TokenizedText):
    """A corpus whose validation text is not used."""

    def val_dataloader(self) -> None:  # type: ignore[override]
        return None


FLAGS = ("--max-seq-length", "64", "--eval.hellaswag_interval", "3")


def rows_of(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scores_of(out_dir: Path) -> dict[int, tuple[float, float]]:
    """Both accuracies by step."""
    rows = [row for row in rows_of(out_dir) if row["hellaswag_acc"]]
    return {int(row["step"]): (float(row["hellaswag_acc"]), float(row["hellaswag_acc_norm"])) for row in rows}


def test_a_run_scores_and_is_the_run_without(train, tmp_path: Path, file: Path, capsys) -> None:
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
    assert [int(row["step"]) for row in rows_of(out) if row["val_loss"]] == [0, 4, 8, 12]
    at_the_end = evaluate(out / "final", str(file), limit=20, **CPU)
    assert (at_the_end.acc, at_the_end.acc_norm) == scores[12]
    one, other = (checkpoints.read_mark(path / "final").files["lit_model.pth"] for path in (without, out))
    assert one == other


def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path: Path, file: Path) -> None:
    flags = (*FLAGS, "--eval.hellaswag", str(file), "--train.max_steps", "8")
    whole = train(*flags, "--out_dir", str(tmp_path / "whole"))
    cut = train(*flags, "--out_dir", str(tmp_path / "cut"))
    train(*flags, "--out_dir", str(cut), "--resume", str(cut / "step-00000004"), "--overwrite")
    one, other = (checkpoints.read_mark(path / "final").files["lit_model.pth"] for path in (whole, cut))
    assert one == other
    same = ("step", "train_loss", "val_loss", "grad_norm", "hellaswag_acc", "hellaswag_acc_norm")
    assert [[row[name] for name in same] for row in rows_of(whole)] == [
        [row[name] for name in same] for row in rows_of(cut)
    ]
    assert list(scores_of(cut)) == [3, 6, 8]


def test_a_run_without_validation_text_scores_at_eval_interval(train, file: Path) -> None:
    flags = ("--data.class_path", f"{__name__}.OnlyTraining", "--max-seq-length", "64")
    out = train(*flags, "--eval.hellaswag", str(file), "--train.max_steps", "6", "--eval.final_validation", "false")
    assert list(scores_of(out)) == [4]
    assert not any(row["val_loss"] for row in rows_of(out))


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"ctx_a": "x"}], [], "has no activity_label"),
        (make_rows(), ["--max-seq-length", "16"], "expected 1 to 16, the context"),
    ],
    ids=["fields", "too long"],
)
def test_bad_questions_stop_a_run_before_it_starts(train, tmp_path: Path, rows, flags, message: str) -> None:
    file = write_rows(tmp_path / "questions.jsonl", rows)
    with pytest.raises(UserError, match=message):
        train("--eval.hellaswag", str(file), *flags)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(train, run_file: Path, tmp_path: Path, file: Path) -> None:
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
    at_the_end = evaluate(tmp_path / "two" / "final", str(file), **CPU)
    assert (at_the_end.acc, at_the_end.acc_norm) == scores[5]
