"""What scripts/gpu.sh finds out on a GPU, part by part: `python -m xdscale.bench.gpu PART OUT …`.

Every finding is one JSON object in OUT/PART.jsonl and one line on stdout, at once, so that a stop costs only what was
not begun. Without a GPU the same parts run on the CPU, to see that they do.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from xdscale.bench.batch import bench_batch
from xdscale.bench.kernels import bench_kernels
from xdscale.bench.tiles import tiles
from xdscale.devices import rank_device
from xdscale.kernels import (
    DEFINITIONS,
    activated_linear,
    masked_token_loss,
    packed_attention,
    quick_gelu,
    residual_norm,
)
from xdscale.plan.hardware import gpu_of_device
from xdscale.recipe import Recipe, load_recipe
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.engine import to_device
from xdscale.training.tracing import on_meta, trace

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "open_clip_torch", "numpy", "liger_kernel")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""What tests allow a kernel to differ from fp64, relative to the norm."""

Tell = Callable[..., None]
"""Writes one finding."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one part; returns the exit code."""
    parser = argparse.ArgumentParser(prog="xdscale.bench.gpu", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path, help="folder of the findings")
    parser.add_argument("rest", nargs="*", help="recipe, section.key=value and micro-batches; or files of plans")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    PARTS[options.part](teller(options.out / f"{options.part}.jsonl"), options.out, options.rest)
    return 0


def teller(path: Path) -> Tell:
    """Returns a function that adds one finding to a file and prints it."""

    def tell(**finding: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finding) + "\n")
        print("  ".join(f"{name} {_text(value)}" for name, value in finding.items()), flush=True)

    return tell


def versions(tell: Tell, _out: Path, _rest: list[str]) -> None:
    """What is installed, and the card."""
    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda, "hip": torch.version.hip}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    tell(**found)
    device = rank_device(0)
    if device.type == "cpu":
        tell(card="none: on the CPU", threads=torch.get_num_threads())
        return
    properties, known = torch.cuda.get_device_properties(device), gpu_of_device(device)
    tell(
        card=properties.name,
        gib=round(properties.total_memory / 2**30, 1),
        processors=properties.multi_processor_count,
        capability=list(torch.cuda.get_device_capability(device)),
        planned_as=known.name if known else None,
    )


def kernels(tell: Tell, _out: Path, _rest: list[str]) -> None:
    """Every kernel natively, outputs and gradients, against its definition in fp64: errors, not only verdicts."""
    device = rank_device(0)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        for name, operation, call, shapes in _operations(device):
            try:
                leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
                found = _with_gradients(functools.partial(call, operation), leaves)
                wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
                expected = _with_gradients(functools.partial(call, DEFINITIONS[operation]), wide)
                errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected)]
                passes = all(error <= TOLERANCE[dtype] for error in errors)  # a NaN is not
                tell(kernel=name, dtype=_short(dtype), output=errors[0], gradients=errors[1:], passes=passes)
            except Exception as error:  # one kernel that does not run leaves the others to be seen
                tell(kernel=name, dtype=_short(dtype), problem=_reason(error))


def _operations(device: torch.device) -> Iterator[tuple[str, Callable, Callable, list[tuple[int, ...]]]]:
    """Yields kernels: name, operation, how it or its definition is called, and the shapes of the inputs.

    Lengths are no multiples of tiles.
    """
    big = device.type == "cuda"
    tokens, size = (5000, 768) if big else (40, 64)
    heads, queries, keys = (12, [512, 77, 300], [693, 1, 427]) if big else (2, [17, 5], [9, 23])
    bounds = [torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32) for lengths in (queries, keys)]
    longest = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}
    attended = [(sum(queries), heads, 64), (sum(keys), heads, 64), (sum(keys), heads, 64)]
    rows = [(tokens, size), (tokens, size), (size,), (size,)]
    for dropout in (0.0, 0.1):
        drop = {"dropout": dropout, "seed": torch.tensor([1], device=device)}
        yield (
            f"attention, dropout {dropout}",
            packed_attention,
            lambda f, *inputs, drop=drop: f(*inputs, *bounds, **longest, **drop),
            attended,
        )
        yield (
            f"residual_norm, dropout {dropout}",
            residual_norm,
            lambda f, *inputs, drop=drop: f(*inputs, eps=1e-12, **drop),
            rows,
        )
    labelled, vocabulary = (2458, 30522) if big else (70, 301)
    labels = torch.randint(vocabulary, (labelled,), device=device)
    scale = 2.0 ** -round(math.log2(size) / 2)  # exact in every dtype
    projection = [(labelled, size), (vocabulary, size), (vocabulary,)]
    yield "masked_token_loss", masked_token_loss, lambda f, h, w, b: f(h, w * scale, b, labels)[0], projection
    yield "quick_gelu", quick_gelu, lambda f, states: f(states), [(tokens, size)]
    yield (
        "activated_linear",
        activated_linear,
        lambda f, *inputs: f(*inputs, F.gelu),
        [(tokens, size), (size, size), (size,)],
    )


