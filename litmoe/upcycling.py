"""Convert a dense model to a mixture of experts (Sparse Upcycling, arXiv 2212.05055).

Each expert starts as a copy of the feed-forward of its layer, and the router starts with random weights. The weights of
the selected experts sum to 1, so at first the mixture computes the same as the dense model, whatever the router
selects. During training, the experts become different. The config changes only in `MOE_FIELDS`.
"""

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

EXPERTS, EXPERTS_PER_TOKEN = 8, 2  # defaults

# Fields in which a dense model and the mixture made from it may differ.
MOE_FIELDS = (
    "mlp_class_name",
    "n_expert",
    "n_expert_per_token",
    "intermediate_size",
    "moe_intermediate_size",
    "first_k_dense_replace",
)


def load_dense_config(folder: Path) -> "Config":
    """Return the config of a dense checkpoint that can be upcycled.

    Raises:
        UserError: the model is not dense, or its feed-forward is not SwiGLU, which experts use.
    """
    config = checkpoints.load_config(folder)
    if config.mlp_class_name == "LLaMAMoE":
        raise UserError(
            f"--upcycle is {folder}, which is a mixture of {config.n_expert} experts already. To train a new run from"
            f" its weights: --initial_checkpoint_dir {folder}."
        )
    if config.mlp_class_name != "LLaMAMLP":
        activations = {"GptNeoxMLP": "GELU without a gate", "GemmaMLP": "a gate with GELU"}
        activation = activations.get(config.mlp_class_name, "another activation")
        raise UserError(
            f"--upcycle is {folder} with the feed-forward {config.mlp_class_name} ({activation}). Experts use SwiGLU,"
            " so a copy would not compute the same. Expected a dense checkpoint with mlp_class_name LLaMAMLP, as"
            " configs/models/moe-200m-dense-twin.yaml trains."
        )
    return config


def upcycled_model(folder: Path) -> dict[str, Any]:
    """Return the default fields of the mixture made from a dense checkpoint; errors as `load_dense_config`."""
    dense = load_dense_config(folder)
    return asdict(dense) | {
        "name": f"{dense.name}-upcycled",
        "mlp_class_name": "LLaMAMoE",
        "n_expert": EXPERTS,
        "n_expert_per_token": EXPERTS_PER_TOKEN,
        # Each expert is a copy of the complete feed-forward.
        "moe_intermediate_size": dense.intermediate_size,
    }


def check_experts(folder: Path, config: "Config", *, tie_embeddings: bool) -> None:
    """Raise UserError if the mixture would not compute the same as the dense checkpoint."""
    dense = load_dense_config(folder)
    # As in LitGPT, experts without a width of their own have that of the dense layers.
    width = config.moe_intermediate_size or config.intermediate_size
    # If all of these are fine, the mixture is a sum of equal experts with weights that sum to 1.
    checks = [
        (config.mlp_class_name == "LLaMAMoE", f"mlp_class_name is {config.mlp_class_name}, expected LLaMAMoE"),
        (
            width == dense.intermediate_size,
            f"moe_intermediate_size is {width}, expected {dense.intermediate_size}, the width of the dense one",
        ),
        (
            not config.first_k_dense_replace or config.intermediate_size == dense.intermediate_size,
            f"intermediate_size is {config.intermediate_size}, expected {dense.intermediate_size}",
        ),
        (
            not config.n_shared_expert,
            f"n_shared_expert is {config.n_shared_expert}, which would add a second feed-forward",
        ),
        (
            not config.n_expert_groups,
            "n_expert_groups selects a sigmoid router, but the weights must sum to 1, as those of the softmax router",
        ),
        (
            config.routed_scaling_factor == 1.0,
            f"routed_scaling_factor is {config.routed_scaling_factor}, expected 1.0",
        ),
    ]
    problems = [problem for is_fine, problem in checks if not is_fine]
    # Last, because this check reads the weights.
    if not problems and tie_embeddings and not _has_tied_embeddings(folder):
        problems.append("train.tie_embeddings is true, but its embedding and output matrix differ")
    if problems:
        raise UserError(
            f"--upcycle {folder}: the mixture would not compute the same as the checkpoint: {'; '.join(problems)}."
            f" Without --model, it gets {EXPERTS} experts of the width of its feed-forward, {EXPERTS_PER_TOKEN} per"
            " token. --model.n_expert and --model.n_expert_per_token change this."
        )


def _has_tied_embeddings(folder: Path) -> bool:
    weights = checkpoints.load_weights(folder)
    return weights["lm_head.weight"].equal(weights["transformer.wte.weight"])


def check_same_tokenizer(folder: Path, tokenizer_dir: Path) -> None:
    """Raise UserError if a checkpoint has a tokenizer that differs from the one of the run."""
    folder = checkpoints.as_folder(folder)
    if not (folder / checkpoints.COMPLETE_FILE).is_file() or not (folder / "tokenizer.json").is_file():
        return  # a checkpoint of LitGPT, with a tokenizer that ours may extend; or one without a tokenizer
    # The rows of the checkpoint's embedding belong to the ids of its own tokenizer.
    if tokenizer_fingerprint(folder) != tokenizer_fingerprint(tokenizer_dir):
        raise UserError(
            f"the tokenizer in {tokenizer_dir} is not the one of {folder}, which the run starts from: ids would mean"
            " other text. Prepare the text with the tokenizer of the checkpoint: `uv run python prepare_data.py"
            f" --source TEXT --tokenizer {quoted(folder)} --data_dir NEW --tokenizer_dir NEW/tokenizer`."
        )


def upcycle(dense: "dict[str, Tensor]", mixture: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return the state dict for a mixture: for each expert the dense weights, and the routers of the mixture.

    Nothing is copied: the experts of a layer share one tensor, until the model loads the state dict.

    Args:
        dense: LitGPT state dict of the dense model.
        mixture: LitGPT state dict of the initialized mixture.
    """
    result = {}
    for name, tensor in mixture.items():
        # A dense model has no routers. All other names differ in the number of the expert only.
        if name.endswith(".mlp.gate.weight"):
            result[name] = tensor
        else:
            result[name] = dense[re.sub(r"\.mlp\.experts\.\d+\.", ".mlp.", name)]
    return result
