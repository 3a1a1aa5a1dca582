"""Conversations and files with instructions."""

import json
from pathlib import Path
from typing import Any


def turn(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pairs(number: int, start: int = 0) -> list[dict[str, str]]:
    """Rows with different questions."""
    return [{"prompt": f"What is {i} + 1?", "response": f"{i + 1}."} for i in range(start, start + number)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows into a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
