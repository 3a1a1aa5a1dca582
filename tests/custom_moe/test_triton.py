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

from benchmarks.triton_resources import FAMILIES, activations, products, usage_of

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
BF16, FP32 = torch.bfloat16, torch.float32


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


def check(capability: int, binaries: dict[str, Any], tensor_cores: bool, folder: Path) -> None:
    for name, binary in binaries.items():
        usage = usage_of(binary, folder)
        assert usage.shared_bytes <= FAMILIES[capability].program_kib * 1024, name
        assert usage.stack_bytes == 0, name
        assert bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)", binary.asm["ptx"])) == tensor_cores, name


@needs_triton
@pytest.mark.slow
def test_consumer_gpu_code_is_pipelined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs on a multiprocessor, and copies of 16 bytes past the registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    binaries = products(86, BF16, aligned=True, tf32=False)
    check(86, binaries, tensor_cores=True, folder=tmp_path)
    for name, binary in binaries.items():
        assert usage_of(binary, tmp_path).programs(FAMILIES[86]) >= 2, name
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", binary.asm["ptx"]), name


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", FAMILIES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_kernels_compile_without_spilling(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tf32 = dtype == FP32  # its products are on tensor cores only as TF32
    check(capability, products(capability, dtype, aligned=True, tf32=tf32), tensor_cores=True, folder=tmp_path)
    check(capability, products(capability, dtype, aligned=False, tf32=False), tensor_cores=not tf32, folder=tmp_path)
    if tf32:
        check(capability, products(capability, dtype, aligned=True, tf32=False), tensor_cores=False, folder=tmp_path)
    for aligned in (True, False):
        check(capability, activations(capability, dtype, aligned), tensor_cores=False, folder=tmp_path)
