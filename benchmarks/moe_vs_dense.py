"""Does a mixture of experts beat its dense twin? Bits per byte at equal tokens and at equal seconds.

    uv run python benchmarks/moe_vs_dense.py                  # the quickstart's model on a CPU, 6 to 11 minutes
    uv run python benchmarks/moe_vs_dense.py --tokens 2000000 --learning-rates 1e-3 2e-3 4e-3 \\
      --output benchmarks/results/moe_vs_dense_long_cpu.json  # its full length, an hour
    uv run python benchmarks/moe_vs_dense.py --device cuda    # MoE-200M; others with --config, --dense, --tokens
    uv run python benchmarks/moe_vs_dense.py --train.global_batch_size 8    # other flags go to run_train.py

The feed-forward of the twin is as wide as the experts that work on one token, so both have the same number of active
parameters. All runs are complete runs of run_train.py with a complete learning-rate schedule:

1. Both models try each learning rate of one grid with the first seed. The best by validation loss is used from then on.
2. Equal tokens: the other seeds, with as many tokens.
3. Equal seconds: the dense model again, with as many more tokens as it was faster in step 2.

A seed decides the weights and the order of the data, and differences are formed between runs of the same seed. Seconds
are those of training, without start, validation and saving. The result file is written after each run.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common
from benchmarks.common import Row, make_table, spread, with_verdict
from benchmarks.runs import NOTHING_ELSE, Corpus, RunFailed, difference, find_corpus, score, seed_flags, train
from litmoe.config import parse_run
from litmoe.flops import count_parameters

VALIDATIONS = 6  # per run
MODELS = ("MoE", "dense")


class Preset(NamedTuple):
    """The comparison of a device."""

    config: str
    dense: str
    tokens: int
    learning_rates: tuple[float, ...]
    flags: tuple[str, ...] = ()


PRESETS = {
    "cpu": Preset("configs/quickstart.yaml", "configs/models/quickstart-dense-twin.yaml", 200_000, (4e-3, 8e-3)),
    "cuda": Preset(
        "configs/runs/tinystories-moe-200m.yaml",
        "configs/models/moe-200m-dense-twin.yaml",
        16_000_000,
        (3e-4, 6e-4, 1.2e-3),
        # The run file is made for 60 times as many tokens.
        ("--train.lr_warmup_steps=50", "--train.micro_batch_size=32"),
    ),
}


def main() -> None:
    parser = common.make_parser(__doc__, "moe_vs_dense_DEVICE", runs=True)
    parser.add_argument("--config", help="run file of the mixture of experts")
    parser.add_argument("--dense", help="model file of its dense twin")
    parser.add_argument("--tokens", type=int, help="of each run at equal tokens")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="the grid")
    parser.add_argument("--seeds", type=int, choices=(1, *common.T_95), default=3, metavar="N")
    args, other_flags = parser.parse_known_args()
    header = common.start(args, "torch", "litgpt", "lightning")
    preset = PRESETS[args.device]
    # The flags of a preset belong to its run file.
    flags = (*(() if args.config else preset.flags), *other_flags)
    given = {name: value for name, value in vars(args).items() if name in Preset._fields and value}
    preset = preset._replace(flags=flags, **given)

    def save(comparison: Row) -> None:
        common.write_result(header | comparison, args.output)

    try:
        common.print_table(compare(preset, args.seeds, find_corpus(args.data_dir), save))
    except RunFailed as error:
        sys.exit(f"error: {error}")


def compare(preset: Preset, seeds: int, corpus: Corpus, save: Callable[[Row], None]) -> Row:
    """Train all models. ``save`` receives the result after each run.

    Raises:
        RunFailed: if the runs of a model failed at every learning rate.
    """
    comparison = Comparison(preset, corpus, save)
    result = comparison.result
    # Step 1: the learning rates, with the first seed.
    for rate, model in product(preset.learning_rates, MODELS):
        comparison.run(model, rate, 0, preset.tokens, result["grid"])
    best_runs = {model: best_run(result["grid"], model) for model in MODELS}
    rates = {model: run["learning_rate"] for model, run in best_runs.items()}
    # A best rate at the edge of the grid may have a better one beyond it.
    edges = (min(preset.learning_rates), max(preset.learning_rates))
    result["learning_rates"] = rates
    result["on_the_edge"] = sorted(model for model in rates if rates[model] in edges)

    # Step 2: the other seeds, with equal tokens.
    equal_tokens = result["equal_tokens"]["runs"]
    equal_tokens += best_runs.values()
    for seed, model in product(range(1, seeds), MODELS):
        comparison.run(model, rates[model], seed, preset.tokens, equal_tokens)

    # Step 3: the dense model with more tokens, so that both train for equal seconds.
    speeds = {model: median(row["tokens_per_second"] for row in of_model(equal_tokens, model)) for model in MODELS}
    result["tokens_per_second"] = speeds
    more_tokens = round(preset.tokens * speeds["dense"] / speeds["MoE"])
    equal_seconds = result["equal_seconds"]["runs"]
    equal_seconds += of_model(equal_tokens, "MoE")
    for seed in range(seeds):
        comparison.run("dense", rates["dense"], seed, more_tokens, equal_seconds)
    return result


class Comparison:
    """The settings that all runs share, and the result so far."""

    def __init__(self, preset: Preset, corpus: Corpus, save: Callable[[Row], None]) -> None:
        self.preset, self.corpus, self.save = preset, corpus, save
        self.model_flags = {"MoE": [], "dense": [f"--model={preset.dense}"]}
        self.result: Row = {"run_file": preset.config, "flags": preset.flags, "models": {}, "grid": [], "failed": []}
        self.result |= {"equal_tokens": {"runs": []}, "equal_seconds": {"runs": []}}
        # Both models share the run file, so its batch and learning-rate schedule apply to both.
        for model, flags in self.model_flags.items():
            run = parse_run(["--config", preset.config, *flags, *preset.flags])
            train_args, config = run.settings.train, run.settings.model
            sizes = count_parameters(config, tie_embeddings=bool(train_args.tie_embeddings))
            self.result["models"][model] = {"name": config.name, **sizes._asdict()}
        self.tokens_per_step = train_args.global_batch_size * (train_args.max_seq_length or config.block_size)
        # The schedule ends at the same fraction of each learning rate.
        self.min_lr_share = train_args.min_lr / run.optimizer["init_args"]["lr"]

    def run(self, model: str, rate: float, seed: int, tokens: int, runs: list[Row]) -> None:
        """Train once, append the result to ``runs`` (a failure to the failed runs), and save everything."""
        # One log line per validation, so that each validation has the tokens and seconds of its step.
        interval = max(1, tokens // self.tokens_per_step // VALIDATIONS)
        flags = ["--config", self.preset.config, *self.model_flags[model], *self.preset.flags, *self.corpus.flags]
        flags += [*seed_flags(seed), f"--train.max_tokens={tokens}", "--train.max_steps=null"]
        flags += [f"--optimizer.init_args.lr={rate}", f"--train.min_lr={rate * self.min_lr_share}"]
        flags += [f"--eval.interval={interval}", f"--train.log_interval={interval}", "--eval.max_iters=25"]
        flags += NOTHING_ELSE
        row: Row = {"model": model, "learning_rate": rate, "seed": seed, "max_tokens": tokens}
        try:
            row |= score(train(flags).rows, self.corpus)
            runs.append(row)
            print(f"  {model}, rate {rate:g}, seed {seed}: {row['bits_per_byte']:.4f} bits per byte", flush=True)
        except RunFailed as error:  # for example a learning rate that is too high
            self.result["failed"].append(row | {"status": str(error)})
            print(f"  {model}, rate {rate:g}, seed {seed}: {error}", flush=True)
        # The differences so far: the file is complete after every run.
        for equal in ("tokens", "seconds"):
            self.result[f"equal_{equal}"] |= differences(self.result[f"equal_{equal}"]["runs"])
        add_table(self.result)
        self.save(self.result)


def of_model(runs: Sequence[Row], model: str) -> list[Row]:
    return [row for row in runs if row["model"] == model]


def best_run(grid: Sequence[Row], model: str) -> Row:
    """Return the run that ended with the lowest loss."""
    runs = of_model(grid, model)
    if not runs:
        raise RunFailed(f"all runs of the {model} model failed, at every learning rate")
    return min(runs, key=lambda row: row["bits_per_byte"])


def differences(runs: Sequence[Row]) -> Row:
    """Return the mean score of both models, and of MoE minus dense with the same seed. Empty without a pair."""
    result = difference(of_model(runs, "MoE"), of_model(runs, "dense"))
    if result:
        result["means"] = {}
        for model in MODELS:
            result["means"][model] = spread([row["bits_per_byte"] for row in of_model(runs, model)])._asdict()
    return result


def add_table(result: Row) -> None:
    rows = []
    for equal in ("tokens", "seconds"):
        comparison = result[f"equal_{equal}"]
        if "difference" not in comparison:
            rows.append([f"equal {equal}", "not measured yet", "", "", "", ""])
            continue
        scores = [f"{comparison['means'][model]['mean']:.4f}" for model in MODELS]
        spent = [describe_length(comparison["runs"], model) for model in MODELS]
        rows.append([f"equal {equal}", *scores, with_verdict(comparison["difference"]), *spent])
    heads = ("", "MoE", "dense", "MoE minus dense", "tokens of the MoE", "tokens of the dense model")
    result["table"] = make_table(heads, rows)

    # Equal time is what counts for a user.
    if "difference" in result["equal_seconds"]:
        millions = result["grid"][0]["max_tokens"] / 1e6
        text = f"bits per byte {with_verdict(result['equal_seconds']['difference'])}"
        result["headline"] = [[f"MoE against its dense twin in equal time, {millions:.1f} M tokens", text]]


def describe_length(runs: Sequence[Row], model: str) -> str:
    """Return the mean tokens and seconds of a model's runs."""
    tokens = mean(run["tokens"] for run in of_model(runs, model))
    seconds = mean(run["seconds"] for run in of_model(runs, model))
    return f"{tokens / 1e6:.2f} M in {seconds:.0f} s"


if __name__ == "__main__":
    main()