def rivals(_tell: Tell, out: Path, _rest: list[str]) -> None:
    """Every kernel against what else computes the same."""
    bench_kernels(out / "rivals.jsonl", rounds=20 if rank_device(0).type == "cuda" else 1)


def step(tell: Tell, out: Path, rest: list[str]) -> None:
    """The true step in bf16 with fp32 masters: times of host and device, memory, waits, a CUDA graph, a profile."""
    recipe, micros = _recipe(rest)
    device = rank_device(0)
    torch.manual_seed(0)
    # Few CPUs have instructions for bf16; without, it is a hundred times slower.
    module = build_adaptation(recipe).train().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    card = gpu_of_device(device) if device.type == "cuda" else None
    for micro in micros:
        name = {"recipe": Path(rest[0]).stem, "micro": micro}
        try:
            trained = _Step(module, recipe, micro, device)
            _measure(tell, name, trained, card.peak_flops if card else None)
            if device.type == "cuda":
                _look_for_waits(tell, name, trained)
                _replay_graph(tell, name, trained)
            _profile(tell, name, trained, out / f"profile-{name['recipe']}-{micro}.txt")
        except Exception as error:  # a micro-batch that does not fit leaves the others to be seen
            tell(**name, problem=_reason(error))
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


class _Step:
    """Forward, backward and update on one batch at the recipe's true shape."""

    def __init__(self, module: nn.Module, recipe: Recipe, micro: int, device: torch.device) -> None:
        self.module, self.device = module, device
        batch = bench_batch(recipe, module, micro)
        self.batch = to_device(batch.arrays, device)
        self.flops = trace(on_meta(module), batch.arrays, recipe.objectives.weights()).flops
        self.tokens = batch.tokens
        self.scales = {name: w / max(1, batch.targets[name]) for name, w in recipe.objectives.weights().items()}
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float().requires_grad_() for parameter in self.trained]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, fused=True)
        for master in self.masters:
            master.grad = torch.zeros_like(master)

    def forward(self) -> torch.Tensor:
        losses = self.module(self.batch)
        return torch.stack([losses[name][0] * scale for name, scale in self.scales.items()]).sum()

    @torch.no_grad()
    def update(self) -> None:
        used = [(p, m) for p, m in zip(self.trained, self.masters) if p.grad is not None]
        torch._foreach_copy_([master.grad for _, master in used], [parameter.grad for parameter, _ in used])
        self.optimizer.step()
        torch._foreach_copy_([parameter for parameter, _ in used], [master for _, master in used])

    def run(self) -> list[tuple[float, float]]:
        """Makes a step; returns milliseconds of the host and of the device for forward, backward and update."""
        self.module.zero_grad(set_to_none=True)
        marks = [self._mark()]
        loss = self.forward()
        marks.append(self._mark())
        loss.backward()
        marks.append(self._mark())
        self.update()
        marks.append(self._mark())
        if self.device.type == "cpu":
            return [(1e3 * (b - a), 1e3 * (b - a)) for (a, _), (b, _) in zip(marks, marks[1:])]
        torch.cuda.synchronize()
        return [(1e3 * (b - a), x.elapsed_time(y)) for (a, x), (b, y) in zip(marks, marks[1:])]

    def _mark(self) -> tuple[float, Any]:
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return time.perf_counter(), event


