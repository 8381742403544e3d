"""The training step on a GPU, for scripts/gpu.sh: its times, waits, a CUDA graph, a profile, and its rivals."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from xdscale.bench.batch import bench_batch
from xdscale.bench.kernels import device_milliseconds, reason
from xdscale.bench.plain_model import attending_by, fused_attend, plain_losses
from xdscale.devices import rank_device
from xdscale.models.operations import use_definitions
from xdscale.plan.hardware import gpu_of_device
from xdscale.recipe import Recipe, load_recipe
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.engine import to_device
from xdscale.training.throughput import wait
from xdscale.training.tracing import on_meta, trace

STEPS_COMPARED = 20
PASSES_COMPARED = 50

Tell = Callable[..., None]
"""Writes one finding."""


def step(tell: Tell, out: Path, rest: list[str]) -> None:
    """The true step in bf16 with fp32 masters: times of host and device, memory, waits, a CUDA graph, a profile."""
    recipe, micros = recipe_and_micros(rest)
    device = rank_device(0)
    torch.manual_seed(0)
    # Few CPUs have instructions for bf16; without, it is a hundred times slower.
    module = build_adaptation(recipe).train().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    card = gpu_of_device(device) if device.type == "cuda" else None
    for micro in micros:
        name = {"recipe": Path(rest[0]).stem, "micro": micro}
        try:
            trained = TrainedStep(module, recipe, micro, device)
            _measure(tell, name, trained, card.peak_flops if card else None)
            if device.type == "cuda":
                if not _waits(tell, name, trained):  # a capture that fails would spoil what follows
                    _replay_graph(tell, name, trained)
            _profile(tell, name, trained, out / f"profile-{name['recipe']}-{micro}.txt")
        except Exception as error:  # a micro-batch that does not fit leaves the others to be seen
            tell(**name, problem=reason(error))
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


class TrainedStep:
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
        """Returns the loss."""
        losses = self.module(self.batch)
        return torch.stack([losses[name][0] * scale for name, scale in self.scales.items()]).sum()

    @torch.no_grad()
    def update(self) -> None:
        """Makes AdamW's step of the fp32 masters and copies them."""
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


