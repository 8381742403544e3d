"""The rate that utilisation is measured against."""

from types import SimpleNamespace

import pytest
import torch

from xdscale.training import throughput


@pytest.fixture
def _unmeasured():
    """Nothing is known of this machine, neither before nor after."""
    throughput.matmul_flops_per_second.cache_clear()
    yield
    throughput.matmul_flops_per_second.cache_clear()


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize(
    ("rate", "largest"),
    [
        (1e12, 1024),  # a CPU's largest
        (2 * 1024**3 / 0.31, 512),  # the next product would take 0.31 s
        (2 * 1024**3 / 0.29, 1024),
        (2 * 256**3 / 0.2, 256),  # slow from the first
    ],
)
def test_products_grow_as_long_as_the_next_one_is_short(monkeypatch, rate, largest):
    clock, sizes = [0.0], []

    def product_seconds(matrix):
        assert matrix.shape == (len(matrix), len(matrix))
        sizes.append(len(matrix))
        seconds = 2 * len(matrix) ** 3 / rate
        clock[0] += 2 * seconds
        return seconds

    monkeypatch.setattr(throughput, "_product_seconds", product_seconds)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert throughput.matmul_flops_per_second(torch.device("cpu"), torch.float32) == pytest.approx(rate)
    assert max(sizes) == largest
    assert sizes == sorted(sizes)
    growing = sum(2 * 2 * size**3 / rate for size in {*sizes})
    assert growing + 0.3 <= clock[0] < growing + 0.3 + 2 * 2 * largest**3 / rate  # of the largest for so long
    products = len(sizes)
    assert throughput.matmul_flops_per_second(torch.device("cpu"), torch.float32) == pytest.approx(rate)
    assert len(sizes) == products  # once is enough


def test_peak_memory_is_told_in_gib(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {"cuda:1": 3 * 2**29}[str(device)])
    assert throughput.peak_memory_gib(torch.device("cuda", 1)) == 1.5
    usage = {throughput.resource.RUSAGE_SELF: SimpleNamespace(ru_maxrss=3 * 2**19)}
    monkeypatch.setattr(throughput.resource, "getrusage", usage.__getitem__)
    assert throughput.peak_memory_gib(torch.device("cpu")) == 1.5  # Linux counts in KiB
    monkeypatch.setattr(throughput.sys, "platform", "darwin")
    assert throughput.peak_memory_gib(torch.device("cpu")) == 1.5 / 1024


def test_of_two_products_the_shorter_counts(monkeypatch):
    """The first one chooses kernels. The clock is read before and behind each."""
    clock = iter((0.0, 5.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    assert [throughput._product_seconds(torch.ones(2, 2)) for _ in range(2)] == [2.0, 1.0]
