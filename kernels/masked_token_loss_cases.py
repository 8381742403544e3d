"""The configurations of `masked_token_loss_triton` that are shipped, for every target."""

import torch
import triton

from xdscale.kernels.compile_case import CompileCase
from xdscale.kernels.gpu import PROCESSORS
from xdscale.kernels.masked_token_loss_triton import (
    COMBINED_ROWS,
    MAX_SPLITS,
    choose_tile,
    chunk_columns,
    combine_kernel,
    constexprs_of,
    logit_gradients_kernel,
    row_statistics_kernel,
    split_columns,
)

FAMILIES = {"sm_80": "cuda", "sm_90": "cuda", "sm_100": "blackwell", "gfx942": "hip"}
"""Which tiles a target takes."""

TRUE_SHAPE = {"few": 64, "many": 2458, "columns": 30522, "size": 768}
"""BERT-base: 64 rows, or 15 % of 32 x 512 positions (2,458); vocabulary; hidden size."""

OPERANDS = (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "fp32"))
"""dtype of products and of weight: bf16, fp16, autocast to bf16, fp32."""

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_cases() -> list[CompileCase]:
    """Every configuration that is shipped, for every target, at BERT-base's shape."""
    cases = []
    for target in PROCESSORS:
        for operands in OPERANDS:
            for rows in ("few", "many"):
                if operands != ("fp32", "fp32") or rows == "many":  # one tile for any number of rows
                    cases += _matrix_cases(target, operands, rows)
        cases.append(_combine_case(target))
    return cases


def _matrix_cases(target: str, operands: tuple[str, str], amount: str) -> list[CompileCase]:
    """The two matrix kernels for one target, pair of dtypes and amount of rows."""
    product, stored = operands
    n, columns, size = TRUE_SHAPE[amount], TRUE_SHAPE["columns"], TRUE_SHAPE["size"]
    family = FAMILIES[target]
    tile = choose_tile(family, TORCH_DTYPES[product], TORCH_DTYPES[stored], n)
    precision = "tf32x3" if product == "fp32" and family != "hip" else "ieee"
    constexprs = constexprs_of(tile, size, TORCH_DTYPES[product], precision)
    item, stored_item = TORCH_DTYPES[product].itemsize, TORCH_DTYPES[stored].itemsize
    blocks = triton.cdiv(n, tile.rows)
    per_split = split_columns(blocks, columns, tile.columns, PROCESSORS[target] * tile.resident)
    splits, chunk = triton.cdiv(columns, per_split), chunk_columns(n, item)
    inputs = {"hidden": f"*{product}", "weight": f"*{stored}", "bias": f"*{stored}", "labels": "*i64"}
    strides = {"hidden_stride": "i32", "weight_stride": "i32"}
    types = dict.fromkeys(constexprs, "constexpr")
    floats = dict.fromkeys(("maximum", "total", "label_logit"), "*fp32")
    read = n * (size * item + 8) + columns * (size + 1) * stored_item
    forward = {**inputs, **floats, "best": "*i32"}
    forward |= {"rows": "i32", "columns": "i32", "size": "i32", "split_columns": "i32", **strides, **types}
    backward = {**inputs, "maximum": "*fp32", "total": "*fp32", "grad_loss": "*fp32"}
    backward |= {"gradients": f"*{product}", "column_sums": "*fp32"}
    backward |= {"rows": "i32", "columns": "i32", "size": "i32", "begin": "i32", "end": "i32", **strides}
    backward |= {"gradients_stride": "i32", **types}
    aligned = ("hidden", "weight", "bias", "labels", "maximum", "size", "hidden_stride", "weight_stride")
    chunk_bytes = n * (size * item + 16) + chunk * (size + 1) * stored_item + n * chunk * item
    common = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "target": target}
    label = f"{product} x {stored}, n = {n}"
    return [
        CompileCase(
            "masked_token_loss", f"row_statistics {label}", row_statistics_kernel, forward,
            (*aligned, "best", "split_columns"), constexprs, **common,
            bytes_moved=read + splits * n * 16, lower_bound_bytes=read + n * 16, flops=2 * n * columns * size,
        ),
        CompileCase(
            "masked_token_loss", f"logit_gradients {label}", logit_gradients_kernel, backward,
            (*aligned, "grad_loss", "gradients", "column_sums", "begin", "gradients_stride"), constexprs, **common,
            bytes_moved=chunk_bytes + blocks * chunk * 4, lower_bound_bytes=chunk_bytes + chunk * 4,
            flops=2 * n * chunk * size,
        ),
    ]  # fmt: skip


def _combine_case(target: str) -> CompileCase:
    """The combining kernel for the most splits."""
    n, splits = TRUE_SHAPE["few"], MAX_SPLITS
    parts = dict.fromkeys(("split_maximum", "split_total", "split_label_logit"), "*fp32")
    results = dict.fromkeys(("maximum", "total", "label_logit"), "*fp32")
    signature = {**parts, "split_best": "*i32", "labels": "*i64", **results, "correct": "*i8"}
    signature |= {"rows": "i32", "splits": "i32", "TILE_ROWS": "constexpr", "TILE_SPLITS": "constexpr"}
    moved = n * (splits * 16 + 8 + 13)
    return CompileCase(
        "masked_token_loss", f"combine {splits} splits, n = {n}", combine_kernel, signature,
        ("split_maximum", "split_best", "labels", "maximum", "correct"),
        {"TILE_ROWS": COMBINED_ROWS, "TILE_SPLITS": MAX_SPLITS}, num_warps=4, num_stages=1, target=target,
        bytes_moved=moved, lower_bound_bytes=moved, flops=0,
    )  # fmt: skip
