"""Times generation: ours, `litgpt generate` and Hugging Face's `generate`, with the same weights and the same prompts.

    uv run python benchmarks/generation.py                                   # the quickstart's model on the CPU
    uv run python benchmarks/generation.py --device cuda
    uv run python benchmarks/generation.py --device cuda --model configs/models/moe-200m.yaml     # random weights

Writes benchmarks/results/generation.json (generation_NAME.json for a named model, and with _cuda on a GPU).

All write the same number of tokens at temperature 0 after the same prompts of 16 tokens, and take turns; ratios are
formed within a round. Counted are the tokens after the first, so neither loading nor the prompt: that is the time to
the first token, in which on a GPU our recording of a step falls, too. LitGPT's is what `litgpt generate` runs, with
LitGPT's own layers: one text after the other by `generate_fn`, and for a batch also its `batched_generate_fn`, which no
command of LitGPT reaches. Whether a row has LitGPT's ids to the last one is reported: rounding may flip a close choice,
and all tokens after it.

Bandwidth: what a step must read at least (each weight that it uses once, where experts are chosen evenly, and the
filled part of the KV caches), times the steps per second, as a share of what copying a large tensor reads and writes.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from litgpt import GPT, Config
from litgpt.generate.base import batched_generate_fn, generate_fn
from torch import Tensor

from benchmarks.common import circumstances, gpu, installed, invocation
from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError, run_door
from litmoe.export.weights import to_huggingface
from litmoe.hf_config import huggingface_config, without_counterpart
from litmoe.inference.generate import choose_dtype, generate_tokens

PACKAGES = ("torch", "litgpt", "transformers", "triton")
BATCHES = (1, 16)
PROMPT = 16
Rows = Iterator[list[int]]


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    checkpoint: Path = ROOT / "checkpoints/quickstart/final",
    model: Path | None = None,
    new_tokens: int = 128,
    rounds: int = 5,
    output: Path | None = None,
) -> None:
    """Times generation by ours, LitGPT and Hugging Face, and writes the result as JSON.

    Args:
        device: Where.
        checkpoint: The model.
        model: A file of a model to be used with random weights instead.
        new_tokens: Written in each row.
        rounds: In each of which all take their turn.
        output: The file; by default one in benchmarks/results.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU here; `--device cpu` needs none.")
    if model is None and not checkpoint.is_dir():
        raise UserError(f"found no checkpoint at {checkpoint}; `make quickstart` trains one, or name a --model file.")
    name = "_".join(["generation", *([model.stem] if model else []), *(["cuda"] if device == "cuda" else [])])
    output = output or ROOT / f"benchmarks/results/{name}.json"
    result = circumstances(invocation("generation"), installed(PACKAGES))
    result["hardware"] |= {"threads": torch.get_num_threads(), "gpu": gpu() if device == "cuda" else None}
    result |= run(torch.device(device), checkpoint, model, new_tokens, rounds)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(f"Written to {output}")


