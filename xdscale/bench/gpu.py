"""What scripts/gpu.sh finds out on a GPU, part by part: `python -m xdscale.bench.gpu PART OUT …`.

Every finding is one JSON object in OUT/PART.jsonl and one line on stdout, at once, so that a stop costs only what was
not begun. Without a GPU the same parts run on the CPU, to see that they do.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from xdscale.bench.gpu_step import Tell, TrainedStep, definitions, recipe_and_micros, repeats, step, step_rivals
from xdscale.bench.kernels import bench_kernels, reason
from xdscale.bench.tiles import tiles
from xdscale.devices import rank_device
from xdscale.kernels import (
    DEFINITIONS,
    activated_linear,
    causal_attention,
    linear,
    masked_token_loss,
    packed_attention,
    pre_norm,
    quick_gelu,
    residual_norm,
)
from xdscale.kernels.linear import FEWEST_ELEMENTS
from xdscale.plan.hardware import gpu_of_device
from xdscale.systems.xdbert import build_adaptation

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "open_clip_torch", "numpy", "liger_kernel")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""What tests allow a kernel to differ from fp64, relative to the norm."""


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
                plain = _with_gradients(functools.partial(call, DEFINITIONS[operation]), leaves)
                errors, theirs = _errors(found, expected), _errors(plain, expected)
                # Sums of thousands that nearly cancel are as far off in PyTorch's own operations. A NaN passes nothing.
                passes = all(ours <= max(TOLERANCE[dtype], 1.5 * other) for ours, other in zip(errors, theirs))
                tell(
                    kernel=name,
                    dtype=_short(dtype),
                    output=errors[0],
                    gradients=errors[1:],
                    plain=theirs,
                    passes=passes,
                )
            except Exception as error:  # one kernel that does not run leaves the others to be seen
                tell(kernel=name, dtype=_short(dtype), problem=reason(error))


def _errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected)]


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
    yield "pre_norm", pre_norm, lambda f, *inputs: torch.cat(f(*inputs, eps=1e-5)), rows
    yield "quick_gelu", quick_gelu, lambda f, states: f(states), [(tokens, size)]
    yield "causal_attention", causal_attention, lambda f, states: f(states), [(1 + tokens // 77, 77, 3, heads, 64)]
    many = FEWEST_ELEMENTS // size + 3 if big else tokens  # else the sums are PyTorch's
    yield "linear", linear, lambda f, *inputs: f(*inputs), [(many, size), (size, size), (size,)]
    product = [(tokens, size), (size, size), (size,)]
    yield "activated_linear", activated_linear, lambda f, *inputs: f(*inputs, F.gelu), product
    yield "activated_linear, quick GELU", activated_linear, lambda f, *inputs: f(*inputs, quick_gelu), product


def rivals(_tell: Tell, out: Path, _rest: list[str]) -> None:
    """Every kernel against what else computes the same."""
    bench_kernels(out / "rivals.jsonl", rounds=20 if rank_device(0).type == "cuda" else 1)


def compare(tell: Tell, _out: Path, rest: list[str]) -> None:
    """The same step in fp32 on the device and on the CPU, without dropout: losses and gradients."""
    recipe, (micro, *_) = recipe_and_micros([*rest, "model.dropout=0.0"])
    torch.manual_seed(0)
    module = build_adaptation(recipe).train()
    found = []
    for device in (torch.device("cpu"), rank_device(0)):
        trained = TrainedStep(module.to(device), recipe, micro, device)
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
    measured = [
        json.loads(line) for path in out.glob("step.jsonl") for line in path.read_text(encoding="utf-8").splitlines()
    ]
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


_PARTS = (versions, kernels, tiles, rivals, step, step_rivals, compare, definitions, repeats, planned)
PARTS = {part.__name__: part for part in _PARTS}


def _with_gradients(call: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out = call(*leaves)
    # The same numbers in every dtype.
    direction = torch.linspace(-1, 1, out.numel(), device=out.device).bfloat16().to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction if out.ndim else torch.ones_like(out))]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
