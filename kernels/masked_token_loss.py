"""Cross-entropy over a vocabulary for the labelled positions, without ever holding [n, V] logits.

Projection, bias, cross-entropy and accuracy are one operation that walks over the vocabulary in chunks. The
forward pass keeps a running maximum and a running sum of exponentials of each row; the backward pass computes
each chunk of logits again, turns it into gradients in a bounded scratch, and multiplies it twice. Chunks of the
vocabulary (and not of rows) write each row of the weight's gradient exactly once: no atomics, no accumulation
in a narrow dtype, the same bits every time.

The plain definition comes first and is the reference for all of it. On a GPU the logits are the work of the
Triton kernels in `masked_token_loss_triton`, elsewhere of PyTorch operations sized for the processor's cache.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from xdscale.kernels.gpu import autocast_dtype, runs_triton, without_autocast

LOG2_E = math.log2(math.e)
"""Logits are scaled by this, so that exp becomes exp2: 2.7 times faster in PyTorch on AVX-512."""

CPU_SCRATCH_BYTES = 2 << 20
"""Wanted size of the [n, chunk] scratch on a CPU: about one core's second-level cache."""

CPU_CHUNK_COLUMNS = (512, 4096)
"""Fewest and most columns of a chunk on a CPU: fewer make the products slow, more gain nothing."""


class RowStatistics(NamedTuple):
    """What one pass over the vocabulary leaves of the logits; each [n], in fp32 (fp64 for fp64 inputs).

    Attributes:
        maximum: the highest logit, times log2(e).
        total: sum over the vocabulary of exp(logit - highest logit), at least 1.
        label_logit: the label's logit, times log2(e).
        correct: bool, whether the label has the highest logit and no lower id has it too.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    label_logit: torch.Tensor
    correct: torch.Tensor


FEWEST_PRECISE_ROWS = 4
"""With fewer rows, PyTorch's fp32 product on CPU adds thousands of terms one after another: its relative error is 1e-6
to 5e-6 instead of 4e-7, and a gradient would depend on how few targets a micro-batch happens to hold."""


def plain_masked_token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: what `masked_token_loss` computes, with the logits [n, V] in memory.

    Args:
        hidden: [n, h].
        weight: [V, h].
        bias: [V].
        labels: int64 [n] in 0..V-1.

    Returns:
        The loss of each row, and whether its highest logit is the label, as `masked_token_loss`.
    """
    logits = F.linear(hidden, weight, bias)  # [n, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels


@torch.compiler.disable(reason="masked_token_loss runs as it is, between compiled graphs")
def masked_token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projects labelled hidden states onto the vocabulary and returns the cross-entropy of each.

    Only labelled rows are passed in, and of their logits only a chunk of the vocabulary exists at any time.
    Sums and the softmax run in fp32 whatever the dtype of the inputs (fp64 stays fp64). Deterministic.
    Under `torch.autocast` the products run in autocast's dtype while gradients keep their tensor's own dtype.
    `torch.compile` breaks the graph here: the operation runs as it is, between two compiled graphs. On a GPU
    nothing waits for the device and every shape follows from the inputs' shapes (CUDA graphs may record it),
    except in fp64, which takes the PyTorch operations made for CPUs.

    Args:
        hidden: [n, h] hidden states at the labelled positions; n = 0 is allowed.
        weight: [V, h] decoder weight, usually the tied embedding.
        bias: [V].
        labels: int64 [n] in 0..V-1. Checked on a CPU; on a GPU a label outside of that range gives a
            meaningless loss, but no access outside of the tensors.

    Returns:
        The loss of each row, fp32 [n] (for n = 0 all three inputs get gradients of zero), and whether the row's highest
        logit is the label, bool [n]. Among equal logits the lowest id wins. Rows of several objectives that share a
        vocabulary go through it once; each sums its own.

    Raises:
        ValueError: a shape, a device or (on a CPU) a label does not fit; the message names the argument.
        TypeError: a dtype does not fit; the message names the argument.
    """
    _check(hidden, weight, bias, labels)
    return _MaskedTokenLoss.apply(hidden, weight, bias, labels, _product_dtype(hidden))


def _check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuses arguments that do not fit together."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, expected [n, h]")
    n, h = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != h or weight.shape[0] == 0:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [V, {h}] with V > 0, as hidden is [{n}, {h}]"
        )
    for name, tensor, expected in (("bias", bias, [weight.shape[0]]), ("labels", labels, [n])):
        if list(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {hidden.device}, where hidden is")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}, expected torch.int64")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden has dtype {hidden.dtype}, expected a floating-point dtype")
    autocast = autocast_dtype(hidden.device) is not None
    for name, tensor in (("weight", weight), ("bias", bias)):
        castable = autocast and torch.float64 not in (tensor.dtype, hidden.dtype)
        if not tensor.is_floating_point() or (tensor.dtype != hidden.dtype and not castable):
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {hidden.dtype}, the dtype of hidden")


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which logits and gradients are multiplied: autocast's, or the inputs' own."""
    narrow = autocast_dtype(hidden.device)
    return narrow if narrow and hidden.dtype != torch.float64 else hidden.dtype


