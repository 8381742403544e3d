"""`xdscale bench step` of XDBERT: a whole training step, as this package and as the released code compute it.

Forward, backward and AdamW on the same weights, tokens and targets, in turns, on the GPU or else the CPU; the parts of
a GPU's step are timed between events on its stream. The learning rate is 0, so that every step starts from the same
weights while the update costs what it always costs.
"""

import copy
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode

from xdscale.bench.batch import bench_batch
from xdscale.bench.plain_model import plain_losses
from xdscale.bench.step import activation_bytes, check_counts, matmul_rate, update_masters
from xdscale.bench.step_report import (
    AUTOCAST,
    FAST,
    MASTERS,
    PARTS,
    PLAIN,
    Measured,
    StepReport,
    short,
    step_table,
)
from xdscale.devices import rank_device
from xdscale.errors import XdscaleError
from xdscale.plan.hardware import gpu_of_device
from xdscale.recipe import with_random_weights
from xdscale.recipes.xdbert.schema import XDBERTRecipe
from xdscale.systems.contract import MicroBatch, open_system
from xdscale.systems.xdbert import XDBERTAdaptation
from xdscale.training.engine import to_device
from xdscale.training.stored import build_module
from xdscale.training.throughput import wait
from xdscale.training.tracing import on_meta, trace

AGAINST = {"plain": PLAIN, "fp32": FAST}


def bench_xdbert(recipe: XDBERTRecipe, against: str, pairs: int, sequences: int | None) -> None:
    """Measures the training step and prints a table; progress goes to stderr.

    Args:
        recipe: its model and objectives are measured, with random weights. The batch comes from its shards; where there
            are none, ids are drawn at the true shape: 512 language tokens, CLIP text on 560 of 693 positions.
        against: "plain" for the released code's computation, "fp32" to leave that out.
        pairs: how many times each path is measured, in turns.
        sequences: samples per step; None for 2.

    Raises:
        XdscaleError: an argument is out of range, or the model or the shards cannot be read.
    """
    report = measure_step(recipe, against=against, pairs=pairs, sequences=2 if sequences is None else sequences)
    console = Console()
    console.print(
        f"{recipe.model.language.name} + {recipe.model.clip.name}, {report.shape}; {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}; matrix products reach "
        + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {short(dtype)}" for dtype, rate in report.rates.items())
        + "; one step in bf16: "
        + (
            ", ".join(
                f"{name.removeprefix('fast bf16, ')} {seconds:.2f} s" for name, seconds in report.bf16_seconds.items()
            )
            or "left out, this machine computes faster in fp32"
        )
        + f"; losses of plain and fast fp32 differ by {report.disagreement:.0e} at most"
    )
    console.print(step_table(report))


