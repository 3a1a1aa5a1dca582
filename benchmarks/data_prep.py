"""Text to tokens: LitGPT's TextFiles against prepare_data.py, both over the same text on the same cores.

    uv run python benchmarks/data_prep.py                                  # 20 MB of the built-in stories
    uv run python benchmarks/data_prep.py --megabytes 100 --repeat 1
    uv run python benchmarks/data_prep.py --text my.txt --tokenizer data/tokenizer

Each run is a process of its own, timed whole ("with imports") and from the moment when all is imported ("without").
TextFiles puts no end-of-text after documents; apart from document ends both must give the same ids, which is checked.
Writes benchmarks/results/data_prep.json.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import circumstances, invocation, peak_memory

MARK = "<|endoftext|>"
FILES = 8  # TextFiles divides its work by files
OUTPUTS = {"TextFiles": ("train/train", "val/val"), "ours": ("tokens/train", "tokens/val")}
WAYS = tuple(OUTPUTS)
PACKAGES = ("litgpt", "litdata", "torch", "tokenizers", "tiktoken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20, help="size of the built-in corpus")
    parser.add_argument("--text", type=Path, help=f"a text of your own, its documents divided by lines of {MARK}")
    parser.add_argument("--tokenizer", default="train", help="a tokenizer folder, or `train`")
    parser.add_argument("--vocab_size", type=int, default=8192, help="of the trained tokenizer")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "data_prep.json")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)  # the process that is timed
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run, args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        result = compare(args, Path(name))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    print(f"Written to {args.output}")


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Runs both ways in turns and checks that the ids agree."""
    before = circumstances(invocation("data_prep"), PACKAGES)
    text_bytes = write_corpus(args, folder)
    make_tokenizer(args, folder)
    seconds: dict[str, list[float]] = {f"{way} {imports}": [] for way in WAYS for imports in ("with", "without")}
    memory: dict[str, float] = {}
    for _ in range(args.repeat):
        for way in WAYS:
            whole, inside, peak = timed_process(way, folder)
            seconds[f"{way} with"].append(round(whole, 2))
            seconds[f"{way} without"].append(round(inside, 2))
            memory[way] = max(peak, memory.get(way, 0.0))
    documents = {way: read_documents(way, folder) for way in WAYS}
    same = documents["TextFiles"] == documents["ours"]
    tokens = sum(map(len, documents["ours"])) // 4
    return {
        **before,
        "text_bytes": text_bytes,
        "documents": len(documents["ours"]),
        "tokens": tokens,
        "same_ids_apart_from_document_ends": same,
        "seconds": seconds,
        "tokens_per_second": {key: round(tokens / statistics.median(values)) for key, values in seconds.items()},
        "ratio": {
            imports: round(
                statistics.median(seconds[f"TextFiles {imports}"]) / statistics.median(seconds[f"ours {imports}"]), 1
            )
            for imports in ("with", "without")
        },
        "peak_memory_gb": {way: round(value / 1e9, 2) for way, value in memory.items()},
    }


