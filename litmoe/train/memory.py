"""Memory of one device for training a model, computed from the settings alone.

An optimizer step runs on fake tensors, which have shapes but no contents, so that a model of any size can be computed
on any machine. A dispatch mode sums up the living tensors at each operation, as an allocator would.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from lightning.fabric.plugins.precision import HalfPrecision, MixedPrecision, Precision
from litgpt import GPT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from custom_moe import backends
from custom_moe.backends import Hardware
from litmoe.config import ParsedRun
from litmoe.layers import use_our_layers
from litmoe.train.cross_entropy import computed_columns
from litmoe.train.model import PretrainingModel, cast_matrices, matrices_to_cast
from litmoe.train.optimizers import make_optimizer, optimizer_traits


class TrainingMemory(NamedTuple):
    """Bytes on one device at the peak of an optimizer step."""

    weights: int
    """Parameters and buffers"""
    gradients: int
    """Of the parameters that are done at the peak"""
    optimizer: int
    """The optimizer's state"""
    activations: int
    """Kept by the forward for the backward"""
    logits: int
    """All tensors of the vocabulary's width: logits, their copies and gradients"""
    workspace: int
    """All others: weights cast to 16 bits, unfinished gradients, temporary results"""

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return sum(self)


def training_memory(run: ParsedRun, precision: str, hardware: Hardware | None = None) -> TrainingMemory:
    """Return the memory of an optimizer step that is not the first one.

    Not counted: the CUDA context (some hundred MB) and gaps in the allocator. On a GPU ``torch.compile`` saves some of
    the temporary results that are counted here.

    Args:
        run: the parsed settings.
        precision: of the run, in Fabric's names. The settings may leave it to the machine.
        hardware: the GPU to compute for; None for the CPU. Either way the operators are those of a CPU: autograd on
            fake CUDA tensors needs a driver. The experts' backends for GPUs allocate as much as the CPU's.
    """
    train = run.settings.train
    context = train.max_seq_length or run.settings.model.block_size
    # Our layers, because their backward keeps other tensors than that of LitGPT's layers.
    with FakeTensorMode(allow_non_fake_inputs=True), use_our_layers(run.settings.moe.router):
        model = _build_model(run, precision, hardware)
        optimizer = _build_optimizer(run, precision, hardware, model)
        tokens = torch.zeros(train.micro_batch_size, context, dtype=torch.int64)
        # CUDA's allocator rounds sizes up to multiples of 512 bytes.
        ledger = _Ledger(_vocabulary_widths(run, hardware), unit=512 if hardware else 1)
        _simulate_step(run, precision, model, optimizer, tokens, ledger)
    memory = TrainingMemory(**{part: ledger.at_peak[part] for part in TrainingMemory._fields})
    if optimizer_traits(run.optimizer).compiles_step:
        # The step was left out, so the ledger has seen no state.
        memory = memory._replace(optimizer=_torchao_state_bytes(optimizer))
    return memory


CPU_TOKENS = 4096
"""Tokens in one forward and backward on a CPU: more are not faster, and need more memory"""


def rows_on_cpu(sequences: int, context: int) -> int:
    """Return how many sequences of a step a CPU processes at a time.

    Args:
        sequences: of a step, on this process. The result divides it.
        context: tokens of a sequence.
    """
    return max(size for size in divisors(sequences) if size == 1 or size * context <= CPU_TOKENS)


