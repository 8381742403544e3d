"""Any split of a global batch over ranks × accumulation × micro-batch gives the same gradient."""

import json
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("split_worker.py")


# Of 12 samples: micro-batch and ZeRO stage, by ranks; accumulation follows. 5 leaves a padded last micro-batch.
SPLITS = {1: [(12, 0), (1, 1)], 2: [(3, 1), (5, 2), (6, 3)], 3: [(2, 2)]}
UNEQUAL = {
    "xdbert": ("mlm", 10),
    "visualbert": ("mlm", 6),
    "vlbert": ("text_mlm", 10),
    "vlbert-pixels": ("text_mlm", 10),
}
"""Systems, and of each the objective whose targets are very unequal, and how unequal."""
LARGE = ("vlbert-pixels",)


@pytest.fixture(scope="module")
def systems(wiki_shards, narrow_model, captioned_pictures, grounded_pictures, photographs, small_trunk):
    """A recipe of each system, and what it is given."""
    many = [f"objectives.{name}.select=0.9" for name in ("mlm", "text_mlm", "masked_region")]
    mixture = ["quickstart-vlbert", "model.max_elements=24", *many]
    pixels = ["model.region_size=2048", f"model.pixels={{weights: {small_trunk}, short_side: 32, long_side: 48}}"]
    features = ["model.region_size=12", "model.region_classes=7"]
    return {
        "xdbert": ["quickstart", *narrow_model, f"data.shards={wiki_shards}"],
        "visualbert": ["quickstart-visualbert", f"data.shards={captioned_pictures}", features[0], many[0]],
        "vlbert": [*mixture, f"data.shards={grounded_pictures}", *features],
        "vlbert-pixels": [*mixture, f"data.shards={photographs}", "model.region_classes=5", *pixels],
    }


@pytest.fixture(scope="module")
def folder(systems, tmp_path_factory, launch_ranks):
    """Returns a function: system -> folder of the gradients of the same global batch, however it is split.

    There is one launch for each number of ranks, of all systems but the large ones, which are launched alone.
    """
    folder, done = tmp_path_factory.mktemp("gradients"), set()

    def of(system):
        mine = [system] if system in LARGE else [name for name in systems if name not in LARGE]
        for ranks, splits in SPLITS.items() if system not in done else ():
            given = {name: systems[name] for name in mine}
            arguments = "--systems", json.dumps(given), "--out", folder, "--splits", json.dumps(splits)
            launch = launch_ranks(WORKER, *arguments, ranks=ranks)
            assert launch.code == 0, launch.stderr[-3000:]
        done.update(mine)
        return folder

    return of


def gradient(folder, system, ranks, micro_batch, stage):
    return dict(np.load(folder / f"{system}-{ranks}-{micro_batch}-{stage}.npz"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "stage"), [(ranks, *split) for ranks, splits in SPLITS.items() for split in splits][1:]
)
@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=[pytest.mark.proof] * (name in LARGE)) for name in UNEQUAL]
)
def test_gradient_of_a_global_batch(folder, system, ranks, micro_batch, stage):
    """Relative difference <= 1e-6 in fp32, with micro-batches of very unequal target counts.

    Of a mixture each micro-batch of one sample has a caption or a text, so that it lacks an objective's targets.
    """
    found = folder(system)
    whole, split = gradient(found, system, 1, 12, 0), gradient(found, system, ranks, micro_batch, stage)
    if micro_batch == 1:
        objective, times = UNEQUAL[system]
        counts = [count[objective] for count in json.loads((found / f"{system}-1-1-1.json").read_text())]
        assert max(counts) > times * (min(counts) + 1)
    # A parameter without gradient in one run has none, or zeros, in the other.
    names = whole.keys() | split.keys()
    assert len(whole) > 40
    difference = norm = 0.0
    for name in names:
        left, right = (part.get(name, np.zeros(1)).astype(np.float64) for part in (whole, split))
        difference += np.square(left - right).sum()
        norm += np.square(left).sum()
    assert np.sqrt(difference / norm) <= 1e-6
