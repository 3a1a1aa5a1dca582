"""Export a checkpoint to a Hugging Face folder that `transformers` loads without custom code, or import such a folder.

    uv run python export_hf.py checkpoints/final exported/
    uv run python export_hf.py checkpoints/final exported/ --dtype bfloat16
    uv run python export_hf.py checkpoints/final exported/ --push ORG/NAME
    uv run python export_hf.py --import HF_FOLDER checkpoints/imported

Both models are run and compared before the new folder is complete. litmoe/export/huggingface.py lists its files.
"""

import sys

from litmoe.cli import run_cli
from litmoe.export.cli import import_folder, main

if __name__ == "__main__":
    # --import=FOLDER is the same as --import FOLDER.
    words = [word for argument in sys.argv[1:] for word in argument.split("=", argument.startswith("--import="))]
    if "--import" in words:
        words.remove("--import")
        run_cli(import_folder, words)
    else:
        run_cli(main)
