"""What does a model learn in the same time? A mixture of experts, its dense twin, nanoGPT and nanochat.

    uv run python benchmarks/learning.py                        # mixture and twin on the built-in stories
    uv run python benchmarks/learning.py --data-dir data/novels --nanogpt ../nanoGPT --nanochat ../nanochat
    uv run python benchmarks/learning.py --minutes 15 --seeds 3 --data-dir data/novels \\
      --output benchmarks/results/learning_15_minutes_cpu.json --plot docs/learning_15_minutes.svg
    uv run python benchmarks/learning.py --device cuda --minutes 0.5 ...        # MoE-200M and models of its width

All models have the same depth, width, heads, context, batch and vocabulary. The feed-forward of the twin is as wide as
the experts that work on one token. Ours are complete runs of run_train.py; the peers are checkouts of their
repositories, trained by learning_peers.py. A seed decides the weights and the order of the windows, which is the same
for all models, and differences are formed between runs of the same seed.

On a CPU each run has one thread, so that seconds are those of one core, and several runs share the machine.

1. Speed: all models take turns in short runs.
2. With several ``--rates``: one run per peer and factor on its learning rates, at the tokens of step 3 divided by 6.
   Ours have the learning rate of the run file.
3. Equal seconds: each run has as many tokens as its model processes in the given minutes, and a complete schedule.
4. Equal tokens: the other models with as many tokens as the mixture.

Seconds are those of the training steps. The result file is written after each run. ``--resume`` keeps the speeds and
the runs of an earlier result file on the same hardware, and adds what the flags ask for.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common
from benchmarks.common import Row, make_table, spread, with_verdict
from benchmarks.runs import (
    NOTHING_ELSE,
    ONE_THREAD,
    Corpus,
    Run,
    RunFailed,
    difference,
    find_corpus,
    run_pool,
    score,
    seed_flags,
    train,
)
from litmoe.config import parse_run
from litmoe.flops import count_parameters
from litmoe.hardware import choose_precision

OURS = ("mixture", "dense twin")
# nanochat's documented switch; on a CPU its default is fp32
NANOCHAT_BF16 = "nanochat in bf16"
VALIDATIONS = 8  # per run


class Preset(NamedTuple):
    """The comparison on a device."""

    config: str  # run file of the mixture
    dense: str  # model file of its twin
    speed_tokens: int  # of a short run
    rates: dict[str, float]  # factors on the peers' learning rates, which are made for much larger batches
    flags: tuple[str, ...] = ()


PRESETS = {
    "cpu": Preset(
        "configs/runs/tinystories-cpu.yaml",
        "configs/models/cpu-dense-twin.yaml",
        80_000,
        {"nanoGPT": 4.0, "nanochat": 10.0},
    ),
    "cuda": Preset(
        "configs/runs/tinystories-moe-200m.yaml",
        "configs/models/moe-200m-dense-twin.yaml",
        2_000_000,
        {"nanoGPT": 1.0, "nanochat": 4.0},
        # The run file is made for 60 times as many tokens.
        ("--train.lr_warmup_steps=50", "--train.micro_batch_size=32"),
    ),
}


class Task(NamedTuple):
    """One training run."""

    model: str
    tokens: int
    seed: int = 0
    rate: float = 1.0  # a factor on a peer's learning rates
    validations: int = VALIDATIONS


def main() -> None:
    parser = common.make_parser(__doc__, "learning_DEVICE", runs=True)
    parser.add_argument("--nanogpt", type=Path, metavar="CHECKOUT", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--nanochat", type=Path, metavar="CHECKOUT", help="a checkout of karpathy/nanochat")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training per run")
    parser.add_argument("--seeds", type=int, choices=(1, *common.T_95), default=2, metavar="N")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="factors on the peers' rates to try")
    parser.add_argument("--rounds", type=int, default=4, help="of the speed measurement")
    parser.add_argument("--equal", nargs="+", choices=("seconds", "tokens"), default=["seconds", "tokens"])
    parser.add_argument("--config", help="run file of the mixture")
    parser.add_argument("--dense", help="model file of its twin")
    parser.add_argument("--resume", action="store_true", help="keep what the result file contains")
    parser.add_argument("--plot", type=Path, help="draw the losses over time into this .svg or .png file")
    args, other_flags = parser.parse_known_args()
    result = common.start(args, "torch", "litgpt", "lightning")
    preset = PRESETS[args.device]
    preset = preset._replace(
        # The flags of a preset belong to its run file.
        flags=(*(() if args.config else preset.flags), *other_flags),
        config=args.config or preset.config,
        dense=args.dense or preset.dense,
    )
    checkouts = {name: path for name, path in (("nanoGPT", args.nanogpt), ("nanochat", args.nanochat)) if path}
    trainer = Trainer(preset, args.device, find_corpus(args.data_dir), checkouts)
    result |= {"minutes": args.minutes, "seeds": args.seeds, "run_file": preset.config, "flags": preset.flags}
    result["corpus"] = trainer.corpus.fingerprint
    result |= {"models": trainer.models, "context": trainer.context, "batch": trainer.train.global_batch_size}
    result["precision"] = trainer.precision
    if args.resume and args.output.exists():
        add_earlier(result, args.output)

    def save() -> None:
        add_table(result)
        common.write_result(result, args.output)

    compare(args, trainer, result, save)
    save()  # also if an earlier file had all runs
    common.print_table(result)
    if args.plot:
        draw(result, args.plot)


def compare(args: argparse.Namespace, trainer: "Trainer", result: Row, save: Callable[[], None]) -> None:
    """Fill ``result``, and call ``save`` after each run."""
    models = list(result["models"])
    rounds = result.setdefault("speed_rounds", [])
    while len(rounds) < args.rounds:
        rounds.append({model: trainer.speed(model) for model in models})
        print("  tokens/s: " + ", ".join(f"{model} {speed:,.0f}" for model, speed in rounds[-1].items()), flush=True)
    # Relative to the mixture within a round, because the speed of a shared machine changes.
    base = statistics.median(speeds["mixture"] for speeds in rounds)
    ratios = {model: statistics.median(speeds[model] / speeds["mixture"] for speeds in rounds) for model in models}
    speeds = {model: base * ratio for model, ratio in ratios.items()}
    result["tokens_per_second"] = speeds
    tokens = {model: trainer.whole_steps(speeds[model] * 60 * args.minutes) for model in models}

    # Learning rates
    peers = [model for model in models if model not in OURS]
    earlier = result.get("rates", {})
    rates = dict.fromkeys(models, 1.0) | {peer: earlier.get(peer, args.rates[0]) for peer in peers}
    if len(args.rates) > 1:
        grid = [
            Task(peer, trainer.whole_steps(tokens[peer] / 6), 0, rate, 1) for rate, peer in product(args.rates, peers)
        ]
        trainer.run_all(grid, result.setdefault("grid", []), save)
        for peer in peers:
            own = of_model(result["grid"], peer)
            if not own:
                reasons = {row["status"] for row in result["grid"] if row["model"] == peer}
                sys.exit(f"error: no run of {peer} succeeded: {'; '.join(sorted(reasons))}")
            rates[peer] = min(own, key=lambda row: row["bits_per_byte"])["rate"]
    result["rates"] = rates
    for name in ("equal_seconds", "equal_tokens"):
        # An earlier result may have runs with another rate.
        result[name] = [row for row in result.get(name, []) if row["rate"] == rates[row["model"]]]

    runs = list(product(range(args.seeds), models))
    if "seconds" in args.equal:
        tasks = [Task(model, tokens[model], seed, rates[model]) for seed, model in runs]
        trainer.run_all(tasks, result["equal_seconds"], save)
    if "tokens" in args.equal:
        # The mixture has the same tokens in both.
        rows = result["equal_tokens"]
        same = [row for row in result["equal_seconds"] if row["model"] == "mixture"]
        rows += [row for row in same if row not in rows]
        tasks = [Task(model, tokens["mixture"], seed, rates[model]) for seed, model in runs]
        trainer.run_all(tasks, rows, save)


def add_earlier(result: Row, path: Path) -> None:
    """Add the speeds and runs of an earlier result file to a new one.

    Exits if it was measured elsewhere or with other settings: such runs can't be compared.
    """
    earlier = json.loads(path.read_text(encoding="utf-8"))
    same = ("versions", "minutes", "run_file", "flags", "corpus", "models", "context", "batch", "precision")
    different = [name for name in same if earlier.get(name) != json.loads(json.dumps(result[name]))]
    if earlier["hardware"]["cpu"] != result["hardware"]["cpu"]:
        different.append("hardware")
    if different:
        sys.exit(f"error: {path} differs in {', '.join(different)}; measure again without --resume.")
    kept = ("speed_rounds", "rates", "grid", "equal_seconds", "equal_tokens")
    result |= {name: earlier[name] for name in kept if name in earlier}
    result["resumed"] = [*earlier.get("resumed", []), {name: earlier[name] for name in ("commit", "date", "command")}]


class Trainer:
    """Trains any of the models on one corpus."""

    def __init__(self, preset: Preset, device: str, corpus: Corpus, checkouts: dict[str, Path]) -> None:
        self.preset, self.device, self.corpus = preset, device, corpus
        # The twin has no routers to balance.
        self.flags = {"mixture": [], "dense twin": [f"--model={preset.dense}", "--moe.bias_update_rate=0"]}
        runs = {model: parse_run(["--config", preset.config, *self.flags[model], *preset.flags]) for model in OURS}
        self.models: Row = {}
        for model, run in runs.items():
            tied = bool(run.settings.train.tie_embeddings)
            self.models[model] = count_parameters(run.settings.model, tie_embeddings=tied)._asdict()
        run = runs["mixture"]
        self.precision = choose_precision(run.settings.precision)[0]
        self.checkouts = dict(checkouts)
        if device == "cpu" and self.precision == "bf16-mixed" and "nanochat" in checkouts:
            self.checkouts[NANOCHAT_BF16] = checkouts["nanochat"]
        for peer, checkout in self.checkouts.items():
            commit = common.output_of(["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"])
            self.models[peer] = {"commit": commit, "rates": preset.rates[repository(peer)]}
        self.train, self.config = run.settings.train, run.settings.model
        # For the peers; ours may choose their own.
        is_auto = run.has_auto_micro_batch
        self.micro_batch_size = self.train.global_batch_size if is_auto else self.train.micro_batch_size
        self.context = self.train.max_seq_length or self.config.block_size
        # Runs at the same time: one per core, or one on a GPU.
        self.at_once = (os.cpu_count() or 1) if device == "cpu" else 1
        self.environment = ONE_THREAD if device == "cpu" else {}

    def whole_steps(self, tokens: float) -> int:
        """Round a number of tokens to complete optimizer steps."""
        step = self.train.global_batch_size * self.context
        return max(1, round(tokens / step)) * step

    def speed(self, model: str) -> float:
        """Return the tokens per second of a short run that has the machine for itself."""
        tokens = self.whole_steps(self.preset.speed_tokens)
        if model in OURS:
            flags = ("--train.log_interval=5", "--eval.max_iters=1")
            return self.train_ours(Task(model, tokens, validations=1), *flags).tokens_per_second
        # The second of two halves: the first one compiles.
        points = self.train_peer(Task(model, tokens, validations=2), {"val-batches": 1})
        (first_tokens, first, _), (last_tokens, last, _) = points
        return (last_tokens - first_tokens) / (last - first)

    def run_all(self, tasks: Sequence[Task], rows: list[Row], save: Callable[[], None]) -> None:
        """Run the tasks that have no row yet, append their results to ``rows``, and save after each one."""
        order = list(self.models)
        done = {(row["model"], row["seed"], row["rate"], row["max_tokens"]) for row in rows}
        with run_pool(self.at_once) as pool:
            futures = [
                pool.submit(self.run, task)
                for task in tasks
                if (task.model, task.seed, task.rate, task.tokens) not in done
            ]
            for future in as_completed(futures):
                row = future.result()
                score_or_error = row.get("bits_per_byte", row.get("status"))
                print(f"  {row['model']}, seed {row['seed']}: {score_or_error}", flush=True)
                rows.append(row)
                # In an order that does not depend on which one was faster.
                rows.sort(key=lambda row: (row["seed"], order.index(row["model"]), row["rate"]))
                save()

    def run(self, task: Task) -> Row:
        """Train once; a failure is a result, too."""
        row: Row = {"model": task.model, "seed": task.seed, "rate": task.rate, "max_tokens": task.tokens}
        try:
            if task.model in OURS:
                return row | score(self.train_ours(task).rows, self.corpus)
            points = self.train_peer(task)
            curve = [[tokens, seconds, round(self.corpus.bits_per_byte(loss), 5)] for tokens, seconds, loss in points]
            return row | {"bits_per_byte": curve[-1][2], "tokens": curve[-1][0], "curve": curve}
        except RunFailed as error:  # for example a learning rate that is too high
            return row | {"status": str(error)}

    def train_ours(self, task: Task, *flags: str) -> Run:
        """Train one of our models with run_train.py, and further flags."""
        steps = task.tokens // (self.train.global_batch_size * self.context)
        # One log line per validation, so that each validation has the tokens and seconds of its step.
        interval = max(1, steps // task.validations)
        all_flags = [
            *("--config", self.preset.config, *self.flags[task.model], *self.preset.flags, *self.corpus.flags),
            *(*seed_flags(task.seed), f"--train.max_tokens={task.tokens}", "--train.max_steps=null"),
            *("--eval.max_iters=1000000", f"--eval.interval={interval}", f"--train.log_interval={interval}"),
            *(*NOTHING_ELSE, *flags),
        ]
        return train(all_flags, environment=self.environment)

    def train_peer(self, task: Task, more_flags: Row | None = None) -> list[tuple[int, float, float]]:
        """Train a peer with flags of learning_peers.py; return the tokens, seconds and loss of each validation."""
        flags = {
            "data-dir": self.corpus.data_dir,
            "tokens": task.tokens,
            "seed": task.seed,
            "rate": self.preset.rates[repository(task.model)] * task.rate,
            "validations": task.validations,
            "device": self.device,
            "context": self.context,
            "batch-size": self.train.global_batch_size,
            "micro-batch-size": self.micro_batch_size,
            "vocab-size": self.config.padded_vocab_size,
            "n-layer": self.config.n_layer,
            "n-embd": self.config.n_embd,
            "n-head": self.config.n_head,
            **(more_flags or {}),
        }
        checkout = str(self.checkouts[task.model].resolve())
        command = [sys.executable, "benchmarks/learning_peers.py", repository(task.model).lower(), checkout]
        command += [f"--{name}={value}" for name, value in flags.items()]
        # The same number of threads as ours.
        environment = os.environ | self.environment
        if task.model == NANOCHAT_BF16:
            environment |= {"NANOCHAT_DTYPE": "bfloat16"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise RunFailed(done.stderr.strip().splitlines()[-1])
        # nanochat prints lines of its own.
        points = [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
        if not math.isfinite(points[-1][2]):
            raise RunFailed("the loss is not finite")
        return points


def repository(peer: str) -> str:
    """Return the name of a peer's repository, which may be part of several comparisons."""
    return peer.split()[0]


