"""What saving costs a run: seconds of training lost to a checkpoint, which is copied at once and written meanwhile.

    uv run python benchmarks/checkpoint.py                        # the quickstart, 2 to 4 minutes on 2 cores

The quickstart's run, some of its tokens, with a save every few seconds and without any, in turn; the order changes from
pair to pair. The difference over the number of saves is the cost of one, with the 95% interval of its mean over the
pairs, and so the share of a run that saves once a minute. Writes benchmarks/results/checkpoint.json.
"""

import json
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import circumstances, invocation, write_result
from benchmarks.runs import Run, corpus, spread, train
from litmoe.cli import run_door

PACKAGES = ("torch", "litgpt", "lightning")


def main(tokens: int = 120_000, pairs: int = 3, every_seconds: float = 2.0) -> None:
    """Measures and writes the result.

    Args:
        tokens: Of each run.
        pairs: Of runs, at least 2.
        every_seconds: Between two saves.
    """
    result = circumstances(invocation("checkpoint"), PACKAGES)
    text = corpus(None)
    flags = ["--config", "configs/quickstart.yaml", *text.flags, f"--train.max_tokens={tokens}", "--sample.prompt=null"]
    flags += ["--train.save_interval=null", "--train.log_interval=10", "--eval.interval=1000000"]
    ways = {"saving": f"--checkpoint.every_minutes={every_seconds / 60}", "not": "--checkpoint.every_minutes=null"}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    saves, size = [], 0
    for pair in range(pairs):
        for way in sorted(ways, reverse=bool(pair % 2)):
            run = train([*flags, ways[way]])
            seconds[way].append(trained_for(run))
            if way == "saving":
                saves.append(run.saves - 1)  # the last one is final/
                size = sum(run.saved_bytes.values())
            print(f"{way:>6}: {seconds[way][-1]:.2f} s, {run.saves} saves", file=sys.stderr)
    each = [(a - b) / n for a, b, n in zip(seconds["saving"], seconds["not"], saves, strict=True)]
    result |= {
        "tokens": tokens,
        "every_seconds": every_seconds,
        "checkpoint_mb": round(size / 1e6, 1),
        "saves": saves,
        "seconds": {way: [round(value, 3) for value in values] for way, values in seconds.items()},
        "seconds_a_save": spread(each)._asdict(),
        "share_at_one_a_minute": spread([value / (60 + mean(each)) for value in each])._asdict(),
    }
    write_result(result, ROOT / "benchmarks/results/checkpoint.json")
    print(json.dumps(result, indent=1))


def trained_for(run: Run) -> float:
    """Seconds from the first log line to the last, with the saves between them."""
    times = [row["time"] for row in run.rows if "time" in row]
    return times[-1] - times[0]


if __name__ == "__main__":
    run_door(main)
