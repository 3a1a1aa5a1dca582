"""What do the Triton kernels take of a GPU's multiprocessor? Compiled for each family of GPUs, without a GPU.

    uv run python benchmarks/triton_resources.py      # 3 minutes

The compiler's own output for the kernels of bf16 training: registers of a thread, shared memory of a program, and bytes
that a thread keeps in memory because the registers do not suffice. From these and the limits of the family follow the
programs that a multiprocessor runs at the same time, and the share of its threads that they fill (occupancy).
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks import common
from benchmarks.common import Row, make_table

BF16, FP32 = torch.bfloat16, torch.float32
REGISTERS = 65_536  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each program takes for itself


class Family(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, table of technical specifications)."""

    gpus: str
    warps: int
    shared_kib: int
    program_kib: int  # of shared memory, for one program


FAMILIES = {
    80: Family("A100", 64, 164, 163),
    86: Family("RTX 30", 48, 100, 99),
    89: Family("RTX 40", 48, 100, 99),
    90: Family("H100, H200", 64, 228, 227),
    120: Family("RTX 50", 48, 100, 99),
}


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # of a thread
    shared_bytes: int
    stack_bytes: int
    warps: int

    def programs(self, family: Family) -> int:
        """Return how many run at the same time on a multiprocessor."""
        # Registers are handed out to warps in units of 256.
        registers_of_warp = -(-32 * self.registers // 256) * 256
        by_registers = REGISTERS // (registers_of_warp * self.warps)
        by_shared = family.shared_kib * 1024 // (self.shared_bytes + RESERVED)
        return min(by_registers, by_shared, family.warps // self.warps)


def main() -> None:
    args = common.make_parser(__doc__, "triton_resources").parse_args()
    result = common.start(args, "torch", "triton")
    result["kernels"] = []
    with tempfile.TemporaryDirectory() as folder:
        for capability, family in FAMILIES.items():
            for name, usage in usages(capability, Path(folder)):
                row = {"capability": capability, "kernel": name, **usage._asdict(), "programs": usage.programs(family)}
                result["kernels"].append(row)
                print(row, flush=True)
    add_table(result)
    common.write_result(result, args.output)
    common.print_table(result)


def usages(capability: int, folder: Path) -> Iterator[tuple[str, Usage]]:
    """Yield the kernels of bf16 training at widths that are multiples of 16."""
    binaries = products(capability, BF16, aligned=True, tf32=False) | activations(capability, BF16, aligned=True)
    for name, binary in binaries.items():
        yield name, usage_of(binary, folder)


# --------------------------------------------------------------------------------------------------------- compilation


def compile_kernel(kernel: Any, capability: int, aligned: bool, warps: int, stages: int, **arguments: Any) -> Any:
    """Compile ``kernel`` without a GPU.

    A torch dtype as argument means a tensor of that type, other values are known to the compiler, and those not given
    are sizes, multiples of 16 where ``aligned``.
    """
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


def products(capability: int, dtype: torch.dtype, aligned: bool, tf32: bool) -> dict[str, Any]:
    """Return the matrix products as the functions around the kernels launch them."""
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
        results[f"multiply, {name}"] = compile_kernel(
            kernels.multiply_kernel, capability, aligned, tile.warps, tile.stages, BLOCK_S=tile.rows, **arguments
        )
    results["multiply, few rows"] = compile_kernel(
        kernels.multiply_kernel, capability, aligned, 4, tile.stages, BLOCK_S=16, **arguments
    )
    blocks = {"BLOCK_O": tile.rows, "BLOCK_C": tile.columns, "BLOCK_S": tile.depth}
    for name, rows, stages in [("in order", None, tile.stages), ("gathered", torch.int64, 2 * tile.stages - 1)]:
        results[f"weight_gradient, rows {name}"] = compile_kernel(
            kernels.weight_gradient_kernel, capability, aligned, tile.warps, stages, x_rows_S=rows, **gradient, **blocks
        )
    return results


def activations(capability: int, dtype: torch.dtype, aligned: bool) -> dict[str, Any]:
    """Return SwiGLU and its backward for narrow and wide experts."""
    import custom_moe.triton_kernels as kernels

    forward = {"h_SJ": dtype, "weights_S": FP32, "a_SI": dtype}
    backward = {**forward, "da_SI": dtype, "dh_SJ": dtype, "dweights_S": FP32}
    kinds = {kernels.swiglu_kernel: forward, kernels.swiglu_backward_kernel: backward}
    return {
        f"{kernel.__name__.removesuffix('_kernel')}, {width} wide": compile_kernel(
            kernel, capability, aligned, 4, 3, BLOCK_S=1024 // width, BLOCK_I=width, **arguments
        )
        for kernel, arguments in kinds.items()
        for width in (64, 1024)
    }


def usage_of(binary: Any, folder: Path) -> Usage:
    """Return what a compiled kernel takes. A file is written to ``folder``."""
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (registers,), (stack,) = (re.findall(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    return Usage(int(registers), binary.metadata.shared, int(stack), binary.metadata.num_warps)


def add_table(result: Row) -> None:
    """Add a table with a row for each kernel and a column for each family."""
    cells: dict[str, dict[int, str]] = {}
    for row in result["kernels"]:
        family = FAMILIES[row["capability"]]
        share = row["programs"] * row["warps"] / family.warps
        used = f"{row['registers']} / {row['shared_bytes'] / 1024:.0f} / {row['stack_bytes']}"
        text = f"{used}: {row['programs']}, {share:.0%}"
        cells.setdefault(row["kernel"], {})[row["capability"]] = text
    heads = [f"{family.gpus} ({capability / 10:.1f})" for capability, family in FAMILIES.items()]
    rows = [[kernel, *(by_family[capability] for capability in FAMILIES)] for kernel, by_family in cells.items()]
    result["table"] = make_table(("kernel", *heads), rows)


if __name__ == "__main__":
    main()
