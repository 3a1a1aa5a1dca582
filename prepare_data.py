"""Turns text into tokens that `run_train.py` reads.

    uv run python prepare_data.py                                          # TinyStories, GPT-2's tokenizer
    uv run python prepare_data.py --source sample --tokenizer train        # built-in stories: no network needed
    uv run python prepare_data.py --source my_texts/ --data_dir data/mine  # .txt, .jsonl or .parquet

Text goes into DATA_DIR/train and DATA_DIR/val, tokens into DATA_DIR/tokens, the tokenizer into TOKENIZER_DIR. Text that
already lies in train/ and val/ is tokenized as it lies. Called again, it builds anew only what changed.
"""

if __name__ == "__main__":
    # Imported here alone: processes that tokenize do not need it.
    from recipe.cli import exit_with_message, run_door
    from recipe.data.prepare import PrepareArgs, prepare

    args = run_door(PrepareArgs)
    exit_with_message(lambda: prepare(args))
