"""Load tokenizers from the Hub or a folder, train them, and encode documents with the fastest exact encoder."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from litmoe.checksummed_json import read_json, write_json
from litmoe.cli import UserError, quoted
from litmoe.data.documents import END_OF_TEXT
from litmoe.data.files import in_short
from litmoe.data.manifest import fingerprint_of, special_tokens, token_text, tokenizer_config, tokenizer_fingerprint

if TYPE_CHECKING:
    from litgpt import Tokenizer

DEFAULT = "gpt2"
DEFAULT_VOCAB_SIZE = 8192
# So much text is enough for the merges of a small vocabulary, and takes seconds. It is taken in blocks.
TRAINING_BYTES = 16 << 20
BLOCK_BYTES = 1 << 20
DOCUMENT_BREAK = "\ufdd0\ufdd1\ufdd0"
"""Ends each document of those that are encoded in one call. Unicode reserves these characters for internal use."""
ORIGIN = "prepared_from"
"""Key in tokenizer_config.json: what prepare_data.py made the folder from."""
# Copied if they exist.
OPTIONAL_FILES = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")
FILES = ("tokenizer.json", "tokenizer_config.json", *OPTIONAL_FILES)
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>")
# The pattern of the ByteLevel pre-tokenizer in tokenizers. tokenizer.json does not contain it, and tiktoken needs it.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

OFFLINE_WAYS = """Without a network:
  --source sample --tokenizer train    the built-in stories and a tokenizer trained on them
  --source PATH --tokenizer FOLDER     your own texts, a folder with a tokenizer.json (or: train)
  or put text into train/ and val/ below --data_dir, and a tokenizer.json into --tokenizer_dir."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a complete tokenizer folder."""

    tokenizer: dict[str, Any]
    """``tokenizer.json``."""
    config: dict[str, Any]
    """``tokenizer_config.json``, with the end-of-text token."""
    others: dict[str, str]
    """File name to text."""

    @cached_property
    def sha256(self) -> str:
        """What ``manifest.tokenizer_fingerprint`` returns for the folder."""
        return fingerprint_of(self.tokenizer, *special_tokens(self.config))


@dataclass(frozen=True)
class TokenizerInfo:
    """A description of a complete tokenizer folder."""

    folder: Path
    name: str
    sha256: str
    vocab_size: int
    """Largest id plus one."""
    eos_token: str
    eos_id: int
    bos_token: str | None = None
    """The token that begins every text; None if texts begin without one."""
    bos_id: int | None = None


# --- where a tokenizer comes from ---


def from_folder(folder: Path, name: str | None = None) -> TokenizerFiles:
    """Read and complete a tokenizer folder. ``tokenizer.json`` is enough.

    Args:
        folder: nothing is written there.
        name: its name in messages, by default its path.

    Raises:
        UserError: the tokenizer is missing or broken, or its end-of-text token is unclear.
    """
    name = name or str(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"no tokenizer in {name}: tokenizer.json is missing. Name another folder or a tokenizer of the Hub "
            "(--tokenizer gpt2), train one on your text (--tokenizer train), or convert an older tokenizer with "
            "transformers: AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)."
        )
    tokenizer = _read_json(folder / "tokenizer.json")
    config = folder / "tokenizer_config.json"
    others = {file: (folder / file).read_text("utf-8") for file in OPTIONAL_FILES if (folder / file).is_file()}
    return _completed(tokenizer, _read_json(config) if config.is_file() else {}, others, name)


def from_hub(name: str) -> TokenizerFiles:
    """Download a tokenizer from the Hugging Face Hub, or read it from the Hub's cache without a network.

    Raises:
        UserError: the Hub has no such tokenizer or gives it only to users who accept its terms, or there is neither a
            network nor a cached copy.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        # A short request first: without a network, a download would wait for minutes.
        huggingface_hub.HfApi().model_info(name, timeout=10)
        folder = huggingface_hub.snapshot_download(name, allow_patterns=list(FILES))
    except GatedRepoError:
        raise UserError(f"the tokenizer {name!r} is gated: accept its terms on the Hub and `hf auth login`.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"no tokenizer {name!r}: neither a folder here nor a model on the Hub. --tokenizer takes a Hub name such "
            "as gpt2, a folder with a tokenizer.json, or the word train."
        ) from None
    except Exception as error:  # the transport raises many kinds of errors without a network
        cached = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
        if not isinstance(cached, str):
            raise UserError(
                f"the tokenizer {name!r} is not available from the Hugging Face Hub ({in_short(error)}).\n"
                f"{OFFLINE_WAYS}"
            ) from None
        folder = str(Path(cached).parent)
    return from_folder(Path(folder), name)


def train(texts: Iterable[str], vocab_size: int) -> TokenizerFiles:
    """Train a byte-level BPE with the special token ``<|endoftext|>``. The same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # tiktoken knows no prefix space, so a tokenizer with one would be encoded slowly.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All bytes, so that any text can be encoded. alphabet() returns them in another order in each process.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _completed(json.loads(tokenizer.to_str()), {"eos_token": END_OF_TEXT}, {}, "train")


