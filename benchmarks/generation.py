"""How fast is text generated? Ours, `litgpt generate` and Hugging Face's `generate`: same weights, same prompts.

    uv run python benchmarks/generation.py                  # checkpoints/quickstart/final on the CPU, 2 minutes
    uv run python benchmarks/generation.py --device cuda
    uv run python benchmarks/generation.py --device cuda --model configs/models/moe-200m.yaml    # random weights

All generate the same number of tokens at temperature 0 after the same prompts of 16 tokens, and take turns; ratios are
formed within a round. The speed counts the tokens after the first, so neither loading nor the prompt; the time to the
first token is reported next to it (on a GPU it contains the recording of our CUDA graph). LitGPT's side is what `litgpt
generate` runs, with LitGPT's own layers: one text after the other. The table says how many rows have LitGPT's token ids
to the last one: rounding may flip a close choice, and all tokens after it.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from litgpt import GPT, Config
from litgpt.generate.base import generate_fn
from torch import Tensor

from benchmarks import common
from benchmarks.common import Row, bold_ours, make_table, ranged
from litmoe import checkpoints
from litmoe.export.huggingface import export
from litmoe.inference.generate import choose_dtype, generate_tokens
from litmoe.layers import use_our_layers

# One text, as in a chat, and a batch.
BATCHES = (1, 16)
PROMPT_TOKENS = 16
STOCK = "litgpt generate"

OnStep = Callable[[list[int]], None]  # receives the new token of each row
Peer = Callable[[Tensor, int, OnStep], None]  # prompts (batch, PROMPT_TOKENS), number of new tokens


def main() -> None:
    parser = common.make_parser(__doc__, "generation_DEVICE")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints/quickstart/final")
    parser.add_argument("--model", type=Path, help="a model file, used with random weights instead of a checkpoint")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.model:  # a result file for each model
        args.output = args.output.with_name(args.output.name.replace("DEVICE", f"{args.model.stem}_DEVICE"))
    elif not args.checkpoint.is_dir():
        sys.exit(f"error: no checkpoint in {args.checkpoint}. Run: make quickstart. Or name a model file: --model FILE")
    result = common.start(args, "torch", "litgpt", "transformers", "triton")
    # As LitGPT's command line does; it applies to all peers.
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    dtype = choose_dtype("auto", device)
    peers: dict[str, Peer] = {}
    if args.model:
        gpt = random_model(Config.from_file(args.model), device, dtype)
    else:
        gpt = checkpoints.load_model(args.checkpoint, device, dtype)
        # Only a checkpoint can be exported to Hugging Face's format.
        peers["huggingface generate"] = hugging_face(args.checkpoint, device, dtype)
    peers = {"ours": partial(ours, gpt), STOCK: partial(litgpt_one_by_one, stock_model(gpt)), **peers}
    result |= {"model": gpt.config.name, "trained": not args.model, "dtype": str(dtype).removeprefix("torch.")}
    result |= {"prompt_tokens": PROMPT_TOKENS, "new_tokens": args.new_tokens, "batches": {}}
    prompts = sample_prompts(gpt, max(BATCHES))
    for batch in BATCHES:
        result["batches"][str(batch)] = measure(peers, prompts[:batch], args.new_tokens, args.rounds)
        add_table(result)
        common.write_result(result, args.output)
    common.print_table(result)


# --------------------------------------------------------------------------------------------------------------- models


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    with use_our_layers():  # as checkpoints.load_model
        gpt = GPT(config).eval()
    # The rotary cache stays in fp32, as in a loaded checkpoint: bf16 would round the positions.
    cos, sin = gpt.cos, gpt.sin
    gpt.to(device, dtype)
    gpt.cos, gpt.sin = cos.to(device), sin.to(device)
    return gpt


def stock_model(gpt: GPT) -> GPT:
    """Return the same weights in LitGPT's own layers."""
    weight = gpt.lm_head.weight
    with weight.device:
        stock = GPT(gpt.config).to(weight.dtype).eval()
    # The state dicts have the same keys, because our layer keeps LitGPT's names.
    stock.load_state_dict(gpt.state_dict())
    stock.cos, stock.sin = gpt.cos, gpt.sin
    return stock


def sample_prompts(gpt: GPT, count: int) -> Tensor:
    """Return texts that the model itself wrote, ``(count, PROMPT_TOKENS)``, so that it is asked what it knows."""
    device = gpt.lm_head.weight.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(count)]
    start = torch.zeros(1, dtype=torch.long, device=device)
    options = {"max_new_tokens": PROMPT_TOKENS, "temperature": 1.0, "generator": generators}
    return torch.stack(list(generate_tokens(gpt, start, num_samples=count, **options)), dim=1)


