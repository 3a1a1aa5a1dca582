"""Tasks of lm-eval on a LitGPT model: numbers and texts equal those of ``HFLM``, without a network."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from litgpt import Tokenizer
from lm_eval import evaluator
from lm_eval.api.instance import Instance

from litmoe import checkpoints, load
from litmoe.cli import UserError, run_cli
from litmoe.evaluation import tasks
from litmoe.evaluation.common import Continuation, batches_by_length
from litmoe.evaluation.tasks import Harness, evaluate, find_tasks, load_tasks
from tests.helpers import CPU_FP32, convert_for_transformers, load_script, save_tiny, tiny_gpt, wordy_gpt

QUESTIONS = [
    {
        "question": f"{name} the {animal} went to the",
        "choices": ["sea.", "wood, and was happy.", "hill"],
        "right": right,
    }
    for right, (name, animal) in enumerate([("Mia", "cat"), ("Tom", "dog"), ("Lily", "fox")])
] * 4


def write_tasks(folder: Path) -> Path:
    """Write a multiple-choice, a generation and a perplexity task, with a tag and a group."""
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    common = {
        "tag": "stories",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "data.jsonl")},
            "cache_dir": str(folder.parent / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.5},
    }
    places = {
        "task": "places",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    writing = {
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[right]}}",
        "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    perplexity = {
        "task": "perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[1]}} {{question}} {{choices[0]}} {{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    for task in (places, writing, perplexity):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task), encoding="utf-8")
    group = {"group": "both", "task": ["places", "writing"]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def checkpoint(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> Path:
    return save_tiny(tmp_path / "checkpoints" / "final", tiny_gpt(moe_fields | {"block_size": 32}), tokenizer_dir)


@pytest.fixture
def harness(checkpoint: Path) -> Harness:
    gpt = checkpoints.load_model(checkpoint, torch.device("cpu"), torch.float32)
    return Harness(gpt, Tokenizer(checkpoint), 32, nullcontext())


@pytest.fixture
def hflm(tmp_path: Path, checkpoint: Path) -> Any:
    return as_hflm(tmp_path, checkpoint)


def as_hflm(tmp_path: Path, checkpoint: Path) -> Any:
    """The model of lm-eval with the same weights in transformers."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert_for_transformers(checkpoint, tmp_path / "converted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    return HFLM(model, tokenizer=tokenizer, batch_size=3, device="cpu")


def asked(*arguments: Any) -> list[Instance]:
    return [Instance("loglikelihood", {}, one, index) for index, one in enumerate(arguments)]


def test_log_probabilities_equal_hflm(harness: Harness, hflm: Any) -> None:
    """Spaces on either side, no context, a begin-of-text token, a long context, a greedy answer."""
    long = "Once upon a time, Mia the cat went to the sea. Mia was happy. The end. Once upon a time, Tom the dog"
    (greedy,) = harness.generate_until(asked(("Tom the dog", {"until": [], "max_gen_toks": 4})))
    pairs = [
        ("Mia the cat went to the", " sea."),
        ("Mia the cat went to the ", "sea."),
        ("Mia the cat  ", " went é 🦊"),
        ("", "Once upon a time"),
        ("", "<|endoftext|>Once"),
        ("<|endoftext|>Tom", " the dog"),
        (long, " went to the hill."),
        (long[:20], long[20:90]),
        ("Tom the dog", greedy),
    ]
    theirs = hflm.loglikelihood(asked(*pairs), disable_tqdm=True)
    ours = harness.loglikelihood(asked(*pairs))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=1e-4, rel=1e-5)
    assert {hit for _, hit in ours} == {True, False}
    texts = [(long,), ("Mia",), (long * 3,)]
    assert harness.loglikelihood_rolling(asked(*texts)) == pytest.approx(
        hflm.loglikelihood_rolling(asked(*texts), disable_tqdm=True), abs=1e-3, rel=1e-5
    )


