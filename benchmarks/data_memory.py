"""Memory of prepare_data.py's code while text grows: 10 MB, 100 MB and 1 GB, streamed from files as the Hub has them.

    uv run python benchmarks/data_memory.py
    uv run python benchmarks/data_memory.py --megabytes 10 100

The built-in stories go into .parquet files of 64 MB in row groups of 1,000, in the layout of a dataset on the Hub, and
are prepared by a process of its own with 2 workers, tokens alone. Ten times a second that process and its children are
looked at; the peak is the largest sum of their proportional set sizes (a page that several share counts once; where
the system does not tell that, the resident sizes). Writes benchmarks/results/data_memory.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import circumstances, invocation, peak_memory

KIND = "pss" if sys.platform == "linux" else "rss"
FILE_BYTES, ROWS = 64e6, 1000
WORKERS = 2
PACKAGES = ("litdata", "datasets", "pyarrow", "tokenizers", "tiktoken", "psutil")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 100, 1000], help="sizes of the text")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "data_memory.json")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the process that is watched
    args = parser.parse_args()
    if args.run:
        run(args.run)
        return
    result = circumstances(invocation("data_memory"), PACKAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = write_corpora(folder, [megabytes * 1e6 for megabytes in args.megabytes])
        make_tokenizer(folder)
        result |= {"workers": WORKERS, "memory": KIND, "runs": [measure(folder / size, sizes[size]) for size in sizes]}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {args.output}")


def write_corpora(folder: Path, sizes: list[float]) -> dict[str, int]:
    """One dataset for each size, the smaller ones being the beginning of the larger; folder name to bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from litmoe.data.stories import generate_stories

    written = {f"{round(size / 1e6)}MB": 0 for size in sizes}
    writers: dict[str, pq.ParquetWriter] = {}
    schema = pa.schema({"text": pa.string()})
    stories = generate_stories()
    while rows := list(islice(stories, ROWS)):
        size = sum(map(len, rows))
        open_ones = [name for name, wanted in zip(written, sizes, strict=True) if written[name] < wanted]
        for name in open_ones:
            if written[name] // FILE_BYTES > (written[name] - size) // FILE_BYTES or name not in writers:
                if name in writers:
                    writers[name].close()
                data = folder / name / "hub" / "data"
                data.mkdir(parents=True, exist_ok=True)
                number = len(list(data.iterdir()))
                writers[name] = pq.ParquetWriter(data / f"train-{number:05d}.parquet", schema)
            writers[name].write_table(pa.table({"text": rows}, schema))
            written[name] += size
        if not open_ones:
            break
    for writer in writers.values():
        writer.close()
    return written


def make_tokenizer(folder: Path) -> None:
    """8,192 tokens, trained on some of the stories."""
    from litmoe.data import tokenizers
    from litmoe.data.stories import generate_stories

    files = tokenizers.train(islice(generate_stories(), 5000), 8192)
    tokenizers.install(files, {"name": "benchmark"}, folder / "tokenizer")


def measure(folder: Path, text_bytes: int) -> dict[str, float]:
    """Prepares one dataset and watches."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--run", str(folder)], stdout=subprocess.PIPE, text=True)
    with peak_memory(process, KIND) as peak:
        output, _ = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"preparing {folder.name} failed:\n{output}")
    tokens = json.loads(output.splitlines()[-1])
    print(
        f"{folder.name}: {peak['all'] / 1e6:.0f} MB at most, {tokens / seconds:,.0f} tokens/s with imports", flush=True
    )
    return {
        "text_bytes": text_bytes,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "peak_memory_mb": round(peak["all"] / 1e6, 1),
        "peak_memory_of_one_process_mb": round(peak["one"] / 1e6, 1),
    }


def run(folder: Path) -> None:
    """What is watched: as `prepare_data.py --source NAME` does it."""
    from litmoe.data import corpora
    from litmoe.data.prepare import PrepareArgs, prepare

    corpora.CORPORA["stories"] = corpora.HubDataset("the built-in stories", str(folder / "hub"))
    tokenizer = folder.parent / "tokenizer"
    args = PrepareArgs("stories", folder / "data", tokenizer_dir=tokenizer, num_workers=WORKERS)
    print(sum(split.tokens for split in prepare(args).splits.values()))


if __name__ == "__main__":
    main()
