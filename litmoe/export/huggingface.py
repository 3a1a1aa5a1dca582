"""A checkpoint as a Hugging Face folder, and back: converted, verified by running both models, then moved into place.

```
exported/
    model.safetensors         in the names of the family's own files, so that no custom code is needed
    config.json               the family's config
    generation_config.json    what ends a text, and how generate.py samples
    tokenizer.json, tokenizer_config.json
    chat_template.jinja       where the model was tuned to answer
    README.md                 the model card
```
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from litgpt import GPT, Config, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError, quoted
from litmoe.data import tokenizers
from litmoe.data.conversations import is_tuned, load_prompt_style, stop_sequences
from litmoe.data.files import in_short
from litmoe.export.card import model_card, new_tokens
from litmoe.export.chat_template import chat_template, differing
from litmoe.export.verify import Check, same_logits, same_text, same_tokens
from litmoe.export.weights import from_huggingface, to_huggingface
from litmoe.hf_config import IMPORTED, huggingface_config, litgpt_config, without_counterpart

Dtype = Literal["float32", "bfloat16", "float16"]

logging.disable_progress_bar()
_CPU = torch.device("cpu")
# Of the checkpoint's tokenizer_config.json: how it was prepared here, and what must not or need not go along.
_NOT_EXPORTED = (tokenizers.ORIGIN, "auto_map", "chat_template", "tokenizer_file", "name_or_path")


# -------------------------------------------------------------------------------------------------------------- export


def export(checkpoint: Path, out: Path, *, dtype: Dtype | None = None, title: str | None = None) -> list[Check]:
    """Writes a checkpoint as a folder that `transformers` loads without custom code.

    Args:
        dtype: of the weights written; as they are when None.
        title: the repository's name on the Hub, for the model card; the folder's name when None.

    Raises:
        UserError: before anything is written, where transformers has no such model, ``out`` is taken, or the checkpoint
            is damaged or without a tokenizer.
        RuntimeError: the two models do not compute the same; nothing is left in ``out``.
    """
    folder = checkpoints.resolve(checkpoint)
    # The model was never trained on longer sequences, so its users must not be offered them.
    config = replace(checkpoints.load_config(folder), block_size=checkpoints.context_of(folder))
    if problems := without_counterpart(config):
        raise UserError(
            f"transformers has no model that computes what {folder} does, so nothing was written. In its "
            f"{checkpoints.MODEL_CONFIG}, what has no counterpart: {'; '.join(problems)}."
        )
    tokenizer = _tokenizer_of(folder)
    with _moved_into_place(out) as partial:
        weights = checkpoints.load_weights(folder)
        tied = checkpoints.is_tied(weights)
        weights = {name: _in_dtype(name, tensor, dtype) for name, tensor in weights.items()}
        written = str(weights["transformer.wte.weight"].dtype).removeprefix("torch.")
        described = huggingface_config(
            config, tied=tied, dtype=written, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
        )
        huggingface_hub.save_torch_state_dict(
            to_huggingface(weights, config, tied=tied), partial, metadata={"format": "pt"}
        )
        _write_json(partial / "config.json", described)
        for path in partial.glob("*.safetensors"):  # written for nobody but the user
            shutil.copymode(partial / "config.json", path)
        checks = _write_tokenizer(folder, partial, tokenizer, config)
        card = model_card(
            folder,
            config,
            described,
            title=title or out.resolve().name,
            chat=(partial / "chat_template.jinja").is_file(),
            style=type(style).__name__ if is_tuned(style := load_prompt_style(folder)) else None,
        )
        (partial / "README.md").write_text(card, encoding="utf-8", newline="\n")
        theirs = AutoTokenizer.from_pretrained(partial)
        checks += [same_tokens(tokenizer, theirs), *_verify(_gpt(weights, config), tokenizer, partial, theirs)]
        if written != "float32":
            model = AutoModelForCausalLM.from_pretrained(partial, dtype="auto")
            finite = model(torch.tensor([[0]])).logits.isfinite().all()
            if str(model.dtype) != f"torch.{written}" or not finite:
                raise RuntimeError(f"the folder does not load in {written}")
            checks.append(Check("weights", f"loaded in {written}; what is compared above are these weights in fp32"))
    return checks


def _in_dtype(name: str, tensor: Tensor, dtype: Dtype | None) -> Tensor:
    # The bias by which experts are chosen moves in steps that bf16 does not have; transformers keeps it in fp32 too.
    keep = dtype is None or name.endswith("e_score_correction_bias") or not tensor.is_floating_point()
    return tensor if keep else tensor.to(getattr(torch, str(dtype)))


def _gpt(weights: dict[str, Tensor], config: Config) -> GPT:
    """The model of these weights, in fp32 and with the layers of ``custom_moe``."""
    with use_custom_moe(), torch.device("meta"):
        gpt = GPT(config)
    gpt.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    gpt.cos, gpt.sin = gpt.rope_cache(device=_CPU)  # not in the state dict
    return gpt.eval()


def _verify(gpt: GPT, tokenizer: Tokenizer, folder: Path, their_tokenizer: Any) -> list[Check]:
    theirs = _load(folder, torch.float32)
    return [same_logits(gpt, theirs), same_text(gpt, tokenizer, theirs, their_tokenizer)]


def _load(folder: Path, dtype: torch.dtype | Literal["auto"]) -> Any:
    """The transformers model of a folder, in which each weight has found its place."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    model, loading = loaded
    if wrong := {kind: sorted(map(str, names))[:5] for kind, names in loading.items() if names}:
        raise RuntimeError(f"not every weight in {folder} has found its place in transformers' model: {wrong}")
    return model.eval()


