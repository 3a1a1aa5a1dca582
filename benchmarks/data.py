"""How fast is text prepared? Against LitGPT, on the same text and the same cores.

    uv run python benchmarks/data.py prepare                     # 20 MB of the built-in stories, 1 to 4 minutes
    uv run python benchmarks/data.py prepare --megabytes 100 --repeat 1
    uv run python benchmarks/data.py prepare --megabytes 1000 --side ours    # does memory grow with the text?

`prepare_data.py` against LitGPT's TextFiles, each a process of its own, timed from start to end with its
imports. The sides take turns. TextFiles puts no end-of-text token after a document; apart from that both must produce
the same token ids, which is checked. Peak memory is that of all processes together.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common
from benchmarks.common import Row, make_table

SEPARATOR = "<|endoftext|>"
TRAINING_FILES = 8  # TextFiles divides its work by files
TOKEN_FOLDERS = {"TextFiles": ("train/train", "val/val"), "ours": ("tokens/train", "tokens/val")}


def main() -> None:
    parser = common.make_parser(__doc__, "data_prep")
    parser.add_argument("mode", choices=("prepare",))
    parser.add_argument("--megabytes", type=float, default=20, help="size of the text")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side; the median counts")
    parser.add_argument("--side", choices=("both", "ours"), default="both", help="measure both, or only ours")
    args = parser.parse_args()
    result = common.start(args, "litgpt", "litdata", "torch", "tokenizers", "tiktoken")
    sides = ("TextFiles", "ours") if args.side == "both" else ("ours",)
    with tempfile.TemporaryDirectory() as folder:
        result |= measure_preparation(sides, args.megabytes, args.repeat, Path(folder))
    add_preparation_table(result)
    common.write_result(result, args.output)
    common.print_table(result)


def measure_preparation(sides: Iterable[str], megabytes: float, repeat: int, folder: Path) -> Row:
    """Let the sides tokenize the same text in turns, and check that their ids agree."""
    # Each side gets a copy of the text, because TextFiles writes its tokens (and other files) next to it.
    text_bytes = write_text(megabytes, folder / "ours")
    shutil.copytree(folder / "ours", folder / "TextFiles")
    # Both sides use one tokenizer. prepare_data.py trains it on this text, before anything is timed.
    prepare(folder, "--tokenizer", "train", "--vocab_size", "8192")

    turns = common.take_turns({side: partial(timed_preparation, side, folder) for side in sides}, repeat)
    documents = read_documents("ours", folder)
    tokens = sum(map(len, documents)) // 4  # int32
    result: Row = {"text_bytes": text_bytes, "documents": len(documents), "tokens": tokens}
    result |= {"seconds": {}, "peak_memory_gb": {}, "tokens_per_second": {}}
    for side in sides:
        seconds = [turn[side][0] for turn in turns]
        result["seconds"][side] = [round(value, 2) for value in seconds]
        result["peak_memory_gb"][side] = [round(turn[side][1], 2) for turn in turns]
        result["tokens_per_second"][side] = round(tokens / median(seconds))
    if "TextFiles" in sides:
        result["same_ids_apart_from_document_ends"] = read_documents("TextFiles", folder) == documents
        speeds = result["tokens_per_second"]
        result["times_textfiles"] = round(speeds["ours"] / speeds["TextFiles"], 1)
    return result


def write_text(megabytes: float, folder: Path) -> int:
    """Write 8 training files and a small validation file of built-in stories. Return their size in bytes."""
    from litmoe.data.stories import generate_stories

    stories, size = [], 0
    for story in generate_stories():
        if size >= megabytes * 1e6:
            break
        stories.append(story)
        size += len(story)
    # The validation set is small, as in real corpora.
    number_of_val = max(1, len(stories) // 20)
    files = {"val/0.txt": stories[:number_of_val]}
    for index in range(TRAINING_FILES):
        files[f"train/{index}.txt"] = stories[number_of_val + index :: TRAINING_FILES]
    for name, texts in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"\n{SEPARATOR}\n".join(texts), encoding="utf-8", newline="\n")
    return sum(path.stat().st_size for path in folder.rglob("*.txt"))


def timed_preparation(side: str, folder: Path) -> tuple[float, float]:
    """Return the seconds of one side's process, and the peak memory of it and its children in GB."""
    for place in (*TOKEN_FOLDERS[side], "tokens"):  # tokens: with our metadata
        shutil.rmtree(folder / side / place, ignore_errors=True)
    if side == "ours":
        return prepare(folder)
    return run([sys.executable, "-c", f"from benchmarks.data import run_text_files as f; f({str(folder)!r})"])


