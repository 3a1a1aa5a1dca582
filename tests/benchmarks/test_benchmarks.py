"""The benchmarks: every script starts, small runs end to end, the arithmetic, and the tables in the documents."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from litgpt import Config

from benchmarks import (
    ablations,
    data,
    generation,
    gpu_checks,
    learning,
    memory,
    moe_layer,
    moe_peers,
    report,
    step_profile,
    train_step,
)
from benchmarks.common import Spread, earlier_rows, spread
from benchmarks.runs import Corpus, Point, Run, RunFailed, run_pool, train, validation_curve

SCRIPTS = ["ablations", "data", "generation", "gpu_checks", "gpu_memory", "gpu_report", "learning", "loss", "memory"]
SCRIPTS += ["moe_layer", "step_profile", "train_step", "triton_resources"]
TINY_MODEL = (
    *("--model.n_layer=2", "--model.n_embd=32", "--model.n_head=2", "--model.block_size=32"),
    "--model.moe_intermediate_size=16",
)
TINY_SIZE = (32, 48, 4, 2)
EAGER_LAYERS = tuple(name for name in moe_peers.layer_builders(TINY_SIZE) if "compiled" not in name)


@pytest.fixture(scope="module")
def corpus(prepared: Path) -> Corpus:
    return Corpus(prepared / "data", prepared / "tokenizer")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = report.ROOT / "benchmarks" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(path), run_name="__main__")
    assert exit_info.value.code == 0
    assert f"benchmarks/{script}.py" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- tables


def test_tables_in_documents_are_up_to_date() -> None:
    """After a measurement run: uv run python benchmarks/report.py"""
    results = report.load_results(report.RESULTS)
    for path in report.documents():
        text = path.read_text(encoding="utf-8")
        assert report.insert_tables(text, results) == text, path.name
        assert text.count("<!-- begin:") == len(report.MARKERS.findall(text)), f"{path.name}: begin without end"


def test_tables_are_inserted_between_markers() -> None:
    text = "before\n<!-- begin:a_cpu -->\nold\n<!-- end:a_cpu -->\nafter\n<!-- begin:b_cuda -->\n<!-- end:b_cuda -->\n"
    new = report.insert_tables(text, {"a_cpu": {"table": [["what", "tokens/s"], ["x", "1"]]}})
    table = "| what | tokens/s |\n| --- | --- |\n| x | 1 |"
    assert new.startswith(f"before\n<!-- begin:a_cpu -->\n{table}\n<!-- end:a_cpu -->\nafter\n")
    assert "Not measured yet." in new.split("begin:b_cuda")[1] and "old" not in new


def test_marker_without_a_result_is_an_error() -> None:
    with pytest.raises(SystemExit, match="'nonsense'"):
        report.insert_tables("<!-- begin:nonsense -->\n<!-- end:nonsense -->", {})


def test_overview_contains_every_headline() -> None:
    results = report.load_results(report.RESULTS)
    overview = "\n".join(report.overview(results))
    headlines = [line for result in results.values() for line in result.get("headline", [])]
    assert len(headlines) > 8
    assert all(f"| {what} | {number} |" in overview for what, number in headlines)


def test_tables_match_the_numbers_in_the_results() -> None:
    """The scripts still read the committed results, and write the same tables."""
    add_table = {
        "ablations_cpu": ablations.add_table,
        "data_prep": data.add_preparation_table,
        "generation_cpu": generation.add_table,
        "learning_cpu": learning.add_table,
        "memory": memory.add_table,
        "moe_layer_cpu": moe_layer.add_table,
        "train_step_cpu": train_step.add_table,
    }
    results = report.load_results(report.RESULTS)
    for name, function in add_table.items():
        table = results[name]["table"]
        function(results[name])
        assert results[name]["table"] == table, name


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_spread_is_the_95_percent_interval() -> None:
    assert spread([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0, 4.303 / math.sqrt(3)), rel=1e-3)
    assert spread([5.0]) == Spread(5.0, 0.0, 0.0)


def test_speed_is_measured_on_the_second_half() -> None:
    rows = [{"step": 0, "val_loss": 3.0}]
    rows += [{"total_tokens": 1000.0 * n, "time": time} for n, time in enumerate((9.0, 10.0, 12.0, 14.0), 1)]
    run = Run(seconds=30.0, first_log_line=(10, 20.0), peak_bytes=1, rows=rows, val_loss=None)
    assert run.tokens_per_second == 2000 / 4  # from the second of four rows
    assert run.first_step_seconds == pytest.approx(20 - 9 * 100 / 500)


def test_curve_counts_training_seconds_only() -> None:
    rows = [
        {"step": 0, "val_loss": 3.0},
        {"total_tokens": 100.0, "tokens_per_second": 50.0, "time": 7.0},
        {"total_tokens": 300.0, "tokens_per_second": 100.0, "time": 99.0, "val_loss": 2.0},
    ]
    assert validation_curve(rows) == [Point(0, 0, 3.0), Point(300, 4, 2.0)]


def test_train_step_compares_with_the_better_stock() -> None:
    def row(speed: float, seconds: float) -> dict[str, Any]:
        return {"status": "measured", "tokens_per_second": speed, "seconds": seconds}

    # Compiled is faster per step, but slower as a complete command.
    rounds = [
        {"ours": row(ours, 5), "stock": row(90, command), "stock compiled": row(100, 60)}
        for ours, command in ((200, 10), (300, 20), (100, 15))
    ]
    times_stock = train_step.summarize(rounds)["times_stock"]
    assert times_stock == {"tokens_per_second": [1, 2, 3], "whole_command": [2, 3, 4]}
    rounds[0]["stock compiled"] = {"status": "out of memory"}
    assert train_step.summarize(rounds)["times_stock"]["tokens_per_second"] == [1, 2, 3]


def learning_result(mixture: list[float], twin: list[float]) -> dict[str, Any]:
    """Two seeds whose validations are at 1, 2, ... seconds; the twin is twice as fast. Seed 1 is worse by 1 (1.1)."""
    curves = {"mixture": (1000, mixture), "dense twin": (2000, twin)}
    worse = {"mixture": 1.1, "dense twin": 1.0}
    rows = [
        {
            "model": model,
            "seed": seed,
            "max_tokens": speed * len(scores),
            "bits_per_byte": scores[-1] + seed * worse[model],
            "curve": [[speed * (index + 1), 9.9, score + seed * worse[model]] for index, score in enumerate(scores)],
        }
        for seed in (0, 1)
        for model, (speed, scores) in curves.items()
    ]
    speeds = {model: float(speed) for model, (speed, _) in curves.items()}
    return {
        "models": dict.fromkeys(curves),
        "minutes": 0.05,
        "precision": "32-true",
        "tokens_per_second": speeds,
        "equal_seconds": rows,
    }


@pytest.mark.parametrize(
    ("mixture", "twin", "seconds"),
    [
        ([3.0, 2.0, 1.0], [2.0, 2.5, 1.5], 1 + 1 / 1.5),
        ([3.0, 2.0, 1.0], [3.5, 2.5, 1.5], 1.0),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 1.0], None),
    ],
    ids=["crosses", "always below", "not below at the end"],
)
def test_crossing_of_mixture_and_twin(mixture: list[float], twin: list[float], seconds: float | None) -> None:
    result = learning_result(mixture, twin)
    assert learning.crossing(result) == (seconds and pytest.approx(seconds, abs=0.1))
    learning.add_table(result)
    assert result["table"][1][3] == f"{mixture[-1] + 0.55:.4f} ± 0.7778"
    change = mixture[-1] - twin[-1] + 0.05
    assert result["table"][1][5] == f"{change:+.4f} ± 0.6353: {'better' if change < -0.6353 else 'no clear difference'}"
    result["equal_seconds"] = result["equal_seconds"][:2]
    learning.add_table(result)
    assert result["table"][1][5] == f"{change - 0.05:+.4f} (one seed)"


def test_learning_is_drawn_alike(tmp_path: Path) -> None:
    result = learning_result([3.0, 2.0, 1.0], [2.0, 2.5, 1.5]) | {"seeds": 2, "hardware": {"cpu": "x", "gpu": None}}
    files = []
    for name in ("a.svg", "b.svg"):
        learning.draw(result, tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_learning_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    settings = dict.fromkeys(("minutes", "run_file", "flags", "corpus", "models", "context", "batch", "precision"), 1)
    result = {"hardware": {"cpu": "x"}, "versions": {}, "commit": "a", "date": "b", "command": "c", **settings}
    path.write_text(json.dumps(result), encoding="utf-8")
    learning.add_earlier(dict(result), path)
    for name in ("flags", "corpus"):
        with pytest.raises(SystemExit, match=f"differs in {name};"):
            learning.add_earlier(result | {name: 2}, path)


def test_model_whose_runs_failed_is_not_drawn(tmp_path: Path) -> None:
    result = learning_result([3.0, 2.0, 1.0], [2.0, 2.5, 1.5]) | {"hardware": {"cpu": "x", "gpu": None}}
    result["equal_seconds"] = [row for row in result["equal_seconds"] if row["model"] == "mixture"]
    learning.draw(result, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "mixture: 1.5" in drawn and "dense twin" not in drawn


def test_failed_check_does_not_hide_the_others() -> None:
    def fails(what: str) -> float:
        raise TypeError(f"no\n kernel for {what}")

    assert gpu_checks.attempt(fails, "fp8") == "TypeError: no kernel for fp8"
    assert gpu_checks.attempt(float, "0.5") == 0.5


def test_earlier_rows_that_cannot_be_compared_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = {"commit": "abc", "hardware": {"cpu": "a", "gpu": None}, "versions": {"torch": "2"}, "rows": {"x": {}}}
    path.write_text(json.dumps(result), encoding="utf-8")
    assert earlier_rows(path, result, "rows") == {"x": {"commit": "abc"}}
    assert earlier_rows(path, {**result, "versions": {"torch": "3"}}, "rows") == {}
    assert earlier_rows(path, result, "rows", ["commit"]) == {"x": {"commit": "abc"}}
    assert earlier_rows(path, {**result, "commit": "def"}, "rows", ["commit"]) == {}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_step_profile_counts_every_operator(moe_fields: dict, precision: str) -> None:
    result = step_profile.measure(Config(**moe_fields), precision, "cpu", batch=2, steps=2)
    assert all(result["milliseconds"][kind] > 0 for kind in step_profile.KINDS)
    assert sum(result["milliseconds"].values()) >= sum(result["operators"].values()) - 0.01
    assert len(step_profile.table({"precisions": {precision: result}})) == 1 + len(step_profile.KINDS) + 2
    assert step_profile.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert step_profile.kind_of("aten::bmm") == "attention"
    assert step_profile.kind_of("aten::_log_softmax") == "activations and softmax"
    assert step_profile.kind_of("aten::index_select") == "gather, sort and scatter"


# ------------------------------------------------------------------------------------------------------------ the layer


def test_every_layer_is_compared_and_timed(tmp_path: Path) -> None:
    cases = [moe_layer.Case(TINY_SIZE, 64, precision, EAGER_LAYERS, 2) for precision in ("fp32", "bf16")]
    cases.append(moe_layer.Case(TINY_SIZE, 64, "fp32", ("LitGPT", "ours"), 2, skewed=True))
    result = moe_layer.run({"device": "cpu"}, cases, tmp_path / "moe_layer_cpu.json", seconds=1e-4)
    for case in result["cases"]:
        for name, row in case["layers"].items():
            if name in moe_peers.GPU_ONLY:
                assert row == {"status": "needs a GPU"}
                continue
            assert row["status"] == "measured", (case["precision"], name, row["status"])
            assert row["speedup"][1] > 0 and row["saved_bytes_per_token"] > 0
    assert result["cases"][-1]["largest_share"] == 0.5
    assert any(row[2] == "**ours**" for row in result["table"]) and "times LitGPT's" in result["headline"][0][1]


def test_wrong_layer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def builders_with_mistakes(size: moe_peers.Size) -> dict:
        def wrong(weights: dict) -> torch.nn.Module:
            layer = builders["LitGPT"](weights)
            layer.gate.weight.register_hook(lambda gradient: 1.001 * gradient)
            return layer

        builders = moe_peers.layer_builders(size)
        return {**builders, "ours": wrong, "dense": lambda weights: 1 / 0}

    monkeypatch.setattr(moe_layer, "layer_builders", builders_with_mistakes)
    case = moe_layer.Case(TINY_SIZE, 64, "fp32", ("LitGPT", "ours", "dense"), 2)
    rows = moe_layer.measure(case, "cpu", 1e-4)["layers"]
    assert rows["LitGPT"]["status"] == "measured"
    assert rows["ours"]["status"] == "wrong: gate" and rows["ours"]["deviation"]["gate"] == 1e-3
    assert "seconds" not in rows["ours"]
    assert rows["dense"] == {"status": "ZeroDivisionError: division by zero"}


def test_saved_bytes_follow_the_formula() -> None:
    """The plain layer keeps x, its sorted copy, gate and up, silu, the product, the experts' outputs, and indices."""
    n_embd, width, _, k = TINY_SIZE
    weights, bench, _ = moe_layer.prepare(moe_layer.Case(TINY_SIZE, 64, "fp32", (), 0), "cpu")
    layer = moe_peers.layer_builders(TINY_SIZE)["plain grouped_mm"](weights)
    saved = moe_layer.saved_bytes(layer, bench) / 64
    floats = n_embd + k * (n_embd + 2 * width + width + width + n_embd)
    assert 4 * floats < saved < 4 * floats + 60 * k  # sorting, weights and places: a few numbers per assignment