# ---------------------------------------------------------------------------------------------------------------- peers


def ours(gpt: GPT, prompts: Tensor, new_tokens: int, on_step: OnStep) -> None:
    for tokens in generate_tokens(gpt, list(prompts), max_new_tokens=new_tokens, temperature=0.0):
        on_step(tokens.tolist())


def litgpt_one_by_one(stock: GPT, prompts: Tensor, new_tokens: int, on_step: OnStep) -> None:
    # As `litgpt generate` does: a cache of exactly the needed length.
    weight = stock.lm_head.weight
    stock.max_seq_length = size = PROMPT_TOKENS + new_tokens
    stock.set_kv_cache(batch_size=1, device=weight.device, dtype=weight.dtype)
    for prompt in prompts:
        for token in generate_fn(stock, prompt, size, temperature=0.0, include_prompt=False, include_eos=True):
            on_step([int(token)])


class Streamer:
    """Receives each step's tokens from transformers; the first call is the prompt."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step, self.is_prompt = on_step, True

    def put(self, tokens: Tensor) -> None:
        if not self.is_prompt:
            self.on_step(tokens.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        pass


def hugging_face(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> Peer:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        export(checkpoint, Path(folder, "exported"))
        model = AutoModelForCausalLM.from_pretrained(Path(folder, "exported"), dtype=dtype).to(device).eval()
    # It must generate as many tokens as the others.
    model.generation_config.eos_token_id = None

    def generate(prompts: Tensor, new_tokens: int, on_step: OnStep) -> None:
        options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
        model.generate(prompts, max_new_tokens=new_tokens, streamer=Streamer(on_step), **options)

    return generate


# --------------------------------------------------------------------------------------------------------------- timing


def measure(peers: dict[str, Peer], prompts: Tensor, new_tokens: int, rounds: int) -> Row:
    """Let all peers take turns; the first round is a warm-up and does not count."""
    functions = {name: partial(timed, peer, prompts, new_tokens) for name, peer in peers.items()}
    turns = common.take_turns(functions, rounds + 1)[1:]
    rows: Row = {}
    for name in peers:
        firsts, rates, ratios = [], [], []
        for turn in turns:
            first_token_seconds, rate, texts = turn[name]
            _, stock_rate, stock_texts = turn[STOCK]
            firsts.append(first_token_seconds)
            rates.append(rate)
            ratios.append(rate / stock_rate)
        # At temperature 0 all rounds give the same texts, so the last one is compared.
        same = [text == stock_text for text, stock_text in zip(texts, stock_texts, strict=True)]
        rows[name] = {
            "tokens_per_second": common.low_median_high(rates),
            "speedup": common.low_median_high(ratios),
            "first_token_seconds": common.low_median_high(firsts),
            "rows_as_litgpt": sum(same),
        }
    return rows


def timed(peer: Peer, prompts: Tensor, new_tokens: int) -> tuple[float, float, list[list[int]]]:
    """Return seconds to the first token, tokens per second after it, and the token ids of each row."""
    times: list[float] = []
    steps: list[list[int]] = []

    def on_step(tokens: list[int]) -> None:
        times.append(time.perf_counter())
        steps.append(tokens)

    start = time.perf_counter()
    peer(prompts, new_tokens, on_step)
    rows: list[list[int]] = []
    seconds = 0.0
    # All texts together, or one text after the other. The first token of each does not count.
    for first in range(0, len(steps), new_tokens):
        rows += [list(row) for row in zip(*steps[first : first + new_tokens], strict=True)]
        seconds += times[first + new_tokens - 1] - times[first]
    return times[0] - start, len(prompts) * (new_tokens - 1) / seconds, rows


def add_table(result: Row) -> None:
    rows = []
    for batch, peers in result["batches"].items():
        for name, row in peers.items():
            first_ms = f"{1000 * row['first_token_seconds'][1]:.1f}"
            same_ids = f"{row['rows_as_litgpt']} of {batch}"
            speeds = [ranged(row["tokens_per_second"]), ranged(row["speedup"], "{:.2f}")]
            rows.append([batch, bold_ours(name), *speeds, first_ms, same_ids])
    heads = ("batch", "", "tokens/s", "times litgpt generate", "first token, ms", "texts with LitGPT's ids")
    result["table"] = make_table(heads, rows)
    single = result["batches"]["1"]
    ours, stock = (single[name]["tokens_per_second"][1] for name in ("ours", STOCK))
    text = f"{ours:,.0f} against {stock:,.0f} tokens/s of `litgpt generate`: {single['ours']['speedup'][1]:.2f} times"
    result["headline"] = [[f"generation at batch size 1, {result['model']}", text]]


if __name__ == "__main__":
    main()
