"""Export a checkpoint to a Hugging Face folder. Both models are run and compared before the folder is complete.

```
exported/
    model.safetensors         under the names of the model family, so that no custom code is needed
    config.json               config of the model family
    generation_config.json    what ends a text, and the sampling of generate.py
    tokenizer.json, tokenizer_config.json
    chat_template.jinja       if the model was finetuned to answer
    README.md                 model card
```
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub.utils import validate_repo_id
from litgpt import GPT, Config, Tokenizer
from litgpt.prompts import PromptStyle
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError, quoted
from litmoe.data import tokenizers
from litmoe.data.conversations import is_tuned, load_prompt_style, stop_sequences
from litmoe.data.files import in_short
from litmoe.export.card import model_card, new_tokens
from litmoe.export.chat_template import chat_template, differing
from litmoe.export.files import atomic_folder, write_json
from litmoe.export.verify import Check, same_logits, same_text, same_tokens
from litmoe.export.weights import to_huggingface
from litmoe.hf_config import huggingface_config, without_counterpart

Dtype = Literal["float32", "bfloat16", "float16"]

logging.disable_progress_bar()

# Entries of tokenizer_config.json that are private, or would contradict the exported files.
_NOT_EXPORTED = (tokenizers.ORIGIN, "auto_map", "chat_template", "tokenizer_file", "name_or_path")


# -------------------------------------------------------------------------------------------------------------- export


def export(checkpoint: Path, out: Path, *, dtype: Dtype | None = None, title: str | None = None) -> list[Check]:
    """Export a checkpoint to a folder that `transformers` loads without custom code.

    Args:
        checkpoint: checkpoint folder.
        out: folder to write.
        dtype: of the exported weights; unchanged if None.
        title: name of the repository on the Hub, for the model card; name of the folder if None.

    Returns:
        What was compared.

    Raises:
        UserError: before anything is written, if transformers has no such model, ``out`` exists, or the checkpoint is
            damaged or has no tokenizer.
        RuntimeError: the two models do not compute the same; ``out`` is not written.
    """
    folder = checkpoints.resolve(checkpoint)
    config, router_problems = read_config(folder)
    problems = without_counterpart(config) + router_problems
    if problems:
        raise UserError(
            f"transformers has no model that computes the same as {folder}, so nothing was written. It has no"
            f" counterpart of: {'; '.join(problems)}."
        )
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json, which the exported model needs. Train with a --tokenizer_dir that `uv run"
            " python prepare_data.py` wrote."
        )
    tokenizer = checkpoints.load_tokenizer(folder)
    style = load_prompt_style(folder)
    # Everything is written and compared in a temporary folder, so that `out` never contains a wrong model.
    with atomic_folder(out) as partial:
        weights = {name: _cast(name, tensor, dtype) for name, tensor in checkpoints.load_weights(folder).items()}
        described = _write_model(weights, config, tokenizer, partial)
        checks = write_tokenizer(folder, partial, tokenizer, style, config)
        card = model_card(
            folder,
            config,
            described,
            title=title or out.resolve().name,
            chat=(partial / "chat_template.jinja").is_file(),
            style=type(style).__name__ if is_tuned(style) else None,
        )
        (partial / "README.md").write_text(card, encoding="utf-8", newline="\n")
        checks += _compare(weights, config, tokenizer, partial)
        if described["dtype"] != "float32":
            # The comparison ran in fp32, so loading in 16 bits is tested as well.
            checks.append(_check_dtype(partial, described["dtype"]))
    return checks


def _cast(name: str, tensor: Tensor, dtype: Dtype | None) -> Tensor:
    # The bias that balances the experts moves in steps too small for bf16; transformers keeps it in fp32 too.
    if dtype is None or name.endswith("e_score_correction_bias"):
        return tensor
    return tensor.to(getattr(torch, dtype))


def _write_model(weights: dict[str, Tensor], config: Config, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Write weights and config.json; return the content of the latter."""
    tied = checkpoints.is_tied(weights)
    dtype = str(weights["transformer.wte.weight"].dtype).removeprefix("torch.")
    described = huggingface_config(config, tied=tied, dtype=dtype, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    # config.json first: its permissions are copied to the weights below.
    write_json(out / "config.json", described)
    converted = to_huggingface(weights, config, tied=tied)
    # Writes several files and an index if the model is large.
    huggingface_hub.save_torch_state_dict(converted, out, metadata={"format": "pt"})
    # They are written with permissions for the user only.
    for path in out.glob("*.safetensors"):
        shutil.copymode(out / "config.json", path)
    return described


def _compare(weights: dict[str, Tensor], config: Config, tokenizer: Tokenizer, folder: Path) -> list[Check]:
    gpt = litgpt_model(weights, config)
    theirs, their_tokenizer = load_model(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    return [
        same_tokens(tokenizer, their_tokenizer),
        same_logits(gpt, theirs),
        same_text(gpt, tokenizer, theirs, their_tokenizer),
    ]


def _check_dtype(folder: Path, dtype: str) -> Check:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    is_finite = bool(model(torch.tensor([[0]])).logits.isfinite().all())
    if str(model.dtype) != f"torch.{dtype}" or not is_finite:
        raise RuntimeError(f"transformers does not load the folder in {dtype}")
    return Check("weights", f"loaded in {dtype}; the comparisons above use these weights in fp32")


def litgpt_model(weights: dict[str, Tensor], config: Config) -> GPT:
    """Return the model with these weights, in fp32 and with the layers of ``custom_moe``."""
    with use_custom_moe(), torch.device("meta"):
        gpt = GPT(config)
    # In fp32, because both models must be compared without rounding errors of 16 bits.
    gpt.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    # The rotary tables are not part of the state dict.
    gpt.cos, gpt.sin = gpt.rope_cache(device=torch.device("cpu"))
    return gpt.eval()


def load_model(folder: Path, dtype: torch.dtype | Literal["auto"]) -> Any:
    """Load the transformers model of a folder.

    Raises:
        RuntimeError: weights are missing or left over.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    model, loading = loaded
    wrong = {kind: sorted(map(str, names))[:5] for kind, names in loading.items() if names}
    if wrong:
        raise RuntimeError(f"the weights in {folder} do not fit the transformers model: {wrong}")
    return model.eval()


def read_config(folder: Path) -> tuple[Config, list[str]]:
    """Return the config of a checkpoint at its length of training, and its own router as a reason against an export."""
    # The model was never trained on longer sequences.
    config = replace(checkpoints.load_config(folder), block_size=checkpoints.context_of(folder))
    router = checkpoints.recorded_router(folder)
    return config, [] if router is None else [f"the router {router} (moe.router of its run)"]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def write_tokenizer(folder: Path, out: Path, tokenizer: Tokenizer, style: PromptStyle, config: Config) -> list[Check]:
    """Write tokenizer, generation config and, if it gives the same tokens as finetuning, the chat template.

    Args:
        folder: checkpoint folder.
        out: folder to write.
        tokenizer: of the checkpoint.
        style: of the checkpoint.
        config: of the model, for the length of a generated text.

    Returns:
        What transformers does with the chat template and at the end of an answer; empty for a base model.
    """
    write_json(out / "tokenizer.json", _with_litgpts_bos(folder / "tokenizer.json", tokenizer))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in _NOT_EXPORTED:
        settings.pop(name, None)
    # Names of the tokens that LitGPT uses, which may be in other files of the checkpoint.
    for name, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if id is not None:
            settings[name] = tokenizer.processor.id_to_token(id)
    pad_id = _pad_id(settings.pop("pad_token", None), tokenizer)
    if pad_id is not None:
        # On the left, because a continuation must follow its prompt directly.
        settings |= {"pad_token": tokenizer.processor.id_to_token(pad_id), "padding_side": "left"}
    # The class that uses tokenizer.json as it is; the class of a model family would change parts of it.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": config.block_size, "add_bos_token": tokenizer.use_bos}
    write_json(out / "tokenizer_config.json", settings)
    checks = _write_generation_config(out, tokenizer, style, config, pad_id)
    if is_tuned(style):
        checks.append(_write_chat_template(out, tokenizer, style, settings.get("bos_token")))
    return checks


def _pad_id(pad_token: Any, tokenizer: Tokenizer) -> int | None:
    """Return the token that fills up a batch: the tokenizer's own, else the end-of-text token.

    The attention mask hides it, so its embedding has no effect. A new token would change how a text that contains its
    name is tokenized. config.json names no pad token: transformers would stop training its input embedding, which is
    that of the end-of-text token.
    """
    # An entry of tokenizer_config.json: a name, or a dictionary with the name.
    name = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    own_id = tokenizer.processor.token_to_id(name) if isinstance(name, str) else None
    pad_id: int | None = tokenizer.eos_id if own_id is None else own_id
    return pad_id


def _write_generation_config(
    out: Path, tokenizer: Tokenizer, style: PromptStyle, config: Config, pad_id: int | None
) -> list[Check]:
    sequences = stop_sequences(style, tokenizer)
    # generation_config.json can express only single tokens.
    stop_ids = [sequence[0] for sequence in sequences if len(sequence) == 1]
    longer = [tokenizer.decode(torch.tensor(sequence)) for sequence in sequences if len(sequence) > 1]
    settings = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids if len(stop_ids) > 1 else tokenizer.eos_id,
        "pad_token_id": pad_id,
        # The defaults of generate.py
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        "max_new_tokens": new_tokens(config),
    }
    write_json(out / "generation_config.json", settings)
    if not longer:
        return []
    return [Check("end of an answer", f"transformers does not stop at {longer}, chat.py does")]


def _write_chat_template(out: Path, tokenizer: Tokenizer, style: PromptStyle, bos_token: str | None) -> Check:
    name, path = type(style).__name__, out / "chat_template.jinja"
    template = chat_template(style, tokenizer, bos_token)
    if template is None:
        return Check("chat template", f"none: the prompt style {name} can't be written as fixed texts")
    path.write_text(template, encoding="utf-8", newline="\n")
    # Test the template with the exported tokenizer, as users will load it.
    messages = differing(AutoTokenizer.from_pretrained(out), tokenizer, style)
    if messages is not None:
        path.unlink()
        reason = f"with the prompt style {name}, transformers would tokenize a conversation differently ({messages})"
        return Check("chat template", f"none: {reason}")
    return Check("chat template", f"the tokens of the prompt style {name}, single and several turns")


def _with_litgpts_bos(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json, changed if LitGPT adds or removes a begin-of-text token because of other files."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer.processor.encode("a").ids == tokenizers.text_ids(tokenizer, "a"):
        return content
    content["post_processor"] = None
    if tokenizer.use_bos:
        bos = tokenizer.processor.id_to_token(tokenizer.bos_id)
        template = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
        content["post_processor"] = json.loads(template.__getstate__())
    return content


# ---------------------------------------------------------------------------------------------------------------- push


def check_can_push(repository: str) -> None:
    """Raise UserError if the Hub does not accept the name, or no user is logged in."""
    try:
        validate_repo_id(repository)
        _organization, _name = repository.split("/")
    except ValueError:  # of the client of the Hub, or no organization
        raise UserError(f"--push is {repository}, which the Hub does not accept; expected ORG/NAME.") from None
    if huggingface_hub.get_token() is None:
        raise UserError("--push needs a token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder and return its address. A new repository is private.

    Raises:
        UserError: the Hub can't be reached, or refuses.
    """
    try:
        address = huggingface_hub.create_repo(repository, exist_ok=True, private=True)
        huggingface_hub.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # of the client of the Hub, or of the connection
        raise UserError(
            f"{folder} is complete, but was not uploaded to {repository}: {in_short(error)}. To upload it later:"
            f" `uv run hf upload {repository} {quoted(folder)}`"
        ) from None
    return str(address)