def prepare(folder: Path, *flags: str) -> tuple[float, float]:
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--data_dir", str(folder / "ours")]
    return run([*command, "--tokenizer_dir", str(folder / "tokenizer"), *flags])


def run(command: list[str]) -> tuple[float, float]:
    """Run a command. Return its seconds and its peak memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Both sides start worker processes, whose memory counts.
    with common.peak_memory(process) as peak:
        output, _ = process.communicate()
        seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)} failed:\n{output}")
    print(f"{seconds:.2f} s: {' '.join(command[1:3])}", flush=True)
    return seconds, peak["bytes"] / 1e9


def run_text_files(folder: str) -> None:
    from litgpt.data import TextFiles
    from litgpt.tokenizer import Tokenizer

    # As in `litgpt pretrain`, with LitGPT's defaults.
    data = TextFiles(Path(folder, "TextFiles", "train"), Path(folder, "TextFiles", "val"))
    data.connect(Tokenizer(Path(folder, "tokenizer")), batch_size=1, max_seq_length=256)
    data.prepare_data()


def read_documents(side: str, folder: Path) -> list[bytes]:
    """Return the token ids (int32) of every document, sorted, without what is between documents."""
    import numpy as np
    from litgpt.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder / "tokenizer")
    line_end = tokenizer.token_to_id("\u010a")  # "\n" in a byte-level vocabulary
    documents = []
    for place in TOKEN_FOLDERS[side]:
        tokens_dir = folder / side / place
        index = json.loads((tokens_dir / "index.json").read_text(encoding="utf-8"))
        # litdata numbers its data formats; 20 is uint16.
        is_uint16 = index["config"]["data_format"] == ["no_header_tensor:20"]
        dtype = np.uint16 if is_uint16 else np.int32
        chunks = []
        for chunk in index["chunks"]:
            # A chunk starts with the number of its items and their offsets, 4 bytes each.
            header_bytes = 4 * (chunk["chunk_size"] + 2)
            chunks.append(np.fromfile(tokens_dir / chunk["filename"], dtype=dtype, offset=header_bytes))
        ids = np.concatenate(chunks).astype(np.int32)
        for piece in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id)):
            # Each piece starts with its separator; TextFiles also keeps the line ends around it.
            inside = np.flatnonzero((piece != tokenizer.eos_id) & (piece != line_end))
            if len(inside):
                documents.append(piece[inside[0] : inside[-1] + 1].tobytes())
    return sorted(documents)


def add_preparation_table(result: Row) -> None:
    rows = []
    for side, name in (("TextFiles", "LitGPT's `TextFiles`"), ("ours", "**`prepare_data.py`**")):
        if side in result["seconds"]:
            seconds = f"{median(result['seconds'][side]):.2f}"
            memory = f"{max(result['peak_memory_gb'][side]):.2f} GB"
            rows.append([name, seconds, f"{result['tokens_per_second'][side]:,}", memory])
    result["table"] = make_table(("", "seconds", "tokens/s", "peak memory"), rows)
    if "times_textfiles" in result:
        what = f"tokenizing {result['text_bytes'] / 1e6:.0f} MB of text"
        result["headline"] = [[what, f"{result['times_textfiles']} times as fast as LitGPT's `TextFiles`"]]


if __name__ == "__main__":
    main()