def _completed(
    tokenizer: dict[str, Any], config: dict[str, Any], others: dict[str, str], origin: str
) -> TokenizerFiles:
    """Add what LitGPT and transformers need: the tokens around texts, a class, no truncation."""
    # A limit that an earlier use of the tokenizer left behind would cut every document.
    tokenizer = {key: None if key in ("truncation", "padding") else value for key, value in tokenizer.items()}
    # The library knows which tokens exist, also those that are only in its template.
    parsed = _parse(tokenizer, origin)
    # A null counts as missing: LitGPT would take it for False.
    named = {key: value for key, value in config.items() if value is not None}
    eos = token_text(named.get("eos_token")) or _infer_end_of_text(parsed, others, origin)
    template = _token_before_texts(parsed)
    # LitGPT's TextFiles fails without a bos_token. Whether texts begin with it is decided below.
    config = {"bos_token": template or eos, "tokenizer_class": "PreTrainedTokenizerFast"} | named
    config |= {"eos_token": eos, "bos_token": token_text(config["bos_token"])}
    # LitGPT does not read the template, so the rule is written out.
    config.setdefault("add_bos_token", template is not None or config["tokenizer_class"] == "LlamaTokenizer")
    places = ("ends a text (eos_token)", "begins a text (bos_token; or set add_bos_token to false)")
    for token, place in zip(special_tokens(config), places, strict=True):
        if token is not None and parsed.token_to_id(token) is None:
            raise UserError(
                f"the tokenizer of {origin} has no token {token!r}; name the token that {place} in its "
                "tokenizer_config.json."
            )
    return TokenizerFiles(tokenizer, config, others)


def _token_before_texts(tokenizer: Any) -> str | None:
    """Return the token that the template of a ``tokenizer.json`` puts before each text: ``<s>`` of ``<s> $A``."""
    encoding = tokenizer.encode("a")
    is_added = encoding.special_tokens_mask[:1] == [1]
    return encoding.tokens[0] if is_added else None


def _infer_end_of_text(tokenizer: Any, others: dict[str, str], origin: str) -> str:
    """Return the token that can end a text: where generation ends, the one with a usual name, or the only one."""
    special = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    # TypeError: a list of ids, as Llama 3 has, does not say which one ends a text.
    with suppress(KeyError, ValueError, TypeError):
        return special[json.loads(others["generation_config.json"])["eos_token_id"]]
    # Prefer a usual name, because special tokens are also used for padding and chat.
    candidates = {*special.values()}.intersection(END_OF_TEXT_NAMES) or special.values()
    if len(candidates) == 1:
        return next(iter(candidates))
    raise UserError(
        f"the tokenizer of {origin} does not say which token ends a text, and its special tokens "
        f"({', '.join(map(repr, special.values())) or 'none'}) do not make it clear. Add a tokenizer_config.json "
        'next to its tokenizer.json: {"eos_token": "<|endoftext|>"}, with the right token.'
    )


def _parse(tokenizer_json: dict[str, Any], origin: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(tokenizer_json))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise UserError(f"the tokenizer.json of {origin} is broken ({error}); download it again.") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}); download it again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is broken (no JSON object in it); download it again.")
    return values


# --- a prepared folder ---


