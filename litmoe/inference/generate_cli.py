"""Command line of generate.py. Modules that import torch are imported when they are used: ``--help`` must be fast."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litmoe.cli import UserError, strip_control_chars
from litmoe.inference.console import discard_output, find_checkpoint, use_utf8

# Not imported when the program runs: the module imports torch.
if TYPE_CHECKING:
    from litmoe.inference.generate import Piece


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
    router: str | None = None,
) -> None:
    """Generate text with a trained model. The text goes to stdout as it is written, all messages to stderr.

    Args:
        checkpoint: Checkpoint folder. Default: the newest complete one under checkpoints/.
        prompt: Beginning of the text. Default: "Once upon a time". An empty one starts a new document.
        prompts: Text file with one prompt per line, instead of --prompt. All are continued in one batch.
        max_new_tokens: Maximum number of tokens. A sample ends earlier at an end-of-text token or a full context.
        num_samples: Samples for each prompt, all in one batch.
        temperature: Below 1, probable tokens become more probable. 0 always takes the most probable token.
        top_k: Sample only from this many most probable tokens; null for all tokens.
        top_p: Sample only from the fewest tokens with a total probability above this; 1 for all tokens.
        seed: The same seed gives the same text on the same machine. Sample i uses this seed plus i.
        max_seq_length: Tokens of prompt and text together. Default: as many as in training.
        device: cpu, cuda, cuda:1, mps. auto takes a GPU if there is one.
        precision: Type of the weights. auto is bf16-true on a GPU with bf16 support, else 32-true.
        router: Class path of the --moe.router that the checkpoint was trained with, to import its code.
    """
    if prompt is not None and prompts is not None:
        raise UserError("got both --prompt and --prompts; use one of them.")
    if prompts is not None:
        texts = read_prompts(prompts)
    else:
        # An empty prompt is allowed, so only None is replaced.
        texts = ["Once upon a time" if prompt is None else prompt]
    folder = find_checkpoint(checkpoint, router)

    from litmoe.inference.generate import load, stream_pieces  # takes seconds

    model = load(folder, device, precision, max_seq_length, router)
    use_utf8(sys.stdout)
    # Loading the model does not count.
    start = time.perf_counter()
    pieces = stream_pieces(
        model.gpt,
        model.tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    try:
        n_full = print_samples(pieces, texts, num_samples)
    except BrokenPipeError:  # `| head`
        discard_output()
        return
    if n_full:
        # To stderr, so that a file with the output contains only the texts.
        context, n_samples = model.gpt.max_seq_length, len(texts) * num_samples
        print(f"Note: {n_full} of {n_samples} samples filled the context of {context:,} tokens.", file=sys.stderr)
    print(f"Generated in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def print_samples(pieces: "Iterable[Piece]", texts: list[str], num_samples: int) -> int:
    """Print each sample after its prompt as it is written, and return how many samples filled the context."""
    # A model may write control characters: a terminal would execute them, a file gets them unchanged.
    clean = strip_control_chars if sys.stdout.isatty() else str
    sample, n_samples, n_full = -1, len(texts) * num_samples, 0
    for piece in pieces:
        if piece.sample != sample:
            sample = piece.sample
            if n_samples > 1:
                print(f"--- sample {sample + 1} of {n_samples} ---")
            print(clean(texts[sample // num_samples]), end="")
        print(clean(piece.text), end="\n" if piece.end else "", flush=True)
        n_full += piece.end == "block_size"
    return n_full


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt per line; empty lines are skipped.

    Raises:
        UserError: the file does not exist, has no prompts, or is not text.
    """
    from litmoe.data.files import first_bad_line, open_text, undecoded

    try:
        # newline=None, so that line ends of Windows are not part of a prompt.
        with open_text(path, newline=None) as file:
            text = file.read()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"found no file {path}; expected a text file with one prompt per line.") from None
    if undecoded(text):
        raise UserError(first_bad_line(path))
    # Not splitlines(), which also splits at U+2028 and other characters that a prompt may contain.
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} is empty; expected one prompt per line.")
    return prompts
