"""What one device needs of memory to train a model, from its config alone.

Training steps run on fake tensors, which have shapes and no contents, so that a model of any size fits into any
machine; ``torch.distributed._tools.mem_tracker`` counts what would be alive at each moment.
"""

from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from litgpt import GPT, Config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from custom_moe import use_custom_moe
from recipe.settings import Precision
from recipe.training.model import PretrainingModel
from recipe.training.optimizers import make_optimizer


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """All that is beside the others at the peak: activations, logits, temporary results"""

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    config: Config,
    *,
    optimizer: dict[str, Any],
    micro_batch_size: int,
    seq_length: int,
    precision: Precision = "bf16-mixed",
    tie_embeddings: bool = False,
) -> TrainingMemory:
    """The memory of steps that accumulate over more than one micro batch.

    Not counted: what the CUDA context takes (some hundred MB), the allocator's gaps, DDP's gradient buckets (as much as
    the gradients). The kernels are a CPU's; a GPU's differ in what they keep beside their results, and do not pad the
    experts' rows.

    Args:
        config: any LitGPT config.
        optimizer: ``class_path`` and ``init_args``, as in a run file.
        micro_batch_size: sequences at once.
        seq_length: tokens in each.
        precision: ``bf16-mixed``, ``16-mixed``, ``bf16-true`` or ``32-true``.
        tie_embeddings: as ``train.tie_embeddings``.
    """
    # All layers that follow the dense ones of a mixture are alike, so two small depths give any depth.
    shallow = (config.first_k_dense_replace or 0) + 1
    one, two = (
        _step_memory(replace(config, n_layer=depth), optimizer, micro_batch_size, seq_length, precision, tie_embeddings)
        for depth in (shallow, shallow + 1)
    )

    def at_depth(first: int, second: int) -> int:
        return first + (second - first) * (config.n_layer - shallow)

    return TrainingMemory(
        *(at_depth(getattr(one, name), getattr(two, name)) for name in TrainingMemory.__dataclass_fields__)
    )


def _step_memory(
    config: Config,
    optimizer: dict[str, Any],
    micro_batch_size: int,
    seq_length: int,
    precision: Precision,
    tie_embeddings: bool,
) -> TrainingMemory:
    # fp16 is as wide as bf16, and a CPU knows only the latter.
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if precision == "16-mixed" else precision)
    with FakeTensorMode(allow_non_fake_inputs=True), use_custom_moe():
        with fabric.init_module():
            gpt = GPT(config)
        gpt.max_seq_length = seq_length
        if tie_embeddings:
            gpt.transformer.wte.weight = gpt.lm_head.weight
        model = PretrainingModel(gpt)
        updater = make_optimizer(optimizer, model, fused=True)
        tracker = MemTracker()
        tracker.track_external(model, updater)
        tokens = torch.zeros(micro_batch_size, seq_length, dtype=torch.int64)
        with tracker:
            # After the first step the optimizer's state is there, after one more micro batch the gradients too.
            for updates in (True, False, False):
                tracker.reset_mod_stats()
                with fabric.autocast():
                    losses = model(tokens, tokens)
                (losses.cross_entropy + losses.load_balancing + losses.z_loss).backward()
                del losses
                if updates:
                    updater.step()
                    updater.zero_grad()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    state = sum(
        value.nbytes for values in updater.state.values() for value in values.values() if torch.is_tensor(value)
    )
    return TrainingMemory(weights, weights, state, peak - 2 * weights - state)
