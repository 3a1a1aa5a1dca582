"""Writes text with a trained model.

    uv run python generate.py --prompt "Once upon a time"
    uv run python generate.py checkpoints/final --prompt "Lily found a key" --temperature 0.5 --max_new_tokens 200
    uv run python generate.py --num_samples 5 --seed 7 > stories.txt
    uv run python generate.py --prompts beginnings.txt

The text goes to stdout as it is written, everything else to stderr.
"""

import os
import sys
import time
from pathlib import Path
from typing import Literal

from litmoe.cli import UserError, harmless, run_door


def main(
    checkpoint: Path | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    max_new_tokens: int = 256,
    num_samples: int = 1,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int = 42,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-true", "16-true"] = "auto",
) -> None:
    """Writes text with a trained model. The text goes to stdout as it is written, everything else to stderr.

    Args:
        checkpoint: The checkpoint folder; without one, the newest whole one under checkpoints/.
        prompt: What the text begins with, "Once upon a time" unless told; an empty one starts a new document.
        prompts: A text file, a prompt in each line, instead of one prompt; all are continued in one batch.
        max_new_tokens: Tokens to write at most. A sample ends before at the end-of-text token or a full context.
        num_samples: Samples to write for each prompt, all in one batch.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the most probable one.
        top_k: Sample among this many most probable tokens; null for all.
        top_p: Sample among the fewest tokens whose probability exceeds this; 1 for all.
        seed: The same seed writes the same text on the same machine; of several, the next one has the next seed.
        max_seq_length: Tokens of prompt and text together; null for the length that the model was trained at.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.
        precision: Type of the weights; auto is bf16-true on a GPU that computes in it, else 32-true.
    """
    from litmoe import checkpoints

    if prompt is not None and prompts is not None:
        raise UserError("got both --prompt and --prompts; give one of them.")
    beginnings = read_prompts(prompts) if prompts else ["Once upon a time" if prompt is None else prompt]
    folder = checkpoints.resolve(checkpoint)
    mark = checkpoints.read_mark(folder)
    print(
        f"{'The newest checkpoint' if checkpoint is None else 'Checkpoint'}: {folder}, step {mark.step:,}",
        file=sys.stderr,
    )
    from litmoe.inference.generate import load, stream_pieces  # takes seconds

    model = load(folder, device, precision, max_seq_length)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]  # Windows consoles

    shown = harmless if sys.stdout.isatty() else str
    start, cut, began, samples = time.perf_counter(), 0, -1, len(beginnings) * num_samples
    pieces = stream_pieces(
        model.gpt,
        model.tokenizer,
        beginnings,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    try:
        for piece in pieces:
            if piece.sample != began:
                began = piece.sample
                if samples > 1:
                    print(f"--- sample {began + 1} of {samples} ---")
                print(shown(beginnings[began // num_samples]), end="")
            print(shown(piece.text), end="\n" if piece.end else "", flush=True)
            cut += piece.end == "block_size"
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if cut:
        print(
            f"Note: {cut} of {samples} filled the model's context of {model.gpt.max_seq_length:,} tokens.",
            file=sys.stderr,
        )
    print(f"Written in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def read_prompts(path: Path) -> list[str]:
    from litmoe.data.files import read_text

    try:
        lines = read_text(path).split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"found no file at {path}; expected a text file with a prompt in each line.") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} is empty; expected a prompt in each line.")
    return prompts


if __name__ == "__main__":
    run_door(main, optional_positional="checkpoint")
