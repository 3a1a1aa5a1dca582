"""What finetuning changes: the quickstart's model learns to write the story that it is asked for.

    uv run python benchmarks/finetuning.py

Tunes checkpoints/quickstart/final (`make quickstart` makes it) on `prepare_data.py --instruct stories`, all weights and
LoRA, and measures before and after: the loss on the held-out answers, and for 50 held-out requests whether the answer
ends by itself and names whom it was asked to name. Writes benchmarks/results/finetuning.json.
"""

import json
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import circumstances, invocation
from litmoe.cli import run_door

PACKAGES = ("torch", "litgpt", "lightning", "tokenizers")
RUN_FILE = "configs/finetune-quickstart.yaml"
WAYS = {"all weights": [], "LoRA": ["--lora_r", "16", "--lora_mlp", "true", "--lora_projection", "true"]}
REQUESTS = 50


def main(
    checkpoint: Path = Path("checkpoints/quickstart/final"),
    data_dir: Path = Path("data/instruct"),
    out_dir: Path = Path("checkpoints/finetuning-benchmark"),
    temperature: float = 0.4,
    output: Path = Path("benchmarks/results/finetuning.json"),
) -> None:
    """Tunes a checkpoint in two ways and measures before and after.

    Args:
        checkpoint: What is tuned.
        data_dir: The conversations; made where they are not there.
        out_dir: Where the tuned checkpoints go; what lies there is replaced.
        temperature: Of the answers.
        output: The file to write.
    """
    result = circumstances(invocation("finetuning"), PACKAGES)
    result |= {"checkpoint": checkpoint.as_posix(), "requests": REQUESTS, "temperature": temperature}
    run("prepare_data.py", "--instruct", "stories", "--data_dir", str(data_dir))
    result["before"] = measure(checkpoint, data_dir, temperature)
    for way, flags in WAYS.items():
        folder = out_dir / way.replace(" ", "-")
        start = time.perf_counter()
        run(
            *("finetune.py", str(checkpoint), "--config", RUN_FILE, "--overwrite", "true"),
            *("--data_dir", str(data_dir), "--out_dir", str(folder), *flags),
        )
        seconds = time.perf_counter() - start
        result[way] = {"flags": flags, "seconds": round(seconds)} | measure(folder / "final", data_dir, temperature)
        print(way, json.dumps({key: value for key, value in result[way].items() if key != "answers"}, indent=2))
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8", newline="\n")


def run(script: str, *flags: str) -> None:
    """A door of this project, in a process of its own."""
    subprocess.run([sys.executable, script, *flags], cwd=ROOT, check=True)


def measure(checkpoint: Path, data_dir: Path, temperature: float) -> dict[str, Any]:
    """The loss on all held-out answers, and what becomes of the first held-out requests."""
    from litmoe import load
    from litmoe.data.conversations import DEFAULT_STYLE, is_tuned, load_prompt_style, prompt_style, prompt_text
    from litmoe.evaluation.answers import evaluate
    from litmoe.inference.generate import draw_samples

    loss = evaluate(checkpoint, data_dir)
    model, style = load(checkpoint), load_prompt_style(checkpoint)
    style = style if is_tuned(style) else prompt_style(DEFAULT_STYLE)
    with open(data_dir / "val.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, REQUESTS)]
    answers = []
    for seed, row in enumerate(rows):
        prompt = prompt_text(row["messages"][:1], style)
        (answer,) = draw_samples(model.gpt, model.tokenizer, prompt, seed=seed, temperature=temperature)
        named = [name for name in row["names"] if re.search(rf"\b{name}\b", answer.text)]
        answers.append(
            {
                "request": row["messages"][0]["content"],
                "answer": answer.text,
                "ends": answer.end == "end_of_text",
                "names": len(named) == len(row["names"]),
            }
        )
    return {
        "loss": loss.loss,
        "answer_tokens": loss.answer_tokens,
        "ended_by_themselves": sum(answer["ends"] for answer in answers),
        "used_the_names": sum(answer["names"] for answer in answers),
        "answers": answers,
    }


if __name__ == "__main__":
    run_door(main)
