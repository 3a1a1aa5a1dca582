"""The benchmarks of whole runs: their arithmetic, a real run of each side, what the document says of the results."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    ablations,
    common,
    cross_entropy,
    data_loading,
    low_memory,
    moe_vs_dense,
    report,
    report_runs,
    train_step,
)
from benchmarks.data_loading import Shape
from benchmarks.report_runs import targets
from benchmarks.runs import Corpus, Failed, Point, Run, Spread, curve, interpolate, spread, train
from benchmarks.train_step import Case, Way
from litmoe.data import manifest

CIRCUMSTANCES = {
    "command": "the command",
    "commit": "abc",
    "date": "2026-01-02T03:04:05",
    "hardware": {"cpu": "a CPU", "cores": 2, "threads": 2, "gpu": None},
    "versions": {"torch": "2"},
}
TINY = [f"--model.{name}={value}" for name, value in {"n_layer": 2, "n_embd": 32, "moe_intermediate_size": 16}.items()]
TINY += ["--model.block_size=32", "--precision=32-true", "--data.init_args.num_workers=0"]


def test_a_runs_speed_is_that_of_its_second_half() -> None:
    rows = [{"step": 0, "val_loss": 3.0}]
    rows += [{"total_tokens": 1000.0 * n, "time": time} for n, time in enumerate((9.0, 10.0, 12.0, 14.0), 1)]
    run = Run(seconds=30.0, first_line=(10, 20.0), peak_bytes=1, rows=rows)
    assert run.tokens_per_second == 2000 / 4  # from the second of four rows
    assert run.first_step_seconds == pytest.approx(20 - 9 * 100 / 500)


def test_a_curves_seconds_are_those_of_training() -> None:
    rows = [
        {"step": 0, "val_loss": 3.0},
        {"total_tokens": 100.0, "tokens_per_second": 50.0, "time": 7.0},
        {"total_tokens": 300.0, "tokens_per_second": 100.0, "time": 99.0, "val_loss": 2.0},
    ]
    assert curve(rows) == [Point(0, 0, 3.0), Point(300, 4, 2.0)]


def test_interpolation() -> None:
    points = [(0.0, 3.0), (2.0, 2.0), (4.0, 1.8)]
    assert [interpolate(points, at) for at in (0, 1, 2, 3)] == pytest.approx([3, 2.5, 2, 1.9])
    assert interpolate(points, 4.1) is None and interpolate(points, -1) is None


def test_a_spread_is_clear_where_the_95_percent_interval_leaves_out_zero() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 1.0, 4.303 / math.sqrt(3)), rel=1e-3)
    assert not found.clear and spread([2.0, 2.1, 2.2]).clear and spread([-2.0, -2.1, -2.2]).clear
    assert spread([5.0]) == Spread(5.0, 0.0, 0.0) and not spread([5.0]).clear


def test_the_best_settings_and_the_ratios() -> None:
    def row(speed: float, seconds: float) -> dict[str, Any]:
        return {"status": "measured", "tokens_per_second": speed, "seconds": seconds}

    trials = [
        {"who": "stock", "micro_batch": 4, "compile": False, **row(100, 10), "expected_seconds": 10},
        {"who": "stock", "micro_batch": 4, "compile": True, **row(110, 90), "expected_seconds": 90},
        {"who": "stock", "micro_batch": 2, "compile": False, "status": "out of memory"},
        {"who": "ours", "micro_batch": 1, "compile": None, **row(500, 1)},
    ]
    assert train_step.best(trials, "stock", "tokens_per_second") == Way("stock", 4, True)
    assert train_step.best(trials, "stock", "expected_seconds") == Way("stock", 4, False)
    assert train_step.best(trials[2:3], "stock", "tokens_per_second") is None
    rounds = [
        {"ours": row(200, 5), "stock": row(100, 60), "stock by the whole command": row(90, 10)},
        {"ours": row(300, 5), "stock": row(100, 60), "stock by the whole command": row(90, 20)},
        {"ours": row(100, 5), "stock": row(100, 60), "stock by the whole command": row(90, 15)},
    ]
    found = train_step.summary(rounds)
    assert found["times_stock"] == {"tokens_per_second": [1, 2, 3], "whole_command": [2, 3, 4]}
    assert found["ours"]["tokens_per_second"] == [100, 200, 300]
    rounds[0]["stock"] = {"status": "out of memory"}
    assert train_step.summary(rounds)["times_stock"]["tokens_per_second"] == [1, 2, 3]


def test_only_rows_of_the_same_machine_and_versions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = {**CIRCUMSTANCES, "tokens": 5}
    assert common.kept_rows(path, result, "rows", "tokens") == {}
    path.write_text(json.dumps({**result, "rows": {"a": {"n": 1}, "b": {"commit": "older"}}}), encoding="utf-8")
    assert common.kept_rows(path, result, "rows", "tokens") == {
        "a": {"n": 1, "commit": "abc"},
        "b": {"commit": "older"},
    }
    busier = {**result, "hardware": {**CIRCUMSTANCES["hardware"], "load_before": 9.0}}
    assert common.kept_rows(path, busier, "rows", "tokens")
    others = {"hardware": {**CIRCUMSTANCES["hardware"], "cpu": "another"}, "versions": {"torch": "3"}, "tokens": 6}
    for key, value in others.items():
        assert common.kept_rows(path, {**result, key: value}, "rows", "tokens") == {}


def test_a_run_with_one_line_has_no_speed() -> None:
    run = Run(seconds=30.0, first_line=(10, 20.0), peak_bytes=1, rows=[{"total_tokens": 1.0, "time": 1.0}])
    with pytest.raises(Failed, match="1 lines"):
        run.tokens_per_second  # noqa: B018  (a property that raises)


@pytest.fixture(scope="module")
def text(prepared: Path) -> Corpus:
    return Corpus(prepared / "data", prepared / "tokenizer")


def test_bits_per_byte(text: Corpus) -> None:
    entry = manifest.read(text.data_dir).splits["val"]
    assert text.bits_per_byte(2.0) * math.log(2) * entry.bytes == pytest.approx(2.0 * entry.tokens)


@pytest.mark.slow
def test_both_sides_train_and_their_losses_are_alike(text: Corpus) -> None:
    """The same tokens, and weights from the same distribution: stock is the peer that it is said to be."""
    case = Case("configs/quickstart.yaml", tuple(TINY), (4, 2), 60 * 128, 60 * 128, 1, shipped=True)
    found = train_step.measure(case, text, save=lambda model: None)
    assert [trial["status"] for trial in found["trials"]] == ["measured"] * 3, found["trials"]
    (row,) = found["rounds"]
    assert row["ours"]["val_loss"] == pytest.approx(row["stock"]["val_loss"], rel=0.1)
    assert all(
        value > 0 for numbers in found["rounds"][0].values() for key, value in numbers.items() if key != "status"
    )
    result = {**CIRCUMSTANCES, "device": "cpu", "peaks": {"measured": 1e12}, "same_on_both_sides": train_step.EQUAL}
    assert "**ours**, micro batch 4" in report.document({"train_step_cpu": {**result, "models": {"quickstart": found}}})


def test_a_run_that_fails_says_why(text: Corpus) -> None:
    with pytest.raises(Failed, match="global_batch_size 3"):
        train(["--config", "configs/quickstart.yaml", *text.flags, "--train.global_batch_size=3"])


@pytest.mark.slow
def test_a_mixture_is_held_against_its_twin(text: Corpus, tmp_path: Path) -> None:
    preset = moe_vs_dense.Preset(
        "configs/quickstart.yaml",
        "configs/models/quickstart-dense-twin.yaml",
        4096,
        (1e-3, 2e-3, math.nan),
        ("--model.n_layer=2", "--model.block_size=32", "--train.lr_warmup_steps=2"),
    )
    saved: list[str] = []
    found = moe_vs_dense.compare(preset, 2, text, lambda found: saved.append(json.dumps(found)))
    assert len(saved) == 10 and json.loads(saved[-1]) == json.loads(json.dumps(found))
    assert [math.isnan(row["learning_rate"]) for row in found["failed"]] == [True, True]
    cut_short = {**CIRCUMSTANCES, "device": "cpu", **json.loads(saved[0])}
    assert "Cut short" in report.document({"moe_vs_dense_cpu": cut_short})
    assert len(found["grid"]) == 4 and len(found["equal_tokens"]["runs"]) == len(found["equal_seconds"]["runs"]) == 4
    assert found["models"]["MoE"]["total"] > found["models"]["dense"]["total"]
    result = {**CIRCUMSTANCES, "device": "cpu", **found}
    text_of_it = report.document({"moe_vs_dense_cpu": json.loads(json.dumps(result))})
    assert f"{found['equal_seconds']['difference']['mean']:+.4f}" in text_of_it
    report_runs.plot(result, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_row_takes_the_best_of_its_grid(text: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*ablations.SIGMOID, "--train.max_seq_length=32")  # the tests' corpus has no batch of longer windows
    choice = ablations.Choice("balance", flags, "--moe.bias_update_rate", (0.001, 0.01))
    monkeypatch.setitem(ablations.CHOICES, "tiny", choice)
    row = ablations.measure("tiny", 2048, 2, text)
    assert row["status"] == "measured", row
    assert row["grid"][str(row["chosen"])] == min(row["grid"].values()) == row["runs"][0]["bits_per_byte"]
    assert [run["seed"] for run in row["runs"]] == [0, 1] and f"--moe.bias_update_rate={row['chosen']}" in row["flags"]


def test_equal_seconds_pair_runs_of_the_same_seed() -> None:
    def run(model: str, seed: int, score: float, seconds: float) -> dict[str, Any]:
        points = [[0, 0.0, 4.0], [100, seconds, score]]
        return {
            "model": model,
            "seed": seed,
            "bits_per_byte": score,
            "seconds": seconds,
            "tokens": 100,
            "curve": points,
        }

    runs = [run("MoE", 0, 1.0, 10), run("MoE", 1, 1.2, 10), run("dense", 0, 1.1, 10), run("dense", 1, 1.4, 8)]
    found = moe_vs_dense.verdict(runs, by="seconds")
    assert found["difference"]["mean"] == pytest.approx(-0.15) and found["seconds"] == [[10, 10], [10, 8]]
    # half of the shorter of the two, 5 s and 4 s
    assert found["difference_on_the_way"]["50%"]["mean"] == pytest.approx((2.5 - 2.55 + 2.88 - 2.7) / 2)


def test_ablations_are_held_against_the_defaults_runs() -> None:
    def row(question: str, *scores: float) -> dict[str, Any]:
        runs = [
            {"bits_per_byte": score, "tokens_per_second": 1000.0, "busiest_expert": 1.5, "dead_experts": 0}
            for score in scores
        ]
        return {"question": question, "status": "measured", "tuned": None, "chosen": None, "runs": runs}

    rows = {
        "default": row("AdamW", 1.0, 1.1, 1.2),
        "worse": row("optimizer", 1.1, 1.2, 1.31),
        "alike": row("experts", 1.2, 1.0, 1.1),
        "broken": {"question": "attention", "status": "it ended"},
    }
    found = ablations.with_differences(rows)
    assert found["worse"]["difference"]["mean"] == pytest.approx(0.31 / 3) and "difference" not in found["default"]
    result = {**CIRCUMSTANCES, "run_file": "a.yaml", "tokens": 1000, "seeds": 3, "rows": found}
    text = report.document({"ablations": result})
    assert "optimizer: the row *worse* chose the default" in text and "*alike* tells no clear difference" in text
    assert "| broken | it ended |" in text


def test_the_reader_is_timed(text: Corpus) -> None:
    shape = Shape("tiny", 16, 2, 5_000, 0)
    for workers in (0, 1):
        found = data_loading.alone(shape, workers, text)
        assert found["tokens_per_second"] > 0 and found["first_batch_seconds"] > 0
    assert 0 < data_loading.waiting(shape, 0, text, need=10_000, seconds=0.1) < 1
    assert data_loading.needed(shape, None) == (5_000, "target")
    steps = {"models": {"tiny": {"summary": {"ours": {"tokens_per_second": [1, 2, 3]}}}}}
    assert data_loading.needed(shape, steps) == (3, "measured")


def test_targets_of_runs_are_computed() -> None:
    def steps(tokens: float, whole: float) -> dict[str, Any]:
        return {
            "ours": {"tokens_per_second": [1, 1e5, 2]},
            "times_stock": {"tokens_per_second": [0, tokens, 9], "whole_command": [0, whole, 9]},
        }

    def verdicts(results: dict) -> list[tuple[str | None, bool]]:
        return [(target.measured, target.reached) for target in targets(results)]

    assert set(verdicts({})) == {(None, False)}
    cpu = {"hardware": {"cores": 2}, "peaks": {}, "models": {"quickstart": {"summary": steps(1.49, 1.5)}}}
    gpu = {
        "hardware": {"gpu": {"name": "NVIDIA H200"}},
        "device": "cuda",
        "peaks": {"measured": 1e15, "datasheet": 2e15},
        "models": {
            "moe-200m": {"summary": steps(4, 4), "flops_per_token": {"causal": 4.5e9}, "precision": "bf16-mixed"}
        },
    }
    both = {"train_step_cpu": cpu, "train_step_cuda": gpu}
    assert verdicts(both)[:5] == [("1.49", False), ("1.50", True), ("4.00", True), ("0.45", True), (None, False)]
    gpu["models"]["moe-200m"]["precision"] = "32-true"
    assert verdicts(both)[3] == (None, False)
    gpu["hardware"]["gpu"]["name"], cpu["hardware"]["cores"] = "NVIDIA GH200 480GB", 4
    assert verdicts(both)[:5] == [(None, False)] * 5
    clear = {"equal_seconds": {"difference": {"mean": -0.2, "deviation": 0.1, "interval": 0.1}}}
    unclear = {"equal_seconds": {"difference": {"mean": -0.2, "deviation": 0.1, "interval": 0.3}}}
    found = verdicts({"moe_vs_dense_cpu": clear, "moe_vs_dense_cuda": unclear})
    assert found[5:8] == [("-0.2000 ± 0.1000", True), (None, False), ("-0.2000 ± 0.3000", False)]
    waits = [
        {"waiting": 0.001, "shipped": True},
        {"waiting": 0.02, "shipped": True},
        {"waiting": 0.9, "shipped": False},
    ]
    assert verdicts({"data_loading_cpu": {"rows": [*waits, {"shipped": True}]}})[8] == ("2.00%", False)


def test_low_memory_leaves_bf16_out_where_a_cpu_has_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(low_memory, "WAYS", {name: way for name, way in low_memory.WAYS.items() if way})
    ways = low_memory.compare(1000, Corpus(Path("none"), Path("none")))
    assert [way["status"] for way in ways.values()] == [common.NO_BF16] * 2
    found = {"low_memory": {**CIRCUMSTANCES, "tokens": 1000, "seeds": 3, "ways": {"fp32": {"status": "x"}, **ways}}}
    assert f"| {common.NO_BF16} |" in report.document(found)
    assert targets(found)[-4].measured is None


def test_what_low_memory_says_is_in_the_document() -> None:
    way = {"status": "measured", "val_losses": [1.0, 2.0], "seconds": 9.0, "weights_mb": 1.5, "optimizer_mb": 3.0}
    over = {"mean": 0.008, "deviation": 0.001, "interval": 0.0023}
    ways = {"fp32": way, "bf16": {**way, "loss_over_fp32": over}, "nearest": {"status": "no C++ compiler"}}
    loss = {"tokens": 1000, "seeds": 2, "ways": ways}
    peak = {"model": "MoE", "context": 2048, "steps": 4, "card_gib": 6.0, "cap_gib": 5.0, "fits": True}
    peak |= {
        "peak_allocated_gib": 4.5,
        "peak_reserved_gib": 4.75,
        "outside_allocator_gib": 0.4,
        "gpu": {"name": "a card"},
    }
    results = {"low_memory": {**CIRCUMSTANCES, **loss}, "low_memory_cuda": {**CIRCUMSTANCES, **peak}}
    assert [(found.measured, found.reached) for found in targets(results)[-4:-2]] == [
        ("+0.80% ± 0.23%", False),
        ("4.75 GiB and 0.4 outside the allocator", True),
    ]
    peak["outside_allocator_gib"] = 0.51  # more than a plan reckons with
    assert not targets({"low_memory_cuda": peak})[-3].reached
    text = report.document(results)
    assert "| bf16 | 1.5000 | +0.80% ± 0.23% |" in text and "| nearest | no C++ compiler |" in text
    assert "a card, its allocator held to 5.0 GiB" in text


def test_a_plan_is_held_to_the_worst_of_its_runs() -> None:
    rows = [{"peak": 104, "measured": 100}, {"peak": 94, "measured": 100}]
    for count, wanted in ((1, ("4.0%", True)), (2, ("6.0%", False))):
        (target,) = [
            found for found in targets({"memory_cuda": {"rows": rows[:count]}}) if "a plan's memory" in found.text
        ]
        assert (target.measured, target.reached) == wanted


def test_what_generation_says_is_in_the_document() -> None:
    row = {"first_token_seconds": {"median": 0.0123}, "bandwidth_share": 0.5, "rows_as_litgpt": 1}
    ours = {**row, "tokens_per_second": {"min": 900, "median": 1000, "max": 1100}}
    ours["speedup"] = {"min": 2.8, "median": 2.9, "max": 3.0}
    found = {"model": "quickstart", "trained": True, "dtype": "float32", "prompt_tokens": 16, "new_tokens": 128}
    found |= {"copy_bytes_per_second": 2e10, "batches": {"1": {"ours": ours}}}
    results = {"generation": {**CIRCUMSTANCES, **found}}
    (target,) = [target for target in targets(results) if "CPU, the quickstart, batch 1" in target.text]
    assert (target.measured, target.reached) == ("2.90", False)
    assert "| 1 | **ours** | 1,000 (900 to 1,100) | 2.90 (2.80 to 3.00) | 12.3 | 50.0% |" in report.document(results)


def test_losses_are_compared_and_timed(tmp_path: Path) -> None:
    cases = [cross_entropy.Case("quickstart", 64, precision, 2) for precision in ("fp32", "bf16", "bf16-mixed")]
    cross_entropy.run("cpu", cases, tmp_path / "cross_entropy_cpu.json", "the command", seconds=1e-4)
    found = report.load(tmp_path)
    for case in found["cross_entropy_cpu"]["cases"]:
        assert tuple(case["ways"]) == tuple(cross_entropy.WAYS)
        for name, row in case["ways"].items():
            if name in cross_entropy.GPU_ONLY:
                assert row == {"status": "needs a GPU"}
                continue
            assert row["status"] == "measured", (case["precision"], name, row)
            assert row["seconds"][0] > 0 and row["speedup"][1] > 0 and row["peak_bytes"] >= 4 * 64 * 128
            assert set(row["deviation"]) == {"loss", "hidden states", "weight"}
    text = report.document(found)
    assert "| 128 x 2,048, 64 tokens, fp32 | **ours** | " in text and "| Liger-Kernel | needs a GPU |" in text


def test_a_wrong_loss_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = cross_entropy.WAYS["ours"]
    ways = {"LitGPT": lambda *tensors: 1.001 * ours(*tensors), "ours": ours, "torch": lambda *tensors: 1 / 0}
    monkeypatch.setattr(cross_entropy, "WAYS", ways)
    found = cross_entropy.measure(cross_entropy.Case("quickstart", 64, "fp32", 2), "cpu", 1e-4)["ways"]
    assert found["LitGPT"]["status"].startswith("wrong: loss by 1.0e-03") and "seconds" not in found["LitGPT"]
    assert found["ours"]["status"] == "measured" and "speedup" not in found["ours"]
    assert found["torch"] == {"status": "ZeroDivisionError: division by zero"}


def test_what_was_not_measured_names_its_command() -> None:
    text = report.document({})
    for command in report_runs.FILES.values():
        assert f"Not measured yet: `uv run {command}` does." in text
        script = next(part for part in command.split() if part.endswith(".py"))
        assert (report.ROOT / script).exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_of_the_benchmark_before_are_no_change_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first result of `make bench` said that the code was not the commit's."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.commit() == "unknown"
    names = ["benchmarks/results/a.json", "docs/a.md", "code.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", *arguments.split()], cwd=tmp_path, check=True)
    clean = common.commit()
    assert len(clean) == 12
    for name, wanted in zip(names, (clean, clean, f"{clean}-dirty"), strict=True):
        (tmp_path / name).write_text("changed")
        assert common.commit() == wanted


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
@pytest.mark.parametrize("target", ["bench", "bench-gpu"])
def test_a_measurement_that_fails_ends_the_target_badly_and_no_other(target: str, tmp_path: Path) -> None:
    uv = tmp_path / "uv"
    for script, code in {"train_step": 2, "nothing": 0}.items():
        uv.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$*" in *{script}*) exit 3;; esac\n', encoding="utf-8")
        uv.chmod(0o755)
        command = ["make", f"UV={uv}", "PYTHON=true", target]
        done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert ("these failed:\n  python benchmarks/train_step.py" in done.stderr) == bool(code)
        for name in ("train_step", "moe_vs_dense", "data_loading", "low_memory", "report"):
            assert f"ran run python benchmarks/{name}.py" in done.stdout


def test_what_saving_costs_is_in_the_document(tmp_path):
    """Of runs with four saves and without any: 2 s more is half a second a save, 0.8% of a minute."""
    spread_of = {"mean": 0.5, "deviation": 0.1, "interval": 0.2}
    result = {
        **{"tokens": 300_000, "every_seconds": 2.0, "checkpoint_mb": 34.2, "saves": [4, 4]},
        **{"seconds": {"saving": [31.0, 33.0], "not": [29.0, 31.0]}, "seconds_a_save": spread_of},
        "share_at_one_a_minute": {"mean": 0.0083, "deviation": 0.0017, "interval": 0.0033},
    }
    assert "one of 4 saves costs 500 ms ± 200 ms" in " ".join(report_runs.checkpoint(result))
    (target,) = [target for target in targets({"checkpoint": result}) if "a save a minute" in target.text]
    assert (target.measured, target.reached) == ("0.83% ± 0.33%", True)
    result["share_at_one_a_minute"]["mean"] = 0.018
    assert not targets({"checkpoint": result})[-1].reached
