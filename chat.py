"""Chat with a trained model, in the terminal or on a web page.

    uv run python chat.py                                                    # the newest checkpoint
    uv run python chat.py checkpoints/quickstart/final --temperature 0.5
    echo "Write a story about a cat." | uv run python chat.py                # only the answers on stdout, for pipes
    uv run python chat.py checkpoints/a/final --web
    uv run python chat.py checkpoints/a/final --web --compare checkpoints/b/final      # two models side by side

`/help` lists the commands of the terminal. By default, only this computer can open the page. It needs no network.
"""

from litmoe.cli import run_cli
from litmoe.inference.chat_cli import main

if __name__ == "__main__":
    run_cli(main, optional_positional="checkpoint")
