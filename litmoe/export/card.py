"""The model card, README.md of an exported folder, from what the checkpoint contains."""

import csv
import json
from collections.abc import Callable
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

A {kind} with {size}, {origin} LitMoE ([LitGPT](https://github.com/Lightning-AI/litgpt)) and
converted to `{architecture}`. No custom code is needed.

{table}

## How to run it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{title}"  # repository on the Hub, or path of this folder
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
{call}
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

## Limits

{limits} Its text may be wrong or offensive. It was not tested for any use.

## Licence

No licence was chosen yet. Before you publish this model, choose one that the training data allows, write it here and
add `license:` to the header above.
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
    """Return the text of ``README.md``.

    Args:
        folder: checkpoint folder; the metrics next to it are read too.
        config: of the model.
        described: the ``config.json`` of the export.
        title: name of the repository on the Hub, or of the folder.
        chat: whether the tokenizer has a chat template.
        style: prompt style of finetuning in LitGPT, None for a base model.
    """
    # A tied matrix counts once.
    total, active, _ = count_parameters(config, described["tie_word_embeddings"])
    imported = checkpoints.load_hyperparameters(folder).get("imported_from")
    tags, kind, size = ["litgpt"], "language model", f"{_short(total)} parameters"
    if config.mlp_class_name == "LLaMAMoE":
        tags.append("moe")
        kind = "mixture-of-experts language model"
        size += f", of which {_short(active)} are active for each token"
    if chat:
        limits = (
            "It was finetuned to answer. In a long conversation, an answer may get other tokens than in training if its"
            " first character and the end of the prompt are one token of the tokenizer."
        )
    else:
        limits = "It continues a text. It was not finetuned to answer."
    rows = _model_rows(config, described, total, active) | _training_rows(folder, imported, style)
    # Rows of unknown values are left out.
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    call = _CHAT if chat else _CONTINUE
    return _TEMPLATE.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title=title,
        kind=kind,
        size=size,
        origin=_origin(folder, imported),
        architecture=described["architectures"][0],
        table=f"| | |\n|---|---|\n{table}",
        call=call.format(new=new_tokens(config)),
        limits=limits,
    )


def _origin(folder: Path, imported: str | None) -> str:
    if imported:
        return "imported into"
    return "exported by" if checkpoints.is_of_litgpt(folder) else "trained with"


def _model_rows(config: Config, described: dict[str, Any], total: int, active: int) -> dict[str, str]:
    rows = {
        "parameters": f"{total:,}",
        "layers, width": f"{config.n_layer}, {config.n_embd}",
        "heads (groups)": f"{config.n_head} ({config.n_query_groups})",
        "vocabulary": f"{config.padded_vocab_size:,}",
        "context": f"{config.block_size:,} tokens",
        "weights": described["dtype"],
    }
    if config.mlp_class_name == "LLaMAMoE":
        rows["parameters"] += f", {active:,} active for each token"
        rows["experts"] = f"{config.n_expert}, {config.n_expert_per_token} for each token"
    return rows


def _training_rows(folder: Path, imported: str | None, style: str | None) -> dict[str, str | None]:
    """Return what is known about the training; None for what is unknown."""
    metadata = checkpoints.read_metadata(folder)
    # Imported checkpoints have step 0.
    duration = f"{metadata.step:,} steps, {metadata.tokens:,} tokens" if metadata.step else None
    loss = _known(_validation_loss, folder, metadata.step)
    conversations = _known(_conversations, folder)
    rows = {"imported from": imported, "training text": _known(_training_text, folder)}
    if conversations:
        # The loss on answers can't be compared with that on a text, so it gets another name.
        rows |= {
            "finetuned on": conversations,
            "finetuned for": duration,
            "loss on held-out answers": loss,
        }
    else:
        rows |= {"trained for": duration, "validation loss": loss}
    rows["prompt style"] = f"`{style}` of LitGPT" if style else None
    rows["made with"] = ", ".join(f"{package} {version}" for package, version in metadata.versions.items())
    return rows


def new_tokens(config: Config) -> int:
    """Return the default length of a generated text: in a small context, leave a quarter for the prompt."""
    return min(256, config.block_size * 3 // 4)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _known(describe: Callable[..., str], *arguments: Any) -> str | None:
    """Return a description; None if its file is missing or lacks something, as in checkpoints of other programs."""
    try:
        return describe(*arguments)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _training_text(folder: Path) -> str:
    """Describe the training text by its manifest; names of the user's own files stay private."""
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text(encoding="utf-8"))
    source, train = manifest["source"], manifest["splits"]["train"]
    name = source["name"]
    # A name or path of the user would be published with the model.
    if name in ("files", "text"):
        name = "the author's own files"
    elif "@" in (source["location"] or ""):  # a repository on the Hub with its commit
        name += f" ({source['location']})"
    return f"{name}: {train['tokens']:,} tokens of {train['documents']:,} documents"


def _conversations(folder: Path) -> str:
    """Describe the data of finetuning; names of the user's own files stay private."""
    # Only checkpoints of finetuning have this file.
    data = json.loads((folder / checkpoints.INSTRUCTIONS).read_text(encoding="utf-8"))
    name = "the author's own files" if data["source"] == "files" else data["source"]
    return f"{name}: {data['splits']['train']['conversations']:,} conversations"


def _validation_loss(folder: Path, step: int) -> str:
    """Return the last validation loss up to the checkpoint, from the metrics of its run."""
    # Checkpoints contain no validation loss. Rows of later steps belong to later checkpoints of the same run. A
    # checkpoint may be copied without its metrics, and a short run may have no evaluation.
    with open(folder.parent / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"] and int(row["step"]) <= step]
    return f"{float(rows[-1]['val_loss']):.4f} nats per token, at step {int(rows[-1]['step']):,}"