def run(device: torch.device, checkpoint: Path, model: Path | None, new_tokens: int, rounds: int) -> dict[str, Any]:
    dtype = choose_dtype("auto", device)
    config = checkpoints.load_config(checkpoint) if model is None else Config.from_file(model)
    gpt = checkpoints.load_model(checkpoint, device, dtype) if model is None else random_model(config, device, dtype)
    prompts = write_prompts(gpt, max(BATCHES))
    result: dict[str, Any] = {
        "model": config.name,
        "trained": model is None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    result |= {"prompt_tokens": PROMPT, "new_tokens": new_tokens, "copy_bytes_per_second": copy_bandwidth(device)}
    result["batches"] = {}
    stock, theirs = stock_model(gpt), None if without_counterpart(config) else huggingface(gpt)
    for batch in BATCHES:
        peers = {
            "ours": ours(gpt),
            "litgpt generate": litgpt_one_by_one(stock),
            **({"litgpt batched_generate_fn": litgpt_batched(stock, batch)} if batch > 1 else {}),
            **({"huggingface generate": theirs} if theirs else {}),
        }
        measured = measure(peers, prompts[:batch], new_tokens, rounds)
        for row in measured.values():
            steps = row["tokens_per_second"]["median"] / (1 if row["one_by_one"] else batch)
            needed = step_bytes(gpt, 1 if row["one_by_one"] else batch, PROMPT + new_tokens // 2)
            row["bandwidth_share"] = round(steps * needed / result["copy_bytes_per_second"], 4)
        result["batches"][str(batch)] = measured
        for name, row in measured.items():
            rate, ratio = row["tokens_per_second"], row["speedup"]["median"]
            print(
                f"batch {batch}, {name}: {rate['median']:,.0f} tokens/s, {ratio:.2f} of litgpt generate,"
                f" first token {row['first_token_seconds']['median'] * 1e3:.1f} ms, {row['bandwidth_share']:.1%} of the"
                f" bandwidth, {row['rows_as_litgpt']} of {batch} rows as LitGPT's",
                flush=True,
            )
    return result


# --------------------------------------------------------------------------------------------------------------- models


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    with use_custom_moe():
        gpt = GPT(config).eval()
    cos, sin = gpt.cos, gpt.sin
    gpt.to(device, dtype)
    gpt.cos, gpt.sin = cos.to(device), sin.to(device)  # fp32 in any model, as `checkpoints.load_model` has them
    return gpt


def stock_model(gpt: GPT) -> GPT:
    """The same weights in LitGPT's own layers."""
    weight = gpt.lm_head.weight
    with weight.device:
        stock = GPT(gpt.config).to(weight.dtype).eval()
    stock.load_state_dict(gpt.state_dict())
    stock.cos, stock.sin = gpt.cos, gpt.sin
    return stock


def write_prompts(gpt: GPT, count: int) -> Tensor:
    """Texts of the model itself, ``(count, PROMPT)``: beginnings that it knows, of one length for LitGPT's batch."""
    device = gpt.lm_head.weight.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(count)]
    start = torch.zeros(1, dtype=torch.long, device=device)
    options = {"max_new_tokens": PROMPT, "temperature": 1.0, "generator": generators}
    return torch.stack(list(generate_tokens(gpt, start, num_samples=count, **options)), dim=1)


# ---------------------------------------------------------------------------------------------------------------- peers


def ours(gpt: GPT) -> Callable[[Tensor, int], Rows]:
    def write(prompts: Tensor, new_tokens: int) -> Rows:
        for tokens in generate_tokens(gpt, list(prompts), max_new_tokens=new_tokens, temperature=0.0):
            yield tokens.tolist()

    return write


def litgpt_one_by_one(stock: GPT) -> Callable[[Tensor, int], Rows]:
    def write(prompts: Tensor, new_tokens: int) -> Rows:
        stock.max_seq_length = size = PROMPT + new_tokens
        stock.set_kv_cache(batch_size=1, device=prompts.device, dtype=stock.lm_head.weight.dtype)
        for prompt in prompts:
            tokens = generate_fn(stock, prompt, size, temperature=0.0, include_prompt=False, include_eos=True)
            yield from ([int(token)] for token in tokens)

    return write


def litgpt_batched(stock: GPT, batch: int) -> Callable[[Tensor, int], Rows]:
    def write(prompts: Tensor, new_tokens: int) -> Rows:
        stock.max_seq_length = size = PROMPT + new_tokens
        stock.set_kv_cache(batch_size=batch, device=prompts.device, dtype=stock.lm_head.weight.dtype)
        options = {"sample_args": {"temperature": 0.0}, "include_prompt": False, "include_eos": True}
        for tokens in batched_generate_fn(stock, prompts, size, **options):
            yield [int(token) for token in tokens]

    return write


def huggingface(gpt: GPT) -> Callable[[Tensor, int], Rows]:
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM

    weights, device, dtype = gpt.state_dict(), gpt.lm_head.weight.device, gpt.lm_head.weight.dtype
    tied = checkpoints.is_tied(weights)
    values = huggingface_config(
        gpt.config, tied=tied, dtype=str(dtype).removeprefix("torch."), bos_id=None, eos_id=None
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values), encoding="utf-8")
        exported = {
            name: tensor.cpu().clone() for name, tensor in to_huggingface(weights, gpt.config, tied=tied).items()
        }
        save_torch_state_dict(exported, folder, metadata={"format": "pt"})
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs = theirs.to(device).eval()
    theirs.generation_config.eos_token_id = None  # as many tokens as the others

    class Clock:
        """What transformers hands each step's tokens to; the prompt comes first."""

        def __init__(self) -> None:
            self.steps: list[tuple[float, list[int]]] = []

        def put(self, tokens: Tensor) -> None:
            self.steps.append((time.perf_counter(), tokens.flatten().tolist()))

        def end(self) -> None:
            pass

    def write(prompts: Tensor, new_tokens: int) -> Rows:
        clock = Clock()
        options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
        theirs.generate(prompts, max_new_tokens=new_tokens, streamer=clock, **options)
        yield from clock.steps[1:]  # type: ignore[misc]  # with the time of each

    return write