def install(files: TokenizerFiles, origin: dict[str, Any], folder: Path) -> None:
    """Write a tokenizer folder, with a note of where it came from.

    A new ``tokenizer.json`` is written last, after the old one was deleted: a killed call leaves no tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    existing = None
    with suppress(OSError, ValueError):
        existing = read_json(path)
    # With a new config the old tokenizer.json would look like the new tokenizer.
    if existing != files.tokenizer:
        path.unlink(missing_ok=True)
    for file in OPTIONAL_FILES:
        if file in files.others:
            (folder / file).write_text(files.others[file], encoding="utf-8", newline="\n")
        else:
            (folder / file).unlink(missing_ok=True)
    write_json(folder / "tokenizer_config.json", {**files.config, ORIGIN: {**origin, "sha256": files.sha256}})
    write_json(path, files.tokenizer)


def origin(folder: Path) -> dict[str, Any]:
    """Return what ``prepare_data.py`` made the folder from; empty for a folder from elsewhere or a changed one."""
    try:
        # A tokenizer that was edited since has another fingerprint, so where it came from does not count.
        noted = dict(tokenizer_config(folder)[ORIGIN])
        return noted if noted.pop("sha256") == tokenizer_fingerprint(folder) else {}
    except (ValueError, KeyError, TypeError):  # a UserError is a ValueError
        return {}


def is_complete(folder: Path) -> bool:
    """Return whether ``tokenizer_config.json`` says what LitGPT needs: a class and the tokens around texts."""
    config = tokenizer_config(folder)
    # `install` put it there, completed by `from_folder` and unchanged since. Parsing a vocabulary again takes a second.
    if isinstance(config.get("add_bos_token"), bool) and origin(folder):
        return True
    # `from_folder` adds what is missing. What it adds changes no id if the fingerprint stays the same.
    has_class = config.get("tokenizer_class") is not None
    return has_class and tokenizer_fingerprint(folder) == from_folder(folder).sha256


def load(folder: Path) -> TokenizerInfo:
    """Describe a tokenizer folder.

    Raises:
        UserError: the tokenizer is missing, broken or incomplete.
    """
    sha256 = tokenizer_fingerprint(folder)
    if not is_complete(folder):
        raise UserError(
            f"the tokenizer at {folder} does not say which token begins a text and which one ends it (tokenizer_class, "
            "add_bos_token, bos_token and eos_token in tokenizer_config.json); "
            f"`--tokenizer {quoted(folder)} --tokenizer_dir ANOTHER` completes it."
        )
    tokenizer = _parse(_read_json(folder / "tokenizer.json"), str(folder))
    eos_token, bos_token = special_tokens(tokenizer_config(folder))
    # `is_complete` has checked that the vocabulary contains both.
    eos_id = tokenizer.token_to_id(eos_token)
    bos_id = tokenizer.token_to_id(bos_token) if bos_token is not None else None
    # Ids may have gaps: a model needs a row for the largest one.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    name = str(origin(folder).get("name", folder))
    return TokenizerInfo(folder, name, sha256, vocab_size, eos_token, eos_id, bos_token, bos_id)


# --- encoding ---


def litgpt_tokenizer(folder: Path) -> "Tokenizer":
    """Return LitGPT's tokenizer of a folder, which encodes as the training text was encoded.

    LitGPT's own also puts a begin-of-text token before texts where the folder's name begins with ``Llama-3`` or is
    SmolLM2's, and keeps the truncation and padding that ``tokenizer.json`` may hold: prompts would be cut.
    """
    from litgpt import Tokenizer

    tokenizer = Tokenizer(folder)
    if tokenizer.backend == "huggingface":
        tokenizer.use_bos = special_tokens(tokenizer_config(folder))[1] is not None
        tokenizer.processor.no_truncation()
        tokenizer.processor.no_padding()
    return tokenizer


def text_ids(tokenizer: "Tokenizer", text: str, *, begin: bool = True) -> list[int]:
    """Return the ids of a text, with the begin-of-text token in front where the tokenizer uses one.

    Replaces ``litgpt.Tokenizer.encode``, which removes an end-of-text token that the text itself ends or begins with,
    and keeps what a template in ``tokenizer.json`` adds. Special tokens written out in the text are encoded as such.

    Args:
        tokenizer: one of LitGPT.
        text: may begin with the begin-of-text token, which is not added twice.
        begin: False for a text that continues another one, such as an answer after its prompt.

    Raises:
        UserError: the text holds half of a surrogate pair, as a command line in another encoding than UTF-8 does.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text {text[:80]!r} can't be encoded: character {error.start + 1} is half of a surrogate pair or a "
            "byte that is not UTF-8; expected UTF-8. Use a terminal in UTF-8, or a file saved as UTF-8."
        ) from None
    if tokenizer.backend == "huggingface":
        # One text at a time: encode_batch starts threads, after which tokenizers warns of every fork.
        ids: list[int] = tokenizer.processor.encode(text, add_special_tokens=False).ids
    else:
        ids = tokenizer.processor.encode(text)
    if begin and tokenizer.use_bos and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return ids