def divisors(number: int) -> list[int]:
    """Return the divisors in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def largest_micro_batch(
    run: ParsedRun, precision: str, hardware: Hardware | None, available: float, ranks: int
) -> tuple[int, int]:
    """Return how many sequences of a step fit into a device at a time, and the bytes that they need.

    The number divides a device's part of the global batch. It is 1 if not even one sequence fits.

    Args:
        run, precision, hardware: as for ``training_memory``.
        available: bytes on the device.
        ranks: devices over all machines.
    """
    sizes = divisors(run.settings.train.global_batch_size // ranks)
    peak = cache(partial(_peak_of_size, run, precision, hardware))
    # Memory grows linearly with the size: the first two sizes predict the others, of which one is checked.
    slope = (peak(sizes[1]) - peak(1)) / (sizes[1] - 1) if len(sizes) > 1 else 0
    fitting = [size for size in sizes if peak(1) + slope * (size - 1) <= available]
    while len(fitting) > 1 and peak(fitting[-1]) > available:
        fitting.pop()
    size = fitting[-1] if fitting else 1
    return size, peak(size)


def _peak_of_size(run: ParsedRun, precision: str, hardware: Hardware | None, size: int) -> int:
    # Copies, because the settings of the run must not change.
    train = copy(run.settings.train)
    train.micro_batch_size = size
    changed = replace(run, settings=replace(run.settings, train=train))
    return training_memory(changed, precision, hardware).peak


def _build_model(run: ParsedRun, precision: str, hardware: Hardware | None) -> PretrainingModel:
    settings = run.settings
    with _fabric_precision(precision).module_init_context():
        gpt = GPT(settings.model)
    gpt.max_seq_length = settings.train.max_seq_length or settings.model.block_size
    if settings.train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    model = PretrainingModel(gpt, settings.activation_checkpointing)
    # The tensors are the CPU's, but the loss must be divided into the blocks of the planned device.
    model.loss_on = "cuda" if hardware else "cpu"
    return model


def _build_optimizer(
    run: ParsedRun, precision: str, hardware: Hardware | None, model: nn.Module
) -> torch.optim.Optimizer:
    # As in the training loop: fused kernels unscale gradients themselves.
    fused = precision != "16-mixed"
    optimizer = make_optimizer(run.optimizer, model, fused=fused)
    if hardware is not None and not fused:
        # torch's default on a GPU: updates many tensors at once, which needs memory for temporary results.
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True
    return optimizer


def _simulate_step(
    run: ParsedRun,
    precision: str,
    model: PretrainingModel,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    ledger: "_Ledger",
) -> None:
    """Run one step on fake tensors, after a first step that creates gradients and optimizer state."""
    # A compiled step can't run on fake tensors. It needs little memory besides its state.
    can_step = not optimizer_traits(run.optimizer).compiles_step
    checkpointing = run.settings.activation_checkpointing
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ledger:
        ledger.add("weights", *model.parameters(), *model.buffers())
        for parameter in parameters:
            # An unfinished gradient is workspace. The hook runs when autograd has stored it in `grad`.
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.add("gradients", p.grad))
            parameter.grad = torch.zeros_like(parameter)
        ledger.add("gradients", *(parameter.grad for parameter in parameters))
        # Optimizers create their state in their first step.
        if can_step:
            optimizer.step()
        ledger.add("optimizer", *tree_leaves(list(optimizer.state.values())))
        # With accumulation, the gradients of the previous micro batches exist during the forward.
        if run.settings.train.gradient_accumulation_iters(1) == 1:
            optimizer.zero_grad()
        # Temporary results of the first step must not count: the run repeats the second one.
        ledger.reset_peak()

        ledger.part = "activations"
        with _fabric_precision(precision).forward_context():
            weights = cast_matrices(matrices_to_cast(model, precision, checkpointing), precision)
            losses = functional_call(model, weights, (tokens, tokens), tie_weights=False)
        loss = losses.cross_entropy + losses.load_balancing + losses.z_loss
        ledger.part = "workspace"
        loss.backward()
        # As in the training loop, they are freed before the update.
        del losses, loss, weights
        if can_step:
            optimizer.step()


def _vocabulary_widths(run: ParsedRun, hardware: Hardware | None) -> set[int]:
    # The last dimension of logits: the complete vocabulary, or the part that the fused loss computes at a time.
    vocabulary = run.settings.model.padded_vocab_size or 0
    return {vocabulary, computed_columns(vocabulary, "cuda" if hardware else "cpu")}


class _Ledger(TorchDispatchMode):
    """Counts the bytes of living tensors by part, while it is active.

    torch calls ``__torch_dispatch__`` for each operation, forward, backward and update. The ledger runs the operation
    and counts the memory of its results. It counts storages, because a view is a tensor without memory of its own. A
    weak reference to each storage reports when Python frees it. (torch's ``MemTracker`` records each module as well,
    which took 100 s for 48 layers.)
    """

    def __init__(self, vocabulary_widths: set[int], unit: int) -> None:
        super().__init__()
        self.part = "workspace"
        """Where new tensors are counted"""
        self.at_peak: Counter[str] = Counter()
        self._vocabulary_widths, self._unit = vocabulary_widths, unit
        # Only CUDA's allocator rounds sizes up.
        self._is_for_cpu = unit == 1
        # Bytes by part now, their sum, and the largest sum since `reset_peak`.
        self._current: Counter[str] = Counter()
        self._total = self._peak = 0
        # By id of the storage: its part, its bytes, and the weak reference, which only calls back while it is kept.
        self._alive: dict[int, tuple[str, int, ReferenceType[Any]]] = {}

    def reset_peak(self) -> None:
        """Set the peak to the current state."""
        self._peak, self.at_peak = self._total, Counter(self._current)

    def add(self, part: str, *tensors: Any) -> None:
        """Move tensors to a part."""
        for tensor in _tensors(tensors):
            for storage in get_untyped_storages(tensor):
                self._count(part, storage)

    def _count(self, part: str, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        # A storage that changes its part, such as a finished gradient, is counted in one part only.
        if key in self._alive:
            self._remove(key)
        size = -(-storage.nbytes() // self._unit) * self._unit
        # The callback removes the entry before another storage can get the same id.
        self._alive[key] = part, size, ref(storage, partial(self._remove, key))
        self._current[part] += size
        self._total += size

    def _remove(self, key: int, _: object = None) -> None:
        part, size, _ = self._alive.pop(key)
        self._current[part] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOP_OPERATORS:
            # To the dispatcher a custom operator is one operation; its Python function shows its temporary buffers.
            # `with self`, because torch switches the mode off inside of this method.
            with self:
                results = _run_loop(_LOOP_OPERATORS[func], args)
        else:
            results = func(*args, **kwargs)
        for result in _tensors(results):
            self._count_new(self._part_of(func, args, result), result)
        if self._is_for_cpu:
            # On a CPU a sum in a wider type first casts its input, below the level of the dispatcher. The same cast is
            # made here to count it; its result is freed at once.
            with self:
                if "sum" in func.__name__ and kwargs.get("dtype"):
                    args[0].to(kwargs["dtype"])
                elif func is torch.ops.aten.add_.Tensor:
                    args[1].to(args[0].dtype)
        # After each operation and not only at the end of a pass: the peak can be at any of them.
        if self._total > self._peak:
            self.reset_peak()
        return results

    def _count_new(self, part: str, tensor: Tensor) -> None:
        for storage in get_untyped_storages(tensor):
            # A known storage belongs to a view, or to an operation in place.
            if id(storage) not in self._alive:
                self._count(part, storage)

    def _part_of(self, func: Any, args: Any, result: Tensor) -> str:
        # By shape, because the same function makes logits in the forward and their gradients in the backward.
        if result.ndim > 1 and result.size(-1) in self._vocabulary_widths:
            return "logits"
        # Weights cast to 16 bits. Counted apart from the activations, although the forward makes both.
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            return "workspace"
        return self.part


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# _init_fn is the decorated Python function, and _opoverload is what the dispatcher passes as `func`.
_LOOP_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator._opoverload: operator._init_fn
    for operator in (
        backends.loop_multiply,
        backends.loop_weight_gradient,
        backends.loop_forward,
        backends.loop_backward,
    )
}
"""The custom operators that loop over the experts, and their Python functions"""


class _Ends(list[int]):
    """Replaces ``ends_E``, the row at which each expert ends.

    The loop backend reads these numbers with ``tolist``. A fake tensor has no contents to read.
    """

    def tolist(self) -> list[int]:
        return self


def _run_loop(body: Callable[..., Any], args: Any) -> Any:
    """Run an operator as if each expert had the same number of tokens, with half of the possible padding."""
    named = dict(zip(inspect.signature(body).parameters, args, strict=True))
    n_experts = named["ends_E"].size(0)
    if "token_R" in named:
        # The complete layer. token_R has room for the largest possible padding, row_multiple - 1 rows for each expert;
        # half of it is the average.
        largest_padding = n_experts * (backends.BACKENDS["loop"].row_multiple(named["x_NC"]) - 1)
        rows = named["token_R"].size(0) - largest_padding // 2
    else:
        # A single product, whose first argument has its rows. It is used for biases and LoRA, without padding.
        rows = args[0].size(0)
    # The real numbers depend on the router. Even ones are the typical case in a balanced model.
    ends = _Ends(rows * (expert + 1) // n_experts for expert in range(n_experts))
    return body(**named | {"ends_E": ends})


def _fabric_precision(name: str) -> Precision:
    """Return Fabric's plugin, without its messages and without the gradient scaler of fp16."""
    if name.endswith("mixed"):
        # The plugin of 16-mixed would make a GradScaler. Its name alone decides whether autocast uses fp16, which the
        # fused loss does not support: then all logits exist at once.
        mixed = MixedPrecision("bf16-mixed", "cpu")
        mixed.precision = name  # type: ignore[assignment]
        return mixed
    return HalfPrecision("bf16-true") if name == "bf16-true" else Precision()


def _torchao_state_bytes(optimizer: Any) -> int:
    """Return the bytes of the two moments of each parameter in torchao's own 8-bit format."""
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            # exp_avg has a sign, exp_avg_sq has none, and each has its own 8-bit format.
            for signed in (True, False):
                moment = optimizer._new_buffer(empty, signed)
                total += sum(storage.nbytes() for storage in get_untyped_storages(moment))
    return total
