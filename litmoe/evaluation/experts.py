"""What the experts of a checkpoint do: how evenly they are used, and which tokens each prefers.

Counted is every token of the validation text, once, in the windows of `litmoe.evaluation.loss`. LitGPT's routers assign
each token to ``n_expert_per_token`` experts in every layer; a router of the user's own may assign it to any number.

- ``load``: assignments of an expert, divided by an even share. 1 is even, 0 is never chosen.
- ``entropy``: of the load of a layer, divided by its maximum log(n_expert). 1 is even, 0 is one expert for everything.
- ``router_entropy``: the same for the probabilities of the router for one token, mean over tokens. Near 1 the router
  hardly distinguishes the experts, near 0 it is sure of one.
- ``dead``: experts with a load below `DEAD`.
- ``tokens``: the tokens that an expert takes more often than by chance. If its choice did not depend on the token, it
  would take the same share of the assignments of each. Listed are the tokens with a share above that by most standard
  deviations. ``lift`` is the factor: 3 is three times as often as the expert takes any token. Tokens seen fewer than
  `SEEN` times are skipped.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

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
from litmoe.evaluation.common import ModelOptions, Result, as_table, load_model
from litmoe.evaluation.loss import open_validation
from litmoe.inference.text_stream import TextStream
from litmoe.layers import hidden_states

SEEN = 20  # a token must occur this often to be listed
TOKENS = 5  # tokens listed for an expert


@dataclass(frozen=True)
class FrequentToken:
    """A token that an expert prefers."""

    id: int
    text: str
    seen: int  # how often it occurs in the text
    share: float  # share of these that the expert took
    lift: float


@dataclass(frozen=True)
class Layer:
    """The experts of one layer; lists are by expert."""

    block: int  # index of the block in the model; the first blocks may be dense
    load: list[float]
    entropy: float
    router_entropy: float
    max_over_mean: float
    dead: list[int]
    tokens: list[list[FrequentToken]]


@dataclass(frozen=True, kw_only=True)
class ExpertStatistics(Result):
    """Statistics of all experts of a checkpoint."""

    name: str  # of the model
    data_dir: str
    n_expert: int
    n_expert_per_token: int
    tokens: int
    layers: list[Layer]
    context: int
    seconds: float


def evaluate(
    folder: Path,
    data_dir: Path | None = None,
    *,
    max_iters: int | None = None,
    batch_size: int | None = None,
    **options: Unpack[ModelOptions],
) -> ExpertStatistics:
    """Observe the routers of a checkpoint over the validation text; arguments as `litmoe.evaluation.loss.evaluate`.

    Raises:
        UserError: the model has no experts, or as `litmoe.evaluation.loss.evaluate`.
    """
    config = checkpoints.load_config(folder)
    if config.mlp_class_name != "LLaMAMoE":
        raise UserError(
            f"--experts: {folder} is a dense model ({config.mlp_class_name}) without experts. `uv run python"
            f" run_train.py --upcycle {folder}` converts a model with LLaMAMLP to a mixture of experts."
        )
    text = open_validation(folder, data_dir, max_iters, batch_size, options.get("max_seq_length"))
    tokenizer = checkpoints.load_tokenizer(folder)
    model = load_model(folder, **options)
    start = time.perf_counter()
    with model.autocast:
        counts = count(model.gpt, text.batches)
    first_block = config.n_layer - len(counts.assigned)
    layers = [
        describe(first_block + index, assigned_EV, counts.seen, counts.router_entropy[index], tokenizer)
        for index, assigned_EV in enumerate(counts.assigned)
    ]
    return ExpertStatistics(
        **model.about,
        name=config.name,
        data_dir=str(text.data_dir),
        n_expert=config.n_expert,
        n_expert_per_token=config.n_expert_per_token,
        tokens=counts.tokens,
        layers=layers,
        context=text.context,
        seconds=time.perf_counter() - start,
    )


class Counts(NamedTuple):
    """How often each expert took each token."""

    tokens: int
    seen: Tensor  # how often each token occurs, ``(padded_vocab_size,)`` int64
    assigned: Tensor  # ``(MoE layers, n_expert, padded_vocab_size)`` int64
    router_entropy: list[float]  # by MoE layer


@torch.inference_mode()
def count(gpt: GPT, batches: Iterable[Tensor]) -> Counts:
    """Count which expert takes which token.

    Args:
        gpt: model with experts, built within ``use_custom_moe()``.
        batches: token ids, each ``(B, T + 1)``; the last one of a row is not read.
    """
    config, device = gpt.config, gpt.lm_head.weight.device
    vocab_size = config.padded_vocab_size
    n_layer = config.n_layer - (config.first_k_dense_replace or 0)
    assigned = torch.zeros(n_layer, config.n_expert * vocab_size, dtype=torch.int64)
    entropies = torch.zeros(n_layer, dtype=torch.float64)
    seen = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in batches:
        ids_BT = batch[:, :-1].to(device)
        seen += ids_BT.flatten().bincount(minlength=vocab_size).cpu()
        _, block_routers = hidden_states(gpt, ids_BT)
        # Dense blocks have none.
        routers = [router for router in block_routers if router is not None]
        for layer, router in enumerate(routers):
            # One counter for each pair of expert and token.
            pairs = (router.experts * vocab_size + ids_BT.flatten()[router.tokens]).cpu()
            assigned[layer].scatter_add_(0, pairs, torch.ones_like(pairs))
            probabilities_NE = router_probabilities(router.logits, router.score_function)
            entropies[layer] += normalized_entropy(probabilities_NE).sum().cpu().double()
    tokens = int(seen.sum())
    return Counts(tokens, seen, assigned.view(n_layer, config.n_expert, vocab_size), (entropies / tokens).tolist())


def describe(block: int, assigned_EV: Tensor, seen_V: Tensor, router_entropy: float, tokenizer: Tokenizer) -> Layer:
    """Return the statistics of a layer.

    Args:
        block: index of the block.
        assigned_EV: how often each expert took each token.
        seen_V: how often each token occurs in the text.
        router_entropy: mean over tokens.
        tokenizer: of the model.
    """
    by_expert_E = assigned_EV.sum(dim=1)
    shares_E = expert_load(by_expert_E)
    load_E = shares_E * len(shares_E)
    statistics = load_statistics(by_expert_E)
    # By chance, an expert takes its share of the assignments of each token, with the variance of a binomial
    # distribution.
    expected_EV = shares_E[:, None] * assigned_EV.sum(dim=0)
    deviations_EV = (assigned_EV - expected_EV) / (expected_EV * (1 - shares_E[:, None])).sqrt()
    # An expert that takes nothing or everything has no deviation.
    deviations_EV = deviations_EV.nan_to_num(0.0).masked_fill(seen_V < SEEN, 0.0)
    best_EV = deviations_EV.argsort(descending=True, stable=True)[:, :TOKENS]

    def frequent_token(expert: int, id: int) -> FrequentToken:
        taken = assigned_EV[expert, id]
        return FrequentToken(
            id=id,
            text=token_text(tokenizer, id),
            seen=int(seen_V[id]),
            share=float(taken / seen_V[id]),
            lift=float(taken / expected_EV[expert, id]),
        )

    tokens = [
        [frequent_token(expert, id) for id in ids if deviations_EV[expert, id] > 0]
        for expert, ids in enumerate(best_EV.tolist())
    ]
    return Layer(
        block=block,
        load=load_E.tolist(),
        entropy=float(statistics.entropy),
        router_entropy=router_entropy,
        max_over_mean=float(statistics.max_over_mean),
        dead=(load_E < DEAD).nonzero().flatten().tolist(),
        tokens=tokens,
    )


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """Return the text of a token inside a text; its name in the vocabulary if it is special or part of a character."""
    if tokenizer.backend != "huggingface":
        return str(tokenizer.processor.id_to_piece(id))
    # After another token, because SentencePiece-like decoders drop the space before the first word of a text.
    stream = TextStream(tokenizer, text_ids(tokenizer, "a", begin=False))
    text = stream.push(id) + stream.flush()
    if text and "\ufffd" not in text:
        return text
    name: str | None = tokenizer.processor.id_to_token(id)
    return name or f"<{id}>"


# ------------------------------------------------------------------------------------------------------------- display


def table(result: ExpertStatistics) -> Group:
    """Return the result as tables for the terminal: each expert, each layer, and a summary."""
    experts = Table("layer", "expert", "load", "preferred tokens, times as often as by chance")
    layers = Table("layer", "entropy", "highest load", "lowest load", "dead experts", "router entropy")
    for layer in result.layers:
        for expert, (load, tokens) in enumerate(zip(layer.load, layer.tokens, strict=True)):
            listed = "  ".join(f"{visible(token.text)} {token.lift:.1f}" for token in tokens)
            shortened = Text(listed, no_wrap=True, overflow="ellipsis")
            experts.add_row(str(layer.block), str(expert), f"{load:.2f}", shortened)
        experts.add_section()
        layers.add_row(
            str(layer.block),
            f"{layer.entropy:.3f}",
            f"{layer.max_over_mean:.2f}",
            f"{min(layer.load):.2f}",
            ", ".join(map(str, layer.dead)) or "none",
            f"{layer.router_entropy:.3f}",
        )
    rows = {
        "text": f"{result.data_dir}, validation, {result.tokens:,} tokens",
        "experts": f"{result.n_expert} in {len(result.layers)} layers, n_expert_per_token {result.n_expert_per_token}",
        "load": "relative to an even share: 1 is even; entropy: 1 is even",
    }
    return Group(experts, layers, as_table(result, rows, f", {result.tokens / result.seconds:,.0f} tokens/s"))


def visible(text: str, length: int = 16) -> str:
    """Return the text of a token in one line: quoted to make spaces visible, and shortened."""
    quoted = repr(text)
    return quoted if len(quoted) <= length else quoted[: length - 1] + "…"


def draw(result: ExpertStatistics, path: Path) -> None:
    """Draw a heat map of experts and layers. The color is the load; each cell has the load and preferred tokens."""
    from matplotlib import rc_context
    from matplotlib.colors import TwoSlopeNorm

    # Not pyplot, which has global state and may open windows.
    from matplotlib.figure import Figure

    loads = [layer.load for layer in result.layers]
    n_layer, n_expert = len(loads), result.n_expert
    # Many experts get small cells with one token.
    n_tokens, cell_width, cell_height, font = (3, 1.2, 0.9, 8) if n_expert <= 16 else (1, 0.7, 0.55, 7)
    size = (max(n_expert * cell_width, 5.0) + 2.5, n_layer * cell_height + 2.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, *map(max, loads)))
    image = axes.imshow(loads, cmap="RdBu_r", norm=norm, aspect="auto")
    for row, layer in enumerate(result.layers):
        for expert, (load, tokens) in enumerate(zip(layer.load, layer.tokens, strict=True)):
            # White text on the dark ends of the color map.
            color = "white" if abs(norm(load) - 0.5) > 0.3 else "black"
            number = "dead" if expert in layer.dead else f"{load:.2f}"
            preferred = "\n".join(visible(token.text, 2 * font) for token in tokens[:n_tokens])
            style: dict[str, Any] = {"ha": "center", "color": color, "parse_math": False}
            axes.text(expert, row - 0.1, number, va="bottom", fontsize=font + 2, fontweight="bold", **style)
            axes.text(expert, row - 0.05, preferred, va="top", fontsize=font, family="monospace", **style)
    axes.set_xticks(range(n_expert), [str(expert) for expert in range(n_expert)])
    axes.set_yticks(
        range(n_layer), [f"layer {layer.block}\nentropy {layer.entropy:.3f}" for layer in result.layers], fontsize=font
    )
    axes.set_xlabel(
        f"expert; n_expert_per_token {result.n_expert_per_token}, {result.tokens:,} tokens of {result.data_dir}\n"
        "number and color: load relative to an even share; below: preferred tokens",
        parse_math=False,
    )
    axes.set_title(f"Which expert takes which tokens: {result.name}, step {result.step:,}", parse_math=False)
    figure.colorbar(image, ax=axes, label="load", ticks=[0, 1, norm.vmax])
    # A fixed salt and no date: the same result gives the same file.
    with rc_context({"svg.hashsalt": "experts"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
