"""`xdscale bench kernels`: forward and backward of the project's operations against what else can compute them.

On a GPU the opponents are PyTorch's attention on padded keys, FlexAttention, the plain loss, and Liger and
Cut-Cross-Entropy where they are installed; on a CPU PyTorch's attention and the plain loss; on both PyTorch's dropout,
addition and LayerNorm, and its activations. Contestants take turns, so that a change of the machine's load meets all
of them. A CPU whose products are slower in bf16 than in fp32, by a hundred times where it has no instructions for it,
leaves bf16 out.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from xdscale.kernels.activated_linear import activated_linear
from xdscale.kernels.attention import packed_attention
from xdscale.kernels.masked_token_loss import masked_token_loss, plain_masked_token_loss
from xdscale.kernels.quick_gelu import SCALE, quick_gelu
from xdscale.kernels.residual_norm import residual_norm
from xdscale.training.throughput import matmul_flops_per_second

QUERIES, HEADS, HEAD_SIZE = 512, 12, 64
KEY_LENGTHS = (427, 693)
"""Keys of the samples in turn: 560 on average of 9 CLIP blocks' 693, to which the others pad."""

HIDDEN, INTERMEDIATE, VOCABULARY, LABELLED = 768, 3072, 30_522, 77
"""BERT-base; labelled positions are 15 % of each sample's 512."""

CLIP_INTERMEDIATE = 2048
"""ViT-B-32's text tower."""

DROPOUT = 0.1
NORM_EPS = 1e-12
IGNORED = -100
"""Label of positions that the loss leaves out."""

Contestants = dict[str, Callable[[], object]]
"""What runs forward and backward once, by name; the project's own is the first."""


@dataclass(frozen=True)
class Plan:
    """How much to run.

    Attributes:
        device: "cuda" (also AMD's) or "cpu".
        attention_samples: samples of an attention call.
        loss_samples: samples whose labelled positions a loss call takes.
        rounds: measurements of each contestant.
        calls: calls per measurement; on a GPU several, so that it does not wait for the first launch.
    """

    device: str
    attention_samples: int
    loss_samples: int
    rounds: int
    calls: int


GPU_PLAN = Plan("cuda", attention_samples=32, loss_samples=32, rounds=20, calls=10)
CPU_PLAN = Plan("cpu", attention_samples=2, loss_samples=1, rounds=5, calls=1)


def bench_kernels() -> None:
    """Times all contestants on this machine's GPU, or else on one core of its CPU, and prints a table."""
    plan = GPU_PLAN if torch.cuda.is_available() else CPU_PLAN
    name = torch.cuda.get_device_name() if plan.device == "cuda" else "one CPU core"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be all that is measured
    try:
        table = _table(plan, f"forward + backward on {name}, torch {torch.__version__}")
    finally:
        torch.set_num_threads(threads)
    console = Console()
    # Not wrapped when piped, so that scripts can read it.
    (console if console.is_terminal else Console(width=200)).print(table)


