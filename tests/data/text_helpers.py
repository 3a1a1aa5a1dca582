"""Write text files, and read the documents that prepared tokens spell."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from litmoe.data.documents import END_OF_TEXT

ROOT = Path(__file__).resolve().parents[2]


def put(path: Path, texts: list[str]) -> Path:
    """Write documents into a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"\n{END_OF_TEXT}\n".join(texts), encoding="utf-8", newline="\n")
    return path


def put_rows(path: Path, texts: list, column: str = "text") -> Path:
    """Write documents as the rows of a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"id": number, column: text}) for number, text in enumerate(texts)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def lay(folder: Path, names: list[str]) -> Path:
    """Write files with documents that begin with the path of their file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("jsonl"):
            put_rows(path, [f"{name} {number}" for number in range(30)])
        else:
            path.write_text(name, encoding="utf-8")
    return folder


def token_ids(data_dir: Path, split: str) -> np.ndarray:
    """The tokens of a split, read from litdata's chunk files."""
    folder = data_dir / "tokens" / split
    index = json.loads((folder / "index.json").read_text())
    assert index["config"]["data_format"] == ["no_header_tensor:20"]  # uint16
    return np.concatenate([np.fromfile(folder / chunk["filename"], np.uint16, offset=12) for chunk in index["chunks"]])


def decoded(data_dir: Path, split: str) -> list[str]:
    """The documents that the tokens of a split spell, each ended by the end-of-text id."""
    tokenizer = Tokenizer.from_file(str(data_dir.parent / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = token_ids(data_dir, split)
    assert ids[-1] == end
    return [tokenizer.decode(piece.tolist()) for piece in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]


def both(data_dir: Path) -> list[str]:
    """The documents of both splits, sorted."""
    return sorted(decoded(data_dir, "train") + decoded(data_dir, "val"))


def chunks(data_dir: Path) -> dict[str, bytes]:
    """The content of all chunk files."""
    return {path.relative_to(data_dir).as_posix(): path.read_bytes() for path in data_dir.rglob("chunk-*.bin")}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with inode and time of change, without locks."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }
