"""Chat with a trained model: in the terminal, on a web page, or from clients of OpenAI's API.

    uv run python chat.py                                                    # the newest checkpoint
    uv run python chat.py checkpoints/quickstart/final --temperature 0.5
    echo "Write a story about a cat." | uv run python chat.py                # only the answers on stdout, for pipes
    uv run python chat.py checkpoints/a/final --web
    uv run python chat.py checkpoints/a/final --web --compare checkpoints/b/final      # two models side by side
    uv run python chat.py checkpoints/a/final --serve                                  # for clients of OpenAI's API

`/help` lists the commands of the terminal. By default, only this computer can use page and API. They need no network.
"""

from litmoe.cli import run_cli
from litmoe.inference.chat_cli import main

if __name__ == "__main__":
    run_cli(main, optional_positional="checkpoint")
