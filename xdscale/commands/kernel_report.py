"""`xdscale kernels report`: every Triton kernel as it ships, compiled for its GPUs on a machine that has none.

Registers, spills and instructions are read from the machine code that Triton's bundled compilers make; shared
memory is checked here, because the compilers do not check it. Bytes and FLOPs come with each `CompileCase`.
"""

import difflib
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from xdscale.errors import XdscaleError
from xdscale.files import check_output_file, write_outputs
from xdscale.kernels import (
    activated_linear_triton,
    attention_launch,
    linear_triton,
    masked_token_loss_cases,
    quick_gelu_triton,
    residual_norm_triton,
)
from xdscale.kernels.compile_case import CompileCase

BEGIN = "<!-- kernels report: begin -->"
END = "<!-- kernels report: end -->"
"""Marker lines around the generated part of the docs."""

PROCESSES = 2
SCHEDULERS = 4
"""Sub-partitions of a streaming multiprocessor, SIMDs of a compute unit: each has its own registers and warps."""

TENSOR_MEMORY_COLUMNS = 512
"""Tensor memory of an sm_100 multiprocessor, which its programs share."""

LARGEST_BYTES_RATIO = 1.1


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (NVIDIA) or compute unit (AMD) has.

    Attributes:
        program_shared_bytes: most shared memory of one program.
        core_shared_bytes: shared memory of all programs together.
        reserved_shared_bytes: what the driver takes of it for each program.
        scheduler_registers: 32-bit registers of each of the four schedulers.
        register_granule: registers are given to a warp in multiples of this.
        lanes: threads per warp.
        warps: most warps at a time.
        programs: most programs at a time.
    """

    program_shared_bytes: int
    core_shared_bytes: int
    reserved_shared_bytes: int
    scheduler_registers: int
    register_granule: int
    lanes: int
    warps: int
    programs: int


# NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability (8.0, 9.0, 10.0).
# AMD: CDNA 3 instruction set guide, and LLVM's AMDGPU occupancy for gfx942 (512 registers per lane, granule 8).
LIMITS = {
    "sm_80": Limits(166_912, 167_936, 1_024, 16_384, 256, lanes=32, warps=64, programs=32),
    "sm_90": Limits(232_448, 233_472, 1_024, 16_384, 256, lanes=32, warps=64, programs=32),
    "sm_100": Limits(232_448, 233_472, 1_024, 16_384, 256, lanes=32, warps=64, programs=32),
    "gfx942": Limits(65_536, 65_536, 0, 32_768, 512, lanes=64, warps=32, programs=16),
}


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of a kernel: registers and spilled bytes per thread, and instructions."""

    registers: int
    spill_bytes: int
    instructions: int


COLUMNS = (
    "operation", "kernel", "target", "tile", "warps", "stages", "registers", "spill bytes", "shared bytes",
    "shared limit", "occupancy", "instructions", "bytes moved", "bytes at least", "ratio", "GFLOP",
)  # fmt: skip
KEY_COLUMNS = ("operation", "kernel", "target")
CHECKED_COLUMNS = ("registers", "spill bytes", "shared bytes", "bytes moved", "bytes at least")
"""What has to be the same as in the docs; the rest follows from it or is not a promise."""

Row = dict[str, str]
"""One line of the table: text by column."""


def print_report(write: Path | None = None, check: Path | None = None) -> None:
    """Compiles every shipped configuration, prints the table and the verdict.

    Args:
        write: file whose part between the marker lines is replaced by the table.
        check: file whose table has to agree in `CHECKED_COLUMNS`.

    Raises:
        XdscaleError: kernels cannot be compiled in this process, or a file or its marker lines are missing.
        SystemExit: code 1, with the names on stderr, where a configuration spills, has more shared memory than
            its target or moves more than 1.1 times the least bytes, or where the table differs from `check`'s.
    """
    for path in filter(None, (write, check)):
        _split(path)  # before minutes of compiling
    if write:
        check_output_file(write)
    cases = shipped_cases()
    rows = measure_all(range(len(cases)))
    print(as_markdown(rows))
    if write:
        before, _, after = _split(write)
        write_outputs({write: f"{before}{BEGIN}\n{as_markdown(rows)}\n{END}{after}"})
    faults = verdict(rows)
    if check:
        faults += differences(documented_rows(check), rows, str(check))
    if faults:
        sys.exit("\n".join(faults))
    ratio = max((row["ratio"] for row in rows), key=float)
    print(f"\n{len(rows)} configurations: no spills, shared memory within limits, bytes at most {ratio} x the least")