# ------------------------------------------------------------------------------------------------------ table and plot


def of_model(rows: Iterable[Row], model: str) -> list[Row]:
    """Return the runs of a model that succeeded."""
    return [row for row in rows if row["model"] == model and "bits_per_byte" in row]


def add_table(result: Row) -> None:
    """Add the table, and for the overview the difference between the mixture and its twin."""
    heads = ("", "tokens/s", "tokens", "bits per byte", "seeds", "minus the dense twin", "at the mixture's tokens")
    columns = len(heads) if result.get("equal_tokens") else len(heads) - 1
    seconds, tokens = result.get("equal_seconds", []), result.get("equal_tokens", [])
    rows = []
    for model in result["models"]:
        runs, twins = of_model(seconds, model), of_model(seconds, "dense twin")
        change = difference(runs, twins) if model != "dense twin" else {}
        rows.append(
            [
                f"ours, {model}" if model in OURS else f"{model}, {result['models'][model]['commit'][:7]}",
                f"{result['tokens_per_second'][model]:,.0f}",
                f"{runs[0]['max_tokens'] / 1e6:.2f} M" if runs else "",
                describe_scores(runs),
                len(runs),
                describe_difference(change),
                describe_scores(of_model(tokens, model)),
            ]
        )
        if model == "mixture" and change:
            result["crossing_seconds"] = crossing(result)
            text = f"bits per byte {describe_difference(change)}"
            what = f"mixture against its dense twin, {result['minutes']:g} minutes in {result['precision']}"
            result["headline"] = [[what, text]]
    result["table"] = make_table(heads[:columns], [row[:columns] for row in rows])