class _MaskedTokenLoss(torch.autograd.Function):
    """Keeps its inputs and two numbers per row for the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.dtype = dtype
        if hidden.shape[0] == 0:
            ctx.save_for_backward(hidden, weight, bias)
            correct = labels.new_zeros(0, dtype=torch.bool)
            ctx.mark_non_differentiable(correct)
            return hidden.new_zeros(0, dtype=_wide(dtype)), correct
        if runs_triton(hidden.device, dtype):
            from xdscale.kernels.masked_token_loss_triton import row_statistics  # CPU runs never load Triton
        else:
            row_statistics = _row_statistics
            _check_labels(labels, weight.shape[0])
        with without_autocast(hidden.device):
            rows = row_statistics(hidden, weight, bias, labels, dtype)
            losses = (rows.maximum - rows.label_logit) / LOG2_E + rows.total.log()
        # The inputs themselves are saved, never a view or a cast: ZeRO-3 empties a parameter after this forward
        # and fills the same parameter again before the backward.
        ctx.save_for_backward(hidden, weight, bias, labels, rows.maximum, rows.total)
        ctx.mark_non_differentiable(rows.correct)
        return losses, rows.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_losses: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        if hidden.shape[0] == 0:
            return torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias), None, None
        labels, maximum, total = rest
        if runs_triton(hidden.device, ctx.dtype):
            from xdscale.kernels.masked_token_loss_triton import logit_gradients
        else:
            logit_gradients = _logit_gradients
        with without_autocast(hidden.device):
            grad_bias = torch.empty_like(bias)
            chunks = logit_gradients(hidden, weight, bias, labels, maximum, total, grad_losses, grad_bias, ctx.dtype)
            grad_hidden, grad_weight = _multiply_chunks(chunks, hidden, weight)
        needed = zip((grad_hidden, grad_weight, grad_bias), ctx.needs_input_grad)
        return (*(gradient if needs else None for gradient, needs in needed), None, None)


class ChunkGradients(NamedTuple):
    """Gradients of the loss with respect to one chunk of logits.

    Attributes:
        columns: the chunk of the vocabulary.
        weight: [chunk, h], those rows of the weight in the dtype of the products.
        logits: [n, chunk] gradients, in the same dtype; overwritten by the next chunk.
    """

    columns: slice
    weight: torch.Tensor
    logits: torch.Tensor


def _multiply_chunks(
    chunks: Iterator[ChunkGradients], hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns gradients of logits into those of hidden states (fp32 sums) and weight (each row written once)."""
    grad_hidden = torch.zeros(hidden.shape, dtype=_wide(hidden.dtype), device=hidden.device)
    grad_weight = torch.empty_like(weight)
    for chunk in chunks:
        states = hidden.to(chunk.logits.dtype)
        grad_hidden = _add_product(grad_hidden, chunk.logits, chunk.weight)
        _write_product(grad_weight[chunk.columns], chunk.logits.t(), states)
    return grad_hidden.to(hidden.dtype), grad_weight


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns total + left @ right; total is overwritten where PyTorch can."""
    if left.device.type == "cpu" and len(left) < FEWEST_PRECISE_ROWS:
        rows = F.pad(left, (0, 0, 0, FEWEST_PRECISE_ROWS - len(left)))
        return total.add_(torch.mm(rows, right)[: len(left)])
    if left.dtype == total.dtype:
        return torch.addmm(total, left, right, out=total)
    if left.is_cuda and total.dtype == torch.float32:
        return torch.addmm(total, left, right, out_dtype=torch.float32)
    return total.add_(torch.mm(left, right))


def _write_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Writes left @ right into out, with sums in fp32 or wider and one rounding."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda and out.dtype == torch.float32:
        out.copy_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        out.copy_(torch.mm(left, right))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _check_labels(labels: torch.Tensor, vocabulary: int) -> None:
    """Refuses labels outside of the vocabulary, where looking at them does not make a GPU wait."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    lowest, highest = labels.aminmax()
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(f"labels go from {int(lowest)} to {int(highest)}, expected 0 to {vocabulary - 1}")


class _Chunk(NamedTuple):
    """A chunk of logits.

    Attributes:
        weight: [chunk, h], those rows of the weight in the dtype of the products.
        logits: [n, chunk] times log2(e), in fp32 or wider; overwritten by the next chunk.
        labels: the rows whose label lies in this chunk, and where in the chunk.
    """

    weight: torch.Tensor
    logits: torch.Tensor
    labels: tuple[torch.Tensor, torch.Tensor]


