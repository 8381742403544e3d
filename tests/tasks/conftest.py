"""The small model as a recipe, and a real micro-batch."""

import pytest
import torch

from xdscale import recipe
from xdscale.data.collate import XDBERTCollator
from xdscale.data.stream import Stream
from xdscale.shards.reader import ShardedSplit


@pytest.fixture(scope="session")
def adaptation_spec(cassette_model):
    """Returns a function that makes a recipe; without arguments the real 2-layer BERT with a small CLIP-T."""

    def make(
        language=cassette_model,
        clip="clip-tiny.json",
        *,
        weights="pretrained",
        tasks=None,
        dropout=0.0,
        kernels="fused",
        layers=2,
    ):
        return recipe.Recipe(
            model={
                "language": {"name": str(language), "weights": weights},
                "clip": {"name": str(clip), "weights": "random"},
                "dropout": dropout,
                "kernels": kernels,
                "cross_layers": layers,
            },
            tasks=tasks or {},
            data={"shards": "unused"},
            training={"steps": 1, "global_batch": 4},
            output={"folder": "unused"},
        )

    return make


@pytest.fixture(scope="session")
def arrays(wiki_shards):
    """Four real sequences, as the training loop gets them; the last is padding of the micro-batch."""
    split = ShardedSplit(wiki_shards, "train")
    stream = Stream(len(split), seed=1, global_batch=3, world_size=1, rank=0, micro_batch=4)
    return XDBERTCollator(split, seed=1, tasks=recipe.Tasks())(stream.slots(0)[0]).arrays


@pytest.fixture(scope="session")
def batch(arrays):
    """The same as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
