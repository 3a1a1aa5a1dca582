"""What one device needs of memory to train a model, from the settings alone.

A whole optimizer step runs on fake tensors, which have shapes and no contents, so that a model of any size fits into
any machine; what is alive is summed up at each operation, as an allocator would.
"""

import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from lightning.fabric.plugins.precision import HalfPrecision, MixedPrecision, Precision
from litgpt import GPT, Config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from custom_moe import kernels, use_custom_moe
from custom_moe.backends import Hardware, backend_for
from custom_moe.experts import Experts
from litmoe.config import ParsedRun
from litmoe.layers import use_fast_layers
from litmoe.train.cross_entropy import words_at_once
from litmoe.train.model import PretrainingModel, cast_matrices, matrices_to_cast
from litmoe.train.optimizers import make_optimizer, optimizer_traits


class TrainingMemory(NamedTuple):
    """Bytes on one device at the moment of a step when the most is there."""

    weights: int
    """Parameters and buffers"""
    gradients: int
    """Those that are whole by then"""
    optimizer: int
    """Its state"""
    activations: int
    """What the forward leaves for the backward"""
    logits: int
    """All that is as wide as the vocabulary: logits, their copies and gradients"""
    workspace: int
    """The rest: weights cast to 16 bits, gradients under way, temporary results"""

    @property
    def peak(self) -> int:
        """All together."""
        return sum(self)


def training_memory(run: ParsedRun, precision: str, hardware: Hardware | None = None) -> TrainingMemory:
    """The memory of an optimizer step of a run, once there have been steps before.

    Not counted: what the CUDA context takes (some hundred MB), the allocator's gaps, DDP's gradient buckets (as much as
    the gradients). On a GPU ``torch.compile`` saves some of the temporary results that are counted here.

    Args:
        run: its model, batches, optimizer and what else decides.
        precision: what it computes in; the settings' own may be left to the machine.
        hardware: the card that it is worked out for; None for the CPU. The operations are a CPU's either way (autograd
            wants a driver for fake CUDA tensors), but for the experts' kernels and the optimizer's kind.
    """
    settings, train = run.settings, run.settings.train
    config = settings.model
    context = train.max_seq_length or config.block_size
    in_precision = _precision(precision)
    fused = precision != "16-mixed"  # as in litmoe/train/loop.py
    # A step that is compiled can't run on fake tensors. It needs little memory besides its state.
    eight_bit = optimizer_traits(run.optimizer).compiles_step
    with FakeTensorMode(allow_non_fake_inputs=True), use_custom_moe(), use_fast_layers():
        with in_precision.module_init_context():
            gpt = GPT(config)
        gpt.max_seq_length = context
        if train.tie_embeddings:
            gpt.transformer.wte.weight = gpt.lm_head.weight
        if hardware is not None:
            _choose_backend(gpt, _backend(run, precision, hardware))
        model = PretrainingModel(gpt, settings.activation_checkpointing)
        optimizer = make_optimizer(run.optimizer, model, fused=fused)
        if hardware is not None and not fused:
            for group in optimizer.param_groups:
                group.update({"foreach": True} if "foreach" in group else {})  # torch's choice for a card

        tokens = torch.zeros(train.micro_batch_size, context, dtype=torch.int64)
        model.loss_on = "cuda" if hardware else "cpu"
        words = config.padded_vocab_size or 0
        widths = {words, words_at_once(words, model.loss_on)}
        ledger = _Ledger(widths, 512 if hardware else 1)  # CUDA's allocator rounds up
        with ledger:
            ledger.add("weights", *model.parameters(), *model.buffers())
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(lambda p: ledger.add("gradients", p.grad))
                parameter.grad = torch.zeros_like(parameter)
            ledger.add("gradients", *(parameter.grad for parameter in parameters))
            if not eight_bit:
                optimizer.step()
            ledger.add("optimizer", *tree_leaves(list(optimizer.state.values())))
            if train.gradient_accumulation_iters(1) == 1:
                optimizer.zero_grad()
            ledger.forget_peak()

            ledger.part = "activations"
            with in_precision.forward_context():
                matrices = matrices_to_cast(model, precision, settings.activation_checkpointing)
                weights = cast_matrices(matrices, precision)
                losses = functional_call(model, weights, (tokens, tokens), tie_weights=False)
            loss = losses.cross_entropy + losses.load_balancing + losses.z_loss
            ledger.part = "workspace"
            loss.backward()
            del losses, loss, weights
            if not eight_bit:
                optimizer.step()
    found = TrainingMemory(**{part: ledger.at_peak[part] for part in TrainingMemory._fields})
    return found._replace(optimizer=_state_of_torchao(optimizer)) if eight_bit else found