# ------------------------------------------------------------------------------------------------------ small real runs


def test_generation_matches_litgpt(tmp_path: Path, moe_fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = tmp_path / "tiny.yaml", tmp_path / "generation_tiny_cpu.json"
    model.write_text(yaml.safe_dump(moe_fields), encoding="utf-8")
    flags = ["--model", str(model), "--new-tokens", "5", "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["generation.py", *flags])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    generation.main()
    results = report.load_results(tmp_path)
    for batch, peers in results["generation_tiny_cpu"]["batches"].items():
        assert set(peers) == {"ours", "litgpt generate"}
        assert all(row["rows_as_litgpt"] == int(batch) for row in peers.values())
        assert peers["litgpt generate"]["speedup"] == [1, 1, 1]
    assert len(results["generation_tiny_cpu"]["table"]) == 1 + 2 * 2


def test_generation_counts_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(steps: list[list[int]], times: list[float]) -> tuple[float, float, list[list[int]]]:
        clock = iter([0.0, *times])
        monkeypatch.setattr(generation.time, "perf_counter", lambda: next(clock))
        tokens = len(steps) * len(steps[0]) // 2

        def peer(prompts: torch.Tensor, new_tokens: int, on_step: generation.OnStep) -> None:
            for step in steps:
                on_step(step)

        return generation.timed(peer, torch.zeros(2, 1), tokens)

    together = timed([[1, 2], [3, 4], [5, 6]], [10.0, 10.5, 11.0])
    assert together == (10.0, 2 * 2 / 1.0, [[1, 3, 5], [2, 4, 6]])
    one_by_one = timed([[1], [3], [2], [4]], [1.0, 1.5, 9.0, 9.5])
    assert one_by_one == (1.0, 2 / 1.0, [[1, 3], [2, 4]])


@pytest.mark.slow
def test_failed_run_reports_its_error(corpus: Corpus) -> None:
    with pytest.raises(RunFailed, match="global_batch_size 3"):
        sizes = ["--train.global_batch_size=3", "--train.micro_batch_size=2"]
        train(["--config", "configs/quickstart.yaml", *corpus.flags, *sizes])


@pytest.mark.slow
def test_preparation_of_both_sides_gives_the_same_ids(tmp_path: Path) -> None:
    result = data.measure_preparation(("TextFiles", "ours"), 0.05, 1, tmp_path)
    assert result["same_ids_apart_from_document_ends"] and result["times_textfiles"] > 1


@pytest.mark.slow
def test_train_step_losses_are_similar(corpus: Corpus) -> None:
    """The same tokens, and weights from the same distribution: the comparison is fair."""
    # Without what stock LitGPT does not know
    flags = (
        *TINY_MODEL,
        "--embedding_lr_factor=1",
        "--zero_init_projections=false",
        "--schedule.name=cosine",
        "--schedule.decay_fraction=0.2",
    )
    case = train_step.Case("configs/quickstart.yaml", flags, micro_batch=4, tokens=60 * 128, rounds=1)
    result = train_step.measure(case, list(train_step.WAYS), corpus, save=lambda model: None)
    (row,) = result["rounds"]
    assert [side["status"] for side in row.values()] == ["measured"] * 3, row
    assert row["ours"]["val_loss"] == pytest.approx(row["stock"]["val_loss"], rel=0.1)
    steps = {"device": "cpu", "peaks": {"measured": 1e12}, "models": {"quickstart": result}}
    train_step.add_table(steps)
    assert len(steps["table"]) == 1 + 3 and len(steps["headline"]) == 1


# A checkout of a peer has its interface, without its model.
PEER = """
import torch
from torch import nn
class GPTConfig:
    def __init__(self, **fields): self.__dict__ |= fields
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
    def configure_optimizers(self, weight_decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=weight_decay)
    def forward(self, x, y):
        logits = self.head(self.wte(x))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.mark.slow
def test_models_learn_for_equal_seconds_and_tokens(corpus: Corpus, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model.py").write_text(PEER, encoding="utf-8")
    monkeypatch.setitem(learning.PRESETS, "cpu", learning.PRESETS["cpu"]._replace(speed_tokens=16_384))
    monkeypatch.setattr(learning, "find_corpus", lambda data_dir: corpus)
    output, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    flags = ["--minutes", "0.005", "--seeds", "1", "--rounds", "1", "--nanogpt", str(tmp_path)]
    flags += ["--rates", "1", "1e30", "--output", str(output), "--plot", str(plot)]
    flags += ["--model.n_layer=2", "--model.block_size=32", "--train.max_seq_length=32", "--train.lr_warmup_steps=2"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *flags])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    learning.main()
    result = json.loads(output.read_text(encoding="utf-8"))
    models = ["mixture", "dense twin", "nanoGPT"]
    assert list(result["models"]) == models and result["rates"] == dict.fromkeys(models, 1.0)
    for equal in ("equal_seconds", "equal_tokens"):
        assert [row["model"] for row in result[equal]] == models
        assert all(row["tokens"] == row["max_tokens"] and row["bits_per_byte"] > 0 for row in result[equal])
    assert len({row["tokens"] for row in result["equal_tokens"]}) == 1
    assert plot.read_text(encoding="utf-8").count("<svg") == 1

    monkeypatch.setattr(sys, "argv", ["learning.py", *flags, "--resume"])
    monkeypatch.setattr(learning.Trainer, "run", None)  # everything is there already
    learning.main()
    again = json.loads(output.read_text(encoding="utf-8"))
    assert again["equal_tokens"] == result["equal_tokens"] and again["table"] == result["table"]
    assert [earlier["date"] for earlier in again["resumed"]] == [result["date"]]


@pytest.mark.slow
def test_ablation_row_has_all_seeds(corpus: Corpus) -> None:
    flags = (*ablations.SOFTMAX, "--train.max_seq_length=32")  # the tiny corpus has no longer windows
    with run_pool(1) as pool:
        runs = [pool.submit(ablations.run_once, flags, seed, 2048, corpus) for seed in (0, 1)]
        row = ablations.collect(ablations.Choice("balance", flags), runs)
    assert row["status"] == "measured" and [run["seed"] for run in row["runs"]] == [0, 1]
    rows = {"default": row, "same": dict(row)}
    ablations.add_differences(rows)
    assert rows["same"]["difference"]["mean"] == 0 and rows["same"]["speed"] == 1
