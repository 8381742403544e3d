"""The rate that utilisation is measured against."""

import pytest
import torch

from xdscale.training import throughput


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