class _ChunkLogits:
    """Computes one chunk of logits after the other into the same scratch."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
    ) -> None:
        # A CPU multiplies fp16 in slow loops, bf16 in its matrix units.
        self.dtype = torch.float32 if dtype == torch.float16 and hidden.device.type == "cpu" else dtype
        self.hidden, self.weight, self.bias, self.labels = hidden.to(self.dtype), weight, bias, labels
        n, vocabulary = hidden.shape[0], weight.shape[0]
        wide = _wide(dtype)
        fitting = CPU_SCRATCH_BYTES // (n * wide.itemsize)
        columns = min(max(fitting // 64 * 64, CPU_CHUNK_COLUMNS[0]), CPU_CHUNK_COLUMNS[1], vocabulary)
        self.chunks = [slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)]
        self.wide = hidden.new_empty(n * columns, dtype=wide)
        self.narrow = None if self.dtype == wide else hidden.new_empty(n * columns, dtype=self.dtype)

    def __call__(self, columns: slice) -> _Chunk:
        """The chunk of these columns."""
        weight = self.weight[columns].to(self.dtype)
        logits = self.view(self.wide, columns)
        bias = self.bias[columns].to(logits.dtype)
        rows = ((self.labels >= columns.start) & (self.labels < columns.stop)).nonzero().squeeze(1)
        places = self.labels[rows] - columns.start
        if self.narrow is None:
            torch.addmm(bias * LOG2_E, self.hidden, weight.t(), alpha=LOG2_E, out=logits)
        else:
            product = torch.mm(self.hidden, weight.t(), out=self.view(self.narrow, columns))
            logits.copy_(product).mul_(LOG2_E).add_(bias * LOG2_E)  # one mixed addition would copy product
            # A bf16 product is rounded (to 1/16 near 16), and a confident row's loss and gradient hang on its
            # label's logit: that one is computed again in fp32.
            exact = (self.hidden[rows].to(logits.dtype) * weight[places].to(logits.dtype)).sum(1) + bias[places]
            logits[rows, places] = exact * LOG2_E
        return _Chunk(weight, logits, (rows, places))

    def view(self, scratch: torch.Tensor, columns: slice) -> torch.Tensor:
        """The part of a scratch that holds this chunk, [n, chunk]."""
        shape = (self.hidden.shape[0], columns.stop - columns.start)
        return scratch[: shape[0] * shape[1]].view(shape)


def _row_statistics(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> RowStatistics:
    """The pass over the vocabulary in PyTorch operations."""
    chunk_logits = _ChunkLogits(hidden, weight, bias, labels, dtype)
    wide = _wide(dtype)
    # The lowest finite number: a chunk of bias -inf (a padded vocabulary) makes no NaN of -inf - -inf.
    maximum = hidden.new_full(labels.shape, torch.finfo(wide).min, dtype=wide)
    total, label_logit, correct = torch.zeros_like(maximum), torch.zeros_like(maximum), torch.zeros_like(labels).bool()
    for columns in chunk_logits.chunks:
        _, logits, (rows, places) = chunk_logits(columns)
        highest = logits.amax(1)
        improved = highest > maximum  # not for an equal logit: the lowest id wins
        correct &= ~improved
        # argmax takes as long as twenty passes of amax, so it sees only the rows whose label is in this chunk.
        correct[rows] = improved[rows] & (logits[rows].argmax(1) == places)
        label_logit[rows] = logits[rows, places]
        renewed = torch.maximum(maximum, highest)
        total.mul_(torch.exp2(maximum - renewed)).add_(logits.sub_(renewed[:, None]).exp2_().sum(1))
        maximum = renewed
    return RowStatistics(maximum, total, label_logit, correct)


def _logit_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    grad_losses: torch.Tensor,
    grad_bias: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[ChunkGradients]:
    """Yields grad_losses * (softmax - one-hot) chunk by chunk in PyTorch operations; fills grad_bias."""
    chunk_logits = _ChunkLogits(hidden, weight, bias, labels, dtype)
    scale = (grad_losses / total)[:, None]
    for columns in chunk_logits.chunks:
        chunk = chunk_logits(columns)
        gradients = chunk.logits.sub_(maximum[:, None]).exp2_().mul_(scale)
        gradients[chunk.labels] -= grad_losses[chunk.labels[0]]
        grad_bias[columns] = gradients.sum(0)
        if chunk_logits.narrow is not None:
            gradients = chunk_logits.view(chunk_logits.narrow, columns).copy_(gradients)
        yield ChunkGradients(columns, chunk.weight, gradients)
