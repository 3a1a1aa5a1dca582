"""How fast is the output layer with its cross-entropy, and how much memory does it need? Forward and backward.

    uv run python benchmarks/loss.py --device cuda
    uv run python benchmarks/loss.py --tokens 2048      # on a CPU

Ours in blocks, compiled and not, against all logits at once and LitGPT's chunked loss, at MoE-200M's output layer in
bf16 on a GPU and in fp32 on a CPU. On a GPU also with the gradient of the weight summed within its matrix product; ours
does not do that, because no GPU has shown yet that it works and helps. Peak memory is that of the GPU's allocator,
without inputs and weights.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from benchmarks import common
from benchmarks.common import Row, bold_ours, make_table, ranged
from litmoe.train import cross_entropy
from litmoe.train.cross_entropy import linear_cross_entropy, loss_of_rows

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states (N, C), weight (V, C), targets (N,)


def main() -> None:
    parser = common.make_parser(__doc__, "loss_DEVICE")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--n-embd", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    result = common.start(args, "torch", "litgpt", "liger-kernel")
    result |= {"tokens": args.tokens, "n_embd": args.n_embd, "vocab": args.vocab}
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        x = torch.randn(args.tokens, args.n_embd, dtype=dtype, requires_grad=True)
        weight = (torch.randn(args.vocab, args.n_embd) * 0.02).to(dtype).requires_grad_()
        targets = torch.randint(args.vocab, (args.tokens,))
    functions = {name: partial(step, loss, x, weight, targets) for name, loss in losses(args.device).items()}
    warm_up = {name: function() for name, function in functions.items()}
    turns = common.take_turns(functions, args.rounds)
    result["losses"] = {
        name: {
            "loss": warm_up[name]["loss"],
            "milliseconds": common.low_median_high([turn[name]["milliseconds"] for turn in turns]),
            "peak_bytes": turns[0][name]["peak_bytes"],
        }
        for name in functions
    }
    add_table(result)
    common.write_result(result, args.output)
    common.print_table(result)


def losses(device: str) -> dict[str, Loss]:
    """Return the ways to compute the loss. Compiling takes long on a CPU and changes little."""
    ways: dict[str, Loss] = {
        "ours": linear_cross_entropy,
        "all logits at once": lambda x, weight, targets: F.cross_entropy((x @ weight.T).float(), targets),
        "LitGPT's, in chunks": lambda x, weight, targets: chunked_cross_entropy(x @ weight.T, targets),
    }
    if device == "cuda":
        compiled = torch.compile(loss_of_rows)
        ways["ours, compiled"] = partial(linear_cross_entropy, loss_of_rows=compiled)
        try:
            ones = torch.ones(128, 128, device=device)
            _add_by_addmm(ones, ones.bfloat16(), ones.bfloat16())
        except RuntimeError as error:
            print(f"this torch can't sum within the product: {error}", file=sys.stderr)
        else:
            ways["ours, compiled, summed by addmm"] = partial(summed_by_addmm, loss_of_rows=compiled)
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError:
            print("liger-kernel is not installed, so it is left out", file=sys.stderr)
        else:
            ways["Liger-Kernel"] = liger_fused_linear_cross_entropy
    return ways


def summed_by_addmm(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Compute our loss with 8 instead of 12 bytes of memory traffic per weight and block."""
    original = cross_entropy._add_product
    cross_entropy._add_product = _add_by_addmm
    try:
        return linear_cross_entropy(x, weight, targets, **options)
    finally:
        cross_entropy._add_product = original


def _add_by_addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def step(loss_of: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> Row:
    """Compute a loss with its gradients; return its value, the milliseconds and the peak memory."""
    x.grad = weight.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if x.is_cuda else 0
    start = time.perf_counter()
    loss = loss_of(x, weight, targets)
    loss.backward()
    value = loss.item()  # waits for the GPU's forward
    if x.is_cuda:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if x.is_cuda else None
    return {"loss": value, "milliseconds": milliseconds, "peak_bytes": peak}


def add_table(result: Row) -> None:
    rows = []
    for name, row in result["losses"].items():
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        rows.append([bold_ours(name), ranged(row["milliseconds"], "{:.1f}"), memory, f"{row['loss']:.4f}"])
    result["table"] = make_table(("", "ms", "peak memory", "loss"), rows)


if __name__ == "__main__":
    main()
