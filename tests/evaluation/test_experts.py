"""Expert statistics: each token counts once in each layer, numbers by hand, a heat map of any size."""

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config, Tokenizer

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError, run_cli
from litmoe.data import manifest
from litmoe.evaluation.experts import count, describe, draw, evaluate, visible
from litmoe.evaluation.loss import batched, read_tokens, windows
from tests.helpers import CPU_FP32, load_script, save_tiny, tiny_gpt

SIGMOID = {
    "intermediate_size": 64,
    "n_shared_expert": 1,
    "n_expert_groups": 2,
    "n_topk_groups": 2,
    "n_topk_scores_per_group": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "padded_vocab_size": 512,
}


def save_trained(folder: Path, gpt: GPT, prepared: Path) -> Path:
    data = prepared / "data"
    paths = {"train_data_path": str(data / "train"), "val_data_path": str(data / "val")}
    settings = {"data": {"class_path": "litmoe.data.TokenizedText", "init_args": paths}}
    return save_tiny(
        folder, gpt, prepared / "tokenizer", hyperparameters=settings, manifest_path=manifest.manifest_path(data)
    )


@pytest.fixture
def checkpoint(tmp_path: Path, moe_fields: dict, prepared: Path) -> Path:
    return save_trained(tmp_path / "checkpoints" / "final", tiny_gpt(moe_fields), prepared)


