"""How each Triton kernel cuts its work, tried on the GPU at hand: `python -m xdscale.bench.gpu tiles OUT [KERNEL …]`.

The launch tables in `kernels/` hold what was fastest here. Candidates are compiled by many processes first; then one
after the other is timed, as replays of a CUDA graph, at BERT-base's true shapes in bf16 with dropout.
"""

import contextlib
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import get_context

import torch

from xdscale.bench.kernels import captured, device_milliseconds
from xdscale.kernels import (
    activated_linear_triton,
    attention_launch,
    linear_triton,
    masked_token_loss_triton,
    quick_gelu_triton,
    residual_norm_triton,
)
from xdscale.kernels.activated_linear_triton import GELUTile
from xdscale.kernels.attention_launch import Tile
from xdscale.kernels.dropout_mask import drop_threshold
from xdscale.kernels.linear_triton import SumTile
from xdscale.kernels.masked_token_loss_triton import LogitsTile
from xdscale.kernels.packing import Packing
from xdscale.kernels.residual_norm_triton import NormTile

SAMPLES, LENGTH, HEADS, HEAD_SIZE = 36, 512, 12, 64
KEY_LENGTHS = (427, 693)
HIDDEN, INTERMEDIATE, VOCABULARY, LABELLED = 768, 3072, 30_522, 77
CLIP_INTERMEDIATE, CLIP_TOKENS = 2048, 560
ROUNDS = 15


@dataclass(frozen=True)
class Search:
    """One kernel, or a pair that shares its settings, and what is tried.

    Attributes:
        launch: launches it once with a candidate.
        candidates: settings, of which the first is what ships.
        nbytes: memory traffic of a launch that is bound by it; else 0.
        flops: of a launch that multiplies matrices; else 0.
    """

    launch: Callable[..., object]
    candidates: list[tuple]
    nbytes: int
    flops: int


def searches(device: torch.device) -> dict[str, Search]:
    """Returns what is tried, by the kernel's name."""
    parts = _attention, _causal_attention, _loss, _norm, _quick_gelu, _linear
    return dict(found for part in parts for found in part(device))


def _attention(device: torch.device) -> Iterator[tuple[str, Search]]:
    lengths = [LENGTH] * SAMPLES, [KEY_LENGTHS[sample % 2] for sample in range(SAMPLES)]
    bounds = [torch.tensor([0, *side], device=device).cumsum(0).to(torch.int32) for side in lengths]
    seed = torch.tensor([1], device=device)
    packing = Packing(*bounds, LENGTH, max(KEY_LENGTHS), drop_threshold(0.1), seed)
    tokens = [sum(side) for side in (lengths[0], lengths[1], lengths[1], lengths[0])]
    query, key, value, grad = (_normal(count, HEADS, HEAD_SIZE, device=device) for count in tokens)
    out, *saved = attention_launch.forward(query, key, value, packing)
    _, log_sum = saved
    row_sum, outputs = torch.zeros_like(log_sum), [torch.empty_like(tensor) for tensor in (query, key, value)]
    pointers = {
        "forward": (query, key, value, out, log_sum),
        "backward_query": (query, key, value, out, grad, log_sum, row_sum, outputs[0]),
        "backward_key_value": (query, key, value, grad, log_sum, row_sum, *outputs[1:]),
    }
    sizes = {"forward": ((64, 128), (32, 64, 128)), "backward_query": ((64, 128), (32, 64, 128))}
    sizes["backward_key_value"] = ((32, 64), (64, 128))
    scores = sum(queries * keys for queries, keys in zip(*lengths))
    for name, products in zip(pointers, (2, 3, 4)):
        shapes = itertools.product(*sizes[name], (4, 8), (2, 3))
        shipped = attention_launch.tile_of(name, query, packing)
        tiles = [shipped, *(tile for shape in shapes if (tile := Tile(*shape)) != shipped)]

        def launch(tile: Tile, name: str = name) -> None:
            attention_launch.launch_kernel(name, tile, packing, pointers[name])

        yield (
            f"attention_{name}",
            Search(launch, [(tile,) for tile in tiles], 0, 2 * products * scores * HEADS * HEAD_SIZE),
        )


def _causal_attention(device: torch.device) -> Iterator[tuple[str, Search]]:
    """CLIP's blocks: queries, keys and values of one projection, and one tensor for their gradients."""
    blocks, length, heads = SAMPLES * 8, 77, 8
    projected, gradient = (_normal(blocks * length, 3, heads, HEAD_SIZE, device=device) for _ in range(2))
    bounds = torch.arange(0, (blocks + 1) * length, length, dtype=torch.int32, device=device)
    packing = Packing(bounds, bounds, length, length, 0, None, causal=True)
    grad = _normal(blocks * length, heads, HEAD_SIZE, device=device)
    inputs, into = projected.unbind(1), gradient.unbind(1)
    _, *saved = attention_launch.forward(*inputs, packing)
    row_sum = torch.zeros_like(saved[1])
    pointers = {
        "forward": (*inputs, *saved),
        "backward_query": (*inputs, saved[0], grad, saved[1], row_sum, into[0]),
        "backward_key_value": (*inputs, grad, saved[1], row_sum, *into[1:]),
    }
    shapes = list(itertools.product((32, 64, 128), (32, 64, 128), (2, 4, 8), (1, 2)))
    for name, products in zip(pointers, (2, 3, 4)):
        shipped = attention_launch.tile_of(name, inputs[0], packing)
        tiles = [shipped, *(tile for shape in shapes if (tile := Tile(*shape)) != shipped)]

        def launch(tile: Tile, name: str = name) -> None:
            attention_launch.launch_kernel(name, tile, packing, pointers[name])

        flops = products * blocks * length * (length + 1) * heads * HEAD_SIZE
        yield f"causal_{name}", Search(launch, [(tile,) for tile in tiles], 0, flops)


