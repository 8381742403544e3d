"""Any split of a global batch over ranks × accumulation × micro-batch gives the same gradient."""

import json
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("split_worker.py")


# Of 12 samples: micro-batch and ZeRO stage, by ranks; accumulation follows. 5 leaves a padded last micro-batch.
SPLITS = {1: [(12, 0), (1, 1)], 2: [(3, 1), (5, 2), (6, 3)], 3: [(2, 2)]}


@pytest.fixture(scope="module")
def folder(wiki_shards, tmp_path_factory, launch_ranks):
    """The gradient of the same global batch, however it is split; one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("gradients")
    for ranks, splits in SPLITS.items():
        arguments = "--shards", wiki_shards, "--out", folder / f"{ranks}", "--splits", json.dumps(splits)
        done = launch_ranks(WORKER, *arguments, ranks=ranks)
        assert done.code == 0, done.stderr[-3000:]
    return folder


def gradient(folder, ranks, micro_batch, stage):
    return dict(np.load(folder / f"{ranks}-{micro_batch}-{stage}.npz"))


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "stage"), [(ranks, *split) for ranks, splits in SPLITS.items() for split in splits][1:]
)
def test_gradient_of_a_global_batch(folder, ranks, micro_batch, stage):
    """Relative difference <= 1e-6 in fp32, with micro-batches of very unequal target counts."""
    whole, split = gradient(folder, 1, 12, 0), gradient(folder, ranks, micro_batch, stage)
    if micro_batch == 1:
        mlm = [count["mlm"] for count in json.loads((folder / "1-1-1.json").read_text())]
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
