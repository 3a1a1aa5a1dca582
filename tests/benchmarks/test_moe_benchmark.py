"""The benchmark of the layer and the document that is made of it, at tiny sizes."""

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import common, moe_layer, report, report_layer
from benchmarks.moe_layer import Case
from benchmarks.moe_peers import GPU_ONLY, Size, config_of, layers, stacked

TINY: Size = (32, 48, 4, 2)
EAGER = tuple(name for name in layers(TINY) if "compiled" not in name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run on the CPU wrote."""
    folder = tmp_path_factory.mktemp("results")
    cases = [Case(TINY, 64, precision, EAGER, 2) for precision in ("fp32", "bf16", "bf16-mixed")]
    cases += [Case(TINY, 64, "fp32", ("LitGPT", "ours"), 2, skewed=True), Case(TINY, 64, "fp32", ("ours",), 0)]
    moe_layer.run("cpu", cases, folder / "moe_layer_cpu.json", "the command", seconds=1e-4)
    return folder


def test_every_layer_is_compared_and_timed(results: Path) -> None:
    result = json.loads((results / "moe_layer_cpu.json").read_text(encoding="utf-8"))
    *table, skewed, compared = result["cases"]
    for case in table:
        assert tuple(case["layers"]) == EAGER
        for name, row in case["layers"].items():
            if name in GPU_ONLY:
                assert row == {"status": "needs a GPU"}
                continue
            assert row["status"] == "measured", (case["precision"], name, row["status"])
            low, typical, high = row["seconds"]
            assert 0 < low <= typical <= high and row["speedup"][1] > 0
            assert row["tokens_per_second"] == pytest.approx(64 / typical, rel=2e-3)
            assert row["saved_bytes_per_token"] > 0 and row["peak_bytes"] > 0
            assert name == "dense" or set(row["deviation"]) == {"output", "x", "gate", "fc", "proj"}
    assert skewed["largest_share"] == 0.5 and set(skewed["layers"]) == {"LitGPT", "ours"}
    assert compared["layers"]["ours"]["status"] == "compared" and "seconds" not in compared["layers"]["ours"]
    assert result["command"] == "the command" and result["versions"]["torch"] and result["quickstart"]


def test_a_wrong_layer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(size: Size) -> dict:
        def build(values: dict) -> torch.nn.Module:
            layer = built["ours"](values)
            layer.experts.proj_weight.register_hook(lambda gradient: 1.001 * gradient)
            return layer

        built = layers(size)
        return {**built, "ours": build, "dense": lambda values: 1 / 0}

    monkeypatch.setattr(moe_layer, "layers", careless)
    found = moe_layer.measure(Case(TINY, 64, "fp32", ("LitGPT", "ours", "dense"), 2), "cpu", 1e-4)["layers"]
    assert found["LitGPT"]["status"] == "measured"
    assert found["ours"]["status"] == "wrong: proj by 1.0e-03" and "seconds" not in found["ours"]
    assert found["dense"] == {"status": "ZeroDivisionError: division by zero"}


def test_saved_bytes_are_those_of_the_formula() -> None:
    """The plain layer keeps x, its sorted copy, gate and up, silu, the product, the experts' outputs, and indices."""
    n_embd, width, _, k = TINY
    tokens = 64
    values, bench, _ = moe_layer.prepare(Case(TINY, tokens, "fp32", (), 0), "cpu")
    saved = moe_layer.saved_bytes(layers(TINY)["plain grouped_mm"](values), bench) / tokens
    floats = n_embd + k * (n_embd + 2 * width + width + width + n_embd)
    assert 4 * floats < saved < 4 * floats + 60 * k  # sorting, weights and places: some numbers for each assignment


def test_stacked_weights_are_gate_above_up() -> None:
    values, *_ = moe_layer.prepare(Case(TINY, 64, "fp32", (), 0), "cpu")
    gate, fc, proj = stacked(values, config_of(TINY))
    assert gate.shape == (4, 32) and fc.shape == (4, 96, 32) and proj.shape == (4, 32, 48)
    assert torch.equal(fc[3, :48], values["experts.3.fc_1.weight"])
    assert torch.equal(fc[3, 48:], values["experts.3.fc_2.weight"])


def test_the_document_says_what_is_in_the_results(results: Path, tmp_path: Path) -> None:
    found = report.load(results)
    text = report.document(found)
    assert "Not measured yet." in text and "needs a GPU" in text and "### fp32, 64 tokens" in text
    for row in report_layer.flat(found["moe_layer_cpu"]):
        assert "speed" not in row or f"{row['tokens_per_second']:,}" in text
    report_layer.plot(found["moe_layer_cpu"], tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_bf16_is_left_out_where_a_cpu_has_none_of_it(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a case that takes half a second elsewhere takes minutes, and the whole table a day."""
    for has_it in (True, False):
        monkeypatch.setattr(moe_layer, "cpu_has_bf16", lambda has_it=has_it: has_it)
        assert ("bf16" in {case.precision for case in moe_layer.cases("cpu")}) == has_it
    found = report.load(results)
    assert "No bf16:" not in report.document(found)
    cases = found["moe_layer_cpu"]["cases"]
    found["moe_layer_cpu"]["cases"] = [case for case in cases if case["precision"] == "fp32"]
    assert f"No bf16: {common.NO_BF16}." in report.document(found)


def test_targets_are_computed(results: Path) -> None:
    found = report.load(results)["moe_layer_cpu"]
    found["cases"] = [
        case for case in found["cases"] if case["precision"] != "bf16-mixed" and case["routing"] == "even"
    ]
    found["cases"].pop()
    cuda = copy.deepcopy(found)
    found["quickstart"] = list(TINY)
    for case, speed, kept in zip(found["cases"], (1.29, 1.31), (59, 61), strict=True):
        case["layers"]["ours"] |= {"speedup": [1.0, speed, 2.0], "saved_bytes_per_token": kept}
        case["layers"]["plain grouped_mm"]["saved_bytes_per_token"] = 100
    cuda["hardware"]["gpu"] = {"name": "NVIDIA H200"}
    (case,) = cuda["cases"] = cuda["cases"][1:]
    case |= {"n_embd": 768, "intermediate_size": 2048, "n_expert": 8, "n_expert_per_token": 2, "tokens": 16384}
    for name, speed in (
        ("ours", 76),
        ("dense", 100),
        ("Liger-Kernel", 80),
        *((f"Hugging Face {way}", 70) for way in ("eager", "grouped_mm")),
    ):
        case["layers"][name] |= {"speedup": [1.0, speed / 9.4, 99.0], "tokens_per_second": speed}

    def verdicts_of(results: dict) -> list[tuple[str, str]]:
        cells = [line.split("|") for line in common.verdicts(report_layer.targets(results))[2:-1]]
        return [(measured.strip(), reached.strip()) for _, _, measured, reached, _ in cells]

    verdicts = verdicts_of({"cpu": found, "cuda": cuda})
    assert verdicts[:5] == [
        ("1.29", "**no**"),
        ("1.31", "yes"),
        ("not measured yet", ""),
        ("1.29", "yes"),
        ("0.61", "**no**"),
    ]
    assert verdicts[5:9] == [("8.09", "yes"), ("0.95", "**no**"), ("0.76", "yes"), ("8.09", "yes")]
    del case["layers"]["Liger-Kernel"]["speedup"]
    assert verdicts_of({"cuda": cuda})[6] == ("not measured yet", ""), "the peer that counts was not there"
    cuda["hardware"]["gpu"] = {"name": "another card"}
    assert verdicts_of({"cuda": cuda})[5:9] == [("not measured yet", "")] * 3 + [("8.09", "yes")]


def test_the_committed_document_is_made_from_the_committed_results() -> None:
    """Run benchmarks/report.py after a measurement, or after a change of its words."""
    written = (report.DOCS / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert written == report.document(report.load(report.RESULTS))