@pytest.mark.parametrize("changes", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_counts_by_hand(moe_fields: dict, prepared: Path, changes: dict) -> None:
    """Compared with the input of the routers in LitGPT's blocks, window by window."""
    config = Config(**moe_fields | changes)
    stock = tiny_gpt(moe_fields | changes)
    with use_custom_moe():
        gpt = GPT(config).eval()
    gpt.load_state_dict(stock.state_dict())
    rows = list(windows(read_tokens(prepared / "data", "val"), 16, first=0))
    counted = count(gpt, batched(rows, 3))

    first = config.first_k_dense_replace or 0
    expected = torch.zeros(config.n_layer - first, 4, config.padded_vocab_size, dtype=torch.int64)
    entropies: list[list[float]] = [[] for _ in expected]
    seen: list[torch.Tensor] = []
    for block in stock.transformer.h[first:]:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for row in rows:
            seen.clear()
            stock(row[None, :-1])
            for layer, x in enumerate(seen):
                gate = stock.transformer.h[first + layer].mlp.gate
                logits = torch.nn.functional.linear(x[0], gate.weight)
                scores = logits.sigmoid() if changes else logits.softmax(-1)
                probabilities = (scores / scores.sum(-1, keepdim=True)).double()
                entropies[layer] += (-(probabilities * probabilities.log()).sum(-1) / math.log(4)).tolist()
                for token, choice in zip(row[:-1], logits.topk(2).indices, strict=True):
                    for expert in choice:
                        expected[layer, expert, token] += 1
    assert torch.equal(counted.assigned, expected)
    assert counted.tokens == sum(row.numel() - 1 for row in rows)
    assert set(counted.assigned.sum(dim=(1, 2)).tolist()) == {2 * counted.tokens}, "every token once in each layer"
    means = [sum(values) / len(values) for values in entropies]
    assert counted.router_entropy == pytest.approx(means, rel=1e-5)


def test_statistics_by_hand(tokenizer_dir: Path) -> None:
    """Four experts, one for each token: even, specialized, rarely used, dead."""
    assigned = torch.zeros(4, 384, dtype=torch.int64)
    assigned[0, 300:304] = torch.tensor([100, 100, 100, 100])
    assigned[1, 300:304] = torch.tensor([0, 300, 0, 0])
    assigned[2, 300:305] = torch.tensor([25, 25, 25, 25, 19])  # the last token occurs 19 times: too rare
    layer = describe(3, assigned, assigned.sum(dim=0), 0.5, Tokenizer(tokenizer_dir))
    total = 400 + 300 + 119
    assert layer.load == pytest.approx([4 * 400 / total, 4 * 300 / total, 4 * 119 / total, 0])
    assert (layer.max_over_mean, layer.dead, layer.block) == (pytest.approx(4 * 400 / total), [3], 3)
    shares = [400 / total, 300 / total, 119 / total]
    assert layer.entropy == pytest.approx(-sum(share * math.log(share) for share in shares) / math.log(4))
    assert [[token.id for token in tokens] for tokens in layer.tokens] == [[300, 302, 303], [301], [300, 302, 303], []]
    (best,) = layer.tokens[1]
    assert (best.seen, best.share) == (425, pytest.approx(300 / 425))
    assert best.lift == pytest.approx(300 / 425 / (300 / total))
    assert best.text == Tokenizer(tokenizer_dir).processor.decode([301])


def test_even_and_single_experts(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    even = describe(0, torch.full((8, 384), 50), torch.full((384,), 200), 1.0, tokenizer)  # 2 experts per token
    assert (even.entropy, even.max_over_mean, even.dead) == (pytest.approx(1), pytest.approx(1), [])
    assert even.tokens == [[]] * 8, "no preferred tokens"
    single = describe(0, torch.full((1, 384), 50), torch.full((384,), 50), 1.0, tokenizer)
    assert (single.load, single.entropy, single.tokens) == ([1.0], 1.0, [[]])


def test_any_number_of_experts_per_token(tokenizer_dir: Path) -> None:
    """As under expert choice: token 300 has no expert in half of its places, token 301 has both experts."""
    assigned = torch.zeros(2, 384, dtype=torch.int64)
    assigned[0, 300:302] = torch.tensor([50, 100])
    assigned[1, 301] = 100
    seen = torch.zeros(384, dtype=torch.int64)
    seen[300:302] = 100
    layer = describe(0, assigned, seen, 0.5, Tokenizer(tokenizer_dir))
    assert layer.load == pytest.approx([2 * 150 / 250, 2 * 100 / 250])
    (first,), (second,) = layer.tokens
    assert (first.id, first.seen, first.share) == (300, 100, 0.5)
    assert (second.id, second.seen, second.share) == (301, 100, 1.0)


def test_finds_a_router_that_prefers_a_token(tmp_path: Path, moe_fields: dict, prepared: Path) -> None:
    """The first layer sends one token to expert 2, which lists it."""
    gpt = tiny_gpt(moe_fields | {"n_expert_per_token": 1})
    name = Tokenizer(prepared / "tokenizer").processor.token_to_id("Ġthe")
    block = gpt.transformer.h[0]
    with torch.no_grad():
        gpt.transformer.wte.weight[:, 0] = 0.0
        gpt.transformer.wte.weight[name, 0] = 30.0
        block.attn.proj.weight.zero_()
        block.norm_2.weight.fill_(1.0)
        block.mlp.gate.weight[:, 0] = torch.tensor([-9.0, -9.0, 9.0, -9.0])
    layer = evaluate(save_trained(tmp_path / "final", gpt, prepared), **CPU_FP32).layers[0]
    (found,) = (token for token in layer.tokens[2] if token.id == name)
    assert (found.text, found.share) == (" the", 1.0)
    assert found.lift == pytest.approx(4 / layer.load[2])
    assert all(token.id != name for expert in (0, 1, 3) for token in layer.tokens[expert])


def test_batch_size_does_not_change_counts(checkpoint: Path) -> None:
    one, other = (evaluate(checkpoint, batch_size=size, max_seq_length=16, **CPU_FP32) for size in (1, 7))
    assert [layer.load for layer in one.layers] == [layer.load for layer in other.layers]
    assert [layer.tokens for layer in one.layers] == [layer.tokens for layer in other.layers]
    part = evaluate(checkpoint, batch_size=2, max_iters=1, max_seq_length=16, **CPU_FP32)
    assert (part.tokens, part.context) == (32, 16)


def test_refuses_a_dense_model(tmp_path: Path, moe_fields: dict, prepared: Path) -> None:
    dense = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "n_expert": 0, "n_expert_per_token": 0}
    with pytest.raises(UserError, match=r"is a dense model \(LLaMAMLP\) without experts.*--upcycle"):
        evaluate(save_trained(tmp_path / "final", tiny_gpt(moe_fields | dense), prepared), **CPU_FP32)


# ------------------------------------------------------------------------------------------------------------- picture


def test_tokens_are_quoted_and_shortened() -> None:
    assert [visible(text) for text in (" the", "\n", "'", "é", "a" * 30)] == [
        "' the'",
        r"'\n'",
        '"\'"',
        "'é'",
        "'" + "a" * 14 + "…",
    ]


@pytest.mark.parametrize(("n_expert", "n_layer"), [(1, 1), (4, 2), (32, 3)])
def test_heat_map_has_every_expert(
    tmp_path: Path, moe_fields: dict, prepared: Path, n_expert: int, n_layer: int
) -> None:
    """In an SVG file, texts are in comments, because letters are drawn as shapes."""
    fields = moe_fields | {"n_expert": n_expert, "n_layer": n_layer, "n_expert_per_token": 1}
    result = evaluate(save_trained(tmp_path / "final", tiny_gpt(fields), prepared), **CPU_FP32)
    layer = replace(
        result.layers[0],
        dead=[0],
        tokens=[[replace(token, text="$x_1$") for token in tokens] for tokens in result.layers[0].tokens],
    )
    result = replace(result, layers=[layer, *result.layers[1:]])
    draw(result, tmp_path / "experts.svg")
    first = (tmp_path / "experts.svg").read_bytes()
    draw(result, tmp_path / "experts.svg")
    assert (tmp_path / "experts.svg").read_bytes() == first, "the same result gives the same file"
    assert ET.fromstring(first).tag.endswith("svg")
    shown = first.decode()
    for row in result.layers:
        assert f"<!-- layer {row.block} -->" in shown or f"layer {row.block}" in shown
        for expert, load in enumerate(row.load):
            assert ("<!-- dead -->" if expert in row.dead else f"<!-- {load:.2f} -->") in shown
    draw(result, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


# --- script


def test_script(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--experts", "--plot", "experts.png", "--device=cpu", "--json-file", "result.json"]
    run_cli(load_script("evaluate").main, flags, optional_positional="checkpoint")
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown == json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    expected = asdict(evaluate(Path("checkpoints") / "final", **CPU_FP32))
    assert {**shown, "seconds": 0} == json.loads(json.dumps({**expected, "seconds": 0}))
    assert (shown["n_expert"], len(shown["layers"]), shown["step"]) == (4, 2, 1)
    tokens = manifest.read(Path(shown["data_dir"])).splits["val"].tokens  # type: ignore[union-attr]
    assert shown["tokens"] == tokens
    for part in ("highest load", "entropy", f"{shown['layers'][0]['load'][0]:.2f}", f"{tokens:,}", "experts.png"):
        assert part in captured.err
    assert (tmp_path / "experts.png").is_file()
    assert checkpoints.verify(checkpoint).step == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "x.png"], "--plot has no effect on the loss; it is used by --experts"),
        (["--experts", "--plot", "x.pdf"], "--plot is x.pdf; expected a name that ends in .png or .svg"),
    ],
)
def test_script_refuses_flags(checkpoint: Path, flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(load_script("evaluate").main, [str(checkpoint), *flags], optional_positional="checkpoint")
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
