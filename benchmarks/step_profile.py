"""Where does the time of a training step go? The operators of a step, with torch's profiler.

    uv run python benchmarks/step_profile.py                                           # the quickstart on a CPU
    uv run python benchmarks/step_profile.py --model configs/models/cpu-dense-twin.yaml --output twin.json

One step is forward, backward, clipping and AdamW of one micro batch of random tokens, on one core as in learning.py,
or on a GPU. It is measured in fp32, and in the precision that a run would choose on this machine if it is another one.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from litgpt import GPT, Config
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from litmoe.hardware import choose_precision
from litmoe.layers import use_our_layers
from litmoe.train.model import PretrainingModel, as_batch, cast_matrices, matrices_to_cast

# Operators by what they do; the first that fits counts.
KINDS = {
    # Only our attention on a CPU multiplies batches of matrices and takes this softmax.
    "attention": ("scaled_dot_product", "flash", "fmha", "aten::bmm", "aten::_softmax", "causalattention"),
    "matrix products": ("aten::mm", "aten::addmm", "gemm", "cutlass"),
    "optimizer and clipping": ("adam", "vector_norm", "foreach"),
    "activations and softmax": ("silu", "exp", "softmax", "sigmoid"),
    "gather, sort and scatter": ("index", "gather", "sort", "topk", "searchsorted", "embedding", "scatter"),
    "copies, sums and products of elements": (
        *("aten::mul", "aten::add", "aten::sum", "aten::copy", "aten::cat", "aten::fill", "aten::zero"),
        *("aten::sub", "aten::div", "aten::mean", "aten::pow", "aten::rsqrt", "elementwise", "reduce"),
    ),
}
LISTED = 20  # operators
OTHER = "Python, views and everything else"


def main() -> None:
    parser = common.make_parser(__doc__, "step_profile_DEVICE")
    parser.add_argument("--model", default="configs/models/quickstart.yaml", help="model file")
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    result = common.start(args, "torch", "litgpt")
    result |= {"model": args.model, "batch": args.batch}
    config = Config.from_file(ROOT / args.model)
    chosen = choose_precision(None)[0]
    # On a CPU fp32 first, and once if it is the choice. GPU time is expensive.
    precisions = dict.fromkeys(["32-true", chosen]) if args.device == "cpu" else [chosen]
    result["precisions"] = {
        precision: measure(config, precision, args.device, args.batch, args.steps) for precision in precisions
    }
    result["table"] = table(result)
    common.write_result(result, args.output)
    common.print_table(result)
    for precision, row in result["precisions"].items():
        print(f"\nms in {precision}")
        for name, milliseconds in row["operators"].items():
            print(f"{milliseconds:10.3f}  {name[:100]}")


def measure(config: Config, precision: str, device: str, batch: int, steps: int) -> common.Row:
    """Return milliseconds per step by kind of operator, and the operators (on a GPU: kernels) that take the most."""
    assert precision in ("32-true", "bf16-mixed"), "fp16 would need a gradient scaler"
    with torch.device(device), use_our_layers():
        gpt = GPT(config)
    model = PretrainingModel(gpt)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1), device=device)
    matrices = matrices_to_cast(model, precision, "none")

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            weights = cast_matrices(matrices, precision)
            losses = functional_call(model, weights, tuple(as_batch(tokens, config.block_size)), tie_weights=False)
        losses.cross_entropy.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):  # warm-up
        step()
    activities = [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    kinds: dict[str, float] = dict.fromkeys([*KINDS, OTHER], 0.0)
    operators: dict[str, float] = {}
    for event in profiler.key_averages():
        milliseconds = self_time(event, device) / 1e3 / steps
        kinds[kind_of(event.key)] += milliseconds
        operators[event.key] = round(milliseconds, 3)
    largest = sorted(operators.items(), key=lambda item: -item[1])[:LISTED]
    return {"steps": steps, "milliseconds": kinds, "operators": dict(largest)}


def self_time(event: Any, device: str) -> float:
    """Return microseconds without those of the operators that it calls."""
    return float(event.self_cpu_time_total if device == "cpu" else event.self_device_time_total)


def kind_of(operator: str) -> str:
    name = operator.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def table(result: common.Row) -> common.Table:
    columns = [row["milliseconds"] for row in result["precisions"].values()]
    totals = [sum(column.values()) for column in columns]
    rows = []
    for kind in columns[0]:
        pairs = zip(columns, totals, strict=True)
        cells = [(f"{column[kind]:.1f}", f"{column[kind] / total:.0%}") for column, total in pairs]
        rows.append([kind, *(cell for pair in cells for cell in pair)])
    heads = [head for precision in result["precisions"] for head in (f"ms in {precision}", "share")]
    ends = [cell for total in totals for cell in (f"{total:.1f}", "")]
    return common.make_table(("", *heads), [*rows, ["all", *ends]])


if __name__ == "__main__":
    main()
