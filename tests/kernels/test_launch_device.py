"""Every launcher makes its tensors' GPU the current one: Triton would launch on another one's stream."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import triton

from xdscale.kernels import (
    activated_linear_triton,
    attention_launch,
    gpu,
    linear_triton,
    masked_token_loss_triton,
    quick_gelu_triton,
    residual_norm_triton,
)
from xdscale.kernels.packing import Packing

KERNELS = {
    activated_linear_triton: ["backward_kernel"],
    attention_launch: [],
    linear_triton: ["column_sums_kernel"],
    masked_token_loss_triton: ["row_statistics_kernel", "combine_kernel", "logit_gradients_kernel"],
    quick_gelu_triton: ["forward_kernel", "backward_kernel"],
    residual_norm_triton: ["forward_kernel", "backward_kernel", "sums_kernel"],
}


class _Kernel:
    """Stands for a kernel; notes where it was launched."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(grid)


def attention_both_ways():
    tokens = torch.zeros(3, 1, 16)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    packing = Packing(offsets, offsets, 3, 3, 0, None)
    out, *saved = attention_launch.forward(tokens, tokens, tokens, packing)
    attention_launch.backward(out, tokens, tokens, tokens, packing, *saved)
    return 3


def loss_both_ways():
    arguments = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(2, dtype=torch.int64)
    found = masked_token_loss_triton.row_statistics(*arguments, torch.float32)
    rest = found.maximum, found.total, torch.ones(()), torch.zeros(5), torch.float32
    list(masked_token_loss_triton.logit_gradients(*arguments, *rest))
    return 3


def gelu_both_ways():
    states = torch.zeros(4)
    quick_gelu_triton.backward(quick_gelu_triton.forward(states), states)
    return 2


def feed_forward_backward():
    rows = torch.zeros(4, 16)
    activated_linear_triton.backward(rows, rows, quick=False)
    linear_triton.column_sums(rows, torch.bfloat16)
    return 3


def norm_both_ways():
    states, weight = torch.zeros(2, 16), torch.ones(16)
    out, total, mean, scale = residual_norm_triton.forward(states, states, weight, weight, None, 1e-5, 0)
    residual_norm_triton.backward(out, weight, weight, None, 0, torch.float32, total, mean, scale)
    return 3


@pytest.mark.parametrize(
    "both_ways", [attention_both_ways, loss_both_ways, gelu_both_ways, norm_both_ways, feed_forward_backward]
)
def test_every_kernel_goes_through_one_launch(both_ways, monkeypatch):
    launches, kernels = [], []

    def launch(kernel, grid, *arguments, **options):
        assert isinstance(arguments[0], torch.Tensor)
        kernels.append(kernel)
        gpu.launch(kernel, grid, *arguments, **options)

    kernel = _Kernel(launches)
    monkeypatch.setattr(attention_launch, "KERNELS", dict.fromkeys(attention_launch.KERNELS, kernel))
    for module, names in KERNELS.items():
        monkeypatch.setattr(module, "launch", launch)
        for name in names:
            monkeypatch.setattr(module, name, kernel)
    assert both_ways() == len(launches) == len(kernels)


@pytest.mark.parametrize(
    ("device", "grid", "expected"),
    [
        (torch.device("cuda", 1), (2, 3), [(2, 3)]),
        (torch.device("cpu"), (4,), [(4,)]),
        (torch.device("cuda", 1), (2, 0, 3), []),
        (torch.device("meta"), (2, 3), []),
    ],
)
def test_kernels_start_on_their_tensors_gpu(monkeypatch, device, grid, expected):
    """Not where there is nothing to do, and never on the meta device."""
    current, launches = [], []

    @contextlib.contextmanager
    def make_current(chosen):
        current.append(chosen)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append((grid, list(current), arguments, options))

    monkeypatch.setattr(torch.cuda, "device", make_current)
    tensor = SimpleNamespace(device=device)
    gpu.launch(Kernel(), list(grid), tensor, 5, num_warps=8)
    on = [device] if device.type == "cuda" else []
    assert launches == [(grid, on, (tensor, 5), {"num_warps": 8}) for grid in expected]


def test_the_host_rounds_as_triton_does():
    for number in range(1, 3000):
        assert gpu.next_power_of_2(number) == triton.next_power_of_2(number)
        assert [gpu.cdiv(number, divisor) for divisor in (1, 16, 77)] == [triton.cdiv(number, d) for d in (1, 16, 77)]
    assert gpu.cdiv(0, 8) == 0
