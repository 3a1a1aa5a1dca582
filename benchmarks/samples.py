"""What the quickstart model writes: twenty samples as they come, none chosen, into docs/SAMPLES.md.

    uv run python benchmarks/samples.py
    uv run python benchmarks/samples.py checkpoints/quickstart/final --temperature 0.6 --output my_samples.md

Each sample has a seed of its own, 0 to 19. Beside each stands how it ended and the longest run of words that it shares
with one story of the corpus, training and validation text together (case and punctuation aside). Sentences of the
grammar come back by design, so the same is measured for stories that the grammar tells for the first time.
"""

import operator
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit, cpu_name
from litmoe.cli import UserError, command, run_door

PACKAGES = ("torch", "litgpt", "lightning", "tokenizers")


def main(
    checkpoint: Path | None = None,
    text: Path = Path("data/stories"),
    prompt: str = "Once upon a time",
    temperature: float = 0.4,
    max_new_tokens: int = 256,
    seeds: int = 20,
    output: Path = Path("docs/SAMPLES.md"),
) -> None:
    """Writes unselected samples of a checkpoint, and what they share with the corpus, into a Markdown file.

    Args:
        checkpoint: The checkpoint folder; without one, the newest whole one under checkpoints/quickstart.
        text: The corpus that it was trained on: a folder with train/ and val/.
        prompt: What each sample begins with.
        temperature: Below 1 the likely tokens become likelier.
        max_new_tokens: Tokens per sample at most; a full context ends it before.
        seeds: Number of samples, seeds 0 to seeds - 1.
        output: The file to write.
    """
    from litmoe import checkpoints
    from litmoe.data.stories import FRIENDS, HEROES, generate_stories
    from litmoe.flops import count_parameters
    from litmoe.inference.generate import draw_samples, load

    folder = checkpoints.resolve(checkpoint, root=Path("checkpoints/quickstart"))
    corpus = searchable(read_corpus(text))
    model = load(folder)
    samples = []
    for seed in range(seeds):
        (sample,) = draw_samples(
            model.gpt, model.tokenizer, prompt, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens
        )
        samples.append((prompt + sample.text, sample.end))

    stories = [words_of(story) for story, _ in samples]
    runs = [longest_run(words, corpus) for words in stories]
    longest = max(range(seeds), key=lambda seed: len(runs[seed]))
    new = (words for words in map(words_of, generate_stories(seed=1)) if f" {' '.join(words)} " not in corpus)
    new_runs = [len(longest_run(words, corpus)) for words in islice(new, seeds)]
    casts = [{line.split("|")[0].strip().lower() for line in table.strip().splitlines()} for table in (HEROES, FRIENDS)]

    faithful = sum(all(len(cast & set(words)) == 1 for cast in casts) for words in stories)
    tied = bool(checkpoints.load_hyperparameters(folder).get("train", {}).get("tie_embeddings"))
    sizes = count_parameters(model.config, tie_embeddings=tied)
    mark = checkpoints.read_mark(folder)
    ended = sum(end == "end_of_text" for _, end in samples)
    facts = {
        "Command": f"`{command('benchmarks/samples.py', *sys.argv[1:])}`",
        "Commit, date": f"{commit()}, {datetime.now(UTC):%Y-%m-%d}",
        "Hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "Versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
        "Model": f"{sizes.total / 1e6:.2f} M parameters, {sizes.active / 1e6:.2f} M of them active for a token",
        "Training": f"{mark.step:,} steps, {mark.tokens:,} tokens",
        "Prompt, temperature": f"`{prompt}`, {temperature}",
        "Ended by themselves, at the end-of-text token": f"**{ended} of {seeds}**",
        "Different from each other": f"{len({story for story, _ in samples})} of {seeds}",
        "One hero and one friend from beginning to end": f"{faithful} of {seeds}",
        "Words in a sample": f"{mean(map(len, stories)):.0f} on average",
        "Found whole in the corpus": f"{sum(map(operator.eq, runs, stories))} of {seeds}",
        "Longest run of words copied from the corpus": f"**{len(runs[longest])}** (seed {longest}), on average"
        f" {mean(map(len, runs)):.0f}",
        f"The same for {seeds} new stories told by the grammar": f"{max(new_runs)}, on average {mean(new_runs):.0f}",
    }
    lines = [
        "# Samples of the quickstart model",
        "",
        f"Seeds 0 to {seeds - 1} as they came, none chosen or left out.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += [f"The longest run, word for word: *{' '.join(runs[longest])}*"]
    for seed, (story, end) in enumerate(samples):
        how = "ended by itself" if end == "end_of_text" else f"cut off ({end})"
        lines += ["", f"## Seed {seed}", "", "> " + story.strip().replace("\n", "\n>\n> "), ""]
        lines += [f"{how}; {len(stories[seed])} words, at most {len(runs[seed])} in a row from the corpus"]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{ended} of {seeds} ended by themselves; longest run from the corpus: {len(runs[longest])} words.")
    print(f"Written to {output}")


def read_corpus(folder: Path) -> Iterator[str]:
    """Every document of the corpus, training and validation text."""
    from litmoe.data.documents import documents_of, text_files

    files = [file for split in ("train", "val") for file in text_files(folder / split) if file.suffix == ".txt"]
    if not files:
        raise UserError(
            f"no .txt files in {folder}/train and {folder}/val; expected the text that the model was trained on. "
            "`uv run python run_train.py --config configs/quickstart.yaml` prepares it; --text names another folder."
        )
    for file in files:
        yield from documents_of(file.read_text(encoding="utf-8"))


def words_of(text: str) -> list[str]:
    """Lower case and without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def searchable(documents: Iterable[str]) -> str:
    """One string in which a run of words is found as ``" w1 w2 w3 "``, and never across two documents."""
    return "\n".join(f" {' '.join(words_of(document))} " for document in documents)


def longest_run(words: list[str], corpus: str) -> list[str]:
    """The longest run of consecutive words that one document of the corpus has too, the first of several."""
    best: list[str] = []
    for start in range(len(words)):
        while start + len(best) < len(words):
            longer = words[start : start + len(best) + 1]
            if f" {' '.join(longer)} " not in corpus:
                break
            best = longer
    return best


if __name__ == "__main__":
    run_door(main, optional_positional="checkpoint")
