"""The benchmark of generation, on a tiny model with random weights."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import generation
from benchmarks.generation import copy_bandwidth, step_bytes, timed
from litmoe.cli import UserError
from tests.tiny_checkpoint import tiny_gpt


def test_everyone_writes_the_same(tmp_path: Path, moe_fields: dict, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = tmp_path / "tiny.yaml", tmp_path / "result.json"
    model.write_text(yaml.safe_dump({**moe_fields, "rotary_percentage": 1.0}), encoding="utf-8")
    generation.main(model=model, new_tokens=5, rounds=2, output=output)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert set(result["batches"]["1"]) == {"ours", "litgpt generate", "huggingface generate"}
    assert "litgpt batched_generate_fn" in result["batches"]["16"]
    for batch, rows in result["batches"].items():
        for row in rows.values():
            assert row["rows_as_litgpt"] == int(batch)
            assert 0 < row["tokens_per_second"]["min"] <= row["tokens_per_second"]["max"]
            assert row["first_token_seconds"]["median"] > 0 and row["bandwidth_share"] > 0
        assert rows["litgpt generate"]["speedup"]["median"] == 1
    assert result["model"] == "tiny-moe" and not result["trained"] and result["versions"]["torch"]
    assert "of 16 rows as LitGPT's" in capsys.readouterr().out


def test_what_a_step_reads(moe_fields: dict) -> None:
    gpt = tiny_gpt({**moe_fields, "n_expert": 4, "n_expert_per_token": 2})
    experts = sum(p.numel() for name, p in gpt.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in gpt.parameters()) - experts - gpt.transformer.wte.weight.numel()
    cache = 2 * 2 * 2 * 8 * 10  # keys and values, layers, groups, head size, places
    assert step_bytes(gpt, 1, 10) == 4 * (rest + experts // 2 + 32 + cache)
    assert step_bytes(gpt, 2, 10) == 4 * (rest + experts * 3 // 4 + 2 * 32 + 2 * cache)
    assert copy_bandwidth(torch.device("cpu")) > 0


def test_only_what_comes_after_the_first_token_counts() -> None:
    steps = [(10.0, [1, 2]), (10.5, [3, 4]), (11.0, [5, 6])]
    _, rate, rows = timed(lambda prompts, new_tokens: iter(steps), torch.zeros(2, 1), 3)  # type: ignore[arg-type]
    assert rate == 2 * 2 / 1.0 and rows == [[1, 3, 5], [2, 4, 6]]
    steps = [(0.0, [1]), (0.5, [3]), (9.0, [2]), (9.5, [4])]
    _, rate, rows = timed(lambda prompts, new_tokens: iter(steps), torch.zeros(2, 1), 2)  # type: ignore[arg-type]
    assert rate == 2 / 1.0 and rows == [[1, 3], [2, 4]]


def test_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make quickstart"):
        generation.main(checkpoint=tmp_path / "nowhere")
