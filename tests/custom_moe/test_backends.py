"""Which backend is chosen where, and the errors if the requested one does not work."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config
from torch._subclasses.fake_tensor import FakeTensorMode

from custom_moe import MoE, backends, experts, set_backend, use_custom_moe
from custom_moe.backends import BACKENDS, Hardware, _find_hardware, backend_for, choose_backend, hardware_of
from custom_moe.experts import Experts

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EVEN, ODD = (768, 2048), (768, 44)  # 44 numbers of 16 bits are 88 bytes


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "backend", "without_triton"),
    [
        (None, FP32, EVEN, "loop", "loop"),  # a CPU, the meta device, a Mac
        (None, BF16, EVEN, "loop", "loop"),
        ((7, 5), FP16, EVEN, "loop", "loop"),
        ((8, 0), BF16, EVEN, "triton", "loop"),
        ((8, 6), BF16, EVEN, "triton", "loop"),
        ((8, 6), FP16, EVEN, "triton", "loop"),
        ((8, 6), BF16, ODD, "triton", "loop"),
        ((8, 6), FP32, EVEN, "loop", "loop"),
        ((8, 9), BF16, EVEN, "triton", "loop"),
        ((9, 0), BF16, EVEN, "grouped_mm", "grouped_mm"),
        ((9, 0), FP16, EVEN, "triton", "loop"),
        ((9, 0), BF16, ODD, "triton", "loop"),
        ((9, 0), FP32, EVEN, "loop", "loop"),
        ((9, 0), FP64, EVEN, "loop", "loop"),
        ((10, 0), BF16, EVEN, "grouped_mm", "grouped_mm"),
        ((12, 0), BF16, EVEN, "triton", "loop"),
        ((12, 0), FP16, EVEN, "triton", "loop"),
    ],
    ids=str,
)
def test_table_of_backends(
    capability: tuple[int, int] | None, dtype: torch.dtype, widths: tuple[int, int], backend: str, without_triton: str
) -> None:
    assert backend_for(dtype, Hardware(capability, triton=True), widths) == backend
    assert backend_for(dtype, Hardware(capability, triton=False), widths) == without_triton
    on_windows = Hardware(capability, triton=True, grouped_mm=False)  # torch has no fast kernel there
    assert backend_for(dtype, on_windows, widths) == ("triton" if backend == "grouped_mm" else backend)


def test_without_rows_the_loop_is_chosen() -> None:
    assert choose_backend("grouped_mm", FP32, torch.device("cpu"), 0, EVEN) == "loop"
    assert choose_backend("grouped_mm", FP32, torch.device("cpu"), 1, EVEN) == "grouped_mm"
    assert choose_backend(None, FP32, torch.device("cpu"), 1, EVEN) == "loop"


@pytest.mark.parametrize(
    ("wanted", "dtype", "widths", "message"),
    [
        ("grouped_mm", BF16, ODD, r"'grouped_mm' needs widths of a multiple of 8 in torch.bfloat16, and these are"),
        ("grouped_mm", FP64, EVEN, "does not compute torch.float64"),
        ("triton", FP32, EVEN, "needs a GPU, and this is cpu"),
        ("cutlass", FP32, EVEN, "is not one of grouped_mm, triton, loop"),
    ],
)
def test_unavailable_backend_raises(wanted, dtype: torch.dtype, widths: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(wanted, dtype, torch.device("cpu"), 42, widths)


def test_triton_on_amd_gpus_is_used_on_request() -> None:
    amd = Hardware(None, triton=True, hip=True)
    assert BACKENDS["triton"].problem(BF16, "cuda", amd, EVEN) is None
    assert backend_for(BF16, amd, EVEN) == "loop"


def test_hardware_of_this_machine() -> None:
    assert hardware_of(torch.device("cpu")).capability is None
    if torch.cuda.is_available():
        assert hardware_of(torch.device("cuda", 0)).capability == torch.cuda.get_device_capability(0)


def test_triton_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch for Linux always brings Triton; without a compiler its first kernel would raise."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    hardware = _find_hardware.__wrapped__("cpu", None)  # not the cached answer
    installed = importlib.util.find_spec("triton") is not None
    assert hardware.triton == (installed and sys.platform != "linux")


@pytest.mark.parametrize(
    ("capability", "dtype", "backend", "waits"),
    [
        ((9, 0), BF16, None, False),
        ((9, 0), BF16, "grouped_mm", False),
        ((9, 0), FP32, "grouped_mm", True),  # torch has a kernel for bf16 only
        ((8, 6), BF16, "grouped_mm", True),
        ((8, 6), BF16, "triton", False),
        ((8, 6), BF16, "loop", True),
    ],
    ids=str,
)
def test_which_backend_waits(
    capability: tuple[int, int], dtype: torch.dtype, backend: str | None, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (backends, experts):
        monkeypatch.setattr(module, "hardware_of", lambda device: Hardware(capability, triton=True))
    layer = Experts(4, 64, 64, n_layer=1, bias=False).to(dtype)
    layer.backend = backend
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.waits_for_device(torch.device("cuda")) == waits


def test_set_backend_changes_all_layers() -> None:
    fields = dict(n_layer=3, n_embd=32, n_head=2, moe_intermediate_size=16, n_expert=4, n_expert_per_token=2)
    config = Config(**fields, mlp_class_name="LLaMAMoE", first_k_dense_replace=1)
    with use_custom_moe():
        gpt = GPT(config)
    set_backend(gpt, "grouped_mm")
    assert [layer.backend for layer in gpt.modules() if isinstance(layer, Experts)] == ["grouped_mm"] * 2
    set_backend(gpt, None)
    assert [layer.backend for layer in gpt.modules() if isinstance(layer, Experts)] == [None] * 2
    assert MoE(config, backend="loop").experts.backend == "loop"
