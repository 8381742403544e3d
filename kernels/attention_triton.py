"""Packed attention's Triton kernels: one forward kernel, one backward kernel for queries and one for keys and values.

Programs walk over tiles of their own sample only, and causal attention over no later keys, so there is no padding
work. No program writes where another does: no atomics, deterministic. Scores stay in registers and accumulate in fp32;
the log-sum-exp (base 2) and the rows' sums of gradient x output, fp32 [heads, Tq], are all that is kept besides inputs
and outputs.
"""

import triton
import triton.language as tl

from xdscale.kernels.dropout_mask import START_0, START_1, keep_tile, stream_key_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(POINTER, start, index, length, head, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):  # noqa: ANN001, ANN202
    """Loads rows of one head from [tokens, heads, D] whose tokens are `stride` apart; zeros beyond sequence and D."""
    column = tl.arange(0, BLOCK_D)
    offset = (start + index).to(tl.int64)[:, None] * stride + (head * D + column)[None, :]
    mask = (index < length)[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    rows = tl.load(POINTER + offset, mask=mask, other=0.0)
    if WIDEN:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def _store_rows(POINTER, rows, start, index, length, head, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):  # noqa: ANN001, ANN202
    column = tl.arange(0, BLOCK_D)
    offset = (start + index).to(tl.int64)[:, None] * stride + (head * D + column)[None, :]
    mask = (index < length)[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    tl.store(POINTER + offset, rows.to(POINTER.dtype.element_ty), mask=mask)


@triton.jit
def _unknown_zero(number):  # noqa: ANN001, ANN202
    """A zero that the compiler does not know.

    It would move the selection of a constant behind the next operation: behind rounding, where two halves of a register
    are selected one by one, or between a product and a sum, which are one instruction together.
    """
    return number * 0.0


@triton.jit
def _read(query, key, keys, CAUSAL: tl.constexpr):  # noqa: ANN001, ANN202
    """Which queries read which keys, [queries, keys] or broadcast to it."""
    read = (key < keys)[None, :]
    if CAUSAL:
        read = read & (key[None, :] <= query[:, None])
    return read


@triton.jit
def _column_order(BLOCK_K: tl.constexpr):  # noqa: ANN202
    """Keys of a tile in the order of its columns, as key // 4 and key % 4.

    Attention does not care in which order keys come, but a random word serves four consecutive ones. A thread of a
    matrix product holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16: they get the keys 4t to 4t + 3.
    """
    column = tl.arange(0, BLOCK_K)
    return ((column >> 4) << 2) + ((column >> 1) & 3), ((column >> 3) & 1) * 2 + (column & 1)


@triton.jit
def _row_order(BLOCK_K: tl.constexpr, PRODUCT_ROWS: tl.constexpr):  # noqa: ANN202
    """As `_column_order`, for keys in rows: a thread holds rows r and r + 8 of each 16 in each product of all warps."""
    row = tl.arange(0, BLOCK_K)
    if BLOCK_K >= 2 * PRODUCT_ROWS:
        product, within = row // PRODUCT_ROWS, row % PRODUCT_ROWS
        group = (product >> 1) * (PRODUCT_ROWS // 2) + ((within >> 4) << 3) + (within & 7)
        return group, (product & 1) * 2 + ((within >> 3) & 1)
    pair = ((row >> 4) << 3) + (row & 7)
    return pair >> 1, (pair & 1) * 2 + ((row >> 3) & 1)


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_forward(  # noqa: ANN201
    QUERY, KEY, VALUE, OUT, LOG_SUM, CU_SEQLENS_Q, CU_SEQLENS_K, SEED,  # noqa: ANN001
    tokens, heads, query_stride, key_stride, value_stride, scale,  # noqa: ANN001
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Attends from one tile of queries to all keys of its sample. Grid: (query tiles, heads, samples)."""
    head, sample = tl.program_id(1), tl.program_id(2)
    start, key_start = tl.load(CU_SEQLENS_Q + sample), tl.load(CU_SEQLENS_K + sample)
    length, keys = tl.load(CU_SEQLENS_Q + sample + 1) - start, tl.load(CU_SEQLENS_K + sample + 1) - key_start
    if tl.program_id(0) * BLOCK_Q >= length:
        return
    index = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = _rows(QUERY, start, index, length, head, query_stride, D, BLOCK_D, WIDEN)
    if THRESHOLD:
        stream_0 = stream_key_tile(SEED, sample, head, START_0)
        stream_1 = stream_key_tile(SEED, sample, head, START_1)
    highest = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    attended = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    group, place = _column_order(BLOCK_K)
    read = tl.minimum(keys, (tl.program_id(0) + 1) * BLOCK_Q) if CAUSAL else keys
    for first in range(0, read, BLOCK_K):
        key_index = first + group * 4 + place
        key = _rows(KEY, key_start, key_index, keys, head, key_stride, D, BLOCK_D, WIDEN)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = tl.where(_read(index, key_index, keys, CAUSAL), scores, -float("inf"))
        raised = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - raised[:, None])  # one instruction for both
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(weights, 1)
        if THRESHOLD:
            drawn = (first // 4 + group)[None, :]
            keep = keep_tile(stream_0, stream_1, index[:, None], drawn, place[None, :], THRESHOLD)
            weights = tl.where(keep, weights, _unknown_zero(scale))
        value = _rows(VALUE, key_start, key_index, keys, head, value_stride, D, BLOCK_D, WIDEN)
        attended = tl.dot(weights.to(value.dtype), value, attended * shrink[:, None], input_precision=PRECISION)
        highest = raised
    # Without keys, `total` is 0: the result is 0, and so is the log-sum-exp.
    some = total > 0
    safe = tl.where(some, total, 1.0)
    _store_rows(OUT, attended * (RESCALE / safe)[:, None], start, index, length, head, heads * D, D, BLOCK_D)
    log_sum = tl.where(some, highest + tl.log2(safe), 0.0)
    tl.store(LOG_SUM + head.to(tl.int64) * tokens + start + index, log_sum, mask=index < length)


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_backward_query(  # noqa: ANN201
    QUERY, KEY, VALUE, OUT, GRAD, LOG_SUM, ROW_SUM, GRAD_QUERY, CU_SEQLENS_Q, CU_SEQLENS_K, SEED,  # noqa: ANN001
    tokens, heads, query_stride, key_stride, value_stride, grad_query_stride, scale,  # noqa: ANN001
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and its rows' sums of gradient x output. Grid: (query tiles, heads, samples)."""
    head, sample = tl.program_id(1), tl.program_id(2)
    start, key_start = tl.load(CU_SEQLENS_Q + sample), tl.load(CU_SEQLENS_K + sample)
    length, keys = tl.load(CU_SEQLENS_Q + sample + 1) - start, tl.load(CU_SEQLENS_K + sample + 1) - key_start
    if tl.program_id(0) * BLOCK_Q >= length:
        return
    index = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = _rows(QUERY, start, index, length, head, query_stride, D, BLOCK_D, WIDEN)
    grad = _rows(GRAD, start, index, length, head, heads * D, D, BLOCK_D, WIDEN)
    out = _rows(OUT, start, index, length, head, heads * D, D, BLOCK_D, WIDEN)
    row_sum = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    row = head.to(tl.int64) * tokens + start + index
    tl.store(ROW_SUM + row, row_sum, mask=index < length)
    log_sum = tl.load(LOG_SUM + row, mask=index < length, other=0.0)
    if THRESHOLD:
        stream_0 = stream_key_tile(SEED, sample, head, START_0)
        stream_1 = stream_key_tile(SEED, sample, head, START_1)
    grad_query = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    group, place = _column_order(BLOCK_K)
    read = tl.minimum(keys, (tl.program_id(0) + 1) * BLOCK_Q) if CAUSAL else keys
    for first in range(0, read, BLOCK_K):
        key_index = first + group * 4 + place
        key = _rows(KEY, key_start, key_index, keys, head, key_stride, D, BLOCK_D, WIDEN)
        value = _rows(VALUE, key_start, key_index, keys, head, value_stride, D, BLOCK_D, WIDEN)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        weights = tl.where(_read(index, key_index, keys, CAUSAL), tl.exp2(scores - log_sum[:, None]), 0.0)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        if THRESHOLD:
            drawn = (first // 4 + group)[None, :]
            keep = keep_tile(stream_0, stream_1, index[:, None], drawn, place[None, :], THRESHOLD)
            grad_weights = tl.where(keep, grad_weights, _unknown_zero(scale)) * RESCALE
        grad_scores = (weights * (grad_weights - row_sum[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision=PRECISION)
    _store_rows(GRAD_QUERY, grad_query * (scale / LOG2_E), start, index, length, head, grad_query_stride, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_backward_key_value(  # noqa: ANN201
    QUERY, KEY, VALUE, GRAD, LOG_SUM, ROW_SUM, GRAD_KEY, GRAD_VALUE, CU_SEQLENS_Q, CU_SEQLENS_K, SEED,  # noqa: ANN001
    tokens, heads, query_stride, key_stride, value_stride, grad_key_stride, grad_value_stride, scale,  # noqa: ANN001
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
    PRODUCT_ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, on transposed scores. Grid: (key tiles, heads, samples).

    Rows beyond the sequences need no mask: queries, gradients and row sums are loaded as 0 there, and what
    keys beyond the end accumulate is not stored.
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    start, key_start = tl.load(CU_SEQLENS_Q + sample), tl.load(CU_SEQLENS_K + sample)
    length, keys = tl.load(CU_SEQLENS_Q + sample + 1) - start, tl.load(CU_SEQLENS_K + sample + 1) - key_start
    if tl.program_id(0) * BLOCK_K >= keys:
        return
    group, place = _row_order(BLOCK_K, PRODUCT_ROWS)
    group += tl.program_id(0) * (BLOCK_K // 4)
    key_index = group * 4 + place
    key = _rows(KEY, key_start, key_index, keys, head, key_stride, D, BLOCK_D, WIDEN)
    value = _rows(VALUE, key_start, key_index, keys, head, value_stride, D, BLOCK_D, WIDEN)
    if THRESHOLD:
        stream_0 = stream_key_tile(SEED, sample, head, START_0)
        stream_1 = stream_key_tile(SEED, sample, head, START_1)
    grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    begin = tl.program_id(0) * BLOCK_K // BLOCK_Q * BLOCK_Q if CAUSAL else 0
    for first in range(begin, length, BLOCK_Q):
        index = first + tl.arange(0, BLOCK_Q)
        row = head.to(tl.int64) * tokens + start + index
        query = _rows(QUERY, start, index, length, head, query_stride, D, BLOCK_D, WIDEN)
        grad = _rows(GRAD, start, index, length, head, heads * D, D, BLOCK_D, WIDEN)
        log_sum = tl.load(LOG_SUM + row, mask=index < length, other=0.0)
        row_sum = tl.load(ROW_SUM + row, mask=index < length, other=0.0)
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale - log_sum[None, :])
        if CAUSAL:
            weights = tl.where(key_index[:, None] <= index[None, :], weights, 0.0)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        kept = weights
        if THRESHOLD:
            keep = keep_tile(stream_0, stream_1, index[None, :], group[:, None], place[:, None], THRESHOLD)
            grad_weights = tl.where(keep, grad_weights, _unknown_zero(scale)) * RESCALE
            kept = tl.where(keep, weights, _unknown_zero(scale))
        grad_value = tl.dot(kept.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - row_sum[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision=PRECISION)
    _store_rows(GRAD_KEY, grad_key * (scale / LOG2_E), key_start, key_index, keys, head, grad_key_stride, D, BLOCK_D)
    _store_rows(GRAD_VALUE, grad_value * RESCALE, key_start, key_index, keys, head, grad_value_stride, D, BLOCK_D)
