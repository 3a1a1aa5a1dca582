"""The model card: what a stranger on the Hub has to know, from what the checkpoint knows."""

import csv
import json
from pathlib import Path
from typing import Any

from litgpt import Config

from litmoe import checkpoints
from litmoe.flops import count_parameters

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

A {kind} of {size}, {origin} LitMoE ([LitGPT](https://github.com/Lightning-AI/litgpt)) and
converted to `{architecture}`: no custom code is needed.

{table}

## How to run it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{title}"  # of the repository on the Hub, or the path of this folder
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
{call}
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

## Limits

{limits} Its text may be wrong or offensive; it was not tested for any use.

## Licence

None was chosen yet. Whoever publishes this model chooses one that the training text allows, writes it here and adds
`license:` to the header above.
"""
_CONTINUE = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={new})"""
_CHAT = """\
messages = [{{"role": "user", "content": "Write a story about a cat."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens={new})"""


def model_card(
    folder: Path, config: Config, described: dict[str, Any], *, title: str, chat: bool, style: str | None
) -> str:
    """The text of ``README.md``.

    Args:
        folder: the checkpoint, whose manifest and mark are read, and the metrics beside it.
        described: its ``config.json``.
        title: the repository's name on the Hub, or the folder's.
        chat: whether the tokenizer has a chat template.
        style: LitGPT's prompt style that it was tuned with, None where it only goes on with a text.
    """
    mark = checkpoints.read_mark(folder)
    total, active, _ = count_parameters(config, described["tie_word_embeddings"])
    imported = checkpoints.load_hyperparameters(folder).get("imported_from")
    conversations = _conversations(folder)
    is_moe = config.mlp_class_name == "LLaMAMoE"
    rows = {
        "parameters": f"{total:,}" + (f", {active:,} active for each token" if is_moe else ""),
        "layers, width": f"{config.n_layer}, {config.n_embd}",
        "heads (groups)": f"{config.n_head} ({config.n_query_groups})",
        "experts": f"{config.n_expert}, {config.n_expert_per_token} for each token" if is_moe else None,
        "vocabulary": f"{config.padded_vocab_size:,}",
        "context": f"{config.block_size:,} tokens",
        "weights": described["dtype"],
        "imported from": imported,
        "training text": _data(folder),
        "tuned on": conversations,
        "tuned for" if conversations else "trained for": (
            f"{mark.step:,} steps, {mark.tokens:,} tokens" if mark.step else None
        ),
        "loss on held-out answers" if conversations else "validation loss": _validation_loss(folder, mark.step),
        "prompt style": f"`{style}` (in LitGPT's names)" if style else None,
        "made with": ", ".join(f"{package} {version}" for package, version in mark.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    limits = (
        "It was tuned to answer; an answer that begins with a sign that the tokenizer joins to the prompt's end may be "
        "divided otherwise in a long conversation than in training."
        if chat
        else "It goes on with a text; it was not tuned to answer."
    )
    return _TEMPLATE.format(
        tags="\n".join(f"- {tag}" for tag in ("litgpt", *(("moe",) if is_moe else ()))),
        title=title,
        kind="mixture-of-experts language model" if is_moe else "language model",
        size=f"{_short(total)} parameters" + (f", of which {_short(active)} work on each token" if is_moe else ""),
        origin="brought into" if imported else "trained with",
        architecture=described["architectures"][0],
        table=f"| | |\n|---|---|\n{table}",
        call=(_CHAT if chat else _CONTINUE).format(new=new_tokens(config)),
        limits=limits,
    )


def new_tokens(config: Config) -> int:
    """How long a text may become where nobody says it: most of a small context, since the prompt wants the rest."""
    return min(256, config.block_size * 3 // 4)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _data(folder: Path) -> str | None:
    """From the manifest of the tokens; what an own corpus was called stays private."""
    try:
        manifest = json.loads((folder / checkpoints.MANIFEST).read_text(encoding="utf-8"))
        source, train = manifest["source"], manifest["splits"]["train"]
        named = source["name"] if source["name"] not in ("files", "text") else "the author's own files"
        place = f" ({source['location']})" if source["location"] and "@" in source["location"] else ""
        return f"{named}{place}: {train['tokens']:,} tokens of {train['documents']:,} documents"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _conversations(folder: Path) -> str | None:
    """What it was tuned on; whose files they were stays private."""
    try:
        found = json.loads((folder / checkpoints.INSTRUCTIONS).read_text(encoding="utf-8"))
        named = "the author's own files" if found["source"] == "files" else found["source"]
        return f"{named}: {found['splits']['train']['conversations']:,} conversations"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _validation_loss(folder: Path, step: int) -> str | None:
    """The last one before the checkpoint in the metrics of its run."""
    try:
        with open(folder.parent / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"] and int(row["step"]) <= step]
        return f"{float(rows[-1]['val_loss']):.4f} nats per token, at step {int(rows[-1]['step']):,}"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
