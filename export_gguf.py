"""Export a checkpoint to one GGUF file that llama.cpp, Ollama and LM Studio run, with a Modelfile for Ollama.

    uv run python export_gguf.py checkpoints/final gguf/my-model.gguf
    uv run python export_gguf.py checkpoints/final gguf/my-model.gguf --quantize q8_0

The file is compared with the checkpoint before it is complete, also in llama.cpp if xllamacpp is installed.
"""

from litmoe.cli import run_cli
from litmoe.export.cli import export_gguf

if __name__ == "__main__":
    run_cli(export_gguf)
