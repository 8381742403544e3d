"""The Triton kernel that sums a matrix over its rows, its launches, and the configurations that are shipped.

A program adds every n-th tile of rows of its columns; a second launch of the same kernel adds what the programs found.
The next tiles are loaded while the present one is added, 16 bytes to a thread. Sums are fp32. No atomics: every value
has one writer, and the same machine gives the same bits every time.
"""

# ruff: noqa: ANN001, ANN201 -- the arguments of kernels are pointers and integers, typed by each launch

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from xdscale.kernels.compile_case import TYPES, CompileCase, compile_case
from xdscale.kernels.gpu import PROCESSORS, architecture, cdiv, launch, launches_on, processors


class SumTile(NamedTuple):
    """How the work is cut.

    Attributes:
        columns: of a tile.
        nbytes: of a tile, which has as many rows as follow.
        threads: of a program.
        programs: for each processor, at most.
        stages: tiles that are under way or added.
    """

    columns: int
    nbytes: int
    threads: int
    programs: int
    stages: int


TILE = SumTile(128, 16384, 256, 2, 4)
"""The fastest on an H200 (`python -m xdscale.bench.gpu tiles`): 82 % of a copy's speed for 768 columns."""

JOIN_TILE = SumTile(32, 8192, 256, 1, 1)
"""Of the sums that the programs found; few columns, so that more than a few processors take part."""


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(
    VALUES, SUMS, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, STAGES: tl.constexpr
):
    """Sums of one tile of columns over every n-th tile of rows: SUMS is [n, columns]."""
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    first, step = tl.program_id(1) * TILE_ROWS, tl.num_programs(1) * TILE_ROWS
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    # Loads go ahead by way of shared memory: bf16 that a loop keeps in registers is unpacked as it comes, which waits.
    for start in tl.range(first, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, TILE_ROWS)
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(VALUES + place, mask=mask, other=0.0).to(tl.float32)
    place = SUMS + tl.program_id(1) * columns + column
    tl.store(place, tl.sum(total, 0).to(SUMS.dtype.element_ty), mask=column < columns)


def column_sums(values: torch.Tensor, dtype: torch.dtype, tile: SumTile = TILE) -> torch.Tensor:
    """Returns the sums over rows, [n, columns] to [columns], added up in fp32; without rows they are 0."""
    values = values.contiguous()
    rows, columns = values.shape
    tiles = cdiv(columns, tile.columns)
    most = max(1, processors(values.device) * tile.programs // max(1, tiles))
    programs = max(1, min(most, cdiv(rows, _rows(values, tile))))
    partial = values.new_empty((programs, columns), dtype=torch.float32)
    sums = values.new_empty((columns,), dtype=dtype)
    _launch(values, partial, tile)
    _launch(partial, sums.unsqueeze(0), JOIN_TILE)
    return sums


def _launch(values: torch.Tensor, sums: torch.Tensor, tile: SumTile) -> None:
    """Adds rows of `values` into those of `sums`, each of which is one program's."""
    rows, columns = values.shape
    launch(
        column_sums_kernel, (cdiv(columns, tile.columns), len(sums)), values, sums, rows, columns,
        TILE_ROWS=_rows(values, tile), TILE_COLUMNS=tile.columns, STAGES=tile.stages,
        num_warps=tile.threads // (64 if architecture(values.device) == "gfx942" else 32), num_stages=1,
    )  # fmt: skip


def _rows(values: torch.Tensor, tile: SumTile) -> int:
    return tile.nbytes // (tile.columns * values.itemsize)


TRUE_SHAPE = (32 * 512, 768)
"""Of `compile_cases`: 32 texts of 512 tokens, BERT-base."""


def compile_cases() -> list[CompileCase]:
    """Returns every configuration that ships: gradient and bias in bf16, under autocast to bf16, and in fp32."""
    operands = (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2
    cases = [case for choice in itertools.product(operands, PROCESSORS) for case in _compile_cases(*choice)]
    return list({(case.name, case.target): case for case in cases}.values())


def _compile_cases(operands: tuple[torch.dtype, torch.dtype], target: str) -> list[CompileCase]:
    """Both launches. Above the least bytes are only the partial sums, which the first one writes for the second."""
    values = torch.empty(TRUE_SHAPE, dtype=operands[0], device="meta")
    with launches_on(target) as launches:
        column_sums(values, operands[1])
    add, join = launches
    names = f"column_sums {TYPES[operands[0]]}", f"join {TYPES[torch.float32]} to {TYPES[operands[1]]}"
    return [
        compile_case(add, target, "linear", names[0], moved=add.nbytes(), least=values.nbytes),
        compile_case(join, target, "linear", names[1], moved=join.nbytes(), least=join.nbytes()),
    ]