class Encoder:
    """Encodes documents. ``<|endoftext|>`` inside a text is ordinary text, never the special id.

    Args:
        tokenizer_json: path of the file.
        eos_id: ends each document.
        bos_id: begins each document; None if texts begin without such a token.
        fast: encode through tiktoken, for a tokenizer that ``agrees_with_tiktoken``; else through ``tokenizers``.
    """

    def __init__(self, tokenizer_json: Path, eos_id: int, bos_id: int | None = None, *, fast: bool) -> None:
        self._path, self._eos_id, self._bos_id = tokenizer_json, eos_id, bos_id
        self._tiktoken: Any = None
        if fast:
            import tiktoken

            bpe = byte_level_bpe(read_json(tokenizer_json))
            assert bpe is not None, "the caller has checked that tiktoken can encode it"
            pattern, ranks = bpe
            special = {DOCUMENT_BREAK: eos_id}
            self._tiktoken = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Contrary to its name, this encodes special tokens in a text as ordinary text.
        tokenizer.encode_special_tokens = True
        return tokenizer

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return the ids ``(n,)`` of all texts, each with the ids that begin and end it."""
        ids = self._encode_fast(texts) if self._tiktoken is not None else None
        if ids is None:
            ids = self._encode_slowly(texts)
        if self._bos_id is None:
            return ids
        # No text contains the end-of-text id, so it tells where the next document begins.
        begins = [0, *(np.flatnonzero(ids == self._eos_id)[:-1] + 1)]
        return np.insert(ids, begins, self._bos_id)

    def _encode_fast(self, texts: list[str]) -> np.ndarray | None:
        """Encode all texts in one call, during which other threads run; None if that is not possible."""
        # One call for all texts takes half of the time of one for each.
        joined = DOCUMENT_BREAK.join([*texts, ""])
        # A text that contains the break itself must not be cut there.
        if joined.count(DOCUMENT_BREAK) != len(texts):
            return None
        try:
            ids = self._tiktoken.encode_to_numpy(joined, allowed_special={DOCUMENT_BREAK}, disallowed_special=())
        except ValueError:
            # tiktoken's regex engine gives up for a million white-space characters in a row.
            return None
        return np.asarray(ids)

    def _encode_slowly(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = []
        for encoding in encoded:
            ids += [*encoding.ids, self._eos_id]
        return np.array(ids, dtype=np.uint32)


def agrees_with_tiktoken(tokenizer_json: Path, sample: list[str]) -> bool:
    """Return whether tiktoken gives exactly this tokenizer's ids: possible for its kind, and true for ``sample``."""
    if byte_level_bpe(read_json(tokenizer_json)) is None:
        return False
    # Any id outside of the vocabulary serves between the texts.
    end = 1 << 30
    try:
        fast = Encoder(tokenizer_json, end, fast=True)
    except ValueError:  # a pattern that tiktoken's regex engine does not know
        return False
    return np.array_equal(fast(sample), Encoder(tokenizer_json, end, fast=False)(sample))


def byte_level_bpe(tokenizer_json: dict[str, Any]) -> tuple[str, dict[bytes, int]] | None:
    """Return pattern and ranks for tiktoken of a byte-level BPE with ids in the order of its merges; else None."""
    pattern = _pattern(tokenizer_json.get("pre_tokenizer") or {})
    if pattern is None or not _is_plain_bpe(tokenizer_json):
        return None
    ranks = _ranks(tokenizer_json["model"])
    return None if ranks is None else (pattern, ranks)


def _ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """Return the id of each token by its bytes; None if tiktoken would merge in another order."""
    vocab: dict[str, int] = model["vocab"]
    to_byte = {character: byte for byte, character in byte_characters().items()}
    # "a b" in older files, ["a", "b"] in newer ones.
    merged = ["".join(merge).replace(" ", "") for merge in model["merges"]]
    # tiktoken ends the process for a byte without a token.
    if not vocab.keys() >= {*to_byte, *merged} or not to_byte.keys() >= {*"".join(merged)}:
        return None
    # tiktoken merges in the order of the ids.
    ids = [vocab[token] for token in merged]
    if ids != sorted(set(ids)):
        return None
    return {bytes(map(to_byte.__getitem__, token)): vocab[token] for token in (*to_byte, *merged)}


def _is_plain_bpe(tokenizer_json: dict[str, Any]) -> bool:
    """Return whether a tokenizer is a BPE without anything that tiktoken does not have."""
    model = tokenizer_json["model"]
    extras = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or tokenizer_json.get("normalizer") is not None:
        return False
    # Added tokens that are not special are found in the text before it is divided.
    added = tokenizer_json.get("added_tokens", [])
    return not any(map(model.get, extras)) and all(token.get("special") for token in added)


def _pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """Return the regular expression of a byte-level pre-tokenizer; None if it does anything else."""
    *splits, level = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        return None
    # GPT-2's kind divides by a pattern of its own. Older files lack use_regex.
    has_pattern = level.get("use_regex", True)
    if not splits:
        return GPT2_PATTERN if has_pattern else None
    # GPT-4's and Llama 3's kind: a pattern, then bytes. Isolated keeps every match as a piece of its own, as tiktoken
    # does.
    wanted = {"type": "Split", "behavior": "Isolated", "invert": False}
    isolates = {"invert": False, **splits[0]}.items() >= wanted.items()
    return splits[0]["pattern"].get("Regex") if isolates and not has_pattern and len(splits) == 1 else None


def byte_characters() -> dict[int, str]:
    """Return GPT-2's printable character for each byte (openai/gpt-2, encoder.py: bytes_to_unicode)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
