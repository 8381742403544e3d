"""Any split of a global batch over ranks × accumulation × micro-batch gives the same gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("split_worker.py")


def gradient(shards, out, *, ranks, micro_batch, stage, port):
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "-q", "--num_accelerators", str(ranks), "--master_port", str(port), WORKER]
    command += ["--shards", shards, "--out", out, "--micro-batch", str(micro_batch), "--stage", str(stage)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(np.load(f"{out}.npz")), json.loads(Path(f"{out}.json").read_text())


@pytest.fixture(scope="module")
def whole(wiki_shards, tmp_path_factory, free_port):
    """One rank, one micro-batch."""
    out = tmp_path_factory.mktemp("whole") / "gradient"
    return gradient(wiki_shards, out, ranks=1, micro_batch=12, stage=0, port=free_port())[0]


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "stage"),
    [(1, 1, 0), (2, 3, 1), (3, 2, 2), (2, 5, 2), (2, 6, 3)],
    ids=["1x12x1", "2x2x3", "3x2x2", "2x2x5 padded", "2x1x6"],
)
def test_gradient_of_a_global_batch(whole, wiki_shards, tmp_path, free_port, ranks, micro_batch, stage):
    """Relative difference <= 1e-6 in fp32, with micro-batches of very unequal target counts."""
    out = tmp_path / "gradient"
    split, counts = gradient(wiki_shards, out, ranks=ranks, micro_batch=micro_batch, stage=stage, port=free_port())
    if micro_batch == 1:
        mlm = [count["mlm"] for count in counts]
        assert max(mlm) > 10 * (min(mlm) + 1)
    # A parameter without gradient in one run has none, or zeros, in the other.
    names = whole.keys() | split.keys()
    assert len(whole) > 100
    difference = norm = 0.0
    for name in names:
        left, right = (part.get(name, np.zeros(1)).astype(np.float64) for part in (whole, split))
        difference += np.square(left - right).sum()
        norm += np.square(left).sum()
    assert np.sqrt(difference / norm) <= 1e-6
