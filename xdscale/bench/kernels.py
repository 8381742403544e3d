"""`xdscale bench kernels`: forward and backward of the project's operations against what else can compute them.

On a GPU the opponents are PyTorch's attention on padded keys on each of its backends, FlexAttention, PyTorch's own
fused loss, the compiled definitions, and Liger and Cut-Cross-Entropy where they are installed; on a CPU PyTorch's
attention, the plain loss and activations. Contestants take turns, so that a change of the machine's load meets all of
them; one that fails costs its own row, which says why. On a GPU a replay of a CUDA graph is timed, so that the host's
launches are not, over several sets of inputs, so that no call finds its own in the cache. A CPU whose products are
slower in bf16 than in fp32, by a hundred times where it has no instructions for it, leaves bf16 out.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from xdscale.bench.contestants import (
    CLIP_HIDDEN,
    CLIP_VOCABULARY,
    DROPOUT,
    Contestants,
    Sizes,
    activated_linear_contestants,
    attention_contestants,
    loss_contestants,
    norm_contestants,
    quick_gelu_contestants,
)
from xdscale.devices import rank_device
from xdscale.training.throughput import matmul_flops_per_second

GPU_SIZES = Sizes("cuda", attention_samples=32, loss_samples=32, rivals=True)
CPU_SIZES = Sizes("cpu", attention_samples=2, loss_samples=1, rivals=False)
GPU_COPIES = 3
"""Sets of inputs on a GPU, which calls take in turn: together beyond the second-level cache."""


@dataclass(frozen=True)
class KernelTiming:
    """What was found about one contestant.

    Attributes:
        operation: what is computed.
        dtype: of the inputs.
        contestant: who computes it.
        milliseconds: of forward and backward, one for each turn; none when it failed.
        ratio: median over the project's own; None where one of the two failed.
        how: "graph" for replays of a CUDA graph, "calls" for single calls.
        problem: why it failed, or why there is no graph; else empty.
        peak_mib: memory of a call on a GPU above its inputs; None elsewhere and where it failed.
    """

    operation: str
    dtype: str
    contestant: str
    milliseconds: list[float]
    ratio: float | None
    how: str
    problem: str
    peak_mib: float | None = None


def bench_kernels(out: Path | None = None, rounds: int | None = None) -> list[KernelTiming]:
    """Times all contestants on this machine's GPU, or else on one core of its CPU; prints rows as they come.

    Args:
        out: file for the rows as JSON lines.
        rounds: measurements of each contestant; default: 20 on a GPU, 5 on a CPU.
    """
    sizes = GPU_SIZES if rank_device(0).type == "cuda" else CPU_SIZES
    name = torch.cuda.get_device_name() if sizes.device == "cuda" else "one CPU core"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be all that is measured
    rows = []
    try:
        print(f"forward + backward on {name}, torch {torch.__version__}; median ms (range), times ours", flush=True)
        for row in measure(sizes, rounds or (20 if sizes.device == "cuda" else 5)):
            rows.append(row)
            print(_line(row), flush=True)
            if out:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    finally:
        torch.set_num_threads(threads)
    return rows


def measure(sizes: Sizes, rounds: int) -> Iterator[KernelTiming]:
    """Yields the rows of one operation after the other."""
    for dtype in _dtypes(torch.device(sizes.device)):
        for operation, make in _contests(sizes, dtype):
            yield from _compete(operation, dtype, make, sizes, rounds)
            if sizes.device == "cuda":
                torch.cuda.empty_cache()


def _dtypes(device: torch.device) -> list[torch.dtype]:
    if device.type == "cuda":
        return [torch.bfloat16, torch.float32]  # what matters most comes first
    rates = [matmul_flops_per_second(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    if rates[1] >= rates[0]:
        return [torch.float32, torch.bfloat16]
    print(f"bf16 left out: {rates[1] / 1e9:.1f} GFLOP/s, against {rates[0] / 1e9:.0f} in fp32", flush=True)
    return [torch.float32]


def _contests(sizes: Sizes, dtype: torch.dtype) -> list[tuple[str, Callable[[], Contestants]]]:
    """Returns what is compared in one dtype: title, and a function that makes contestants with inputs of their own."""
    contests = [
        (f"attention, dropout {DROPOUT}", lambda: attention_contestants(sizes, dtype, DROPOUT)),
        ("masked-token loss", lambda: loss_contestants(sizes, dtype)),
    ]
    if sizes.device == "cuda":
        clip = CLIP_HIDDEN, CLIP_VOCABULARY
        contests.append(("attention", lambda: attention_contestants(sizes, dtype, 0.0)))
        contests.append(("masked-token loss, CLIP's", lambda: loss_contestants(sizes, dtype, *clip)))
    return [
        *contests,
        (f"dropout {DROPOUT} + residual + LayerNorm", lambda: norm_contestants(sizes, dtype)),
        ("CLIP's activation", lambda: quick_gelu_contestants(sizes, dtype)),
        ("GELU + Linear", lambda: activated_linear_contestants(sizes, dtype)),
    ]


def _compete(
    operation: str, dtype: torch.dtype, make: Callable[[], Contestants], sizes: Sizes, rounds: int
) -> Iterator[KernelTiming]:
    """Times the contestants in turns; one that fails in its first calls takes no more."""
    copies = [make() for _ in range(GPU_COPIES if sizes.device == "cuda" else 1)]
    turns: dict[str, Callable[[], float]] = {}
    hows, problems, found = {}, {}, {name: [] for name in copies[0]}
    peaks: dict[str, float | None] = dict.fromkeys(found)
    for name in found:
        try:
            turns[name], hows[name], problems[name] = _prepare([copy[name] for copy in copies], sizes.device)
            peaks[name] = _peak_mib(copies[0][name]) if sizes.device == "cuda" else None
        except Exception as error:  # whatever a rival, its import or its compiler raises is the finding
            hows[name], problems[name] = "", reason(error)
    for _ in range(rounds):
        for name in list(turns):
            try:
                found[name].append(turns[name]())
            except Exception as error:
                problems[name], found[name] = reason(error), []
                del turns[name]
    ours = found[next(iter(found))]
    for name, values in found.items():
        ratio = statistics.median(values) / statistics.median(ours) if values and ours else None
        kind = str(dtype).removeprefix("torch.")
        yield KernelTiming(operation, kind, name, values, ratio, hows[name], problems[name], peaks[name])


def _prepare(calls: list[Callable[[], object]], device: str) -> tuple[Callable[[], float], str, str]:
    """Warms up; returns what gives the milliseconds of one call, how it does, and why there is no graph if none."""
    for call in calls:
        call()
    if device == "cpu":
        return lambda: _host_milliseconds(calls[0]), "calls", ""
    torch.cuda.synchronize()
    try:
        # Some wait for the device, which no graph can hold: a capture that fails leaves the generator of random numbers
        # unusable, so waits are looked for first.
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = captured(calls)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return lambda: device_milliseconds(lambda: [call() for call in calls]) / len(calls), "calls", reason(error)
    return lambda: device_milliseconds(graph.replay) / len(calls), "graph", ""


def _peak_mib(call: Callable[[], object]) -> float:
    """Returns the most memory that a call takes of a GPU beside what is there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Returns a CUDA graph of calls, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first calls on a stream set libraries up, which a graph cannot hold
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _host_milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def device_milliseconds(call: Callable[[], object]) -> float:
    """Returns how long the device takes for a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def reason(error: Exception) -> str:
    """Returns what an error says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _line(row: KernelTiming) -> str:
    who = f"{row.operation:36} {row.dtype:9} {row.contestant:40}"
    if not row.milliseconds:
        return f"{who} failed: {row.problem}"
    low, high = min(row.milliseconds), max(row.milliseconds)
    ratio = "" if row.ratio is None else f" {row.ratio:7.2f}"
    note = "" if row.peak_mib is None else f"  {row.peak_mib:,.1f} MiB"
    note += f"  no graph: {row.problem}" if row.problem else ""
    return f"{who} {statistics.median(row.milliseconds):9.3f} ({low:.3f} - {high:.3f}){ratio}{note}"