def test_generated_texts_equal_hflm(harness: Harness, hflm: Any) -> None:
    long = "Once upon a time, Mia the cat went to the sea. Mia was happy. The end. Once upon a time, Tom the dog"
    requests = [
        ("Once upon a time", {"until": [], "max_gen_toks": 20}),
        ("Once upon a time", {"until": ["e"], "max_gen_toks": 20}),
        ("Mia the cat ", {"until": ["\n", "zz"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}),
        (long, {"until": " ", "max_gen_toks": 10}),
    ]
    theirs = hflm.generate_until(asked(*requests), disable_tqdm=True)
    ours = harness.generate_until(asked(*requests))
    assert ours == theirs
    assert all("e" not in ours[1] for _ in ours) and len(ours[0]) > 5
    sampled = ("Once upon a time", {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0})
    one, other = harness.generate_until(asked(sampled, sampled))
    assert one != other, "each sample is different"


def test_llama_texts_equal_hflm(tmp_path: Path, moe_fields: dict, llama_tokenizer_dir: Path) -> None:
    """SentencePiece-like tokenizer: one begin-of-text token, and all spaces and letters."""
    folder = save_tiny(tmp_path / "final", wordy_gpt(moe_fields), llama_tokenizer_dir)
    gpt = checkpoints.load_model(folder, torch.device("cpu"), torch.float32)
    ours, theirs = Harness(gpt, Tokenizer(folder), 64, nullcontext()), as_hflm(tmp_path, folder)
    writing = [(text, {"until": [], "max_gen_toks": 20}) for text in ("Once upon a time", "Mia the cat", "Tom")]
    written = ours.generate_until(asked(*writing))
    assert written == theirs.generate_until(asked(*writing), disable_tqdm=True)
    assert all(text.count(" ") >= 3 for text in written)
    pairs = [("Mia the cat went to the", " sea."), ("", "Once upon a time"), ("Tom", " the dog")]
    nats = [nats for nats, _ in ours.loglikelihood(asked(*pairs))]
    assert nats == pytest.approx(
        [nats for nats, _ in theirs.loglikelihood(asked(*pairs), disable_tqdm=True)], abs=1e-4, rel=1e-5
    )


def test_results_equal_lm_eval(checkpoint: Path, folder: Path, hflm: Any) -> None:
    """All numbers of all kinds of tasks, with their standard errors."""
    names = ["places", "writing", "perplexity"]
    manager = find_tasks(names, folder)
    theirs = evaluator.simple_evaluate(
        hflm, tasks=load_tasks(manager, names), task_manager=manager, log_samples=False, num_fewshot=1
    )
    ours = evaluate(checkpoint, names, tasks_dir=folder, num_fewshot=1, **CPU_FP32)
    expected = tasks.scores_of(theirs)
    assert {(score.task, score.metric) for score in ours.scores} == {
        ("places", "acc"),
        ("places", "acc_norm"),
        ("writing", "exact_match"),
        ("perplexity", "word_perplexity"),
        ("perplexity", "bits_per_byte"),
    }
    for mine, other in zip(ours.scores, expected, strict=True):
        assert (mine.task, mine.metric, mine.n) == (other.task, other.metric, 12)
        assert mine.value == pytest.approx(other.value, rel=1e-4)
        assert (mine.stderr is None) == (other.stderr is None)
        assert mine.version == 1.5
    assert ours.scores[0].num_fewshot == 1
    assert any(score.stderr for score in ours.scores)


def test_accuracy_by_hand(checkpoint: Path, folder: Path) -> None:
    """The choice with the highest log-probability by LitGPT's forward pass."""
    model = load(checkpoint, device="cpu", precision="32-true")
    hits = []
    for row in QUESTIONS:
        start = model.tokenizer.encode(row["question"])
        nats = []
        for choice in row["choices"]:
            ids = model.tokenizer.encode(f"{row['question']} {choice}").long()
            with torch.no_grad():
                logs = model.gpt(ids[None, :-1])[0].log_softmax(-1)
            nats.append(float(logs.gather(1, ids[1:, None])[len(start) - 1 :].sum()))
        hits.append(nats.index(max(nats)) == row["right"])
    scores = evaluate(checkpoint, ["places"], tasks_dir=folder, **CPU_FP32).scores
    assert scores[0].value == pytest.approx(sum(hits) / len(hits))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks"), [("both", {"places", "writing"}), ("stories", {"places", "writing", "perplexity"})]
)
def test_groups_tags_and_limit(checkpoint: Path, folder: Path, name: str, tasks: set[str]) -> None:
    result = evaluate(checkpoint, [name], tasks_dir=folder, limit=2, **CPU_FP32)
    assert {score.task for score in result.scores} == tasks
    assert {score.n for score in result.scores} == {2}
    assert result.limit == 2


def test_uses_the_context_of_training(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, folder: Path) -> None:
    settings = {"train": {"max_seq_length": 24}}
    saved = save_tiny(tmp_path / "short", tiny_gpt(moe_fields), tokenizer_dir, hyperparameters=settings)
    assert evaluate(saved, ["places"], tasks_dir=folder, limit=1, **CPU_FP32).context == 24
    with pytest.raises(UserError, match="expected 1 to 64"):
        evaluate(saved, ["places"], tasks_dir=folder, max_seq_length=65, **CPU_FP32)


