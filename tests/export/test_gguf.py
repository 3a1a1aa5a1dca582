"""GGUF files: llama.cpp itself computes the same, and what it can't compute is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from litgpt import GPT, Config
from litgpt.prompts import prompt_styles
from tokenizers import Tokenizer as Library

from litmoe import load
from litmoe.cli import UserError
from litmoe.config import PROJECT
from litmoe.data.conversations import Message, encode_prompt, prompt_text
from litmoe.export import gguf_model, llama_cpp
from litmoe.export.chat_template import Parts, parts_of
from litmoe.export.gguf import export
from litmoe.export.gguf_model import problems_in_llama_cpp
from litmoe.export.llama_cpp import LlamaCpp
from litmoe.export.modelfile import modelfile
from litmoe.inference.generate import generate_tokens
from tests.export.test_huggingface import FAMILIES, LLAMA3_ROPE, OLMO
from tests.helpers import DENSE_FIELDS, load_script, save_tiny, tiny_gpt, wordy_gpt

ALL_GROUPS = {**FAMILIES["glm4-moe-everything"][0], "n_topk_groups": 4}
# Fields of a tiny model, and the architecture in llama.cpp.
COMPUTED: dict[str, tuple[dict, str]] = {
    "mixtral": ({}, "llama"),
    "mixtral-wide-heads": (FAMILIES["mixtral-wide-heads"][0], "llama"),
    "llama": (DENSE_FIELDS, "llama"),
    "llama-with-biases": (FAMILIES["llama-with-biases"][0], "llama"),
    "llama-3.1": (FAMILIES["llama-3.1"][0], "llama"),
    "qwen2": (FAMILIES["qwen2"][0], "llama"),
    "qwen3": (FAMILIES["qwen3"][0], "qwen3"),
    "qwen3-moe": (FAMILIES["qwen3-moe"][0], "qwen3moe"),
    "olmo2": (FAMILIES["olmo2"][0], "olmo2"),
    "glm4-moe-without-shared-expert": (FAMILIES["glm4-moe"][0], "glm4moe"),
    "glm4-moe-everything": (ALL_GROUPS, "glm4moe"),
    "gpt-neox": (FAMILIES["gpt-neox"][0], "gptneox"),
    "pythia": (FAMILIES["pythia"][0], "gptneox"),
}
QUICK = ("mixtral", "llama-3.1", "glm4-moe-everything", "pythia")
by_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMPUTED]
)
QUESTION: list[Message] = [{"role": "user", "content": "Who is Mia?"}]


def random_gpt(fields: dict) -> GPT:
    """A model with a random bias of the experts, so that a test notices a missing one."""
    gpt = tiny_gpt(fields)
    for name, buffer in gpt.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.5)
    return gpt


def train_on(gpt: GPT, tokenizer_dir: Path, texts: list[str], steps: int = 100) -> GPT:
    """Train until the model knows most words of the texts."""
    encode = Library.from_file(str(tokenizer_dir / "tokenizer.json")).encode_batch
    ids = torch.tensor([id for encoding in encode(texts) for id in (*encoding.ids, 0)])
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 33, (16, 1), generator=generator)
        rows = ids[starts + torch.arange(33)]  # (16, 33)
        loss = F.cross_entropy(gpt(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0
    return gpt


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a file. Names begin with the architecture instead of `general`."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def types_of(path: Path) -> dict[str, str]:
    """The type of each tensor in a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def equal_tokens(result: str) -> tuple[int, int]:
    """The numbers of `N of M tokens`."""
    match = re.match(r"(\d+) of (\d+) tokens", result)
    assert match is not None
    return int(match[1]), int(match[2])


def assert_all_tokens_equal(result: str) -> None:
    """Random models may end a text early, so the number of tokens varies."""
    equal, tokens = equal_tokens(result)
    assert equal == tokens >= 60


# --------------------------------------------------------------------------------------------------------------- model