def _tokenizer_of(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} holds no tokenizer.json, without which nobody could use the exported model. Train with a "
            "--tokenizer_dir that `uv run python prepare_data.py` wrote."
        )
    return checkpoints.load_tokenizer(folder)


def _write_tokenizer(folder: Path, out: Path, tokenizer: Tokenizer, config: Config) -> list[Check]:
    """Writes tokenizer, chat template and generation config."""
    _write_json(out / "tokenizer.json", _adding_bos_as_litgpt(folder / "tokenizer.json", tokenizer))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings = {key: value for key, value in settings.items() if key not in _NOT_EXPORTED}
    to_token = tokenizer.processor.id_to_token
    tokens = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    settings |= {name: to_token(token) for name, token in tokens.items() if token is not None}
    # The class that takes tokenizer.json as it is; a model's own would build parts of it anew.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = config.block_size
    settings["add_bos_token"] = tokenizer.use_bos
    _write_json(out / "tokenizer_config.json", settings)
    style = load_prompt_style(folder)
    stops_of_style = stop_sequences(style, tokenizer)
    stops = [sequence[0] for sequence in stops_of_style if len(sequence) == 1]
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "do_sample": True,  # as generate.py samples
        "temperature": 0.8,
        "top_k": 50,
        "max_new_tokens": new_tokens(config),
    }
    _write_json(out / "generation_config.json", {key: value for key, value in generation.items() if value is not None})
    checks = []
    if longer := [tokenizer.decode(torch.tensor(sequence)) for sequence in stops_of_style if len(sequence) > 1]:
        checks.append(Check("end of an answer", f"transformers does not stop at {longer}, as chat.py does"))
    if not is_tuned(style):
        return checks
    name, path = type(style).__name__, out / "chat_template.jinja"
    template = chat_template(style, tokenizer, settings.get("bos_token"))
    if template is None:
        return [*checks, Check("chat template", f"none: the prompt style {name} is not one text around the user's")]
    path.write_text(template, encoding="utf-8", newline="\n")
    if (messages := differing(AutoTokenizer.from_pretrained(out), tokenizer, style)) is not None:
        path.unlink()
        reason = f"with the prompt style {name} transformers would divide a conversation otherwise ({messages})"
        return [*checks, Check("chat template", f"none: {reason}")]
    return [*checks, Check("chat template", f"the tokens of the prompt style {name}, single and several turns")]


def _adding_bos_as_litgpt(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer.json``; where LitGPT adds or removes a begin token by other files, so that it does so by itself."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer.processor.encode("a").ids != tokenizers.text_ids(tokenizer, "a"):
        values["post_processor"] = None
        if tokenizer.use_bos:
            bos = tokenizer.processor.id_to_token(tokenizer.bos_id)
            adding = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
            values["post_processor"] = json.loads(adding.__getstate__())
    return values


# -------------------------------------------------------------------------------------------------------------- import


def import_folder(source: Path, out: Path) -> list[Check]:
    """Makes a checkpoint of a Hugging Face folder on this disk, which every script here and `litgpt` read.

    Raises:
        UserError: no folder of a known model family, with something that LitGPT can't compute, or ``out`` is taken.
        RuntimeError: the two models do not compute the same; nothing is left in ``out``.
    """
    theirs = _read_config(source)
    check_free(out)
    files = tokenizers.from_folder(source)
    their_tokenizer = _without_code(AutoTokenizer, source)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_dir = Path(scratch) / "tokenizer"
        tokenizers.install(files, {"name": source.resolve().name}, tokenizer_dir)
        _add_bos_token_as(their_tokenizer, tokenizer_dir / "tokenizer_config.json")
        vocab_size = tokenizers.load(tokenizer_dir).vocab_size
        if vocab_size > theirs.vocab_size:
            raise UserError(
                f"the tokenizer in {source} has {vocab_size:,} tokens, the model {theirs.vocab_size:,}; expected a "
                "tokenizer that fits the model."
            )
        config = _config_of(theirs, source, vocab_size)
        tokenizer = tokenizers.litgpt_tokenizer(tokenizer_dir)
        checks = [same_tokens(tokenizer, their_tokenizer, may_end=True)]
        model = _load_untrusted(source)
        weights = from_huggingface(model.state_dict(), config)
        gpt = _gpt(weights, config)
        model = model.float()  # in place, and new tensors where the weights are not fp32 already
        checks += [same_logits(gpt, model), same_text(gpt, tokenizer, model, their_tokenizer)]
        checkpoints.save(
            out,
            weights=weights,
            config=config,
            hyperparameters={"imported_from": source.resolve().name, "model_type": theirs.model_type},
            step=0,
            tokens=0,
            tokenizer_dir=tokenizer_dir,
        )
    return checks


def _read_config(source: Path) -> Any:
    path = source / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"found no readable {path}; expected a Hugging Face folder on this disk (`hf download ORG/NAME --local-dir "
            "FOLDER` gets one)."
        ) from None
    if model_type not in IMPORTED:
        raise UserError(
            f"{source} holds a model of type {model_type!r}; expected one of {', '.join(IMPORTED)}. LitGPT's own "
            "`litgpt download` and `litgpt convert_to_litgpt` know more."
        )
    if "quantization_config" in content:
        raise UserError(f"{source} is quantized (quantization_config); expected the model's plain weights.")
    return _without_code(AutoConfig, source)


