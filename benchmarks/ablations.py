"""What is each default of the quickstart worth? Every choice against its alternative, three seeds each, on a CPU.

    uv run python benchmarks/ablations.py --data-dir data/novels    # 20 minutes on two cores
    uv run python benchmarks/ablations.py --only default Muon       # some rows; the others of an earlier run are kept

All runs are runs of run_train.py with configs/quickstart.yaml and a few flags, the same number of tokens and the
complete schedule. A seed decides the weights and the order of the data; differences are formed between runs of the same
seed. Each run has one thread, and as many run at the same time as there are cores. The rows with 16-bit weights and
8-bit Adam train like configs/runs/tinystories-moe-200m-6gb.yaml, which fits a GPU of 6 GB: what do few bits cost, with
stochastic rounding and without?
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common
from benchmarks.common import Row, make_table, with_verdict
from benchmarks.runs import (
    MUON,
    NOTHING_ELSE,
    ONE_THREAD,
    Corpus,
    RunFailed,
    difference,
    find_corpus,
    run_pool,
    score,
    seed_flags,
    train,
)

CONFIG = "configs/quickstart.yaml"


class Choice(NamedTuple):
    """One row: the question that it answers, and the flags that differ from the default."""

    question: str
    flags: tuple[str, ...] = ()


# bf16 weights and 8-bit Adam, with the quickstart's learning rate.
LOW_MEMORY = (
    "--precision=bf16-true",
    "--activation_checkpointing=block",
    "--optimizer=torchao.optim.AdamW8bit",
    "--optimizer.init_args.lr=4.0e-3",
    "--optimizer.init_args.betas=[0.9, 0.95]",
    "--optimizer.init_args.weight_decay=0.1",
)
STOCHASTIC = "--optimizer.init_args.bf16_stochastic_round=true"
# Mixtral's router and balance: softmax over the best 2 of 8, and two losses.
SOFTMAX = (
    *("--model.n_shared_expert=0", "--model.n_expert_per_token=2", "--model.routed_scaling_factor=1.0"),
    *("--model.n_expert_groups=null", "--model.n_topk_groups=null", "--model.n_topk_scores_per_group=null"),
    *("--moe.bias_update_rate=0", "--moe.load_balancing_loss=0.01"),
)
NARROW_LAYERS = (
    *("--model.n_layer=4", "--model.n_embd=128", "--model.n_head=4", "--model.n_query_groups=2"),
    "--model.moe_intermediate_size=192",
)
CHOICES = {
    "default": Choice("shared expert, best of 8 by a sigmoid router with bias balancing, 3 layers, AdamW"),
    "softmax router, 2 of 8, no shared expert": Choice("experts", SOFTMAX),
    "best of 16": Choice("experts", ("--model.n_expert=16",)),
    "first layer dense": Choice("experts", ("--model.first_k_dense_replace=1", "--model.intermediate_size=480")),
    "no balancing": Choice("balance", ("--moe.bias_update_rate=0", "--moe.z_loss=0")),
    "bias at 10 times the rate": Choice("balance", ("--moe.bias_update_rate=0.01",)),
    "4 layers of width 128": Choice("layers", NARROW_LAYERS),
    "tied embeddings": Choice("embedding", ("--train.tie_embeddings=true",)),
    "embedding at the rate of all": Choice("embedding", ("--embedding_lr_factor=1",)),
    "LitGPT's initial projections": Choice("initial weights", ("--zero_init_projections=false",)),
    "cosine": Choice("schedule", ("--schedule.name=cosine", "--schedule.decay_fraction=0.2")),
    "decay over the last 20%": Choice("schedule", ("--schedule.decay_fraction=0.2",)),
    "half the rate": Choice("rate", ("--optimizer.init_args.lr=2.0e-3",)),
    "twice the rate": Choice("rate", ("--optimizer.init_args.lr=8.0e-3",)),
    "batch of 8 windows": Choice("batch", ("--train.global_batch_size=8", "--train.micro_batch_size=8")),
    "200 steps of warm-up": Choice("schedule", ("--train.lr_warmup_steps=200",)),
    "last rate of 10%": Choice("schedule", ("--train.min_lr=4.0e-4",)),
    "no weight decay": Choice("optimizer", ("--optimizer.init_args.weight_decay=0",)),
    "beta2 of 0.99": Choice("optimizer", ("--optimizer.init_args.betas=[0.9, 0.99]",)),
    "no clipping": Choice("optimizer", ("--train.max_norm=null",)),
    "Muon": Choice("optimizer", (MUON,)),
    "QK-norm": Choice("attention", ("--model.norm_qk=true",)),
    "three key heads": Choice("attention", ("--model.n_query_groups=3",)),
    "document masking": Choice("attention", ("--document_masking=true",)),
    "bf16, 8-bit Adam, stochastic rounding": Choice("memory", (*LOW_MEMORY, STOCHASTIC)),
    "bf16, 8-bit Adam, rounding to nearest": Choice("memory", LOW_MEMORY),
}


def main() -> None:
    parser = common.make_parser(__doc__, "ablations_cpu", runs=True)
    parser.add_argument("--only", nargs="+", choices=tuple(CHOICES), default=list(CHOICES), metavar="ROW")
    parser.add_argument("--tokens", type=int, default=300_000, help="of each run")
    parser.add_argument("--seeds", type=int, choices=(1, *common.T_95), default=3, metavar="N")
    args = parser.parse_args()
    result = common.start(args, "torch", "torchao", "litgpt", "lightning")
    result |= {"run_file": CONFIG, "tokens": args.tokens, "seeds": args.seeds}
    corpus, rows = find_corpus(args.data_dir), common.earlier_rows(args.output, result, "rows", ("run_file", "tokens"))
    with run_pool(os.cpu_count() or 1) as pool:
        futures = {
            name: [pool.submit(run_once, CHOICES[name].flags, seed, args.tokens, corpus) for seed in range(args.seeds)]
            for name in args.only
        }
        # The file is written after each row, so an interrupted run keeps what it has.
        for name, runs in futures.items():
            rows[name] = collect(CHOICES[name], runs)
            print(f"{name}: {rows[name].get('bits_per_byte', rows[name]['status'])}", flush=True)
            result["rows"] = {name: rows[name] for name in CHOICES if name in rows}
            add_differences(result["rows"])
            add_table(result)
            common.write_result(result, args.output)
    common.print_table(result)


def collect(choice: Choice, runs: Sequence["Future[Row]"]) -> Row:
    """Wait for the runs of a row. A failure, for example 8-bit Adam without a C++ compiler, is a result, too."""
    # All seeds or none: differences are formed between runs of the same seed.
    row: Row = {"question": choice.question, "flags": choice.flags, "status": "measured"}
    try:
        row["runs"] = [run.result() for run in runs]
    except RunFailed as error:
        return row | {"status": str(error)}
    for key in ("bits_per_byte", "tokens_per_second"):
        row[key] = common.spread([run[key] for run in row["runs"]])._asdict()
    return row


def run_once(flags: Sequence[str], seed: int, tokens: int, corpus: Corpus) -> Row:
    # One validation, after the last step.
    command = ["--config", CONFIG, *flags, *corpus.flags, *seed_flags(seed), f"--train.max_tokens={tokens}"]
    command += [*NOTHING_ELSE, "--train.log_interval=50", "--eval.interval=1000000000", "--eval.max_iters=1000000"]
    rows = train(command, environment=ONE_THREAD).rows
    # The statistics of the experts at the end are in the last row of a training step.
    last = next(row for row in reversed(rows) if "train_loss" in row)
    # The busiest expert's load over the mean load, in each layer.
    loads = [value for name, value in last.items() if name.startswith("expert_load_max/")]
    dead_experts = sum(value for name, value in last.items() if name.startswith("dead_experts/"))
    return {"seed": seed, **score(rows, corpus), "busiest_expert": round(mean(loads), 3), "dead_experts": dead_experts}


def add_differences(rows: Row) -> None:
    """Compare each row with the default's runs of the same seeds: difference of the scores, ratio of the speeds."""
    default = rows.get("default", {}).get("runs", [])
    speeds = {run["seed"]: run["tokens_per_second"] for run in default}
    for name in rows.keys() - {"default"}:
        runs = rows[name].get("runs", [])
        rows[name] |= difference(runs, default)
        ratios = [run["tokens_per_second"] / speeds[run["seed"]] for run in runs if run["seed"] in speeds]
        if ratios:
            rows[name]["speed"] = median(ratios)


def add_table(result: Row) -> None:
    rows = []
    for name, row in result["rows"].items():
        if "runs" not in row:
            rows.append([name, row["status"], "", "", ""])
            continue
        bits = row["bits_per_byte"]
        change = with_verdict(row["difference"]) if "difference" in row else ""
        load = f"{mean(run['busiest_expert'] for run in row['runs']):.2f}"
        rows.append([name, f"{bits['mean']:.4f} ± {bits['deviation']:.4f}", change, f"{row.get('speed', 1):.2f}", load])
    heads = ("", "bits per byte", "minus the default's", "times its speed", "busiest expert, times the mean")
    result["table"] = make_table(heads, rows)


if __name__ == "__main__":
    main()