def _loss(device: torch.device) -> Iterator[tuple[str, Search]]:
    rows = SAMPLES * LABELLED
    hidden, weight = _normal(rows, HIDDEN, device=device), _normal(VOCABULARY, HIDDEN, device=device) * HIDDEN**-0.5
    bias, labels = _normal(VOCABULARY, device=device), torch.randint(VOCABULARY, (rows,), device=device)
    maximum, total, _, _ = masked_token_loss_triton.row_statistics(hidden, weight, bias, labels, torch.bfloat16)
    grad_losses, grad_bias = torch.ones(rows, device=device), torch.empty_like(bias)
    tables = masked_token_loss_triton.TILES
    place = masked_token_loss_triton.FAMILIES[masked_token_loss_triton.architecture(device)], 2, 2
    few, shipped = tables[place]
    shapes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3)]
    shapes += [
        (128, 256, 64, 8, 4),
        (64, 256, 64, 8, 3),
        (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4),
        (128, 128, 32, 8, 4),
    ]
    tiles = [LogitsTile(*shape, resident) for shape in shapes for resident in (1, 2, 3)]

    def row_statistics(tile: LogitsTile) -> None:
        with _replaced(tables, place, (few, tile)):
            masked_token_loss_triton.row_statistics(hidden, weight, bias, labels, torch.bfloat16)

    def gradients(tile: LogitsTile) -> None:
        with _replaced(tables, place, (few, tile)):
            given = (hidden, weight, bias, labels, maximum, total, grad_losses, grad_bias, torch.bfloat16)
            for _ in masked_token_loss_triton.logit_gradients(*given):
                pass

    flops = 2 * rows * VOCABULARY * HIDDEN
    yield (
        "loss_statistics",
        Search(row_statistics, [(shipped,), *((tile,) for tile in tiles if tile != shipped)], 0, flops),
    )
    alone = [tile for tile in tiles if tile.resident == 1 and tile != shipped]
    yield "loss_gradients", Search(gradients, [(shipped,), *((tile,) for tile in alone)], 0, flops)


