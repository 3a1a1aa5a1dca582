"""The flags of ``prepare_data.py``."""

from dataclasses import dataclass
from pathlib import Path

from litmoe.cli import UserError
from litmoe.data import corpora
from litmoe.data.documents import END_OF_TEXT, SPLITS

MINIMUMS = {"vocab_size": 257, "max_documents": 1, "num_workers": 0}
"""Smallest values of flags. A vocabulary contains 256 bytes and the end-of-text token."""


@dataclass
class PrepareArgs:
    """Turn text into tokens for training.

    With --instruct, conversations are prepared instead: `prepare_data.py --instruct stories --help`.
    """

    source: str | None = None
    """Where the text comes from: a file (.txt, .md, .jsonl, .json, .csv, .tsv, each also as .gz, .bz2, .xz or .zst, or
    .parquet); a folder of such files (files named val, valid, validation or dev are validation text, files named test
    are left out); `sample` (built-in stories, no network); a corpus of the Hugging Face Hub by name (`tinystories`, 2.1
    million stories, 1.9 GB; `shakespeare`, 1 MB; `wikitext-103`, 0.5 GB; `openwebtext`, 8.0 million documents, 9.0 B
    GPT-2 tokens; `fineweb-edu`, its sample-10BT, 9.7 million documents, 10 B GPT-2 tokens, 28 GB of parquet); or
    `hf:ORG/NAME[:CONFIG]`, any dataset of the Hub with a column of text. Default: the text in DATA_DIR/train and
    DATA_DIR/val, or else tinystories."""
    data_dir: Path = Path("data/custom_text")
    """Folder of the corpus: text in train/ and val/, tokens in tokens/."""
    tokenizer: str | None = None
    """A tokenizer of the Hugging Face Hub, a folder with a tokenizer.json, or `train`: a byte-level BPE trained on this
    text. Default: the one in TOKENIZER_DIR, or else gpt2."""
    tokenizer_dir: Path = Path("data/tokenizer")
    """Folder where the tokenizer is stored."""
    vocab_size: int | None = None
    """Number of tokens of a trained tokenizer (default 8192); a small text may give fewer."""
    val_fraction: float | None = None
    """Share of the documents that become validation text, chosen by their hash, if the corpus has none (default 0.1;
    openwebtext 0.0005, fineweb-edu 0.001, hf: 0.01)."""
    document_separator: str = ""
    """A line of a .txt that ends a document, in addition to the line <|endoftext|>; '\\n' is an empty line. Without
    such a line a file is one document."""
    text_column: str | None = None
    """Field of a .jsonl or .json, or column of a .parquet, .csv or .tsv, that holds the text. Default: `text`, or the
    only one with text (a .csv or .tsv must have a column `text` then)."""
    max_documents: int | None = None
    """Take at most this many documents from the beginning of the source (for a quick try)."""
    skip_broken: bool = False
    """Leave out rows that cannot be read, such as a line of a .jsonl that is not JSON, and count them."""
    keep_text: bool = False
    """Also write the text of a Hub corpus to DATA_DIR/train and DATA_DIR/val, not only its tokens."""
    overwrite: bool = False
    """Replace another corpus or tokenizer, and build everything again."""
    num_workers: int | None = None
    """Tokenizing threads; 0 tokenizes in the main thread. Default: one for each core."""
    log_to_wandb: bool = False
    """Log text and tokens to Weights & Biases as a dataset (also by WANDB_LOG_DATASET=1)."""
    wandb_artifact: str | None = None
    """Name of that dataset (default: dataset-FOLDER)."""
    wandb_project: str | None = None
    """Its project (default: WANDB_PROJECT)."""
    wandb_entity: str | None = None
    """Its user or team (default: WANDB_ENTITY)."""

    @property
    def separator(self) -> str | None:
        """The separator line; None for none, or for the one that always separates."""
        given = self.document_separator.replace("\\n", "\n")
        if given in ("", END_OF_TEXT):
            return None
        return given if given.strip("\n") else ""

    def check(self) -> None:
        """Raise one ``UserError`` with all problems that are visible before anything is read."""
        problems = self._problems_of_values()
        source = corpora.find(self.source) if self.source is not None else None
        if isinstance(source, Path):
            corpora.source_files(source)
            problems += self._problems_of_path(source)
        if problems:
            raise UserError("\n".join(problems))

    def _problems_of_values(self) -> list[str]:
        problems = []
        for name, minimum in MINIMUMS.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                problems.append(f"--{name} {value}: expected {minimum} or more.")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            problems.append(f"--val_fraction {self.val_fraction}: expected a number between 0 and 1, such as 0.1.")
        if self.separator is not None and "\n" in self.separator:
            problems.append(
                f"--document_separator {self.document_separator!r}: expected one line; '\\n' is an empty one."
            )
        if self.vocab_size is not None and self.tokenizer != "train":
            problems.append("--vocab_size needs --tokenizer train; other tokenizers have a fixed size.")
        return problems

    def _problems_of_path(self, source: Path) -> list[str]:
        """Name why the source cannot be read into ``data_dir``: one of them is inside of the other."""
        path, data_dir = source.resolve(), self.data_dir.resolve()
        prepared = [data_dir / name for name in (*SPLITS, "tokens")]
        if path == data_dir or any(path.is_relative_to(folder) for folder in prepared):
            return [f"--source {source} is the prepared text; leave out --source to use it."]
        if data_dir.is_relative_to(path):
            return [f"--data_dir {self.data_dir} is inside of --source {source}; choose one outside of it."]
        return []