def _measure(tell: Tell, name: dict[str, Any], trained: _Step, peak: float | None) -> None:
    on_gpu = trained.device.type == "cuda"
    began = time.perf_counter()
    trained.run()  # compiles
    first = time.perf_counter() - began
    before = 0
    if on_gpu:
        trained.module.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    # Gradients come as activations go: the peak above what was there is nearly all activations.
    rounds = [trained.run() for _ in range(7 if on_gpu else 1)]
    host, device = ([statistics.median(r[part][side] for r in rounds) for part in range(3)] for side in (0, 1))
    seconds = sum(device) / 1e3
    tell(
        **name,
        first_seconds=first,
        host_ms=dict(zip(("forward", "backward", "optimizer"), host)),
        device_ms=dict(zip(("forward", "backward", "optimizer"), device)),
        tokens_per_second=trained.tokens / seconds,
        tflops_per_second=trained.flops / seconds / 1e12,
        flops_per_sequence=trained.flops / name["micro"],
        mfu_of_peak=trained.flops / seconds / peak if peak else None,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        activations_gib=(torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None,
    )


def _look_for_waits(tell: Tell, name: dict[str, Any], trained: _Step) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.forward().backward()
        tell(**name, waits="none in forward and backward")
    except RuntimeError as error:
        tell(**name, waits=_reason(error))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _replay_graph(tell: Tell, name: dict[str, Any], trained: _Step) -> None:
    """What the step would take if the host cost nothing."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        trained.module.zero_grad(set_to_none=True)
        with torch.cuda.stream(stream):
            trained.forward().backward()
        torch.cuda.current_stream().wait_stream(stream)
        trained.module.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            trained.forward().backward()
        times = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        tell(**name, graph_ms=statistics.median(times))
    except RuntimeError as error:
        torch.cuda.synchronize()
        tell(**name, graph_problem=_reason(error))


def _profile(tell: Tell, name: dict[str, Any], trained: _Step, path: Path) -> None:
    on_gpu = trained.device.type == "cuda"
    steps = 3 if on_gpu else 1  # one after the other, as in training: the host runs ahead
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(steps):
            trained.module.zero_grad(set_to_none=True)
            trained.forward().backward()
            trained.update()
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        tell(**name, device_busy=_busy(profiler))
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    path.write_text(averages.table(sort_by=key, row_limit=40, max_name_column_width=80), encoding="utf-8")
    top = sorted(averages, key=lambda entry: getattr(entry, key), reverse=True)[:10]
    tell(**name, top_ms={entry.key[:60]: round(getattr(entry, key) / 1e3 / steps, 3) for entry in top})


def _busy(profiler: profile) -> float:
    """Returns the share of the second half of a profile in which the GPU computes."""
    events = profiler.profiler.kineto_results.events()
    spans = sorted((e.start_ns(), e.end_ns()) for e in events if e.device_type() == torch.autograd.DeviceType.CUDA)
    first = (spans[0][0] + spans[-1][1]) // 2
    busy, until = 0, first
    for start, end in spans:
        busy, until = busy + max(0, end - max(start, until)), max(until, end)
    return busy / (until - first)


def compare(tell: Tell, _out: Path, rest: list[str]) -> None:
    """The same step in fp32 on the device and on the CPU, without dropout: losses and gradients."""
    recipe, (micro, *_) = _recipe([*rest, "model.dropout=0.0"])
    torch.manual_seed(0)
    module = build_adaptation(recipe).train()
    found = []
    for device in (torch.device("cpu"), rank_device(0)):
        trained = _Step(module.to(device), recipe, micro, device)
        module.zero_grad(set_to_none=True)
        loss = trained.forward()
        loss.backward()
        gradients = {name: p.grad.double().cpu() for name, p in module.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (expected, wanted), (loss, gradients) = found
    # A key's bias has a true gradient of 0: only rounding is left of it.
    scale = {name: wanted[name.replace("key.bias", "key.weight")].norm().clamp(min=1e-12) for name in wanted}
    errors = {name: float((gradients[name] - wanted[name]).norm() / scale[name]) for name in wanted}
    worst = max(errors, key=errors.get)
    tell(cpu_loss=expected, device_loss=loss, relative=abs(loss / expected - 1), worst=worst, gradient=errors[worst])


def planned(tell: Tell, out: Path, rest: list[str]) -> None:
    """What `xdscale plan --json` says (files in `rest`) beside what was measured."""
    measured = [json.loads(line) for path in out.glob("step.jsonl") for line in path.read_text().splitlines()]
    for path in map(Path, rest):
        plan = json.loads(path.read_text(encoding="utf-8"))
        row = next((row for row in plan["rows"] if row["way"] == "zero1" and row["micro_batch"]), None)
        if row is None:
            tell(recipe=plan["recipe"], problem="the plan says that nothing fits")
            continue
        gpu = plan["machine"]["cluster"]["gpu"]
        activations = row["activations"]["kept"] / row["micro_batch"] / 2**30
        for found in measured:
            if found["recipe"] != plan["recipe"] or "device_ms" not in found:
                continue
            micro, seconds = found["micro"], sum(found["device_ms"].values()) / 1e3
            tell(
                recipe=found["recipe"],
                micro=micro,
                planned_for=gpu["name"],
                flops_per_sequence=[plan["flops_per_sequence"], found["flops_per_sequence"]],
                seconds=[plan["flops_per_sequence"] * micro / gpu["peak_flops"] / plan["machine"]["mfu"], seconds],
                activations_gib=[activations * micro, found["activations_gib"]],
            )


PARTS = {part.__name__: part for part in (versions, kernels, tiles, rivals, step, compare, planned)}


def _recipe(rest: list[str]) -> tuple[Recipe, list[int]]:
    """Returns the recipe that the arguments name, with random weights and ids, and the micro-batches."""
    overrides = [word for word in rest[1:] if "=" in word]
    random = ["model.language.weights=random", "model.language.sha256=null", "model.clip.weights=random"]
    # There are no such shards, so that ids are drawn at the true shape, whatever lies where the recipe's should.
    random.append("data.shards=invented")
    return load_recipe(rest[0], [*random, *overrides]), [int(word) for word in rest[1:] if "=" not in word]


def _with_gradients(call: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out = call(*leaves)
    # The same numbers in every dtype.
    direction = torch.linspace(-1, 1, out.numel(), device=out.device).bfloat16().to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction if out.ndim else torch.ones_like(out))]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_text(entry)}" for name, entry in value.items()) + "}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