# -------------------------------------------------------------------------------------------------------------- measure


def measure(
    peers: dict[str, Callable[[Tensor, int], Rows]], prompts: Tensor, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Each peer once a round, after one round that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in peers}
    firsts: dict[str, list[float]] = {name: [] for name in peers}
    ids: dict[str, list[list[int]]] = {}
    for turn in range(rounds + 1):
        for name, write in peers.items():
            first, rate, ids[name] = timed(write, prompts, new_tokens)
            if turn:
                rates[name].append(rate)
                firsts[name].append(first)
    theirs = "litgpt generate"
    return {
        name: {
            "tokens_per_second": spread(rates[name]),
            "speedup": spread([own / other for own, other in zip(rates[name], rates[theirs], strict=True)]),
            "first_token_seconds": spread(firsts[name]),
            "rows_as_litgpt": sum(own == other for own, other in zip(ids[name], ids[theirs], strict=True)),
            "one_by_one": name == theirs,
        }
        for name in peers
    }


def timed(
    write: Callable[[Tensor, int], Rows], prompts: Tensor, new_tokens: int
) -> tuple[float, float, list[list[int]]]:
    """Seconds to the first token, tokens per second after it, and the ids of each row."""
    start = time.perf_counter()
    times, steps = [], []
    for step in write(prompts, new_tokens):
        at, tokens = step if isinstance(step, tuple) else (time.perf_counter(), step)
        times.append(at)
        steps.append(tokens)
    if len(steps) == len(prompts) * new_tokens:  # one text after the other
        rows = [[tokens[0] for tokens in steps[i : i + new_tokens]] for i in range(0, len(steps), new_tokens)]
        seconds = sum(times[i + new_tokens - 1] - times[i] for i in range(0, len(times), new_tokens))
    else:
        rows = [list(row) for row in zip(*steps, strict=True)]
        seconds = times[-1] - times[0]
    return times[0] - start, len(prompts) * (new_tokens - 1) / seconds, rows


def spread(values: list[float]) -> dict[str, float]:
    return {name: float(f"{of(values):.4g}") for name, of in (("min", min), ("median", median), ("max", max))}


def step_bytes(gpt: GPT, rows: int, seen: int) -> int:
    """What a step reads at least, with ``seen`` places of each KV cache filled."""
    config, size = gpt.config, gpt.lm_head.weight.element_size()
    parameters = {name: parameter.numel() for name, parameter in gpt.named_parameters()}
    embedding = parameters.pop("transformer.wte.weight", 0)  # none where it is tied to the output layer
    experts = sum(count for name, count in parameters.items() if ".experts." in name)
    used = 1 - (1 - config.n_expert_per_token / config.n_expert) ** rows if config.n_expert else 0
    weights = sum(parameters.values()) - experts + int(experts * used) + rows * config.n_embd * bool(embedding)
    return size * (weights + rows * 2 * config.n_layer * config.n_query_groups * config.head_size * seen)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by copying a tensor of 256 MB (on a GPU 2 GB), the best of ten."""
    source = torch.ones(2**28 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return float(f"{2 * source.numel() / best:.4g}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")  # as LitGPT's command line does; for all peers
    run_door(main)
