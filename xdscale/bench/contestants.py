"""What `xdscale bench kernels` lets compete: the project's operations, and whatever else computes the same.

A contestant that has to be imported or compiled does that in its first call: where it cannot, it costs its own row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from xdscale.kernels.activated_linear import activated_linear
from xdscale.kernels.attention import packed_attention
from xdscale.kernels.masked_token_loss import masked_token_loss, plain_masked_token_loss
from xdscale.kernels.quick_gelu import SCALE, quick_gelu
from xdscale.kernels.residual_norm import residual_norm

QUERIES, HEADS, HEAD_SIZE = 512, 12, 64
KEY_LENGTHS = (427, 693)
"""Keys of the samples in turn: 560 on average of 9 CLIP blocks' 693, to which the others pad."""

HIDDEN, INTERMEDIATE, VOCABULARY, LABELLED = 768, 3072, 30_522, 77
"""BERT-base; labelled positions are 15 % of each sample's 512."""

CLIP_HIDDEN, CLIP_INTERMEDIATE, CLIP_VOCABULARY = 512, 2048, 49_408
"""ViT-B-32's text tower."""

DROPOUT = 0.1
NORM_EPS = 1e-12
IGNORED = -100
"""Label of positions that the loss leaves out."""


@dataclass(frozen=True)
class Sizes:
    """What a call works on.

    Attributes:
        device: "cuda" (also AMD's) or "cpu".
        attention_samples: samples of an attention call.
        loss_samples: samples whose labelled positions a loss call takes.
        rivals: whether other libraries and compiled definitions compete too; some exist for GPUs alone.
    """

    device: str
    attention_samples: int
    loss_samples: int
    rivals: bool


Contestants = dict[str, Callable[[], object]]
"""What runs forward and backward once, by name; the project's own is the first."""


def attention_contestants(sizes: Sizes, dtype: torch.dtype, dropout: float) -> Contestants:
    """Returns attention of 512 queries of each sample to keys of different numbers, packed and padded."""
    samples, device = sizes.attention_samples, sizes.device
    lengths = torch.tensor([KEY_LENGTHS[sample % 2] for sample in range(samples)], device=device)
    most = max(KEY_LENGTHS)
    mask = torch.arange(most, device=device) < lengths[:, None]  # [samples, most]
    padded = [_leaf(samples, HEADS, count, HEAD_SIZE, dtype=dtype, device=device) for count in (QUERIES, most, most)]
    # The packed tokens are the padded ones' valid ones: all compute the same.
    rows = [tokens.detach().transpose(1, 2) for tokens in padded]
    packed = [rows[0].flatten(0, 1), rows[1][mask], rows[2][mask]]
    packed = [tokens.contiguous().requires_grad_() for tokens in packed]
    cu_seqlens_q = torch.arange(samples + 1, device=device, dtype=torch.int32) * QUERIES
    cu_seqlens_k = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    seed = torch.tensor([1], device=device) if dropout else None

    def ours() -> torch.Tensor:
        layout = {"max_seqlen_q": QUERIES, "max_seqlen_k": most, "dropout": dropout, "seed": seed}
        return packed_attention(*packed, cu_seqlens_q, cu_seqlens_k, **layout)

    def pytorch() -> torch.Tensor:
        return F.scaled_dot_product_attention(*padded, attn_mask=mask[:, None, None, :], dropout_p=dropout)

    contestants = {
        "packed_attention": _with_backward(ours, packed),
        "scaled_dot_product_attention, padded": _with_backward(pytorch, padded),
    }
    if not sizes.rivals:
        return contestants
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        contestants[f"{backend.name.lower()} of it"] = _with_backward(_on_backend(pytorch, backend), padded)
    plain = functools.partial(_plain_attention, *padded, mask, dropout)
    contestants["plain, padded, compiled"] = _with_backward(_compiled(plain), padded)
    if not dropout:  # these have none
        contestants["FlexAttention, padded"] = _with_backward(_flex_attention(padded, lengths), padded)
        contestants["varlen_attn"] = _with_backward(_varlen_attention(packed, cu_seqlens_q, cu_seqlens_k), packed)
    return contestants


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: float
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * HEAD_SIZE**-0.5  # [samples, heads, queries, keys]
    weights = scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1)
    return F.dropout(weights, dropout) @ value


def _on_backend(call: Callable[[], torch.Tensor], backend: SDPBackend) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return call()

    return run