class _Ledger(TorchDispatchMode):
    """What is alive of the tensors that are made while it is on, by part."""

    def __init__(self, vocabulary: set[int], unit: int) -> None:
        super().__init__()
        self.part = "workspace"
        """Where new tensors go"""
        self.at_peak: Counter[str] = Counter()
        self._vocabulary, self._unit = vocabulary, unit
        self._now: Counter[str] = Counter()
        self._total = self._peak = 0
        self._alive: dict[int, tuple[str, int, ReferenceType[Any]]] = {}

    def forget_peak(self) -> None:
        """What is alive now is the most so far."""
        self._peak, self.at_peak = self._total, Counter(self._now)

    def add(self, part: str, *tensors: Any) -> None:
        """Counts tensors to a part, wherever they were."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                for storage in get_untyped_storages(tensor):
                    self._count(part, storage)

    def _count(self, part: str, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            self._freed(key)
        size = -(-storage.nbytes() // self._unit) * self._unit
        self._alive[key] = part, size, ref(storage, partial(self._freed, key))
        self._now[part] += size
        self._total += size

    def _freed(self, key: int, _: object = None) -> None:
        part, size, _ = self._alive.pop(key)
        self._now[part] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOP:
            with self:  # what it makes on its way counts too
                results = _run_loop(_LOOP[func], args)
        else:
            results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                for storage in get_untyped_storages(result):
                    if id(storage) not in self._alive:
                        self._count(self._part_of(func, args, result), storage)
        if "sum" in func.__name__ and self._unit == 1 and (wider := (kwargs or {}).get("dtype")):
            # On a CPU a sum in a wider type casts its input first, where no one sees it.
            with self:
                args[0].to(wider)
        if self._total > self._peak:
            self.forget_peak()
        return results

    def _part_of(self, func: Any, args: Any, result: Tensor) -> str:
        if result.ndim > 1 and result.size(-1) in self._vocabulary:
            return "logits"
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            return "workspace"
        return self.part


_LOOP: dict[Any, Callable[..., Any]] = {
    operator._opoverload: operator._init_fn
    for operator in (
        kernels.loop_multiply,
        kernels.loop_weight_gradient,
        kernels.loop_forward,
        kernels.loop_backward,
    )
}
"""The operators that go through the experts one by one, and the Python that they are made of"""


class _Ends(list[int]):
    """Where each expert's rows end, known, as fake tensors are not."""

    def tolist(self) -> list[int]:
        return self


def _run_loop(body: Callable[..., Any], args: Any) -> Any:
    """As if the router gave each expert the same, with half of the padding that there may be."""
    named = dict(zip(inspect.signature(body).parameters, args, strict=True))
    rows, experts = named.get("token_R", args[0]).size(0), named["ends_E"].size(0)
    if "token_R" in named:
        rows -= experts * (kernels.row_multiple(named["x_NC"]) - 1) // 2
    return body(**named | {"ends_E": _Ends(rows * (expert + 1) // experts for expert in range(experts))})


def _precision(name: str) -> Precision:
    """What Fabric would take, without its lines on the screen, nor the scaler that fp16 has on a card."""
    if name.endswith("mixed"):
        mixed = MixedPrecision("bf16-mixed", "cpu")
        mixed.precision = name  # type: ignore[assignment]
        return mixed
    return HalfPrecision("bf16-true") if name == "bf16-true" else Precision()


def _state_of_torchao(optimizer: Any) -> int:
    """The two moments of each parameter, in the form that torchao's optimizers keep them in."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    moments = (
        optimizer._new_buffer(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), signed)
        for parameter in parameters
        for signed in (True, False)
    )
    return sum(storage.nbytes() for moment in moments for storage in get_untyped_storages(moment))


def _backend(run: ParsedRun, precision: str, hardware: Hardware) -> str:
    """What would compute the experts on a card."""
    config: Config = run.settings.model
    wanted = run.settings.moe.backend
    if wanted == "auto":
        widths = (config.n_embd, config.moe_intermediate_size or config.intermediate_size)
        wanted = backend_for(torch.float32 if precision == "32-true" else torch.bfloat16, hardware, widths)
    # Triton's operators are known where Triton is; the loop's results are as large.
    return "loop" if wanted == "triton" and importlib.util.find_spec("triton") is None else wanted


def _choose_backend(gpt: GPT, backend: str) -> None:
    """Without asking whether this machine has it: fake tensors need no kernels."""
    for module in gpt.modules():
        if isinstance(module, Experts):
            module._choose_backend = lambda *_: backend  # type: ignore[method-assign]