def measure_step(recipe: XDBERTRecipe, *, against: str, pairs: int, sequences: int) -> StepReport:
    """Does the work of `bench_xdbert`."""
    check_counts(pairs, sequences)
    if against not in AGAINST:
        raise XdscaleError(f"--against {against!r}: expected one of {', '.join(AGAINST)}")
    device = rank_device(0)
    rates = {dtype: matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    torch.manual_seed(recipe.training.seed)
    module = build_module(open_system(with_random_weights(recipe)), continued=True).train().to(device)
    bench = _Bench(module, recipe, bench_batch(recipe, module, sequences))
    names = [PLAIN, FAST] if against == "plain" else [FAST]
    ways = [MASTERS, AUTOCAST] if rates[torch.bfloat16] >= rates[torch.float32] else []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        steps = len(names) * (pairs + 1) + (pairs + 4 if ways else 0)
        task = progress.add_task("memory of a step", total=steps + 1)

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        disagreement = bench.disagreement()
        advance("memory of a step")
        bf16_seconds, measured = {}, {}
        for name in [*names, *ways]:
            measured[name] = Measured(bench.flops(name), bench.activation_bytes(name))
            advance(f"memory: {name}")
        for name in ways:
            trial = replace(measured[name], seconds=[], cpu_seconds=[], parts=[])
            for _ in range(2):  # the first touches fresh memory
                bench.step(name, trial)
            bf16_seconds[name] = min(trial.seconds)
            advance(f"trial: {name}")
        names += sorted(ways, key=bf16_seconds.get)[:1]
        for pair in range(1, pairs + 1):
            for name in names:
                bench.step(name, measured[name])
                advance(f"{pair} of {pairs}: {name}")
    paths = {name: measured[name] for name in names}
    card = gpu_of_device(device) if device.type == "cuda" else None
    return StepReport(paths, rates, bf16_seconds, disagreement, bench.shape, card.peak_flops if card else None)


class _Clock:
    """Sums the time of the parts; a part lasts until another one begins."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[tuple[str, str] | None, Any]] = []

    def begin(self, part: tuple[str, str] | None) -> None:
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((part, mark))

    def take(self) -> dict[tuple[str, str], float]:
        """Returns the seconds of each part since the last call; the device has come to the end."""
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        for (part, began), (_, ended) in pairwise(self._marks):
            if part is not None:
                seconds[part] += began.elapsed_time(ended) / 1e3 if self._on_gpu else ended - began
        self._marks.clear()
        return seconds

    def end_forward(self, name: str, outputs: Any) -> None:
        """The backward pass of a part begins when the gradient of one of its outputs arrives."""
        self.begin(None)
        tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        tensors = tensors.values() if isinstance(tensors, Mapping) else tensors
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: self.begin((name, "backward")))

    def run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        self.begin((name, "forward"))
        outputs = function(*arguments)
        self.end_forward(name, outputs)
        return outputs

    def watch(self, module: XDBERTAdaptation) -> None:
        """Times the parts of a module from now on."""
        heads = [head for head in (module.mlm, module.match, module.clip_tokens) if head is not None]
        parts = ([module.model.language], [module.model.clip], module.model.layers, heads)
        for name, group in zip(PARTS, parts):
            for part in group:
                part.register_forward_pre_hook(lambda *_, name=name: self.begin((name, "forward")))
                part.register_forward_hook(lambda _module, _in, outputs, name=name: self.end_forward(name, outputs))


class _Bench:
    """One set of weights, in fp32 and copied to bf16, and one batch."""

    def __init__(self, module: XDBERTAdaptation, recipe: XDBERTRecipe, batch: MicroBatch) -> None:
        self.module, self.narrow = module, copy.deepcopy(module).to(torch.bfloat16)
        self.dropout, self.arrays = recipe.model.dropout, batch.arrays
        self.device = next(module.parameters()).device
        self.batch = to_device(batch.arrays, self.device)
        self.scales = {name: w / max(1, batch.targets[name]) for name, w in recipe.objectives.weights().items()}
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optim = recipe.optim
        self.optimizer = torch.optim.AdamW(
            trained, lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        # Kept from step to step, as engines do: fresh pages would cost more than the copies.
        self._wide_gradients = [torch.empty_like(p, requires_grad=False) for p in module.parameters()]
        self.clock = _Clock(self.device)
        self.clock.watch(self.module)
        self.clock.watch(self.narrow)
        samples, length = batch.arrays["language_ids"].shape
        counts = ", ".join(f"{count} {name} targets" for name, count in batch.targets.items())
        clip = batch.arrays["clip_lengths"].sum(1).mean()
        self.shape = f"{samples} sequences of {length} tokens, CLIP text on {clip:.0f} positions each, {counts}"

    def step(self, name: str, measured: Measured) -> None:
        """Makes a step and adds its times to `measured`."""
        self._clear()
        self.clock.take()
        wait(self.device)
        began, cpu_began = time.perf_counter(), time.process_time()
        self._forward_backward(name)
        self.clock.begin(("optimizer", "forward"))
        self._update(name)
        self.clock.begin(None)
        wait(self.device)
        measured.seconds.append(time.perf_counter() - began)
        measured.cpu_seconds.append(time.process_time() - cpu_began)
        measured.parts.append(self.clock.take())

    def activation_bytes(self, name: str) -> int:
        """Returns the peak memory of forward and backward above weights and gradients; also warms caches."""
        self._clear()
        module = self.narrow if name == MASTERS else self.module
        return activation_bytes(lambda: self._forward_backward(name), module.parameters())

    def flops(self, name: str) -> int:
        """Returns the FLOPs of the matrix products in forward and backward, counted without values."""
        module = on_meta(self.module)
        if name != PLAIN:
            return trace(module, self.arrays, self.scales).flops
        batch = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in self.batch.items()}
        with FlopCounterMode(display=False) as counter:
            torch.stack(list(plain_losses(module, batch, dropout=self.dropout).values())).sum().backward()
        return counter.get_total_flops()

    def disagreement(self) -> float:
        """Returns the largest relative difference of a loss between plain and fast fp32, without dropout."""
        self.module.eval()
        with torch.no_grad():
            expected = plain_losses(self.module, self.batch, dropout=0.0)
            found = self.module(self.batch)
        self.module.train()
        return max(abs(found[name][0] / expected[name] - 1).item() for name in expected)

    def _clear(self) -> None:
        torch.manual_seed(0)
        for module in (self.module, self.narrow):
            module.zero_grad(set_to_none=True)

    def _forward_backward(self, name: str) -> None:
        losses = self._losses(name)
        torch.stack([losses[task] * scale for task, scale in self.scales.items()]).sum().backward()
        self.clock.begin(None)

    def _losses(self, name: str) -> dict[str, torch.Tensor]:
        if name == PLAIN:
            return plain_losses(self.module, self.batch, dropout=self.dropout, run=self.clock.run)
        module = self.narrow if name == MASTERS else self.module
        with torch.autocast(self.device.type, torch.bfloat16, enabled=name == AUTOCAST):
            return {task: terms[0] for task, terms in module(self.batch).items()}

    def _update(self, name: str) -> None:
        """AdamW as PyTorch does it by default for the plain path, fused for the fast ones; one state serves all."""
        for group in self.optimizer.param_groups:
            group["fused"] = name != PLAIN
        if name != MASTERS:
            self.optimizer.step()
            return
        update_masters(self.optimizer, self.module, self.narrow, self._wide_gradients)
