"""Talks with a trained model, in the terminal or on a page in the browser.

    uv run python chat.py                                                    # the newest checkpoint, or name one
    uv run python chat.py checkpoints/quickstart/final --temperature 0.5
    echo "Write a story about a cat." | uv run python chat.py                # answers alone, for pipes
    uv run python chat.py checkpoints/a/final --web
    uv run python chat.py checkpoints/a/final --web --compare checkpoints/b/final      # two side by side

`/help` lists the commands of the terminal. The page is served to this machine alone and needs no network.
"""

import os
import sys
from pathlib import Path
from typing import Literal

from litmoe.cli import UserError, run_door

HOST, PORT = "127.0.0.1", 7860


def main(
    checkpoint: Path | None = None,
    web: bool = False,
    compare: Path | None = None,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int | None = None,
    max_seq_length: int | None = None,
    host: str = HOST,
    port: int = PORT,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-true", "16-true"] = "auto",
) -> None:
    """Talks with a trained model, in the terminal or, with --web, on a page in the browser.

    Args:
        checkpoint: The checkpoint folder; without one, the newest whole one under checkpoints/.
        web: Serve a page for the browser.
        compare: With --web, a second checkpoint that answers the same questions beside the first.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the most probable one.
        top_k: Sample among this many most probable tokens; null for all.
        top_p: Sample among the fewest tokens whose probability exceeds this; 1 for all.
        max_new_tokens: Tokens in an answer at most.
        seed: The same seed gives the same answers to the same questions; null for others each time.
        max_seq_length: Tokens of conversation and answer together; null for the length that the model was trained at.
        host: With --web, the address to serve; 0.0.0.0 serves everybody on the network.
        port: With --web, its port; 0 for any that is free.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.
        precision: Type of the weights; auto is bf16-true on a GPU that computes in it, else 32-true.
    """
    from litmoe import checkpoints

    if compare is not None and not web:
        raise UserError("--compare shows two models on the page in the browser: add --web.")
    if (host, port) != (HOST, PORT) and not web:
        raise UserError("--host and --port are of the page in the browser: add --web.")
    folders = [checkpoints.resolve(folder) for folder in ([checkpoint] if compare is None else [checkpoint, compare])]
    for folder in folders:
        print(f"{'The newest checkpoint' if checkpoint is None else 'Checkpoint'}: {folder}", file=sys.stderr)
    from litmoe.inference.generate import Sampling, check_sampling, check_seed, load  # takes seconds

    check_sampling(1, max_new_tokens, temperature, top_k, top_p)
    if seed is not None:
        check_seed(seed)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if web:
        from litmoe.inference.web import listen, serve  # takes seconds more

        with listen(host, port) as sock:  # before the models are loaded: it may fail
            serve([load(folder, device, precision, max_seq_length) for folder in folders], sampling, seed, sock)
        return
    from litmoe.inference.chat import Chat
    from litmoe.inference.terminal import Terminal

    terminal = Terminal(Chat(load(folders[0], device, precision, max_seq_length), seed=seed), sampling)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]  # Windows consoles
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        terminal.run()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_door(main, optional_positional="checkpoint")