def shipped_cases() -> list[CompileCase]:
    """Returns every configuration that the launchers can choose, for every target."""
    modules = attention_launch, masked_token_loss_cases, residual_norm_triton, quick_gelu_triton
    modules = *modules, linear_triton, activated_linear_triton
    return [case for module in modules for case in module.compile_cases()]


def measure_all(positions: Sequence[int]) -> list[Row]:
    """Compiles the shipped cases at these positions in parallel; Triton's cache makes a second time quick.

    Raises:
        XdscaleError: TRITON_INTERPRET is set, so that nothing would be compiled.
        RuntimeError: a case does not compile; it is named.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise XdscaleError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    # Started afresh: a fork would inherit the locks of PyTorch's threads.
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        ProcessPoolExecutor(PROCESSES, mp_context=context) as pool,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        futures = [pool.submit(_measure_position, position) for position in positions]
        for _ in bar.track(as_completed(futures), total=len(futures), description="compiling"):
            pass
        return [future.result() for future in futures]


def _measure_position(position: int) -> Row:
    return measure(_cases_of_this_process()[position])


_cases_of_this_process = functools.cache(shipped_cases)  # kernels cannot be sent between processes


def measure(case: CompileCase) -> Row:
    """Compiles one case and returns its line of the table."""
    limits = LIMITS[case.target]
    try:
        kernel = _compiled(case)
    except Exception as error:
        raise RuntimeError(f"{case.operation} {case.name} does not compile for {case.target}") from error
    code = _amd_code(kernel) if case.target == "gfx942" else _nvidia_code(kernel)
    shared = kernel.metadata.shared
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    share = occupancy(limits, code.registers, shared, kernel.metadata.num_warps, columns)
    tile = [str(value) for name, value in case.constexprs.items() if re.match("BLOCK_[QK]|TILE|DEPTH", name)]
    cells = (
        case.operation, case.name, case.target, "x".join(tile), f"{case.num_warps}", f"{case.num_stages}",
        f"{code.registers}", f"{code.spill_bytes}", f"{shared:,}", f"{limits.program_shared_bytes:,}", f"{share:.0%}",
        f"{code.instructions:,}", f"{case.bytes_moved:,}", f"{case.lower_bound_bytes:,}",
        f"{case.bytes_moved / case.lower_bound_bytes:.3f}", f"{case.flops / 1e9:.1f}",
    )  # fmt: skip
    return dict(zip(COLUMNS, cells))


def _compiled(case: CompileCase) -> CompiledKernel:
    names = list(case.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    amd = case.target == "gfx942"
    target = GPUTarget("hip", case.target, 64) if amd else GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    source = ASTSource(case.kernel, case.signature, case.constexprs, attributes)
    return triton.compile(source, target, {"num_warps": case.num_warps, "num_stages": case.num_stages})


def _nvidia_code(kernel: CompiledKernel) -> MachineCode:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        listing = _output(tools.nvdisasm.path, "--no-dataflow", "--print-code", file.name)
    # These kernels have no local arrays: a stack frame holds spilled registers and nothing else.
    spilled = _number(r"\bSTACK:(\d+)", usage) + _number(r"\bLOCAL:(\d+)", usage)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.M)
    return MachineCode(_number(r"\bREG:(\d+)", usage), spilled, len(instructions))


def _amd_code(kernel: CompiledKernel) -> MachineCode:
    text = kernel.asm["amdgcn"]
    # Registers spill to scratch memory, or without using any to accumulation registers and lanes of others.
    words = _number(r"\.vgpr_spill_count:\s*(\d+)", text) + _number(r"\.sgpr_spill_count:\s*(\d+)", text)
    spilled = max(4 * words, _number(r"\.private_segment_fixed_size:\s*(\d+)", text))
    instructions = re.findall(r"^\t[a-z]+_\w+", text, re.M)
    return MachineCode(_number(r"\.vgpr_count:\s*(\d+)", text), spilled, len(instructions))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


def occupancy(limits: Limits, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0) -> float:
    """Returns the share of a core's warps that run at a time, as its registers and memories allow.

    Args:
        limits: the core.
        registers: per thread.
        shared_bytes: per program.
        warps: per program.
        tensor_columns: columns of tensor memory per program.
    """
    warp_registers = -(-registers * limits.lanes // limits.register_granule) * limits.register_granule
    scheduler_warps = min(limits.warps // SCHEDULERS, limits.scheduler_registers // warp_registers)
    fitting = [limits.programs, scheduler_warps * SCHEDULERS // warps]
    if shared_bytes:
        fitting.append(limits.core_shared_bytes // (shared_bytes + limits.reserved_shared_bytes))
    if tensor_columns:
        fitting.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(fitting) * warps / limits.warps


def verdict(rows: Sequence[Row]) -> list[str]:
    """Returns one message for every promise that a configuration breaks; none if all is well."""
    faults = []
    for row in rows:
        name = " ".join(_key(row))
        if row["spill bytes"] != "0":
            faults.append(f"{name}: spills {row['spill bytes']} bytes per thread")
        if _integer(row["shared bytes"]) > _integer(row["shared limit"]):
            faults.append(f"{name}: {row['shared bytes']} bytes of shared memory, limit {row['shared limit']}")
        ratio = _integer(row["bytes moved"]) / _integer(row["bytes at least"])
        if ratio > LARGEST_BYTES_RATIO:
            faults.append(f"{name}: moves {ratio:.3f} times the least bytes, limit {LARGEST_BYTES_RATIO}")
    return faults


def differences(documented: Sequence[Row], measured: Sequence[Row], name: str) -> list[str]:
    """Returns a unified diff of the checked columns, empty where both agree."""
    texts = [[_checked_text(row) for row in rows] for rows in (documented, measured)]
    return list(difflib.unified_diff(*texts, name, "compiled now", lineterm="", n=0))


def documented_rows(path: Path) -> list[Row]:
    """Reads the table between a file's marker lines.

    Raises:
        XdscaleError: the file, its marker lines or the table are missing.
    """
    _, table, _ = _split(path)
    lines = [line.strip().strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    if not cells or tuple(cells[0]) != COLUMNS or any(len(line) != len(COLUMNS) for line in cells):
        raise XdscaleError(f"{path}: no table with the report's columns; 'xdscale kernels report --write' makes it")
    return [dict(zip(COLUMNS, line)) for line in cells[2:]]


def as_markdown(rows: Sequence[Row]) -> str:
    """Returns the table, with columns that line up where it is read as text."""
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS]
    left = COLUMNS.index("warps")  # text columns, then numbers
    lines = [COLUMNS, ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]]
    lines += [list(row.values()) for row in rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in lines
    )


def _split(path: Path) -> tuple[str, str, str]:
    """Returns a file's text before, between and after the marker lines."""
    if not path.is_file():
        raise XdscaleError(f"{path}: no such file; it needs the lines '{BEGIN}' and '{END}'")
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise XdscaleError(f"{path}: the table's place is not marked; add the lines '{BEGIN}' and '{END}'")
    return before, table, after


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY_COLUMNS)


def _checked_text(row: Row) -> str:
    return " ".join(_key(row)) + ": " + ", ".join(f"{column} {row[column]}" for column in CHECKED_COLUMNS)


def _integer(cell: str) -> int:
    return int(cell.replace(",", ""))
