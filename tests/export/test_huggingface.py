"""Hugging Face folders: transformers computes the same, and unsupported models are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, Config, Tokenizer
from litgpt.scripts import convert_lit_checkpoint
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from litmoe import checkpoints, load
from litmoe.cli import UserError
from litmoe.config import PROJECT
from litmoe.data.tokenizers import text_ids
from litmoe.export.huggingface import check_can_push, export, load_model
from litmoe.export.importing import import_folder
from litmoe.export.verify import same_text
from litmoe.export.weights import from_huggingface, to_huggingface
from litmoe.hf_config import litgpt_config, model_type_of, without_counterpart
from tests.helpers import DENSE_FIELDS, NEOX_FIELDS, save_tiny, tiny_gpt, wordy_gpt

SIGMOID = {"n_expert_groups": 2, "n_topk_groups": 2, "n_topk_scores_per_group": 1, "norm_topk_prob": True}
POST_NORM = {"norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True}
OLMO = {"norm_qk": True, "norm_qk_type": "olmo2"}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}
FAMILIES = {
    "mixtral": ({}, "MixtralForCausalLM"),
    "mixtral-wide-heads": ({"head_size": 16, "n_query_groups": 1, "rope_base": 500}, "MixtralForCausalLM"),
    "llama": (DENSE_FIELDS, "LlamaForCausalLM"),
    "llama-with-biases": ({**DENSE_FIELDS, "bias": True}, "LlamaForCausalLM"),
    "llama-3.1": ({**DENSE_FIELDS, "rope_adjustments": LLAMA3_ROPE, "n_embd": 64}, "LlamaForCausalLM"),
    "qwen2": ({**DENSE_FIELDS, "attn_bias": True}, "LlamaForCausalLM"),
    "qwen3": ({**DENSE_FIELDS, "norm_qk": True, "head_size": 16}, "Qwen3ForCausalLM"),
    "qwen3-moe": ({"norm_qk": True}, "Qwen3MoeForCausalLM"),
    "qwen3-moe-dense-first": (
        {"norm_qk": True, "first_k_dense_replace": 1, "intermediate_size": 40},
        "Qwen3MoeForCausalLM",
    ),
    "olmoe": (OLMO, "OlmoeForCausalLM"),
    "olmo2": ({**DENSE_FIELDS, **OLMO, **POST_NORM}, "Olmo2ForCausalLM"),
    "glm4-moe": ({**SIGMOID, "routed_scaling_factor": 2.5}, "Glm4MoeForCausalLM"),
    "glm4-moe-everything": (
        {
            **SIGMOID,
            **{"n_expert": 8, "n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2},
            **{"n_shared_expert": 2, "first_k_dense_replace": 1, "intermediate_size": 40, "norm_topk_prob": False},
            **{"attn_bias": True, "norm_qk": True, "rotary_percentage": 0.5},
        },
        "Glm4MoeForCausalLM",
    ),
    "gpt-neox": ({**NEOX_FIELDS, "gelu_approximate": "tanh", "norm_eps": 1e-3}, "GPTNeoXForCausalLM"),
    "pythia": ({**NEOX_FIELDS, "parallel_residual": True, "rotary_percentage": 0.25}, "GPTNeoXForCausalLM"),
}
QUICK = ("mixtral", "llama-3.1", "glm4-moe-everything", "pythia")
by_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
IMPORTED = [name for name in FAMILIES if name != "olmo2"]


def family_gpt(fields: dict, family: str) -> GPT:
    """A model of the family, with a random bias of the experts, so that a test notices a missing one."""
    gpt = tiny_gpt(fields | FAMILIES[family][0])
    for name, buffer in gpt.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.5)
    return gpt


def sample_ids(vocab_size: int = 384) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------------------- export


@by_family
def test_transformers_computes_the_same(family: str, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    gpt = family_gpt(moe_fields, family)
    checks = export(save_tiny(tmp_path / "final", gpt, tokenizer_dir), tmp_path / "out")
    assert [check.what for check in checks] == ["tokenizer", "logits", "greedy text"]
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == FAMILIES[family][1]
    assert not any(loading.values())
    with torch.no_grad():
        expected = gpt(sample_ids())
        torch.testing.assert_close(model(sample_ids()).logits, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1, "a test on zeros would show nothing"
    if family == "olmo2":
        with pytest.raises(UserError, match="type 'olmo2'"):
            import_folder(tmp_path / "out", tmp_path / "back")
        return
    import_folder(tmp_path / "out", tmp_path / "back")
    assert checkpoints.verify(tmp_path / "back").step == 0
    weights = checkpoints.load_weights(tmp_path / "back")
    assert weights.keys() == gpt.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in gpt.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "pythia"])
def test_tied_embeddings_are_stored_once(family: str, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    gpt = family_gpt(moe_fields, family)
    gpt.transformer.wte.weight = gpt.lm_head.weight
    export(save_tiny(tmp_path / "final", gpt, tokenizer_dir), tmp_path / "out")
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert stored < sum(p.numel() for p in gpt.parameters()) * 4 + 12_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["mixtral", "llama", "qwen2", "qwen3", "qwen3-moe", "olmoe"])
def test_names_equal_litgpts_conversion(family: str, moe_fields: dict) -> None:
    """For the families with a function in LitGPT."""
    gpt = family_gpt(moe_fields, family)
    own = {"qwen2": "qwen_2_5", "qwen3": "qwen_3", "qwen3-moe": "qwen_3", "olmoe": "qwen_3"}.get(family, "llama")
    expected: dict[str, torch.Tensor] = {}
    getattr(convert_lit_checkpoint, f"copy_weights_{own}")(gpt.config, expected, gpt.state_dict())
    found = to_huggingface(gpt.state_dict(), gpt.config, tied=False)
    if family == "qwen2":  # exported as Llama, which has one more bias
        zeros = [found.pop(f"model.layers.{layer}.self_attn.o_proj.bias") for layer in range(gpt.config.n_layer)]
        assert not any(bias.any() for bias in zeros)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_export_in_another_dtype(dtype: str, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    gpt = family_gpt(moe_fields, "glm4-moe")
    checks = export(save_tiny(tmp_path / "final", gpt, tokenizer_dir), tmp_path / "out", dtype=dtype)
    assert checks[-1].result.startswith(f"loaded in {dtype}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    bias = gpt.state_dict()["transformer.h.0.mlp.gate.e_score_correction_bias"]
    assert torch.equal(model.model.layers[0].mlp.gate.e_score_correction_bias, bias), "this bias stays in fp32"


@pytest.mark.slow
def test_large_models_are_sharded(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, monkeypatch) -> None:
    """huggingface_hub splits above 5 GB; in this test above 50 kB."""
    import huggingface_hub

    written = huggingface_hub.save_torch_state_dict
    assert huggingface_hub.serialization._base.MAX_SHARD_SIZE == "5GB"
    monkeypatch.setattr(
        huggingface_hub,
        "save_torch_state_dict",
        lambda *args, **kwargs: written(*args, max_shard_size="50KB", **kwargs),
    )
    gpt = family_gpt(moe_fields, "mixtral")
    export(save_tiny(tmp_path / "final", gpt, tokenizer_dir), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_class_name": "LayerNorm", "bias": True}, ["norm_class_name: LayerNorm", "bias: True"]),
        ({"rotary_percentage": 0.25}, ["rotary_percentage: 0.25"]),
        ({"n_shared_expert": 1}, ["n_shared_expert: 1"]),
        ({"first_k_dense_replace": 1}, ["first_k_dense_replace: 1"]),
        ({"routed_scaling_factor": 2.0}, ["routed_scaling_factor: 2.0"]),
        ({"parallel_residual": True}, ["parallel_residual: True"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping: 30.0"]),
        ({"sliding_window_size": 16}, ["sliding_window_size: 16"]),
        ({"scale_embeddings": True}, ["scale_embeddings: True"]),
        ({"rope_condense_ratio": 2}, ["rope_condense_ratio: 2"]),
        ({"rope_adjustments": {"factor": 2.0}}, ["rope_adjustments: {'factor': 2.0}"]),
        ({"attention_scores_scalar": 5}, ["attention_scores_scalar: 5"]),
        ({"name": "Gemma-MoE"}, ["name: Gemma-MoE"]),
        ({**SIGMOID, **OLMO}, ["norm_qk_type: olmo2"]),
        ({**SIGMOID, "n_expert_groups": 4, "n_topk_groups": 2}, ["n_topk_scores_per_group: 1"]),
        ({**OLMO, "head_size": 16}, ["head_size: 16"]),
        (
            {**DENSE_FIELDS, **OLMO},
            ["norm_1: True", "norm_2: True", "post_attention_norm: False", "post_mlp_norm: False"],
        ),
        ({**DENSE_FIELDS, "norm_qk": True, "attn_bias": True}, ["attn_bias: True"]),
        ({**DENSE_FIELDS, "mlp_class_name": "GemmaMLP"}, ["mlp_class_name: GemmaMLP"]),
        ({**NEOX_FIELDS, "n_query_groups": 2}, ["n_query_groups: 2"]),
        ({**NEOX_FIELDS, "bias": False}, ["bias: False"]),
        ({**NEOX_FIELDS, "name": "OLMo-x"}, ["name: OLMo-x"]),
    ],
)
def test_names_fields_without_counterpart(changes: dict, named: list[str], moe_fields: dict) -> None:
    assert without_counterpart(Config(**moe_fields | changes)) == named


def test_refusal_writes_nothing(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    gpt = tiny_gpt(moe_fields | {"norm_class_name": "LayerNorm", "bias": True})
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    with pytest.raises(UserError, match="norm_class_name: LayerNorm; bias: True"):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_existing_folder_is_not_changed(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields), tokenizer_dir)
    (tmp_path / "out").mkdir()
    export(folder, tmp_path / "out")  # an empty folder is fine
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="exists and is not empty"):
        export(folder, tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not empty"):
        import_folder(tmp_path / "out", folder)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_wrong_conversion_writes_nothing(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, monkeypatch) -> None:
    """Running both models finds a wrong weight."""
    import litmoe.export.huggingface as module

    def wrong(weights: dict, config: Config, *, tied: bool) -> dict:
        result = to_huggingface(weights, config, tied=tied)
        result["model.norm.weight"] = result["model.norm.weight"] * 1.01
        return result

    monkeypatch.setattr(module, "to_huggingface", wrong)
    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields), tokenizer_dir)
    with pytest.raises(RuntimeError, match="the logits of both models differ by"):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize(("gap", "is_accepted"), [(1e-5, True), (1e-2, False)])
def test_a_tie_is_no_difference(
    gap: float, is_accepted: bool, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path
) -> None:
    """Two tokens have almost equal logits, and the two models prefer different ones."""
    folder = save_tiny(tmp_path / "final", wordy_gpt(moe_fields), tokenizer_dir)
    export(folder, tmp_path / "out")
    gpt = checkpoints.load_model(folder, torch.device("cpu"), torch.float32)
    theirs = load_model(tmp_path / "out", torch.float32)
    tokenizer, their_tokenizer = Tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        hidden = theirs.model(torch.tensor([text_ids(tokenizer, "Once upon a time")])).last_hidden_state[0, -1]
        first = int((theirs.lm_head.weight @ hidden).argmax())
        second = 300 if first != 300 else 301
        for model, preferred in ((gpt, first), (theirs, second)):
            model.lm_head.weight[second] = model.lm_head.weight[first]
            model.lm_head.weight[preferred] += gap * hidden / hidden.square().sum()
    if is_accepted:
        assert "only up to two equally probable tokens" in same_text(gpt, tokenizer, theirs, their_tokenizer).result
    else:
        with pytest.raises(RuntimeError, match="both models write different texts"):
            same_text(gpt, tokenizer, theirs, their_tokenizer)


def test_refuses_a_missing_tokenizer(tmp_path: Path, moe_fields: dict) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        export(save_tiny(tmp_path / "final", tiny_gpt(moe_fields), None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_exports_each_model_file(tmp_path: Path, tokenizer_dir: Path) -> None:
    """All files of configs/models, with small sizes."""
    from tests.test_configs import shrunken

    for path in sorted((PROJECT / "configs/models").glob("*.yaml")):
        config = Config.from_file(path)
        names = [flag.removeprefix("--model.") for flag in shrunken(config)[::2]]
        small = dict(zip(names, map(int, shrunken(config)[1::2]), strict=True))
        gpt = tiny_gpt(yaml.safe_load(path.read_text(encoding="utf-8")) | small)
        folder = save_tiny(tmp_path / path.stem / "final", gpt, tokenizer_dir)
        export(folder, tmp_path / path.stem / "out")


def test_each_model_file_has_a_counterpart() -> None:
    found = {}
    for path in sorted((PROJECT / "configs/models").glob("*.yaml")):
        config = Config.from_file(path)
        assert without_counterpart(config) == [], path.stem
        found[path.stem] = model_type_of(config)
    assert found["gpt2-moe-8x124m"] == found["moe-200m"] == "mixtral"


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_is_the_same(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, stories: list[str]) -> None:
    source = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, source)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"prepared_from": {"name": "secret/folder"}, "chat_template": "no", "tokenizer_class": "GPT2Tokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields), source)
    export(folder, tmp_path / "out")
    ours, theirs = load(folder, device="cpu").tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*stories[:20], "naïve 🦊\n\n x ", "a<|endoftext|>b"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == ours.processor.decode(ours.encode(text).tolist(), False)
    assert (theirs.eos_token_id, theirs.model_max_length, theirs.chat_template) == (0, 64, None)
    assert "secret" not in "".join(path.read_text("utf-8") for path in (tmp_path / "out").glob("*.json"))


def test_bos_token_is_kept(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    """LitGPT decides by ``add_bos_token``."""
    source = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, source)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8")) | {"add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    export(save_tiny(tmp_path / "final", tiny_gpt(moe_fields), source), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Mia")["input_ids"][0] == 0
    import_folder(tmp_path / "out", tmp_path / "back")
    assert load(tmp_path / "back", device="cpu").tokenizer.encode("Mia")[0] == 0


def test_a_batch_gives_the_same_texts(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    """Padding needs a token, and has no effect on the texts."""
    export(save_tiny(tmp_path / "final", wordy_gpt(moe_fields), tokenizer_dir), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["Once upon a time, Mia the cat", "The", "Hello, I am"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (tokenizer.eos_token_id, "left")
    assert (
        batch["attention_mask"].sum(dim=1) == torch.tensor([len(tokenizer(text)["input_ids"]) for text in texts])
    ).all()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().padding_idx is None, "the embedding of the end-of-text token can be trained"
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"do_sample": False, "max_new_tokens": 20}
    alone = [generator(text, **settings)[0]["generated_text"] for text in texts]
    assert [found["generated_text"] for (found,) in generator(texts, batch_size=3, **settings)] == alone
    assert tokenizer.batch_decode(model.generate(**batch, **settings), skip_special_tokens=True) == alone
    assert len(set(alone)) == 3 and all(len(text) > 40 for text in alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_keeps_the_tokenizer(family: str, tmp_path: Path, moe_fields: dict) -> None:
    """Some families have rules of their own, for numbers for example, which must not replace tokenizer.json."""
    from litmoe.hf_config import huggingface_config

    texts = [
        *("In 2024 and 1999, 123456 of 3,141.59", "Mia's isn't we'll I'M IT'S", "  a   b\t\tc\n\n\nd  \n e"),
        *("Füchse naïve 日本語 🦊 \u200d é e\u0301 \ufb01", "x=foo_bar(1){2};//c\r\n..."),
    ]
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    library.train_from_iterator([*texts * 9, *map(str, range(2000))], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = Config(**moe_fields | FAMILIES[family][0])
    described = huggingface_config(config, tied=False, dtype="float32", bos_id=None, eos_id=0)
    (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert theirs(text)["input_ids"] == library.encode(text).ids
    # Newer versions of transformers than the pinned one always use Qwen's rules for this type.
    assert described["model_type"] != "qwen2"


@pytest.mark.parametrize("entry", ["<pad>", {"content": "<pad>", "__type": "AddedToken"}, "<missing>"])
def test_keeps_a_pad_token_of_the_vocabulary(
    entry: object, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path
) -> None:
    source = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, source)
    library = Library.from_file(str(source / "tokenizer.json"))
    library.add_special_tokens(["<pad>"])
    library.save(str(source / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8")) | {"pad_token": entry}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = {"vocab_size": library.get_vocab_size(), "padded_vocab_size": 400}
    export(save_tiny(tmp_path / "final", tiny_gpt(moe_fields | sizes), source), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token == ("<|endoftext|>" if entry == "<missing>" else "<pad>")
    assert len(tokenizer) == library.get_vocab_size()


def test_a_llama_tokenizer_goes_out_and_in(tmp_path: Path, moe_fields: dict, llama_tokenizer_dir: Path) -> None:
    """The check compares what is really streamed, which differs from decoding token by token."""
    folder = save_tiny(tmp_path / "final", wordy_gpt(moe_fields), llama_tokenizer_dir)
    export(folder, tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "back")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("Once upon")["input_ids"][0] == 1 and theirs("Once upon")["input_ids"].count(1) == 1
    wanted = load(folder, device="cpu").generate("Once upon", max_new_tokens=30, temperature=0.0)
    assert load(tmp_path / "back", device="cpu").generate("Once upon", max_new_tokens=30, temperature=0.0) == wanted
    assert wanted.count(" ") > 5


def test_single_token_is_decoded_the_same(tmp_path: Path, moe_fields: dict, llama_tokenizer_dir: Path) -> None:
    """Without a begin-of-text token, "The" is one token, and LitGPT's decode writes a space before it."""
    source = tmp_path / "tokenizer"
    shutil.copytree(llama_tokenizer_dir, source)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = save_tiny(tmp_path / "final", wordy_gpt(moe_fields), source)
    assert len(load(folder, device="cpu").tokenizer.processor.encode("The", add_special_tokens=False).ids) == 1
    export(folder, tmp_path / "out")
    assert 1 not in AutoTokenizer.from_pretrained(tmp_path / "out")("The")["input_ids"]