def describe_difference(change: Row) -> str:
    if not change:
        return ""
    # One pair says nothing about the noise.
    alone = f"{change['difference']['mean']:+.4f} (one seed)"
    return with_verdict(change["difference"]) if change["difference"]["interval"] else alone


def describe_scores(runs: Sequence[Row]) -> str:
    """Return the mean of the runs and the deviation of one."""
    if not runs:
        return ""
    scores = spread([run["bits_per_byte"] for run in runs])
    return f"{scores.mean:.4f}" + (f" ± {scores.deviation:.4f}" if len(runs) > 1 else "")


def mean_curve(result: Row, model: str) -> tuple[list[float], list[float]]:
    """Return seconds at the measured speed and mean bits per byte of the runs at equal seconds."""
    curves = [run["curve"] for run in of_model(result["equal_seconds"], model)]
    # A run that validates before its first step has a point at 0 tokens.
    points = list(zip(*([point for point in curve if point[0]] for curve in curves), strict=True))
    speed = result["tokens_per_second"][model]
    return [same[0][0] / speed for same in points], [statistics.mean(point[2] for point in same) for same in points]


def crossing(result: Row) -> float | None:
    """Return after how many seconds the mixture stays below its twin; None if it does not at the end."""
    (seconds, own), twin = (mean_curve(result, model) for model in OURS)
    # The twin's validations may be at other seconds, and one more or less.
    gaps = list(zip(seconds, own - np.interp(seconds, *twin), strict=True))
    if gaps[-1][1] >= 0:
        return None
    # From the end back to the last point at which it was not below.
    for (start, before), (end, after) in reversed(list(pairwise(gaps))):
        if before >= 0:
            return round(float(start + (end - start) * before / (before - after)), 1)
    return round(gaps[0][0], 1)


def draw(result: Row, path: Path) -> None:
    """Draw bits per byte over seconds of training."""
    from matplotlib import rc_context

    # Not pyplot, which has global state and may open windows.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    lowest = []
    for model in result["models"]:
        seconds, scores = mean_curve(result, model)
        if not scores:  # all of its runs failed
            continue
        lowest += scores[-1:]
        style = "-" if model in OURS else "--"
        axes.plot([second / 60 for second in seconds], scores, style, marker=".", label=f"{model}: {scores[-1]:.3f}")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("bits per byte of validation text")
    # The first minutes would hide the differences at the end.
    axes.set_ylim(min(lowest) - 0.05, max(lowest) + 0.45)
    axes.grid(alpha=0.3)
    axes.legend()
    hardware = result["hardware"]
    machine = hardware["gpu"]["name"] if hardware["gpu"] else f"one core of {hardware['cpu']}"
    axes.set_title(f"{machine}; mean of the seeds", fontsize="medium")
    # A fixed salt and no date: the same result gives the same file.
    with rc_context({"svg.hashsalt": "learning"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
