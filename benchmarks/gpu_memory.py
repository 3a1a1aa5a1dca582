"""Does a training run need as much GPU memory as `--plan` predicts?

    uv run python benchmarks/gpu_memory.py --device cuda
    uv run python benchmarks/gpu_memory.py --device cpu     # rehearsal: the quickstart alone

Each run trains a few steps. The prediction (litmoe/train/memory.py) is for a run that is not compiled, and so are the
runs, except the one that says so. "6 GB" limits the process to 6 GiB of the GPU, as on an RTX 3060 laptop, and lets the
run choose its micro batch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks import common
from benchmarks.common import Row, gib, make_table
from benchmarks.runs import NOTHING_ELSE, Corpus, RunFailed, find_corpus, train
from custom_moe.backends import hardware_of
from litmoe.config import parse_run
from litmoe.hardware import choose_precision
from litmoe.train.memory import training_memory

STEPS = 4


class Case(NamedTuple):
    """A run of a few steps."""

    run_file: str
    flags: tuple[str, ...]
    limit_gib: float | None = None


EAGER = "--compile=false"
CASES = {
    "cpu": {"quickstart": Case("configs/quickstart.yaml", (EAGER, "--train.micro_batch_size=4"))},
    "cuda": {
        "MoE-200M, 6 GB": Case("configs/runs/tinystories-moe-200m-6gb.yaml", (), limit_gib=6.0),
        "MoE-200M": Case("configs/runs/tinystories-moe-200m.yaml", (EAGER, "--train.micro_batch_size=8")),
        "MoE-200M, compiled": Case("configs/runs/tinystories-moe-200m.yaml", ("--train.micro_batch_size=8",)),
        "MoE-200M, blocks recomputed": Case(
            "configs/runs/tinystories-moe-200m.yaml",
            (EAGER, "--train.micro_batch_size=8", "--activation_checkpointing=block"),
        ),
        "GPT-2 124M": Case("configs/runs/fineweb-edu-gpt2-124m.yaml", (EAGER, "--train.micro_batch_size=16")),
    },
}


def main() -> None:
    if sys.argv[1:2] == ["limited"]:
        train_with_limit(float(sys.argv[2]), sys.argv[3:])
        return
    parser = common.make_parser(__doc__, "gpu_memory_DEVICE", runs=True)
    args = parser.parse_args()
    result = common.start(args, "torch", "litgpt", "lightning")
    result["rows"] = {}
    corpus = find_corpus(args.data_dir)
    for name, case in CASES[args.device].items():
        result["rows"][name] = measure(case, args.device, corpus)
        print(f"{name}: {result['rows'][name]}", flush=True)
        add_table(result)
        common.write_result(result, args.output)
    common.print_table(result)


def train_with_limit(limit_gib: float, flags: Sequence[str]) -> None:
    """Run run_train.py with a part of the GPU's memory."""
    import runpy

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_gib * 2**30 / total)
    sys.argv = [str(ROOT / "run_train.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def measure(case: Case, device: str, corpus: Corpus) -> Row:
    """Return the predicted and the measured peak of a run in bytes. A failure is a result, too."""
    flags = ["--config", case.run_file, *case.flags, *corpus.flags, *NOTHING_ELSE]
    run = parse_run(flags)
    settings = run.settings
    context = settings.train.max_seq_length or settings.model.block_size
    steps = STEPS * settings.train.global_batch_size * context
    flags += [f"--train.max_tokens={steps}", "--train.max_steps=null", "--train.lr_warmup_steps=1"]
    flags += ["--train.log_interval=1", "--eval.max_iters=1"]
    row: Row = {"run_file": case.run_file, "flags": case.flags, "limit_gib": case.limit_gib}
    script = ["run_train.py"]
    if case.limit_gib:
        script = ["benchmarks/gpu_memory.py", "limited", str(case.limit_gib)]
    try:
        measured = train(flags, script=script, watch_memory=device == "cpu")
    except RunFailed as error:
        return row | {"status": str(error)}
    row |= {"status": "measured", "peak_bytes": measured.peak_bytes}
    if run.has_auto_micro_batch:
        return row
    precision = choose_precision(settings.precision)[0]
    hardware = hardware_of(torch.device(device)) if device == "cuda" else None
    return row | {"planned_bytes": training_memory(run, precision, hardware).peak}


def add_table(result: Row) -> None:
    rows = []
    for name, row in result["rows"].items():
        measured, planned = row.get("peak_bytes"), row.get("planned_bytes")
        cells = [gib(number) if number else "" for number in (planned, measured)]
        ratio = f"{measured / planned:.2f}" if measured and planned else ""
        rows.append([name, *cells, ratio, "" if row["status"] == "measured" else row["status"]])
    result["table"] = make_table(("run", "predicted", "measured", "measured / predicted", ""), rows)


if __name__ == "__main__":
    main()