def test_exports_the_context_of_training(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    settings = {"train": {"max_seq_length": 24}}
    export(
        save_tiny(tmp_path / "final", tiny_gpt(moe_fields), tokenizer_dir, hyperparameters=settings), tmp_path / "out"
    )
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 24
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 24
    assert "| context | 24 tokens |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- model card


def test_model_card(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    gpt = tiny_gpt(moe_fields)
    manifest = {
        "source": {"name": "tinystories", "location": "roneneldan/TinyStories@f54c09f"},
        "splits": {"train": {"tokens": 1234567, "documents": 890}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "metrics.csv").write_text("step,val_loss\n2,4.5\n7,3.25\n8,\n9,1.0\n", encoding="utf-8")
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir, step=8, manifest_path=tmp_path / "manifest.json")
    export(folder, tmp_path / "out", title="org/name")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["litgpt", "moe"]}
    total = sum(parameter.numel() for parameter in gpt.parameters())
    active = total - 2 * 2 * 3 * 32 * 48
    for line in (
        "# org/name",
        f"| parameters | {total:,}, {active:,} active for each token |",
        "| training text | tinystories (roneneldan/TinyStories@f54c09f): 1,234,567 tokens of 890 documents |",
        "| trained for | 8 steps, 1,024 tokens |",
        "| validation loss | 3.2500 nats per token, at step 7 |",
    ):
        assert line in card.splitlines()
    assert "No licence was chosen yet" in card
    code = card.split("```python\n")[1].split("```")[0].replace("org/name", str(tmp_path / "out"))
    exec(compile(code, "card", "exec"), {})


# -------------------------------------------------------------------------------------------------------------- import


def hf_folder(folder: Path, tokenizer_dir: Path, model_type: str, *, pickled: bool = False, **changes: object) -> Path:
    """A tiny random model as transformers saves it."""
    torch.manual_seed(0)
    sizes = {
        **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(folder)
    if pickled:
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}, marks=pytest.mark.slow),
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": torch.bfloat16}),
        ("gpt_neox", {"pickled": True}),
        pytest.param("mixtral", {"num_local_experts": 4, "pickled": True}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"num_key_value_heads": 2, "head_dim": 16}, marks=pytest.mark.slow),
    ],
)
def test_imports_a_transformers_folder(model_type: str, changes: dict, tmp_path: Path, tokenizer_dir: Path) -> None:
    source = hf_folder(tmp_path / "hf", tokenizer_dir, model_type, **changes)
    assert [check.what for check in import_folder(source, tmp_path / "in")] == ["tokenizer", "logits", "greedy text"]
    model = load(tmp_path / "in", device="cpu", precision="32-true")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(sample_ids()).logits
        torch.testing.assert_close(model.gpt(sample_ids()), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
    weights = checkpoints.load_weights(tmp_path / "in")
    assert checkpoints.is_tied(weights) == bool(changes.get("tie_word_embeddings"))
    assert weights["lm_head.weight"].dtype == changes.get("dtype", torch.float32)
    assert load(tmp_path / "in", device="cpu").generate("Once", max_new_tokens=4).startswith("Once")


@pytest.mark.parametrize("has_config", [True, False])
def test_imports_bos_of_a_template(tmp_path: Path, llama_tokenizer_dir: Path, has_config: bool) -> None:
    """Also without a tokenizer_config.json. The end-of-text token of a template is left out, with a note."""
    source = hf_folder(tmp_path / "hf", llama_tokenizer_dir, "llama", eos_token_id=2)
    path = source / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    ending = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    content["post_processor"] = json.loads(ending.__getstate__())
    path.write_text(json.dumps(content), encoding="utf-8")
    if has_config:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
        (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        (source / "tokenizer_config.json").unlink()
    checks = import_folder(source, tmp_path / "in")
    assert ("without the </s>" in checks[0].result) is has_config  # else transformers takes its LlamaTokenizer
    ids = text_ids(load(tmp_path / "in", device="cpu").tokenizer, "Once upon")
    assert ids[0] == 1 and 2 not in ids


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mixtral", {"sliding_window": 16}, "sliding_window: 16"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: .*linear"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters: .*yarn"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act: relu"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias: False"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window: 8"),
        ("olmoe", {"norm_topk_prob": False}, "norm_topk_prob: False"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ("gpt2", {}, "type 'gpt2'; expected one of llama, mixtral, gpt_neox"),
    ],
)
def test_refuses_what_litgpt_cannot_compute(
    model_type: str, changes: dict, message: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    source = hf_folder(tmp_path / "hf", tokenizer_dir, model_type)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "rope_scaling" in changes:
        del config["rope_parameters"]  # as folders were written before transformers 5
    (source / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        import_folder(source, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_refuses_a_bias_of_the_output_projection(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = hf_folder(tmp_path / "hf", tokenizer_dir, "llama", attention_bias=True)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.o_proj\.bias"):
        import_folder(source, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_imports_the_rope_of_llama_31(tmp_path: Path, tokenizer_dir: Path) -> None:
    scaling = {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 16, "rope_theta": 500000.0},
    }
    source = hf_folder(tmp_path / "hf", tokenizer_dir, "llama", rope_parameters=scaling)
    import_folder(source, tmp_path / "in")
    assert checkpoints.load_config(tmp_path / "in").rope_adjustments == LLAMA3_ROPE


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_names_a_missing_file(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    source = hf_folder(tmp_path / "hf", tokenizer_dir, "llama")
    (source / name).unlink()
    with pytest.raises(UserError, match=r"config\.json|no weights|tokenizer"):
        import_folder(source, tmp_path / "in")


def test_refuses_damaged_weights(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = hf_folder(tmp_path / "hf", tokenizer_dir, "llama")
    path = source / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="can't be read"):
        import_folder(source, tmp_path / "in")
    path.write_bytes(content)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        import_folder(source, tmp_path / "in")
    assert not (tmp_path / "in").exists()


class _Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm-done",)


def test_runs_no_code_of_a_pickle(tmp_path: Path, tokenizer_dir: Path, monkeypatch) -> None:
    source = hf_folder(tmp_path / "hf", tokenizer_dir, "llama")
    (source / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Harmful()}, source / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="can't be read"):
        import_folder(source, tmp_path / "in")
    assert not (tmp_path / "harm-done").exists()


@pytest.mark.parametrize("family", IMPORTED)
def test_config_round_trip(family: str, moe_fields: dict) -> None:
    """All fields, except those that express the same in two ways."""
    from litmoe.hf_config import huggingface_config

    config = Config(**moe_fields | FAMILIES[family][0])
    described = huggingface_config(config, tied=False, dtype="float32", bos_id=0, eos_id=0)
    back, problems = litgpt_config(AutoConfig.for_model(**described), config.name, config.vocab_size)
    assert problems == []
    assert huggingface_config(back, tied=False, dtype="float32", bos_id=0, eos_id=0) == described
    gpt = family_gpt(moe_fields, family)
    with torch.device("meta"):
        again = GPT(back)
    again.load_state_dict(gpt.state_dict(), assign=True)
    again.cos, again.sin = again.rope_cache()
    with torch.no_grad():
        assert torch.equal(again.eval()(sample_ids()), gpt(sample_ids()))


def test_splits_stacked_experts(moe_fields: dict) -> None:
    """transformers has one tensor for all experts, its files one for each."""
    gpt = family_gpt(moe_fields, "qwen3-moe")
    files = to_huggingface(gpt.state_dict(), gpt.config, tied=False)
    assert all(
        torch.equal(tensor, gpt.state_dict()[name]) for name, tensor in from_huggingface(files, gpt.config).items()
    )


# ---------------------------------------------------------------------------------------------------------------- push


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", "org/--"])
def test_refuses_a_bad_repository_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(UserError, match="expected ORG/NAME"):
        check_can_push(name)