@by_family
def test_llama_cpp_writes_the_same(family: str, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    fields, architecture = COMPUTED[family]
    folder = save_tiny(tmp_path / "final", random_gpt(moe_fields | fields), tokenizer_dir)
    checks = dict(export(folder, tmp_path / "model.gguf", quantization="f32").checks)
    assert metadata_of(tmp_path / "model.gguf")["general.architecture"] == architecture
    assert_all_tokens_equal(checks["greedy text"])
    assert checks["tokenizer"] == "the same ids of 7 texts in llama.cpp"


def test_quickstart_model_in_llama_cpp(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Its kind: shared expert, sigmoid router with a bias, the best of 8, two groups of which both are chosen."""
    fields = yaml.safe_load((PROJECT / "configs/models/quickstart.yaml").read_text(encoding="utf-8"))
    gpt = random_gpt(fields | {"vocab_size": 384, "padded_vocab_size": 384})
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    checks = dict(export(folder, tmp_path / "model.gguf", quantization="f32").checks)
    assert_all_tokens_equal(checks["greedy text"])
    metadata = metadata_of(tmp_path / "model.gguf")
    assert metadata["glm4moe.expert_weights_scale"] == 2.0
    assert metadata["glm4moe.expert_gating_func"] == 2
    with pytest.raises(UserError, match=r"have 144, 240 numbers; expected multiples of 32. Use --quantize f16"):
        export(folder, tmp_path / "small.gguf", quantization="q8_0")


@pytest.mark.parametrize("is_chat", [False, True], ids=["base", "chat"])
def test_same_tokens_as_generate(is_chat: bool, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    """llama.cpp gets the text and tokenizes it; generate.py's code writes the same tokens."""
    fields = moe_fields | {"block_size": 128, "n_embd": 64, "moe_intermediate_size": 64}
    style = prompt_styles["phi-2"]() if is_chat else None
    folder = save_tiny(tmp_path / "final", wordy_gpt(fields), tokenizer_dir, prompt_style=style)
    model = load(folder, device="cpu", precision="32-true")
    exported = export(folder, tmp_path / "f32.gguf", quantization="f32")
    assert ("conversations" in dict(exported.checks)) == is_chat
    llama = LlamaCpp(tmp_path / "f32.gguf", 128)
    prompt = llama.chat_prompt(QUESTION) if is_chat else llama.tokenize("Once upon a time")
    if style is not None:
        assert prompt == encode_prompt(QUESTION, model.tokenizer, style)
    steps = generate_tokens(model.gpt, torch.tensor(prompt), max_new_tokens=40, temperature=0.0)
    assert llama.generate(prompt, 40) == torch.cat(list(steps)).tolist()


def test_q8_0_of_a_trained_model(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, stories: list[str]) -> None:
    """q8_0 rounds weights and activations to 1 of 255 steps, so two close tokens, or experts, may change places.

    A trained model seldom has close tokens: at least 95% of llama.cpp's choices must be those of the unrounded model.
    Random models are no measure, because they have close logits everywhere.
    """
    gpt = tiny_gpt(moe_fields | {"n_embd": 64, "moe_intermediate_size": 64})
    folder = save_tiny(tmp_path / "final", train_on(gpt, tokenizer_dir, stories), tokenizer_dir)
    checks = dict(export(folder, tmp_path / "model.gguf", quantization="q8_0").checks)
    equal, tokens = equal_tokens(checks["greedy text"])
    assert tokens >= 40 and equal >= 0.95 * tokens
    assert types_of(tmp_path / "model.gguf")["blk.0.ffn_down_exps.weight"] == "Q8_0"


def test_tied_embeddings_are_stored_once(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    gpt = random_gpt(moe_fields)
    gpt.transformer.wte.weight = gpt.lm_head.weight
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    checks = dict(export(folder, tmp_path / "model.gguf", quantization="f32").checks)
    assert "output.weight" not in types_of(tmp_path / "model.gguf")
    assert_all_tokens_equal(checks["greedy text"])


def test_type_of_each_tensor(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, monkeypatch) -> None:
    """Rows of 48 numbers can't be divided into blocks of 32; the embedding gets 8 bits at least."""
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    folder = save_tiny(tmp_path / "final", random_gpt(moe_fields), tokenizer_dir)
    for quantization, matrix in (("f16", "F16"), ("bf16", "BF16"), ("q4_0", "Q4_0")):
        exported = export(folder, tmp_path / f"{quantization}.gguf", quantization=quantization)
        types = types_of(tmp_path / f"{quantization}.gguf")
        assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_up_exps.weight"] == matrix
        assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.ffn_norm.weight"] == "F32"
        assert types["token_embd.weight"] == ("Q8_0" if quantization == "q4_0" else matrix)
        assert types["blk.0.ffn_down_exps.weight"] == ("F16" if quantization == "q4_0" else matrix)
        assert ("need" in exported.checks[0].result) == (quantization == "q4_0")
        assert exported.checks[1].result.startswith("not run")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["f16", "bf16", "q4_0"])
def test_llama_cpp_runs_each_type(quantization: Any, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    folder = save_tiny(tmp_path / "final", wordy_gpt(moe_fields), tokenizer_dir)
    checks = dict(export(folder, tmp_path / "model.gguf", quantization=quantization).checks)
    equal, tokens = equal_tokens(checks["greedy text"])
    # Four bits change many choices of a random model. Wrong weights would leave about 1 of 100 tokens.
    assert equal >= tokens * (0.3 if quantization == "q4_0" else 0.95)


def test_wrong_tensors_are_found(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(gguf_model, "_in_pairs", lambda tensor, heads: tensor)
    folder = save_tiny(tmp_path / "final", random_gpt(moe_fields), tokenizer_dir)
    with pytest.raises(RuntimeError, match=r"llama\.cpp writes other texts"):
        export(folder, tmp_path / "model.gguf", quantization="f32")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (OLMO, "norm_qk_type: olmo2"),
        ({"norm_qk": True, "first_k_dense_replace": 1, "intermediate_size": 40}, "first_k_dense_replace: 1"),
        ({**DENSE_FIELDS, "norm_qk": True, "rope_adjustments": LLAMA3_ROPE}, "rope_adjustments"),
        ({**FAMILIES["glm4-moe-everything"][0]}, "n_topk_groups: 2 (expected 4: all groups)"),
        ({"norm_class_name": "LayerNorm", "bias": True}, "norm_class_name: LayerNorm"),
    ],
)
def test_names_fields_that_llama_cpp_lacks(changes: dict, named: str, moe_fields: dict) -> None:
    assert any(problem.startswith(named) for problem in problems_in_llama_cpp(Config(**moe_fields | changes)))


def test_each_model_file_can_be_exported() -> None:
    for path in sorted((PROJECT / "configs/models").glob("*.yaml")):
        assert problems_in_llama_cpp(Config.from_file(path)) == [], path.stem


def test_refusals_write_nothing(
    tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, llama_tokenizer_dir: Path
) -> None:
    olmoe = save_tiny(tmp_path / "olmoe", tiny_gpt(moe_fields | OLMO), tokenizer_dir)
    gpt = tiny_gpt(moe_fields | {"padded_vocab_size": 512})
    sentencepiece = save_tiny(tmp_path / "sentencepiece", gpt, llama_tokenizer_dir)
    without = save_tiny(tmp_path / "without", gpt, None)
    out = tmp_path / "out" / "model.gguf"
    cases = [
        (olmoe, out, "norm_qk_type: olmo2.*transformers can: `uv run python export_hf.py"),
        (sentencepiece, out, "found the normalizer Sequence; expected a byte-level BPE"),
        (without, out, "holds no tokenizer"),
        (sentencepiece, out.with_suffix(".bin"), r"expected a name that ends in \.gguf"),
    ]
    for folder, path, message in cases:
        with pytest.raises(UserError, match=message):
            export(folder, path)
    assert not out.parent.exists()


def test_files_of_the_user_are_kept(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields), tokenizer_dir)
    export(folder, tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"a\.gguf exists"):
        export(folder, tmp_path / "a.gguf")
    export(folder, tmp_path / "b.gguf")  # the Modelfile is ours
    assert "FROM ./b.gguf\n" in (tmp_path / "Modelfile").read_text(encoding="utf-8")
    (tmp_path / "Modelfile").write_text("FROM mine\n", encoding="utf-8")
    with pytest.raises(UserError, match="was not written by export_gguf"):
        export(folder, tmp_path / "c.gguf")
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == "FROM mine\n"


def test_weights_too_large_for_f16(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    gpt = tiny_gpt(moe_fields)
    with torch.no_grad():
        gpt.lm_head.weight[0, 0] = 1e6
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    with pytest.raises(UserError, match=r"output\.weight has weights above 65,504.*--quantize bf16"):
        export(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_fields(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    """A begin-of-text token, another token that ends a turn, and ids without a token."""
    source = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, source)
    library = Library.from_file(str(source / "tokenizer.json"))
    size = library.get_vocab_size()
    names = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    library.add_special_tokens(names)
    library.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    settings |= {"bos_token": "<|begin_of_text|>", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    gpt = tiny_gpt(moe_fields | {"padded_vocab_size": 448, "block_size": 128})
    folder = save_tiny(tmp_path / "final", gpt, source, prompt_style=prompt_styles["llama3"]())
    checks = dict(export(folder, tmp_path / "model.gguf", quantization="f32").checks)
    assert checks["tokenizer"].startswith("the same ids")
    assert checks["conversations"] == "the same ids of 5 conversations in llama.cpp"
    assert checks["chat template"].startswith("the tokens of the prompt style Llama3")
    metadata = metadata_of(tmp_path / "model.gguf")
    fields = {name.removeprefix("tokenizer."): value for name, value in metadata.items() if "tokenizer." in name}
    assert (fields["ggml.model"], fields["ggml.pre"]) == ("gpt2", "gpt-2")
    assert (fields["ggml.eos_token_id"], fields["ggml.bos_token_id"], fields["ggml.add_bos_token"]) == (0, size, True)
    assert fields["ggml.eot_token_id"] == size + 1
    assert "<|start_header_id|>" in fields["chat_template"]
    assert len(fields["ggml.tokens"]) == len(fields["ggml.token_type"]) == 448
    types = [TokenType(kind) for kind in fields["ggml.token_type"]]
    assert types[0] == types[size] == TokenType.CONTROL and types[1] == TokenType.NORMAL
    assert set(types[size + 4 :]) == {TokenType.UNUSED}
    assert metadata["llama.context_length"] == 128


@pytest.mark.slow
def test_every_prompt_style_in_llama_cpp(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    """A style with a chat template gives the tokens of finetuning; the export compares them."""
    gpt = tiny_gpt(moe_fields | {"n_layer": 1, "block_size": 2048})
    for name, style in prompt_styles.items():
        folder = save_tiny(tmp_path / name / "final", gpt, tokenizer_dir, prompt_style=style())
        checks = dict(export(folder, tmp_path / name / "model.gguf", quantization="f32").checks)
        has_template = "tokenizer.chat_template" in metadata_of(tmp_path / name / "model.gguf")
        assert has_template == (name != "llama2"), name
        assert ("conversations" in checks) == has_template, name


# ----------------------------------------------------------------------------------------------------------- Modelfile


def rendered(text: str, turns: list[tuple[str, str]], system: str) -> str:
    """What Ollama makes of the template in a Modelfile: one turn after another, up to the last response."""
    template = text.split('TEMPLATE """')[1].split('"""\nPARAMETER')[0]
    first, later, end = re.fullmatch(
        r"\{\{ if \.System \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}\{\{ \.Response \}\}(.*)", template, re.DOTALL
    ).groups()
    result = ""
    for number, (question, answer) in enumerate(turns):
        turn = first if system and number == 0 else later
        turn = turn.replace("{{ .System }}", system).replace("{{ .Prompt }}", question)
        result += re.sub(r"\{\{ (\".*?\") \}\}", lambda literal: json.loads(literal[1]), turn)
        if number < len(turns) - 1:
            result += answer + end
    return result


def test_modelfile_writes_the_prompt_of_training() -> None:
    options = dict(eos_token="<|endoftext|>", stop=["<|endoftext|>"], context=256, temperature=0.8, top_k=50)
    for name in ("phi-2", "alpaca", "stablelm-zephyr", "qwen2.5"):
        style = prompt_styles[name]()
        parts = parts_of(style, None)
        assert parts is not None
        text = modelfile("model.gguf", parts, **options)
        question: Message = {"role": "user", "content": "Why?"}
        assert rendered(text, [("Why?", "")], "") == prompt_text([question], style), name
        with_system = prompt_text([{"role": "system", "content": "Be kind."}, question], style)
        assert rendered(text, [("Why?", "")], "Be kind.") == with_system, name
        two = rendered(text, [("Who?", "Mia."), ("Why?", "")], "")
        first = prompt_text([{"role": "user", "content": "Who?"}], style)
        assert two == f"{first}Mia.<|endoftext|>{prompt_text([question], style)}", name


def test_modelfile_quotes_what_go_would_read() -> None:
    parts = Parts('{{ "x" }} ', "\r", "", "", "")
    text = modelfile("a.gguf", parts, eos_token="</s>", stop=["\nUser:"], context=64, temperature=0.8, top_k=50)
    assert r'{{ else }}{{ "{{ \"x\" }} " }}{{ .Prompt }}{{ "\r" }}{{ end }}' in text
    assert 'PARAMETER stop """\nUser:"""\n' in text


def test_script_prints_the_commands(
    tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields), tokenizer_dir)
    load_script("export_gguf").export_gguf(folder, tmp_path / "My Story.gguf")
    shown = capsys.readouterr().out
    assert "ollama create my-story -f " in shown and "ollama run my-story" in shown
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert 'FROM ./My Story.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 64\n' in text
    assert types_of(tmp_path / "My Story.gguf")["token_embd.weight"] == GGMLQuantizationType.F16.name