def _varlen_attention(
    packed: list[torch.Tensor], cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(*packed, cu_seqlens_q, cu_seqlens_k, QUERIES, max(KEY_LENGTHS))

    return run


def _compiled(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return torch.compile(call, dynamic=False)  # compiles in its first call


def _flex_attention(padded: list[torch.Tensor], lengths: torch.Tensor) -> Callable[[], torch.Tensor]:
    def valid(sample: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key < lengths[sample]

    @functools.cache
    def build() -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        blocks = create_block_mask(valid, len(lengths), None, QUERIES, max(KEY_LENGTHS), device=lengths.device)
        return functools.partial(torch.compile(flex_attention, dynamic=False), *padded, block_mask=blocks)

    return lambda: build()()


def loss_contestants(sizes: Sizes, dtype: torch.dtype, size: int = HIDDEN, vocabulary: int = VOCABULARY) -> Contestants:
    """Returns the loss of 15 % labelled positions of so many states; gathering them is part of the time."""
    device, positions = sizes.device, sizes.loss_samples * QUERIES
    hidden = _leaf(positions, size, dtype=dtype, device=device)
    weight = _leaf(vocabulary, size, dtype=dtype, device=device, scale=size**-0.5)
    bias = _leaf(vocabulary, dtype=dtype, device=device)
    leaves = [hidden, weight, bias]
    labelled = torch.randperm(positions, device=device)[: sizes.loss_samples * LABELLED].sort()[0]
    labels = torch.randint(vocabulary, labelled.shape, device=device)
    all_labels = torch.full((positions,), IGNORED, device=device).index_copy(0, labelled, labels)

    def plain_everywhere() -> torch.Tensor:
        logits = F.linear(hidden, weight, bias).float()
        return F.cross_entropy(logits, all_labels, ignore_index=IGNORED, reduction="sum")

    losses = {
        "masked_token_loss": lambda: masked_token_loss(hidden[labelled], weight, bias, labels)[0].sum(),
        "plain, labelled positions": lambda: plain_masked_token_loss(hidden[labelled], weight, bias, labels)[0].sum(),
        "plain, all positions": plain_everywhere,
    }

    def liger() -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden[labelled], labels, bias)

    def cut() -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden[labelled], weight, labels, reduction="sum")

    def pytorch() -> torch.Tensor:  # from torch 2.14 on
        return F.linear_cross_entropy(hidden[labelled], weight, labels, linear_bias=bias, reduction="sum")

    if sizes.rivals:
        losses["plain, labelled positions, compiled"] = _compiled(losses["plain, labelled positions"])
        losses |= {"linear_cross_entropy": pytorch, "Liger": liger}
    contestants = {name: _with_backward(loss, leaves) for name, loss in losses.items()}
    if sizes.rivals:
        contestants["Cut-Cross-Entropy, without bias"] = _with_backward(cut, [hidden, weight])
    return contestants


def norm_contestants(sizes: Sizes, dtype: torch.dtype) -> Contestants:
    """Returns the end of a sublayer of BERT-base, for as many samples as the attention has."""
    shape, device = (sizes.attention_samples * QUERIES, HIDDEN), sizes.device
    leaves = [_leaf(*size, dtype=dtype, device=device) for size in (shape, shape, shape[1:], shape[1:])]
    states, residual, weight, bias = leaves
    seed = torch.tensor([1], device=device)

    def pytorch() -> torch.Tensor:
        return F.layer_norm(residual + F.dropout(states, DROPOUT), shape[1:], weight, bias, NORM_EPS)

    def ours() -> torch.Tensor:
        return residual_norm(*leaves, eps=NORM_EPS, dropout=DROPOUT, seed=seed)

    contestants = {
        "residual_norm": _with_backward(ours, leaves),
        "dropout, +, layer_norm": _with_backward(pytorch, leaves),
    }

    def liger() -> torch.Tensor:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(residual + F.dropout(states, DROPOUT), weight, bias, NORM_EPS)

    if sizes.rivals:
        contestants["dropout, +, layer_norm, compiled"] = _with_backward(_compiled(pytorch), leaves)
        contestants["dropout, +, Liger's layer_norm"] = _with_backward(liger, leaves)
    return contestants


def quick_gelu_contestants(sizes: Sizes, dtype: torch.dtype) -> Contestants:
    """Returns the activation of one layer of CLIP's text tower, in the longest texts' blocks."""
    states = _leaf(sizes.attention_samples * max(KEY_LENGTHS), CLIP_INTERMEDIATE, dtype=dtype, device=sizes.device)

    def plain() -> torch.Tensor:
        return states * torch.sigmoid(SCALE * states)

    contestants = {
        "quick_gelu": _with_backward(lambda: quick_gelu(states), [states]),
        "x * sigmoid(1.702 x)": _with_backward(plain, [states]),
    }
    if sizes.rivals:
        contestants["x * sigmoid(1.702 x), compiled"] = _with_backward(_compiled(plain), [states])
    return contestants


def activated_linear_contestants(sizes: Sizes, dtype: torch.dtype) -> Contestants:
    """Returns the second half of BERT-base's feed-forward, for as many samples as the attention has."""
    shapes = (sizes.attention_samples * QUERIES, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (HIDDEN,)
    leaves = [_leaf(*shape, dtype=dtype, device=sizes.device, scale=INTERMEDIATE**-0.5) for shape in shapes]
    states, weight, bias = leaves

    def plain() -> torch.Tensor:
        return F.linear(F.gelu(states), weight, bias)

    contestants = {
        "activated_linear": _with_backward(lambda: activated_linear(*leaves, F.gelu), leaves),
        "gelu, linear": _with_backward(plain, leaves),
    }
    if sizes.rivals:
        contestants["gelu, linear, compiled"] = _with_backward(_compiled(plain), leaves)
    return contestants


def _leaf(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def _with_backward(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """Returns a function that runs `call` and returns the gradients of the sum of its output."""

    def run() -> tuple[torch.Tensor, ...]:
        out = call()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run
