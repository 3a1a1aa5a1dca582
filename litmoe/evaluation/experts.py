"""What the experts of a checkpoint do: how evenly they are used, and which tokens each takes beyond chance.

What is counted. Every token of the validation text that the model reads, once, in the windows of the loss
(litmoe/evaluation/loss.py); each is assigned to ``n_expert_per_token`` experts in every layer.

- ``load``: an expert's assignments over those of an even share: 1 is even, 0 is never chosen.
- ``entropy``: of the layer's load, over its greatest value, log(n_expert): 1 is even, 0 one expert for everything.
- ``router_entropy``: the same of the router's probabilities for one token, mean over tokens: near 1 it hardly chooses,
  near 0 it is sure of one expert.
- ``dead``: experts with a load below `DEAD`.
- ``tokens``: those that an expert takes most often beyond chance. Were its choice blind to the token, it would take
  the same share of each; listed are those whose share exceeds that by most standard deviations. ``lift`` says by how
  many times: 3 is three times as often as the expert takes any token. Tokens seen fewer than `SEEN` times are left out.
"""

import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from litgpt import GPT, Tokenizer
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from custom_moe.balance import DEAD, expert_load, load_statistics, normalized_entropy, router_probabilities
from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data.tokenizers import text_ids
from litmoe.evaluation.common import Precision, as_table, load_model
from litmoe.evaluation.loss import open_validation
from litmoe.forward import hidden_states
from litmoe.inference.generate import TextStream

SEEN = 20
TOKENS = 5  # listed for an expert


@dataclass(frozen=True)
class FrequentToken:
    """A token that an expert takes beyond chance."""

    id: int
    text: str
    seen: int
    """How often it stood in the text"""
    share: float
    """How often of these the expert took it"""
    lift: float


@dataclass(frozen=True)
class Layer:
    """The experts of one layer."""

    block: int
    """Its place in the model; the first ones may be dense"""
    load: list[float]
    """By expert; mean 1"""
    entropy: float
    router_entropy: float
    max_over_mean: float
    dead: list[int]
    tokens: list[list[FrequentToken]]
    """By expert, the most telling first"""


@dataclass(frozen=True)
class ExpertStatistics:
    """What `evaluate` measured, and on what."""

    checkpoint: str
    step: int
    name: str
    """The model's"""
    data_dir: str
    n_expert: int
    n_expert_per_token: int
    tokens: int
    layers: list[Layer]
    context: int
    device: str
    precision: str
    seconds: float


