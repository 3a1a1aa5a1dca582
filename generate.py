"""Generate text with a trained model.

    uv run python generate.py --prompt "Once upon a time"
    uv run python generate.py checkpoints/final --prompt "Lily found a key" --temperature 0.5 --max_new_tokens 200
    uv run python generate.py --num_samples 5 --seed 7 > stories.txt
    uv run python generate.py --prompts beginnings.txt

The text goes to stdout as it is written, all messages to stderr.
"""

from litmoe.cli import run_cli
from litmoe.inference.generate_cli import main

if __name__ == "__main__":
    run_cli(main, optional_positional="checkpoint")
