"""The Triton kernels: their results, in Triton's interpreter or on a GPU, and their code for the GPUs they serve."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
BF16, FP32 = torch.bfloat16, torch.float32
SHARED_MEMORY = {80: 163, 86: 99, 90: 227, 120: 99}
"""kB for one program, by compute capability (CUDA C++ Programming Guide, table of technical specifications)"""


@needs_triton
@pytest.mark.parametrize(
    "interpreted",
    [True, pytest.param(False, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))],
    ids=["in the interpreter", "on a GPU"],
)
@pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_equal_plain_arithmetic(interpreted: bool, cases: str) -> None:
    path = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.no_skips", "--noconftest"]
    variables = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-m", cases, str(path)], env=variables, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout + result.stderr


def compiled(kernel: Any, capability: int, aligned: bool, warps: int, stages: int, **arguments: Any) -> Any:
    """Compile ``kernel`` without a GPU. A torch dtype as argument means a tensor of that type, other values are
    known to the compiler, and those not given are sizes, multiples of 16 where ``aligned``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {BF16: "*bf16", torch.float16: "*fp16", FP32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    signature = {name: "constexpr" if name in arguments else "i32" for name in kernel.arg_names}
    signature |= {name: names[value] for name, value in arguments.items() if isinstance(value, torch.dtype)}
    known = {name: value for name, value in arguments.items() if not isinstance(value, torch.dtype)}
    multiples = [name for name in signature if signature[name] != "constexpr" and name not in ("E", "n_tile", "S")]
    places = [(kernel.arg_names.index(name),) for name in multiples if aligned or signature[name].startswith("*")]
    source = ASTSource(kernel, signature, known, {place: [["tt.divisibility", 16]] for place in places})
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def variants(capability: int, dtype: torch.dtype, aligned: bool, tf32: bool) -> dict[str, Any]:
    """The matrix products as the functions around the kernels launch them."""
    import custom_moe.triton_kernels as kernels

    tile = kernels.choose_tile(dtype, divmod(capability, 10), aligned, tf32)
    both = {"ends_E": torch.int32, "PRECISION": "tf32" if tf32 else "ieee"}
    multiply = {"x_NC": dtype, "weight_EOC": dtype, "y_SO": dtype, "EVEN": aligned, "BLOCK_E": 8, **both}
    gradient = {"grad_NO": dtype, "x_NC": dtype, "out_EOC": dtype, "grad_rows_S": None, **both}
    results: dict[str, Any] = {}
    for name, rows, stride in [
        ("rows in order", None, "stride_C"),
        ("weights transposed", None, "stride_O"),
        ("rows gathered", torch.int64, "stride_C"),
    ]:
        arguments = {**multiply, "rows_S": rows, stride: 1, "BLOCK_O": tile.columns, "BLOCK_C": tile.depth}
        results[f"multiply, {name}"] = compiled(
            kernels.multiply_kernel, capability, aligned, tile.warps, tile.stages, BLOCK_S=tile.rows, **arguments
        )
    results["multiply, few rows"] = compiled(
        kernels.multiply_kernel, capability, aligned, 4, tile.stages, BLOCK_S=16, **arguments
    )
    blocks = {"BLOCK_O": tile.rows, "BLOCK_C": tile.columns, "BLOCK_S": tile.depth}
    for name, rows, stages in [("in order", None, tile.stages), ("gathered", torch.int64, 2 * tile.stages - 1)]:
        results[f"weight_gradient, rows {name}"] = compiled(
            kernels.weight_gradient_kernel, capability, aligned, tile.warps, stages, x_rows_S=rows, **gradient, **blocks
        )
    return results


def activations(capability: int, dtype: torch.dtype, aligned: bool) -> dict[str, Any]:
    import custom_moe.triton_kernels as kernels

    forward = {"h_SJ": dtype, "weights_S": FP32, "a_SI": dtype}
    backward = {**forward, "da_SI": dtype, "dh_SJ": dtype, "dweights_S": FP32}
    kinds = {kernels.swiglu_kernel: forward, kernels.swiglu_backward_kernel: backward}
    return {
        f"{kernel.__name__}, {width} wide": compiled(
            kernel, capability, aligned, 4, 3, BLOCK_S=1024 // width, BLOCK_I=width, **arguments
        )
        for kernel, arguments in kinds.items()
        for width in (64, 1024)
    }


def bytes_on_the_stack(binary: Any, folder: Path) -> int:
    """Return the bytes that a thread keeps in memory because registers do not suffice."""
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


def check(capability: int, binaries: dict[str, Any], tensor_cores: bool, folder: Path) -> None:
    for name, binary in binaries.items():
        assert binary.metadata.shared <= SHARED_MEMORY[capability] * 1024, name
        assert bytes_on_the_stack(binary, folder) == 0, name
        assert bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)", binary.asm["ptx"])) == tensor_cores, name


@needs_triton
@pytest.mark.slow
def test_consumer_gpu_code_is_pipelined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs of 8.6's 100 kB, 1 kB of which each takes for itself, and copies of 16 bytes past the registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    binaries = variants(86, BF16, aligned=True, tf32=False)
    check(86, binaries, tensor_cores=True, folder=tmp_path)
    for name, binary in binaries.items():
        assert 2 * (binary.metadata.shared + 1024) <= 100 * 1024, name
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", binary.asm["ptx"]), name


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_kernels_compile_without_spilling(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tf32 = dtype == FP32  # its products are on tensor cores only as TF32
    check(capability, variants(capability, dtype, aligned=True, tf32=tf32), tensor_cores=True, folder=tmp_path)
    check(capability, variants(capability, dtype, aligned=False, tf32=False), tensor_cores=not tf32, folder=tmp_path)
    if tf32:
        check(capability, variants(capability, dtype, aligned=True, tf32=False), tensor_cores=False, folder=tmp_path)
    for aligned in (True, False):
        check(capability, activations(capability, dtype, aligned), tensor_cores=False, folder=tmp_path)
