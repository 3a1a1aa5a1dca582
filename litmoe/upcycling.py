"""A dense model becomes a mixture of experts (Sparse Upcycling, arXiv 2212.05055).

Each expert begins as a copy of its layer's feed-forward, the router begins at random. The weights of the experts that
work on a token sum to 1, so at the start the mixture computes what the dense model computed, whatever the router
chooses; with training the experts part. LitGPT's config of the dense model changes in its `MOE_FIELDS` alone.
"""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litmoe import checkpoints
from litmoe.cli import UserError, quoted
from litmoe.data.manifest import tokenizer_fingerprint

if TYPE_CHECKING:
    from litgpt import Config
    from torch import Tensor

EXPERTS, EXPERTS_PER_TOKEN = 8, 2

MOE_FIELDS = (
    "mlp_class_name",
    "n_expert",
    "n_expert_per_token",
    "intermediate_size",
    "moe_intermediate_size",
    "first_k_dense_replace",
)
"""What may differ between a dense model and the mixture that it becomes."""


def load_dense_config(folder: Path) -> "Config":
    """The config of a dense checkpoint whose feed-forward can become experts.

    Raises:
        UserError: there is none, or its feed-forward is another one than an expert's, SwiGLU.
    """
    config = checkpoints.load_config(folder)
    if config.mlp_class_name == "LLaMAMoE":
        raise UserError(
            f"--upcycle {folder}: it is a mixture of {config.n_expert} experts already. --initial_checkpoint_dir"
            f" {folder} trains a new run from its weights."
        )
    if config.mlp_class_name != "LLaMAMLP":
        activation = {"GptNeoxMLP": "GELU without a gate", "GemmaMLP": "a gate with GELU"}
        found = activation.get(config.mlp_class_name, "another one")
        raise UserError(
            f"--upcycle {folder}: its feed-forward is {config.mlp_class_name} ({found}), and an expert computes SwiGLU:"
            " no copy of it would compute the same. Expected a dense checkpoint with mlp_class_name LLaMAMLP, such as"
            " configs/models/moe-200m-dense-twin.yaml trains."
        )
    return config


def upcycled_model(folder: Path) -> dict[str, Any]:
    """The fields of the mixture that a dense checkpoint becomes where no model file says otherwise.

    Raises:
        UserError: as `load_dense_config`.
    """
    dense = load_dense_config(folder)
    return asdict(dense) | {
        "name": f"{dense.name}-upcycled",
        "mlp_class_name": "LLaMAMoE",
        "n_expert": EXPERTS,
        "n_expert_per_token": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": dense.intermediate_size,
    }


def check_experts(folder: Path, config: "Config", *, tie_embeddings: bool) -> None:
    """Raises ``UserError`` where a mixture would not compute what the dense checkpoint computes."""
    dense = load_dense_config(folder)
    problems = []
    if config.mlp_class_name != "LLaMAMoE":
        problems.append(f"mlp_class_name is {config.mlp_class_name}, expected LLaMAMoE")
    elif (width := config.moe_intermediate_size or config.intermediate_size) != dense.intermediate_size:
        problems.append(
            f"moe_intermediate_size is {width}, expected {dense.intermediate_size}, the dense feed-forward's width"
        )
    if config.first_k_dense_replace and config.intermediate_size != dense.intermediate_size:
        problems.append(f"intermediate_size is {config.intermediate_size}, expected {dense.intermediate_size}")
    if config.n_shared_expert:
        problems.append(f"n_shared_expert is {config.n_shared_expert}, which would add a second feed-forward")
    if config.n_expert_groups:
        problems.append("n_expert_groups asks for a sigmoid router; the softmax router's weights sum to 1")
    if config.routed_scaling_factor != 1.0:
        problems.append(f"routed_scaling_factor is {config.routed_scaling_factor}, expected 1.0")
    if not problems and tie_embeddings:
        weights = checkpoints.load_weights(folder, mmap=os.name != "nt")
        if not weights["lm_head.weight"].equal(weights["transformer.wte.weight"]):
            problems.append("train.tie_embeddings is true, and its embedding and output matrix differ")
    if problems:
        raise UserError(
            f"--upcycle {folder}: the model would not begin as what the checkpoint is: {'; '.join(problems)}. Without"
            f" --model it becomes {EXPERTS} experts as wide as its feed-forward, {EXPERTS_PER_TOKEN} for each token;"
            " --model.n_expert and --model.n_expert_per_token change these."
        )


def check_same_tokenizer(folder: Path, tokenizer_dir: Path) -> None:
    """Raises ``UserError`` where a run's tokenizer is another one than a checkpoint's, if that holds one."""
    folder = checkpoints.as_folder(folder)
    if not all((folder / name).is_file() for name in (checkpoints.MARK, "tokenizer.json")):
        return  # a folder of LitGPT's, whose tokenizer our text's may complete, or one without a tokenizer
    if tokenizer_fingerprint(folder) != tokenizer_fingerprint(tokenizer_dir):
        raise UserError(
            f"the tokenizer in {tokenizer_dir} is another one than that of {folder}, whose weights the run starts from:"
            " its ids would mean other text. Prepare the text with the checkpoint's: `uv run python prepare_data.py"
            f" --source TEXT --tokenizer {quoted(folder)} --data_dir NEW --tokenizer_dir NEW/tokenizer`."
        )


def upcycle(dense: "dict[str, Tensor]", mixture: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The state dict to load into a mixture: the dense model's weights, once for each expert, and its own routers.

    Copies nothing: all experts of a layer are one tensor here, and become several where the model takes them.

    Args:
        dense: LitGPT's state dict of the dense model.
        mixture: LitGPT's state dict of the mixture as it was initialized.
    """
    return {
        key: own if key.endswith(".mlp.gate.weight") else dense[re.sub(r"\.mlp\.experts\.\d+\.", ".mlp.", key)]
        for key, own in mixture.items()
    }
