"""Command line of chat.py. Modules that import torch are imported when they are used: ``--help`` must be fast."""

import sys
from pathlib import Path
from typing import Literal

from litmoe.cli import UserError
from litmoe.inference.console import discard_output, find_checkpoint, use_utf8

HOST, PORT = "127.0.0.1", 7860


def main(
    checkpoint: Path | None = None,
    web: bool = False,
    serve: bool = False,
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
    router: str | None = None,
) -> None:
    """Chat with a trained model: in the terminal, with --web on a web page, with --serve from clients of OpenAI's API.

    Args:
        checkpoint: Checkpoint folder. Default: the newest complete one under checkpoints/.
        web: Serve a web page.
        serve: Serve OpenAI's API. The sampling flags apply to requests that do not have these settings.
        compare: With --web, a second checkpoint that answers the same questions next to the first.
        temperature: Below 1, probable tokens become more probable. 0 always takes the most probable token.
        top_k: Sample only from this many most probable tokens; null for all tokens.
        top_p: Sample only from the fewest tokens with a total probability above this; 1 for all tokens.
        max_new_tokens: Maximum number of tokens in an answer.
        seed: The same seed gives the same answers to the same questions; null for different answers each time.
        max_seq_length: Tokens of conversation and answer together. Default: as many as in training.
        host: With --web or --serve, the address. With 0.0.0.0, everyone on the network can use the model.
        port: With --web or --serve, the port; 0 for any free port.
        device: cpu, cuda, cuda:1, mps. auto takes a GPU if there is one.
        precision: Type of the weights. auto is bf16-true on a GPU with bf16 support, else 32-true.
        router: Class path of the --moe.router that the checkpoint was trained with, to import its code.
    """
    if compare is not None and not web:
        raise UserError("--compare needs the web page: add --web.")
    if web and serve:
        raise UserError("--web and --serve are two servers: start each with a --port of its own.")
    if (host, port) != (HOST, PORT) and not (web or serve):
        raise UserError("--host and --port need a server: add --web for the page, or --serve for OpenAI's API.")
    # All checks come before the slow imports.
    folders = [find_checkpoint(checkpoint, router)]
    if compare is not None:
        folders.append(find_checkpoint(compare, router))

    from litmoe.inference.generate import Sampling, check_sampling, check_seed, load  # takes seconds

    # Before the models are loaded, which takes longest.
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_sampling(**sampling)
    if seed is not None:
        check_seed(seed)
    if web or serve:
        from litmoe.inference.http import listen

        # Open the port first: it may fail, and loading the models takes longer.
        with listen(host, port) as sock:
            models = [load(folder, device, precision, max_seq_length, router) for folder in folders]
            # Only one of the two imports, because Gradio takes seconds.
            if web:
                from litmoe.inference import web as page

                page.serve(models, sampling, seed, sock)
            else:
                from litmoe.inference import server

                server.serve(models[0], sampling, seed, sock)
        return

    from litmoe.inference.chat import Chat
    from litmoe.inference.terminal import Terminal

    model = load(folders[0], device, precision, max_seq_length, router)
    terminal = Terminal(Chat(model, seed=seed), sampling)
    # Bytes that are not UTF-8 stay recognizable, so that the terminal can report the line.
    use_utf8(sys.stdin, errors="surrogateescape")
    use_utf8(sys.stdout)
    try:
        terminal.run()
    except BrokenPipeError:  # `| head`
        discard_output()