def test_batches_contain_each_row_once() -> None:
    lengths = [3, 9, 1, 30, 10, 4, 4]
    batches = batches_by_length([Continuation([0] * length, 1) for length in lengths], batch_tokens=20)
    assert batches[0] == [3]
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= 20 for batch in batches)


def test_script(checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--tasks", "places, perplexity", "--tasks-dir", "tasks", "--device=cpu", "--limit=3", "--num-fewshot=0"]
    run_cli(load_script("evaluate").main, [*flags, "--json-file", "result.json"], optional_positional="checkpoint")
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown == json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    expected = evaluate(
        Path("checkpoints/final"), ["places", "perplexity"], tasks_dir=Path("tasks"), limit=3, **CPU_FP32
    )
    assert {**shown, "seconds": 0} == {**asdict(expected), "seconds": 0}
    assert (shown["protocol"], shown["tasks_dir"], shown["context"]) == (f"lm-eval {version('lm-eval')}", "tasks", 32)
    for part in ("places", "acc_norm", f"{shown['scores'][0]['value']:.4f}", "±", "lm-eval", "only the first 3"):
        assert part in captured.err


def test_only_json_reaches_stdout(checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """lm-eval prints a line for each metric whose error bar it bootstraps."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    task = yaml.safe_load((folder / "places.yaml").read_text(encoding="utf-8"))
    del task["doc_to_choice"], task["tag"]
    task |= {"task": "endings", "output_type": "loglikelihood", "doc_to_target": " {{choices[right]}}"}
    task |= {"metric_list": [{"metric": "perplexity"}]}
    (folder / "endings.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    flags = [str(checkpoint), "--tasks=endings", f"--tasks_dir={folder}", "--device=cpu"]
    run_cli(load_script("evaluate").main, flags, optional_positional="checkpoint")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scores"][0]["metric"] == "perplexity"
    assert "bootstrapping for stddev" in captured.err


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "places", "--data_dir", "data"], "--data_dir has no effect on --tasks"),
        (["--tasks", "a", "--hellaswag", "b"], "--hellaswag and --tasks are different evaluations"),
        (["--tasks_dir", "x"], "--tasks_dir has no effect on the loss; it is used by --tasks"),
        (["--tasks", "a", "--num_fewshot", "-1"], "--num_fewshot is -1; expected 0 or more"),
        (["--tasks", "places", "--tasks_dir", "nowhere"], "found no folder nowhere"),
    ],
)
def test_script_refuses_flags(checkpoint: Path, flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(load_script("evaluate").main, [str(checkpoint), *flags], optional_positional="checkpoint")
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_unknown_task_names_similar_ones(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"found no task 'hellaswog' in lm-eval or .*Similar names: .*hellaswag"):
        evaluate(checkpoint, ["places", "hellaswog"], tasks_dir=folder, **CPU_FP32)


def test_missing_network_is_a_clear_error(checkpoint: Path, folder: Path) -> None:
    """A task with data from the Hub, as those of lm-eval."""
    task = yaml.safe_load((folder / "places.yaml").read_text(encoding="utf-8"))
    task |= {"task": "far", "dataset_path": "Nobody/nothing", "dataset_kwargs": {}}
    (folder / "far.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    with pytest.raises(UserError, match=r"can't load far \(.*needs a network.*--tasks_dir"):
        evaluate(checkpoint, ["far"], tasks_dir=folder, **CPU_FP32)


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_kwargs": {"until": [], "max_gen_toks": 32}}, "asks for 32 new tokens .* room for 32 tokens"),
        ({"generation_kwargs": {"until": []}}, "asks for 256 new tokens"),
        ({"generation_kwargs": {"max_gen_toks": 3, "num_beams": 4}}, "supported are until, max_gen_toks"),
        ({"generation_kwargs": {"max_gen_toks": 3, "repetition_penalty": 2.0}}, "supported are until"),
        ({"unsafe_code": True}, "writing would run code that the model wrote"),
    ],
)
def test_refuses_unsupported_tasks(checkpoint: Path, folder: Path, changes: dict, message: str) -> None:
    change(folder, "writing", **changes)
    with pytest.raises(UserError, match=message):
        evaluate(checkpoint, ["writing"], tasks_dir=folder, **CPU_FP32)


def test_refuses_an_answer_longer_than_context(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"of a task has \d+ tokens; expected 1 to 2, the context"):
        evaluate(checkpoint, ["places"], tasks_dir=folder, max_seq_length=2, **CPU_FP32)


def test_refuses_a_diverged_model(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, folder: Path) -> None:
    gpt = tiny_gpt(moe_fields)
    torch.nn.init.constant_(gpt.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        evaluate(save_tiny(tmp_path / "final", gpt, tokenizer_dir), ["places"], tasks_dir=folder, **CPU_FP32)
