"""How much memory does training need at 12, 24 and 48 layers, dense and as a mixture of experts?

    uv run python benchmarks/memory.py

Nothing is measured: the steps run on tensors without contents (litmoe/train/memory.py), with the kernels of an A100, so
no GPU is needed. To compare with a real run: `run_train.py --plan` predicts, and the run prints its peak at the end.
"""

import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common
from benchmarks.common import Row, gib, make_table
from custom_moe.backends import Hardware
from litmoe.config import parse_run
from litmoe.flops import count_parameters
from litmoe.train.memory import training_memory

# A dense model and the same with experts.
RUNS = ("fineweb-edu-gpt2-124m", "fineweb-edu-gpt2-moe")
LAYERS = (12, 24, 48)
MICRO_BATCHES = (1, 16)
# The kernels decide what is kept for the backward. An A100 has those of most NVIDIA cards.
A100 = Hardware((8, 0), triton=True)


def main() -> None:
    args = common.make_parser(__doc__, "memory").parse_args()
    result = common.start(args, "torch", "litgpt", "lightning")
    result["rows"] = [work_out(*case) for case in product(RUNS, LAYERS, MICRO_BATCHES)]
    add_table(result)
    common.write_result(result, args.output)
    common.print_table(result)


def work_out(name: str, layers: int, micro_batch_size: int) -> Row:
    """Return the size of a run's model at another depth, and the bytes that a training step needs."""
    run_file = f"configs/runs/{name}.yaml"
    flags = [f"--model.n_layer={layers}", f"--micro-batch-size={micro_batch_size}"]
    run = parse_run(["--config", str(ROOT / run_file), *flags])
    train, precision = run.settings.train, run.settings.precision
    sizes = count_parameters(run.settings.model, tie_embeddings=bool(train.tie_embeddings))
    # With the precision that a GPU would choose; this machine may have none.
    memory = training_memory(run, precision or "bf16-mixed", A100)
    return {
        "run": run_file,
        "n_layer": layers,
        "total_parameters": sizes.total,
        "active_parameters": sizes.active,
        "micro_batch_size": micro_batch_size,
        "max_seq_length": train.max_seq_length,
        "precision": precision,
        "optimizer_class": run.optimizer["class_path"],
        **memory._asdict(),
        "peak": memory.peak,
    }


def add_table(result: Row) -> None:
    """Add one row for each model and depth, from the pair of rows with the small and the large micro batch."""
    rows = []
    for small, large in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        total, active = small["total_parameters"], small["active_parameters"]
        kind = "MoE" if active < total else "dense"
        parameters = f"{total / 1e6:,.1f} M / {active / 1e6:,.1f} M"
        kept = small["weights"] + small["gradients"] + small["optimizer"]
        rows.append([kind, small["n_layer"], parameters, gib(kept), gib(small["peak"]), gib(large["peak"])])
    heads = ("model", "layers", "parameters / active", "weights, gradients, AdamW", "peak, micro batch 1")
    result["table"] = make_table((*heads, "micro batch 16"), rows)


if __name__ == "__main__":
    main()