def _norm(device: torch.device) -> Iterator[tuple[str, Search]]:
    tokens, seed, threshold = SAMPLES * LENGTH, torch.tensor([1], device=device), drop_threshold(0.1)
    shipped = residual_norm_triton.TILES[residual_norm_triton.architecture(device)]
    tiles = [NormTile(*shape) for shape in [(1024, 1), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8)]]
    forwards = [shipped["forward"], *(tile for tile in tiles if tile != shipped["forward"])]
    choices = [tile._replace(stages=stages) for tile in tiles for stages in (1, 3, 4)]
    # As many elements on a processor at a time, and up to four times as many.
    choices = [tile._replace(programs=8192 * n // tile.elements) for tile in choices for n in (1, 2, 4)]
    backwards = [shipped["backward"], *(tile for tile in choices if tile != shipped["backward"])]
    for size in residual_norm_triton.TRUE_SIZES:
        states, residual, grad = (_normal(tokens, size, device=device) for _ in range(3))
        weight, bias = (_normal(size, device=device) for _ in range(2))
        inputs = states, residual, weight, bias, seed, 1e-12, threshold
        gradients = grad, weight, bias, seed, threshold, residual.dtype
        saved = residual_norm_triton.forward(*inputs)[1:]

        def forward(tile: NormTile, inputs: tuple = inputs) -> None:
            residual_norm_triton.forward(*inputs, tile=tile)

        def backward(tile: NormTile, inputs: tuple = (*gradients, *saved)) -> None:
            residual_norm_triton.backward(*inputs, tile=tile)

        yield f"norm_forward_{size}", Search(forward, [(tile,) for tile in forwards], 4 * states.nbytes, 0)
        yield f"norm_backward_{size}", Search(backward, [(tile,) for tile in backwards], 4 * states.nbytes, 0)


def _quick_gelu(device: torch.device) -> Iterator[tuple[str, Search]]:
    states, grad = (_normal(SAMPLES * CLIP_TOKENS, CLIP_INTERMEDIATE, device=device) for _ in range(2))
    module = vars(quick_gelu_triton)

    def with_tile(call: Callable[[], object], tile: int, warps: int) -> None:
        with _replaced(module, "TILE", tile), _replaced(module, "_warps", lambda _device: warps):
            call()

    shapes = [(2048, 8), (1024, 4), (2048, 4), (4096, 8), (4096, 4), (8192, 8), (1024, 8)]
    calls = {
        "quick_gelu_forward": (2, lambda: quick_gelu_triton.forward(states)),
        "quick_gelu_backward": (3, lambda: quick_gelu_triton.backward(grad, states)),
    }
    for name, (tensors, call) in calls.items():

        def launch(tile: int, warps: int, call: Callable[[], object] = call) -> None:
            with_tile(call, tile, warps)

        yield name, Search(launch, shapes, tensors * states.nbytes, 0)


def _linear(device: torch.device) -> Iterator[tuple[str, Search]]:
    rows = 4 * SAMPLES * LENGTH  # more than a second-level cache holds
    for columns in (HIDDEN, INTERMEDIATE):
        values = _normal(rows, columns, device=device)

        def add(tile: SumTile, values: torch.Tensor = values) -> None:
            linear_triton.column_sums(values, torch.bfloat16, tile)

        shapes = itertools.product((128, 256), (8192, 16384), (256,), (2, 4, 8), (1, 3, 4))
        sums = [SumTile(*shape) for shape in shapes if SumTile(*shape) != linear_triton.TILE]
        choices = [(tile,) for tile in (linear_triton.TILE, *sums)]
        yield f"column_sums_{columns}", Search(add, choices, values.nbytes, 0)
    states, grad = (_normal(SAMPLES * LENGTH, INTERMEDIATE, device=device) for _ in range(2))
    shapes = itertools.product((1024, 2048, 4096), (128, 256, 512))
    found = [GELUTile(*shape) for shape in shapes if GELUTile(*shape) != activated_linear_triton.TILE]
    for name, quick in (("gelu_backward", False), ("quick_gelu_and_backward", True)):

        def activate(tile: GELUTile, quick: bool = quick) -> None:
            # The gradient is written in its place, again and again; time does not depend on values.
            activated_linear_triton.backward(grad, states, quick=quick, tile=tile)

        choices = [(tile,) for tile in (activated_linear_triton.TILE, *found)]
        yield name, Search(activate, choices, 4 * states.nbytes, 0)


def tiles(tell: Callable[..., None], _out: object, rest: list[str]) -> None:
    """Times every candidate of every kernel, or of those named; what ships comes first, then the others by time."""
    if not torch.cuda.is_available():
        tell(problem="tiles are tried on a GPU, and there is none here")
        return
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), get_context("spawn")) as pool:
        parts = min(12, os.cpu_count() or 1)
        for done in [pool.submit(_compile, part, parts, rest) for part in range(parts)]:
            done.result()
    copy = _copy_bytes_per_second()
    tell(copy_gb_per_second=copy / 1e9)
    for name, search in searches(torch.device("cuda")).items():
        if rest and name not in rest:
            continue
        times = []
        for candidate in search.candidates:
            try:
                times.append((candidate, _milliseconds(functools.partial(search.launch, *candidate))))
            except Exception as error:  # too much shared memory, say: that one is out
                tell(kernel=name, candidate=str(candidate), problem=f"{type(error).__name__}: {error}"[:120])
        for candidate, (middle, low, high) in [*times[:1], *sorted(times[1:], key=lambda row: row[1][0])]:
            seconds = middle / 1e3
            share = {"share_of_copy": search.nbytes / seconds / copy} if search.nbytes else {}
            share |= {"tflops": search.flops / seconds / 1e12} if search.flops else {}
            tell(kernel=name, candidate=_short(candidate), ms=middle, range=[low, high], **share)


def _compile(part: int, parts: int, names: list[str]) -> None:
    """Runs every so-many-th candidate once, so that its machine code lies in Triton's cache."""
    jobs = [
        (search, candidate)
        for name, search in searches(torch.device("cuda")).items()
        for candidate in search.candidates
        if not names or name in names
    ]
    for search, candidate in jobs[part::parts]:
        with contextlib.suppress(Exception):  # its turn comes again where times are taken, and says why
            search.launch(*candidate)
            torch.cuda.synchronize()


def _milliseconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Returns the median, shortest and longest time of a call, replayed four at a time."""
    calls = [call] * 4
    graph = captured(calls)
    times = [device_milliseconds(graph.replay) / len(calls) for _ in range(ROUNDS)]
    return statistics.median(times), min(times), max(times)


def _copy_bytes_per_second() -> float:
    """Returns the bytes, read and written, that a copy of four gigabytes moves in a second, by the faster of two."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    times = [_milliseconds(call)[0] for call in (lambda: target.copy_(source), lambda: torch.neg(source, out=target))]
    return 2 * source.nbytes / (min(times) / 1e3)


@contextlib.contextmanager
def _replaced(table: dict, key: object, value: object) -> Iterator[None]:
    before = table[key]
    table[key] = value
    try:
        yield
    finally:
        table[key] = before


def _normal(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _short(candidate: tuple) -> str:
    settings = candidate[0] if isinstance(candidate[0], tuple | Tile) else candidate
    return " ".join(str(value) for value in (astuple(settings) if isinstance(settings, Tile) else settings))
