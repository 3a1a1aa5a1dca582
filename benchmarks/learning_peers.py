"""Train nanoGPT or nanochat from a checkout on a prepared corpus, for learning.py.

    uv run python benchmarks/learning_peers.py nanochat CHECKOUT --data-dir data/stories --tokens 1000000

Model, initial weights and optimizer are the peer's own code, unmodified and compiled as in its training script, whose
schedules are computed here. Only the loop is ours. So all models see the same windows in the same order (that of
run_train.py with the same seed), are validated on the same windows, and are timed in the same way. Each validation is
printed as a line of JSON: tokens, seconds of training, nats per token.

Both scripts are made for 500,000 tokens per step. nanochat scales its rates by the batch; ``--rate`` multiplies all
learning rates of either, so that the best one for a small batch can be searched for.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from litgpt.utils import CycleIterator
from torch import Tensor, nn

from litmoe.data import TokenizedText
from litmoe.train.model import as_batch


class Peer(NamedTuple):
    """What a peer's training script builds."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]  # of inputs and targets (B, T), a mean over tokens in nats
    update: Callable[[int], None]  # the optimizer's step, by its number


def nanogpt(args: argparse.Namespace, steps: int) -> Peer:
    """Build as nanoGPT's train.py with its defaults for a small model: biases and dropout off."""
    from model import GPT, GPTConfig  # type: ignore[import-not-found]  # nanoGPT's

    shape = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd}
    model = GPT(GPTConfig(block_size=args.context, vocab_size=args.vocab_size, dropout=0.0, bias=False, **shape))
    model.to(args.device)
    peak, warmup = 1e-3 * args.rate, min(100, steps // 10)
    optimizer = model.configure_optimizers(1e-1, peak, (0.9, 0.99), args.device)
    compiled = torch.compile(model)

    def update(step: int) -> None:
        # train.py's get_lr, down to a tenth
        progress = (step - warmup) / (steps - warmup)
        rate = peak * (step + 1) / (warmup + 1)
        if step >= warmup:
            rate = 0.1 * peak + 0.5 * (1 + math.cos(math.pi * progress)) * 0.9 * peak
        for group in optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            result: Tensor = compiled(x, y)[1]
        return result

    return Peer(model, loss, update)


def nanochat(args: argparse.Namespace, steps: int) -> Peer:
    """Build as nanochat's scripts/base_train.py with its defaults."""
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]  # nanochat's

    def build(depth: int, width: int, heads: int) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = GPT(
                GPTConfig(
                    sequence_len=args.context,
                    vocab_size=args.vocab_size,
                    n_layer=depth,
                    n_head=heads,
                    n_kv_head=heads,
                    n_embd=width,
                    window_pattern="L",
                )
            )
        return model

    model: Any = build(args.n_layer, args.n_embd, args.n_head)
    model.to_empty(device=args.device)
    model.init_weights()
    # The rates by batch size. The weight decay also by the compute-optimal length of a run, relative to depth 12.
    batch_ratio = args.batch_size * args.context / 2**19
    scale = math.sqrt(batch_ratio) * args.rate
    own, reference = (
        sum(sized.num_scaling_params()[part] for part in ("transformer_matrices", "lm_head"))
        for sized in (model, build(12, 768, 6))
    )
    weight_decay = 0.28 * math.sqrt(batch_ratio) * reference / own
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * scale,
        embedding_lr=0.3 * scale,
        scalar_lr=0.5 * scale,
        matrix_lr=0.02 * scale,
        weight_decay=weight_decay,
    )
    compiled = torch.compile(model, dynamic=False)
    warmup, decay_steps = 40, round(0.65 * steps)
    decay_start = steps - decay_steps

    def update(step: int) -> None:
        left = min(1.0, (steps - step) / decay_steps)
        factor = (step + 1) / warmup if step < warmup else left + (1 - left) * 0.05
        if step < 400:
            momentum = 0.85 + step / 400 * (0.97 - 0.85)
        else:
            momentum = 0.97 + (max(step, decay_start) - decay_start) / decay_steps * (0.90 - 0.97)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = weight_decay * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return Peer(model, compiled, update)


PEERS = {"nanogpt": nanogpt, "nanochat": nanochat}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--validations", type=int, default=1)
    parser.add_argument("--val-batches", type=int, help="micro batches in a validation (default: all)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step")
    parser.add_argument("--micro-batch-size", type=int, help="windows in a forward pass (default: all)")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout.resolve()))
    torch.manual_seed(args.seed)
    for tokens, seconds, loss in train(args):
        print(json.dumps([tokens, round(seconds, 2), loss]), flush=True)


def train(args: argparse.Namespace) -> Iterator[tuple[int, float, float]]:
    """Yield tokens, seconds of training and loss after each validation."""
    steps = args.tokens // (args.batch_size * args.context)
    peer = PEERS[args.peer](args, steps)
    micro_batch_size = args.micro_batch_size or args.batch_size
    accumulation = args.batch_size // micro_batch_size
    data = TokenizedText(args.data_dir / "train", args.data_dir / "val", num_workers=0, seed=args.seed)
    data.connect(batch_size=micro_batch_size, max_seq_length=args.context)
    batches = CycleIterator(data.train_dataloader())
    val_batches = data.val_dataloader()
    ends = [round(steps * number / args.validations) for number in range(args.validations + 1)]
    seconds = 0.0
    for begin, end in pairwise(ends):
        start = clock(args.device)
        for step in range(begin, end):
            for _ in range(accumulation):
                loss = loss_of(peer, next(batches), args)
                (loss / accumulation).backward()
            peer.update(step)
        seconds += clock(args.device) - start
        yield end * args.batch_size * args.context, seconds, validate(args, peer, val_batches)


def clock(device: str) -> float:
    """Return seconds, after all work on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def loss_of(peer: Peer, windows: Tensor, args: argparse.Namespace) -> Tensor:
    """Return the loss of windows ``(B, T + 1)``."""
    batch = as_batch(windows.to(args.device), args.context)
    return peer.loss(batch.input_ids, batch.targets)


@torch.no_grad()
def validate(args: argparse.Namespace, peer: Peer, batches: Iterable[Tensor]) -> float:
    """Return the mean loss over the validation text."""
    peer.model.eval()
    losses = [loss_of(peer, windows, args).item() for windows in islice(batches, args.val_batches)]
    peer.model.train()
    return statistics.mean(losses)


if __name__ == "__main__":
    main()
