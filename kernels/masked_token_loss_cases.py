"""The configurations of `masked_token_loss_triton` that are shipped, for every target."""

import itertools

import torch

from xdscale.kernels.compile_case import TYPES, CompileCase, compile_case
from xdscale.kernels.gpu import PROCESSORS, launches_on
from xdscale.kernels.masked_token_loss_triton import MAX_SPLITS, combine, logit_gradients, row_statistics

TRUE_ROWS, TRUE_COLUMNS, TRUE_SIZE = (64, 2458), 30522, 768
"""BERT-base: 64 rows, or 15 % of 32 x 512 positions; vocabulary; hidden size."""

OPERANDS = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
)
"""dtype of products and of weight: bf16, fp16, autocast to bf16, fp32."""


def compile_cases() -> list[CompileCase]:
    """Every configuration that is shipped, for every target, at BERT-base's shape."""
    cases = []
    for target in PROCESSORS:
        for (product, stored), rows in itertools.product(OPERANDS, TRUE_ROWS):
            if product != stored or product != torch.float32 or rows == max(TRUE_ROWS):  # one tile for any rows
                cases += _matrix_cases(target, product, stored, rows)
        cases.append(_combine_case(target))
    return cases


def _matrix_cases(target: str, product: torch.dtype, stored: torch.dtype, n: int) -> list[CompileCase]:
    """The two matrix kernels for one target, pair of dtypes and number of rows; of the chunks the first."""
    with torch.device("meta"):
        hidden, weight = (
            torch.empty((n, TRUE_SIZE), dtype=product),
            torch.empty((TRUE_COLUMNS, TRUE_SIZE), dtype=stored),
        )
        bias, labels = torch.empty(TRUE_COLUMNS, dtype=stored), torch.empty(n, dtype=torch.int64)
    inputs = hidden, weight, bias, labels
    with launches_on(target) as launches:
        rows = row_statistics(*inputs, product)
        list(logit_gradients(*inputs, rows.maximum, rows.total, rows.total, torch.empty_like(bias), product))
    statistics, _, gradients, *_ = launches
    read = sum(tensor.nbytes for tensor in inputs)
    chunk = min(gradients.arguments[-4], TRUE_COLUMNS)  # where it ends
    chunk_bytes = hidden.nbytes + n * 20 + chunk * (TRUE_SIZE + 1) * stored.itemsize + n * chunk * product.itemsize
    label = f"{TYPES[product]} x {TYPES[stored]}, n = {n}"
    return [
        compile_case(
            statistics, target, "masked_token_loss", f"row_statistics {label}",
            moved=read + statistics.grid[1] * n * 16, least=read + n * 16, flops=2 * n * TRUE_COLUMNS * TRUE_SIZE,
        ),
        compile_case(
            gradients, target, "masked_token_loss", f"logit_gradients {label}",
            moved=chunk_bytes + gradients.grid[0] * chunk * 4, least=chunk_bytes + chunk * 4,
            flops=2 * n * chunk * TRUE_SIZE,
        ),
    ]  # fmt: skip


def _combine_case(target: str) -> CompileCase:
    """The combining kernel for the most splits."""
    n = min(TRUE_ROWS)
    with torch.device("meta"), launches_on(target) as launches:
        best, labels = torch.empty((MAX_SPLITS, n), dtype=torch.int32), torch.empty(n, dtype=torch.int64)
        combine(torch.empty((3, MAX_SPLITS, n)), best, labels)
    moved = n * (MAX_SPLITS * 16 + 8 + 13)
    name = f"combine {MAX_SPLITS} splits, n = {n}"
    return compile_case(launches[0], target, "masked_token_loss", name, moved=moved, least=moved)
