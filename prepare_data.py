"""Turn text into tokens that `run_train.py` reads.

    uv run python prepare_data.py                                          # TinyStories, GPT-2's tokenizer
    uv run python prepare_data.py --source sample --tokenizer train        # built-in stories: no network needed
    uv run python prepare_data.py --source fineweb-edu --data_dir data/fineweb-edu
    uv run python prepare_data.py --source hf:ORG/NAME:CONFIG --text_column body --data_dir data/theirs
    uv run python prepare_data.py --source my_texts/ --data_dir data/mine  # .txt, .jsonl, ...

Only tokens are written, to DATA_DIR/tokens; --keep_text also writes the text. Without --source, the text that you put
into DATA_DIR/train and DATA_DIR/val is tokenized. A second call does nothing if nothing changed. After an interruption,
the same command resumes.

With --instruct, it prepares conversations for finetune.py instead (`--instruct stories --help` lists its flags):

    uv run python prepare_data.py --instruct stories                       # 6,000 requests for built-in stories
    uv run python prepare_data.py --instruct alpaca_data.json --data_dir data/alpaca
    uv run python prepare_data.py --instruct hf:databricks/databricks-dolly-15k --data_dir data/dolly
"""

if __name__ == "__main__":
    import sys

    from litmoe.cli import exit_with_message, run_cli
    from litmoe.data.prepare import PrepareArgs, prepare

    if any(argument.partition("=")[0] == "--instruct" for argument in sys.argv[1:]):
        from litmoe.data.instructions import InstructArgs, prepare_instructions

        instruct_args = run_cli(InstructArgs)
        exit_with_message(lambda: prepare_instructions(instruct_args))
    else:
        args = run_cli(PrepareArgs)
        exit_with_message(lambda: prepare(args))