def evaluate(
    folder: Path,
    data_dir: Path | None = None,
    *,
    max_iters: int | None = None,
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> ExpertStatistics:
    """Watches the routers of a checkpoint over the validation text; arguments and errors as `loss.evaluate`.

    Raises:
        UserError: also for a model without experts.
    """
    config = checkpoints.load_config(folder)
    if config.mlp_class_name != "LLaMAMoE":
        raise UserError(
            f"--experts: {folder} is a dense model ({config.mlp_class_name}), it has no experts."
            " `run_train.py --upcycle` makes a mixture of experts of one whose feed-forward is LLaMAMLP."
        )
    text = open_validation(folder, data_dir, max_iters=max_iters, batch_size=batch_size, max_seq_length=max_seq_length)
    tokenizer = checkpoints.load_tokenizer(folder)
    loaded = load_model(folder, device, precision, text.context)
    start = time.perf_counter()
    counted = count(loaded.gpt, text.batches, loaded.autocast)
    return ExpertStatistics(
        checkpoint=str(folder),
        step=checkpoints.read_mark(folder).step,
        name=config.name,
        data_dir=str(text.data_dir),
        n_expert=config.n_expert,
        n_expert_per_token=config.n_expert_per_token,
        tokens=counted.tokens,
        layers=[
            describe(block, assigned, router_entropy, config.n_expert_per_token, tokenizer)
            for block, (assigned, router_entropy) in enumerate(
                zip(counted.assigned, counted.router_entropy, strict=True), config.n_layer - len(counted.assigned)
            )
        ],
        context=text.context,
        device=loaded.device,
        precision=loaded.precision,
        seconds=time.perf_counter() - start,
    )


class Counted(NamedTuple):
    """What went where."""

    tokens: int
    assigned: Tensor
    """``(MoE layers, n_expert, padded_vocab_size)`` int64: how often each expert took each token"""
    router_entropy: list[float]
    """By MoE layer"""


@torch.inference_mode()
def count(gpt: GPT, batches: Iterable[Tensor], autocast: Any = None) -> Counted:
    """Counts which expert takes which token.

    Args:
        gpt: built within ``use_custom_moe()``, with experts.
        batches: token ids, each ``(B, T + 1)``; the last one of a row is not read.
        autocast: the context of the forward passes.
    """
    config, device = gpt.config, gpt.lm_head.weight.device
    vocabulary = config.padded_vocab_size
    n_layer = config.n_layer - (config.first_k_dense_replace or 0)
    assigned = torch.zeros(n_layer, config.n_expert * vocabulary, dtype=torch.int64)
    entropies, tokens = torch.zeros(n_layer, dtype=torch.float64), 0
    for batch in batches:
        ids = batch[:, :-1].to(device)
        with autocast or nullcontext():
            _, routers = hidden_states(gpt, ids)
        for layer, router in enumerate(router for router in routers if router is not None):
            cells = (router.experts * vocabulary + ids.flatten()[router.tokens]).cpu()
            assigned[layer].scatter_add_(0, cells, torch.ones_like(cells))
            probabilities = router_probabilities(router.logits, router.score_function)  # (N, E)
            entropies[layer] += normalized_entropy(probabilities).sum().double().cpu()
        tokens += ids.numel()
    return Counted(tokens, assigned.view(n_layer, config.n_expert, vocabulary), (entropies / tokens).tolist())


def describe(
    block: int, assigned: Tensor, router_entropy: float, n_expert_per_token: int, tokenizer: Tokenizer
) -> Layer:
    """The statistics of a layer.

    Args:
        assigned: ``(n_expert, V)``, how often each expert took each token.
    """
    by_token = assigned.sum(dim=0)  # (V,)
    counts = assigned.sum(dim=1)  # (E,)
    shares = expert_load(counts)
    load = shares * len(shares)
    statistics = load_statistics(counts)
    by_chance = shares[:, None] * by_token  # (E, V)
    deviations = (assigned - by_chance) / (by_chance * (1 - shares[:, None])).sqrt()
    # An expert that takes nothing, or everything, has no deviation.
    deviations = deviations.nan_to_num(0.0).masked_fill(by_token < SEEN * n_expert_per_token, 0.0)
    tokens = []
    for expert, row in enumerate(deviations):
        best = [id for id in row.argsort(descending=True, stable=True)[:TOKENS].tolist() if row[id] > 0]
        tokens.append(
            [
                FrequentToken(
                    id=id,
                    text=token_text(tokenizer, id),
                    seen=int(by_token[id]) // n_expert_per_token,
                    share=float(assigned[expert, id] / by_token[id] * n_expert_per_token),
                    lift=float(assigned[expert, id] / by_chance[expert, id]),
                )
                for id in best
            ]
        )
    return Layer(
        block=block,
        load=load.tolist(),
        entropy=float(statistics.entropy),
        router_entropy=router_entropy,
        max_over_mean=float(statistics.max_over_mean),
        dead=(load < DEAD).nonzero().flatten().tolist(),
        tokens=tokens,
    )


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """Return the text of a token inside a text; its name in the vocabulary if it is special or part of a character."""
    if tokenizer.backend != "huggingface":
        return str(tokenizer.processor.id_to_piece(id))
    # After another token: alone, SentencePiece-like decoders drop the space before a word.
    stream = TextStream(tokenizer, text_ids(tokenizer, "a", begin=False))
    text = stream.push(id) + stream.flush()
    name: str | None = tokenizer.processor.id_to_token(id)
    return name or f"<{id}>" if not text or "\ufffd" in text else text


def table(result: ExpertStatistics) -> Group:
    """The result for people: each expert, then each layer, then what was measured."""
    experts = Table("layer", "expert", "load", "tokens beyond chance, times as often")
    for layer in result.layers:
        for expert, (load, tokens) in enumerate(zip(layer.load, layer.tokens, strict=True)):
            listed = "  ".join(f"{visible(token.text)} {token.lift:.1f}" for token in tokens)
            cut = Text(listed, no_wrap=True, overflow="ellipsis")
            experts.add_row(str(layer.block), str(expert), f"{load:.2f}", cut)
        experts.add_section()
    layers = Table("layer", "entropy", "busiest", "idlest", "dead experts", "router's entropy")
    for layer in result.layers:
        layers.add_row(
            str(layer.block),
            f"{layer.entropy:.3f}",
            f"{layer.max_over_mean:.2f}",
            f"{min(layer.load):.2f}",
            ", ".join(map(str, layer.dead)) or "none",
            f"{layer.router_entropy:.3f}",
        )
    rows = {
        "checkpoint": f"{result.checkpoint}, step {result.step:,}",
        "text": f"{result.data_dir}, validation, {result.tokens:,} tokens",
        "experts": f"{result.n_expert} in {len(result.layers)} layers, {result.n_expert_per_token} for each token",
        "load": "of an even share: 1 is even; entropies: 1 is even",
        "computed": f"on {result.device} in {result.precision}, {result.tokens / result.seconds:,.0f} tokens/s",
    }
    return Group(experts, layers, as_table(rows))


def visible(text: str, length: int = 16) -> str:
    """A token's text in one line: quoted, so that its spaces show, and shortened."""
    quoted = repr(text)
    return quoted if len(quoted) <= length else quoted[: length - 1] + "…"


def draw(result: ExpertStatistics, path: Path) -> None:
    """Draws experts by layers: the color is the load, in each cell stand its number and the expert's tokens."""
    from matplotlib import rc_context
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    loads = [layer.load for layer in result.layers]
    rows, columns = len(loads), result.n_expert
    roomy = columns <= 16
    listed, width, height = (3, 1.15, 0.82) if roomy else (1, 0.66, 0.5)  # inches of a cell
    left, right, top, bottom = 0.9, 1.2, 1.25, 0.9
    size = (max(columns * width, 5.0) + left + right, rows * height + top + bottom)
    figure = Figure(figsize=size)
    axes = figure.add_axes((left / size[0], bottom / size[1], 1 - (left + right) / size[0], rows * height / size[1]))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, *(max(load) for load in loads)))
    image = axes.imshow(loads, cmap="RdBu_r", norm=norm, aspect="auto")

    for row, layer in enumerate(result.layers):
        for column, (load, tokens) in enumerate(zip(layer.load, layer.tokens, strict=True)):
            dark = abs(norm(load) - 0.5) > 0.3
            number = "dead" if column in layer.dead else f"{load:.2f}"
            lines = [visible(token.text, 16 if roomy else 9) for token in tokens[:listed]]
            color = "white" if dark else "black"
            offset = 0.30 if roomy else 0.18
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": color, "parse_math": False}
            axes.text(column, row - offset, number, fontsize=10 if roomy else 8, fontweight="bold", **style)
            below = row + 0.12 if roomy else row + 0.22
            size_of = 8 if roomy else 7
            axes.text(column, below, "\n".join(lines), family="monospace", fontsize=size_of, linespacing=1.2, **style)
        summary = f"entropy {layer.entropy:.3f}\nbusiest {layer.max_over_mean:.2f}"
        summary += f"\ndead {len(layer.dead)}" if layer.dead else ""
        axes.text(columns - 0.42, row, summary, fontsize=8, va="center", color="dimgray", linespacing=1.2)

    axes.set_xticks(range(columns), [str(expert) for expert in range(columns)])
    axes.set_yticks(range(rows), [f"layer {layer.block}" for layer in result.layers])
    axes.set_xticks([edge - 0.5 for edge in range(1, columns)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xlabel("expert", fontsize=9)
    axes.xaxis.set_label_position("top")

    def inches(x: float, y: float) -> tuple[float, float]:
        return x / size[0], y / size[1]

    title = f"Which expert takes which tokens: {result.name}, step {result.step:,}"
    figure.text(*inches(0.2, size[1] - 0.3), title, fontsize=13, fontweight="bold", va="center", parse_math=False)
    about = (
        f"{columns} experts in {rows} layers, {result.n_expert_per_token} for each token;"
        f" {result.tokens:,} tokens of {result.data_dir}, validation"
    )
    figure.text(*inches(0.2, size[1] - 0.58), about, fontsize=9, va="center", color="dimgray", parse_math=False)
    bar = figure.add_axes((*inches(left, bottom - 0.38), 2.6 / size[0], 0.14 / size[1]))
    figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 1, norm.vmax])
    bar.set_xticklabels(["0 idle", "1 even", f"{norm.vmax:.1f} busy"], fontsize=8)
    legend = (
        "Number and color: the tokens that the expert gets, over an even share.\n"
        f"Below: the token{'s' if listed > 1 else ''} that it takes most often beyond chance."
    )
    figure.text(*inches(left + 3.0, bottom - 0.4), legend, fontsize=8.5, va="center", linespacing=1.4)
    with rc_context({"svg.hashsalt": "experts"}):  # the same picture is the same file
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