def _measure(tell: Tell, name: dict[str, Any], trained: TrainedStep, peak: float | None) -> None:
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
    with torch.autograd.set_multithreading_enabled(False):  # else a thread of autograd's own makes the backward pass
        alone = [trained.run() for _ in range(4 if on_gpu else 1)]
    seconds = sum(_medians(rounds, 1).values()) / 1e3
    tell(
        **name,
        first_seconds=first,
        host_ms=_medians(rounds, 0),
        host_ms_one_thread=_medians(alone, 0),
        device_ms=_medians(rounds, 1),
        tokens_per_second=trained.tokens / seconds,
        tflops_per_second=trained.flops / seconds / 1e12,
        flops_per_sequence=trained.flops / name["micro"],
        mfu_of_peak=trained.flops / seconds / peak if peak else None,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        activations_gib=(torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None,
    )


def _medians(rounds: list[list[tuple[float, float]]], side: int) -> dict[str, float]:
    """Returns the median milliseconds of each part, of the host (side 0) or the device (1)."""
    parts = enumerate(("forward", "backward", "optimizer"))
    return {part: statistics.median(found[number][side] for found in rounds) for number, part in parts}


def _waits(tell: Tell, name: dict[str, Any], trained: TrainedStep) -> bool:
    """Says whether forward or backward wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.forward().backward()
    except RuntimeError as error:
        tell(**name, waits=reason(error))
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tell(**name, waits="none in forward and backward")
    return False


def _replay_graph(tell: Tell, name: dict[str, Any], trained: TrainedStep) -> None:
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
        tell(**name, graph_ms=statistics.median(device_milliseconds(graph.replay) for _ in range(5)))
    except RuntimeError as error:
        torch.cuda.synchronize()
        tell(**name, graph_problem=reason(error))


def _profile(tell: Tell, name: dict[str, Any], trained: TrainedStep, path: Path) -> None:
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
    on_gpu = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.start_ns(), e.end_ns()) for e in on_gpu if not e.is_user_annotation())
    first = (spans[0][0] + spans[-1][1]) // 2
    busy, until = 0, first
    for start, end in spans:
        busy, until = busy + max(0, end - max(start, until)), max(until, end)
    return busy / (until - first)


def step_rivals(tell: Tell, _out: Path, rest: list[str]) -> None:
    """The whole step: ours in bf16, and the released code's computation, eager and compiled.

    Compiled, it attends by PyTorch's own operation and runs under autocast, as one would speed it up today.
    """
    recipe, (micro, *_) = recipe_and_micros(rest)
    device = rank_device(0)
    torch.manual_seed(0)
    module = build_adaptation(recipe).train().to(device)
    ours = TrainedStep(copy.deepcopy(module).to(torch.bfloat16), recipe, micro, device)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0, fused=True)

    def plain(losses: Callable[..., dict[str, torch.Tensor]], dtype: torch.dtype | None) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = losses(module, ours.batch, dropout=recipe.model.dropout)
                loss = torch.stack([found[name].float() * scale for name, scale in ours.scales.items()]).sum()
            loss.backward()
            optimizer.step()

        return run

    ways = {
        "ours, bf16 with fp32 masters": ours.run,
        "plain, autocast to bf16": plain(plain_losses, torch.bfloat16),
        "plain, fp32": plain(plain_losses, None),
        "plain, SDPA, compiled, autocast to bf16": plain(torch.compile(plain_losses, dynamic=False), torch.bfloat16),
    }
    middle, own = {}, next(iter(ways))
    for name, run in ways.items():
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with attending_by(fused_attend) if "SDPA" in name else contextlib.nullcontext():
                times = [_seconds(run, device) for _ in range(2 + 5)][2:]  # the first ones compile and warm up
            middle[name] = statistics.median(times)
            tell(
                recipe=Path(rest[0]).stem,
                micro=micro,
                way=name,
                seconds=times,
                times_ours=middle[name] / middle[own] if own in middle else None,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
            )
        except Exception as error:  # one that does not fit or compile leaves the others to be seen
            tell(recipe=Path(rest[0]).stem, micro=micro, way=name, problem=reason(error))
        for used in (module, ours.module):
            used.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # for the next one's memory


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def definitions(tell: Tell, _out: Path, rest: list[str]) -> None:
    """Twenty steps in fp32 by the kernels and by their definitions, with dropout: the losses."""
    recipe, (micro, *_) = recipe_and_micros(rest)
    device = rank_device(0)
    torch.manual_seed(0)
    fused = build_adaptation(recipe).train()
    curves = []
    for module in (fused, use_definitions(copy.deepcopy(fused))):
        trained = TrainedStep(module.to(device), recipe, micro, device)
        optimizer = torch.optim.AdamW(trained.trained, lr=1e-4)
        losses = []
        for step in range(STEPS_COMPARED):
            torch.manual_seed(step)  # both drop the same
            optimizer.zero_grad(set_to_none=True)
            loss = trained.forward()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses).double().cpu())
    fused_losses, plain = curves
    difference = ((fused_losses - plain).abs() / plain).max().item()
    tell(steps=STEPS_COMPARED, first=plain[0].item(), last=plain[-1].item(), largest_relative_difference=difference)


def repeats(tell: Tell, _out: Path, rest: list[str]) -> None:
    """The same pass again and again in bf16, with dropout: how many gradients ever have other bits."""
    recipe, (micro, *_) = recipe_and_micros(rest)
    device = rank_device(0)
    torch.manual_seed(0)
    module = build_adaptation(recipe).train().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    trained = TrainedStep(module, recipe, micro, device)
    first: dict[str, torch.Tensor] = {}
    differing, losses = set(), set()
    for _ in range(PASSES_COMPARED if device.type == "cuda" else 3):
        torch.manual_seed(0)  # all drop the same
        module.zero_grad(set_to_none=True)
        loss = trained.forward()
        loss.backward()
        losses.add(loss.item())
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        first = first or {name: gradient.clone() for name, gradient in found.items()}
        differing |= {name for name in found if not torch.equal(found[name], first[name])}
    tell(gradients=len(first), differing=sorted(differing), losses=len(losses))


def recipe_and_micros(rest: list[str]) -> tuple[Recipe, list[int]]:
    """Returns the recipe that the arguments name, with random weights and ids, and the micro-batches."""
    overrides = [word for word in rest[1:] if "=" in word]
    random = ["model.language.weights=random", "model.language.sha256=null", "model.clip.weights=random"]
    # There are no such shards, so that ids are drawn at the true shape, whatever lies where the recipe's should.
    random.append("data.shards=invented")
    return load_recipe(rest[0], [*random, *overrides]), [int(word) for word in rest[1:] if "=" not in word]