def _table(plan: Plan, title: str) -> Table:
    table = Table(title=title)
    for column in ("operation", "dtype", "contestant"):
        table.add_column(column, no_wrap=column == "dtype")
    for column in ("median ms", "range ms", "x ours"):
        table.add_column(column, justify="right", no_wrap=True)
    dtypes = [torch.float32, torch.bfloat16]
    rates = [matmul_flops_per_second(torch.device(plan.device), dtype) for dtype in dtypes]
    if rates[1] < rates[0]:
        table.caption = f"bf16 left out: {rates[1] / 1e9:.1f} GFLOP/s, against {rates[0] / 1e9:.0f} in fp32"
        dtypes.pop()
    for dtype in dtypes:
        for operation, contestants in _contests(plan, dtype):
            medians = []
            for contestant, seconds in _time(contestants, plan).items():
                low, middle, high = (1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
                medians.append(middle)
                cells = (f"{middle:.2f}", f"{low:.2f} - {high:.2f}", f"{middle / medians[0]:.2f}")
                table.add_row(operation, str(dtype).removeprefix("torch."), contestant, *cells)
            table.add_section()
    return table


def _contests(plan: Plan, dtype: torch.dtype) -> list[tuple[str, Contestants]]:
    """Returns what is compared in one dtype: title and contestants."""
    contests = [(f"attention, dropout {DROPOUT}", attention_contestants(plan, dtype, DROPOUT))]
    if plan.device == "cuda":
        contests.append(("attention", attention_contestants(plan, dtype, 0.0)))
    return [
        *contests,
        ("masked-token loss", loss_contestants(plan, dtype)),
        (f"dropout {DROPOUT} + residual + LayerNorm", norm_contestants(plan, dtype)),
        ("CLIP's activation", quick_gelu_contestants(plan, dtype)),
        ("GELU + Linear", activated_linear_contestants(plan, dtype)),
    ]


def attention_contestants(plan: Plan, dtype: torch.dtype, dropout: float) -> Contestants:
    """Returns attention of 512 queries of each sample to keys of different numbers, packed and padded."""
    samples, device = plan.attention_samples, plan.device
    lengths = torch.tensor([KEY_LENGTHS[sample % 2] for sample in range(samples)], device=device)
    most = max(KEY_LENGTHS)
    mask = torch.arange(most, device=device) < lengths[:, None]  # [samples, most]
    padded = [_leaf(samples, HEADS, count, HEAD_SIZE, dtype=dtype, device=device) for count in (QUERIES, most, most)]
    # The packed tokens are the padded ones' valid ones: all compute the same.
    rows = [tokens.detach().transpose(1, 2) for tokens in padded]
    packed = [rows[0].flatten(0, 1), rows[1][mask], rows[2][mask]]
    packed = [tokens.contiguous().requires_grad_() for tokens in packed]
    query_offsets = torch.arange(samples + 1, device=device, dtype=torch.int32) * QUERIES
    key_offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    seed = torch.tensor([1], device=device) if dropout else None

    def ours() -> torch.Tensor:
        layout = {"max_query": QUERIES, "max_key": most, "dropout": dropout, "seed": seed}
        return packed_attention(*packed, query_offsets, key_offsets, **layout)

    def pytorch() -> torch.Tensor:
        return F.scaled_dot_product_attention(*padded, attn_mask=mask[:, None, None, :], dropout_p=dropout)

    contestants = {
        "packed_attention": _with_backward(ours, packed),
        "scaled_dot_product_attention, padded": _with_backward(pytorch, padded),
    }
    if device == "cuda" and not dropout:  # FlexAttention has no dropout, and no backward on CPUs
        contestants["FlexAttention, padded"] = _with_backward(_flex_attention(padded, lengths), padded)
    return contestants


def _flex_attention(padded: list[torch.Tensor], lengths: torch.Tensor) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def valid(sample: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key < lengths[sample]

    blocks = create_block_mask(valid, len(lengths), None, QUERIES, max(KEY_LENGTHS), device=lengths.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(*padded, block_mask=blocks)


def loss_contestants(plan: Plan, dtype: torch.dtype) -> Contestants:
    """Returns the loss of 15 % labelled positions; gathering them is part of the time."""
    device, positions = plan.device, plan.loss_samples * QUERIES
    hidden = _leaf(positions, HIDDEN, dtype=dtype, device=device)
    weight = _leaf(VOCABULARY, HIDDEN, dtype=dtype, device=device, scale=HIDDEN**-0.5)
    bias = _leaf(VOCABULARY, dtype=dtype, device=device)
    leaves = [hidden, weight, bias]
    labelled = torch.randperm(positions, device=device)[: plan.loss_samples * LABELLED].sort()[0]
    labels = torch.randint(VOCABULARY, labelled.shape, device=device)
    all_labels = torch.full((positions,), IGNORED, device=device).index_copy(0, labelled, labels)

    def plain_everywhere() -> torch.Tensor:
        logits = F.linear(hidden, weight, bias).float()
        return F.cross_entropy(logits, all_labels, ignore_index=IGNORED, reduction="sum")

    losses = {
        "masked_token_loss": lambda: masked_token_loss(hidden[labelled], weight, bias, labels)[0],
        "plain, labelled positions": lambda: plain_masked_token_loss(hidden[labelled], weight, bias, labels)[0],
        "plain, all positions": plain_everywhere,
    }
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        losses["Liger"] = lambda: liger(weight, hidden[labelled], labels, bias)
    contestants = {name: _with_backward(loss, leaves) for name, loss in losses.items()}
    if device == "cuda" and dtype != torch.float32 and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        def cut() -> torch.Tensor:
            return linear_cross_entropy(hidden[labelled], weight, labels, reduction="sum")

        contestants["Cut-Cross-Entropy, without bias"] = _with_backward(cut, [hidden, weight])
    return contestants


def norm_contestants(plan: Plan, dtype: torch.dtype) -> Contestants:
    """Returns the end of a sublayer of BERT-base, for as many samples as the attention has."""
    shape, device = (plan.attention_samples * QUERIES, HIDDEN), plan.device
    leaves = [_leaf(*size, dtype=dtype, device=device) for size in (shape, shape, shape[1:], shape[1:])]
    states, residual, weight, bias = leaves
    seed = torch.tensor([1], device=device)

    def pytorch() -> torch.Tensor:
        return F.layer_norm(residual + F.dropout(states, DROPOUT), shape[1:], weight, bias, NORM_EPS)

    def ours() -> torch.Tensor:
        return residual_norm(*leaves, eps=NORM_EPS, dropout=DROPOUT, seed=seed)

    return {
        "residual_norm": _with_backward(ours, leaves),
        "dropout, +, layer_norm": _with_backward(pytorch, leaves),
    }


def quick_gelu_contestants(plan: Plan, dtype: torch.dtype) -> Contestants:
    """Returns the activation of one layer of CLIP's text tower, in the longest texts' blocks."""
    states = _leaf(plan.attention_samples * max(KEY_LENGTHS), CLIP_INTERMEDIATE, dtype=dtype, device=plan.device)
    return {
        "quick_gelu": _with_backward(lambda: quick_gelu(states), [states]),
        "x * sigmoid(1.702 x)": _with_backward(lambda: states * torch.sigmoid(SCALE * states), [states]),
    }


def activated_linear_contestants(plan: Plan, dtype: torch.dtype) -> Contestants:
    """Returns the second half of BERT-base's feed-forward, for as many samples as the attention has."""
    sizes = (plan.attention_samples * QUERIES, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (HIDDEN,)
    leaves = [_leaf(*size, dtype=dtype, device=plan.device, scale=INTERMEDIATE**-0.5) for size in sizes]
    states, weight, bias = leaves
    return {
        "activated_linear": _with_backward(lambda: activated_linear(*leaves, F.gelu), leaves),
        "gelu, linear": _with_backward(lambda: F.linear(F.gelu(states), weight, bias), leaves),
    }


def _leaf(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def _with_backward(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """Returns a function that runs `call` and returns the gradients of the sum of its output."""

    def run() -> tuple[torch.Tensor, ...]:
        out = call()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def _time(contestants: Contestants, plan: Plan) -> dict[str, list[float]]:
    """Returns the seconds per call of each contestant, in `plan.rounds` turns after a first one that is not counted."""
    seconds = {name: [] for name in contestants}
    for _ in range(plan.rounds + 1):
        for name, call in contestants.items():
            seconds[name].append(_seconds_per_call(call, plan))
    return {name: values[1:] for name, values in seconds.items()}


def _seconds_per_call(call: Callable[[], object], plan: Plan) -> float:
    if plan.device == "cpu":
        started = time.perf_counter()
        for _ in range(plan.calls):
            call()
        return (time.perf_counter() - started) / plan.calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(plan.calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / plan.calls