def _config_of(theirs: Any, source: Path, vocab_size: int) -> Config:
    name = source.resolve().name
    if "Gemma" in name or "OLMo" in name:  # LitGPT makes other norms for models of these names
        name = theirs.model_type
    try:
        config, problems = litgpt_config(theirs, name, vocab_size)
    except (AssertionError, ValueError) as error:
        config, problems = None, [str(error) or "sizes that do not divide"]
    if config is None or problems:
        raise UserError(
            f"LitGPT can't compute what {source} does, so nothing was written. In its config.json, what has no "
            f"counterpart: {'; '.join(problems)}."
        )
    return config


def _load_untrusted(source: Path) -> Any:
    if not any(source.glob("*.safetensors")) and not any(source.glob("pytorch_model*.bin")):
        raise UserError(f"{source} holds no weights; expected model.safetensors or pytorch_model.bin.")
    try:
        # Pickled weights are read by torch.load(weights_only=True): nothing in them is run.
        return _load(source, "auto")
    except RuntimeError as error:
        raise UserError(f"the weights in {source} are not those of its config.json: {in_short(error)}.") from error
    except Exception as error:  # each format has errors of its own for a damaged file
        raise UserError(f"the weights in {source} can't be read: {in_short(error)}. Get them anew.") from error


def _add_bos_token_as(theirs: Any, path: Path) -> None:
    """Notes for LitGPT's tokenizer whether transformers puts a begin token before a text, and which one."""
    first, plain = theirs("a")["input_ids"][0], theirs("a", add_special_tokens=False)["input_ids"][0]
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["add_bos_token"] = first != plain
    if first != plain:
        settings["bos_token"] = theirs.convert_ids_to_tokens(first)
    elif theirs.bos_token is not None:
        settings["bos_token"] = theirs.bos_token
    _write_json(path, settings)


# ---------------------------------------------------------------------------------------------------------------- push


def check_can_push(repository: str) -> None:
    """Raises UserError for a name that the Hub does not take, or where nobody is logged in."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"--push {repository}: the Hub takes no such name; expected ORG/NAME.")
    if huggingface_hub.get_token() is None:
        raise UserError(
            "--push needs a token of the Hugging Face Hub that may write: `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, repository: str) -> str:
    """Uploads an exported folder; a new repository is private. Returns its address.

    Raises:
        UserError: the Hub can't be reached or refuses.
    """
    try:
        address = huggingface_hub.create_repo(repository, exist_ok=True, private=True)
        huggingface_hub.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # the transport has many ways to say that there is no network
        raise UserError(
            f"{folder} is whole, but was not uploaded to {repository}: {in_short(error)}. "
            f"Later: `uv run hf upload {repository} {quoted(folder)}`"
        ) from None
    return str(address)


def _without_code(reader: Any, source: Path) -> Any:
    """A part of somebody's folder; code that comes with it is never run.

    Raises:
        UserError: it can't be read, or not without its code.
    """
    try:
        return reader.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of transformers, of tokenizers, or of the values in the files
        raise UserError(f"{source} can't be read by transformers: {in_short(error)}") from None


# --------------------------------------------------------------------------------------------------------------- files


def check_free(out: Path) -> None:
    """Raises UserError where something is at ``out`` already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; name another folder, or remove it.")


@contextmanager
def _moved_into_place(out: Path) -> Iterator[Path]:
    """A folder to write into beside ``out``, which takes its place at the end, or is removed after an error."""
    check_free(out)
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