def write_corpus(args: argparse.Namespace, folder: Path) -> int:
    """The same text for both: 8 files to train on, a small one to validate on; returns their bytes."""
    from litmoe.data.documents import documents_of
    from litmoe.data.stories import generate_stories

    if args.text:
        documents = [text for text in documents_of(args.text.read_text(encoding="utf-8")) if text]
    else:
        documents, size = [], 0
        for story in generate_stories():
            if size >= args.megabytes * 1e6:
                break
            documents.append(story)
            size += len(story)
    cut = max(1, len(documents) // 20)
    (folder / "train").mkdir()
    (folder / "val").mkdir()
    shards = [documents[cut + i :: FILES] for i in range(FILES)]
    for name, shard in [("val/0.txt", documents[:cut]), *((f"train/{i}.txt", s) for i, s in enumerate(shards))]:
        (folder / name).write_text(f"\n{MARK}\n".join(shard), encoding="utf-8", newline="\n")
    return sum(path.stat().st_size for path in folder.rglob("*.txt"))


def make_tokenizer(args: argparse.Namespace, folder: Path) -> None:
    """Puts the tokenizer into ``folder``, in the form that both read."""
    from litmoe.data import tokenizers

    if args.tokenizer == "train":
        texts = (path.read_text(encoding="utf-8") for path in sorted((folder / "train").glob("*.txt")))
        files = tokenizers.train((text.replace(MARK, "") for text in texts), args.vocab_size)
    else:
        files = tokenizers.from_folder(Path(args.tokenizer))
    tokenizers.install(files, {"name": "benchmark"}, folder / "tokenizer")


def timed_process(way: str, folder: Path) -> tuple[float, float, float]:
    """Seconds of the whole process, seconds after its imports, peak memory of it and its children in bytes."""
    for place in OUTPUTS[way]:
        shutil.rmtree(folder / place, ignore_errors=True)
    command = [sys.executable, __file__, "--run", way, "--folder", str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    with peak_memory(process) as peak:
        output, _ = process.communicate()
        whole = time.perf_counter() - started
    lines = [line for line in output.splitlines() if line.startswith("SECONDS ")]
    if process.returncode or not lines:
        sys.exit(f"{way} failed:\n{output}")
    inside = float(lines[-1].split()[1])
    print(f"{way}: {whole:.2f} s, {inside:.2f} s of them after its imports", flush=True)
    return whole, inside, peak["all"]


def run(way: str, folder: Path) -> None:
    """What is timed."""
    if way == "TextFiles":
        from litdata import optimize  # noqa: F401
        from litgpt.data import TextFiles
        from litgpt.tokenizer import Tokenizer

        started = time.perf_counter()
        data = TextFiles(folder / "train", folder / "val")
        data.connect(Tokenizer(folder / "tokenizer"), batch_size=1, max_seq_length=256)
        data.prepare_data()
    else:
        import tiktoken  # noqa: F401
        import tokenizers  # noqa: F401

        from litmoe.data.prepare import PrepareArgs, prepare

        started = time.perf_counter()
        prepare(PrepareArgs(data_dir=folder, tokenizer_dir=folder / "tokenizer"))
    print(f"SECONDS {time.perf_counter() - started}")


def read_documents(way: str, folder: Path) -> list[bytes]:
    """The ids of every document (int32), sorted, without what stands between documents."""
    import numpy as np
    from litgpt.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder / "tokenizer")
    line_end = tokenizer.token_to_id("\u010a")
    documents = []
    for place in OUTPUTS[way]:
        index = json.loads((folder / place / "index.json").read_text(encoding="utf-8"))
        dtype = np.uint16 if index["config"]["data_format"] == ["no_header_tensor:20"] else np.int32
        chunks = [
            np.fromfile(folder / place / chunk["filename"], dtype=dtype, offset=4 * (chunk["chunk_size"] + 2))
            for chunk in index["chunks"]
        ]
        ids = np.concatenate(chunks).astype(np.int32)
        for piece in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id)):
            # A mark of its own begins each piece; TextFiles keeps the line ends around it.
            words = np.flatnonzero((piece != tokenizer.eos_id) & (piece != line_end))
            if len(words):
                documents.append(piece[words[0] : words[-1] + 1].tobytes())
    return sorted(documents)


def table(result: dict) -> str:
    """The result for people."""
    lines = [
        f"{result['text_bytes'] / 1e6:.1f} MB, {result['documents']:,} documents, {result['tokens']:,} tokens, "
        f"{result['hardware']['cores']} cores; the same ids apart from document ends: "
        f"{result['same_ids_apart_from_document_ends']}",
        f"{'':28} {'TextFiles':>12} {'ours':>12} {'ratio':>7}",
    ]
    for imports in ("with", "without"):
        speeds = [f"{result['tokens_per_second'][f'{way} {imports}']:,}" for way in WAYS]
        lines.append(
            f"{f'tokens/s, {imports} imports':28} {speeds[0]:>12} {speeds[1]:>12} {result['ratio'][imports]:>6}x"
        )
    memory = [f"{result['peak_memory_gb'][way]:.2f}" for way in WAYS]
    lines.append(f"{'peak memory, GB':28} {memory[0]:>12} {memory[1]:>12}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
