"""The small model as a recipe, and micro-batches: real ones of adaptation, small ones of finetuning."""

import numpy as np
import pytest
import torch

from xdscale.data.collate import XDBERTCollator
from xdscale.data.order import Order, validation_slots
from xdscale.data.task_batches import TaskCollator, encode_examples
from xdscale.data.task_files import Example
from xdscale.recipes.xdbert.schema import XDBERTObjectives, XDBERTRecipe
from xdscale.shards.clip_bpe import ClipBPE, describe_clip_tokenizer
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.shards.table import Table
from xdscale.systems.contract import Slots
from xdscale.tasks.contract import find_task
from xdscale.training.engine import to_device

TEXTS = ("Albedo is a measure of reflection.", "Snow is bright.", "The open ocean reflects less light than snow does.")


@pytest.fixture(scope="session")
def adaptation_spec(cassette_model):
    """Returns a function that makes a recipe; without arguments the real 2-layer BERT with a small CLIP-T."""

    def make(
        language=cassette_model,
        clip="clip-tiny.json",
        *,
        weights="pretrained",
        objectives=None,
        dropout=0.0,
        kernels="fused",
        layers=2,
    ):
        return XDBERTRecipe(
            system="xdbert",
            model={
                "language": {"name": str(language), "weights": weights},
                "clip": {"name": str(clip), "weights": "random"},
                "dropout": dropout,
                "cross_layers": layers,
            },
            objectives=objectives or {},
            data={"shards": "unused"},
            run={"kernels": kernels},
            training={"steps": 1, "global_batch": 4},
            output={"folder": "unused"},
        )

    return make


@pytest.fixture(scope="session")
def arrays(wiki_shards):
    """Four real sequences, as the training loop gets them; the last is padding of the micro-batch."""
    split = Table(wiki_shards, "train")
    order = Order(len(split), seed=1, global_batch=3, world_size=1, rank=0, micro_batch=4)
    return XDBERTCollator(split, seed=1, objectives=XDBERTObjectives())(order.slots(0)[0]).arrays


@pytest.fixture(scope="session")
def batch(arrays):
    """The same as tensors."""
    return to_device(arrays, torch.device("cpu"))


@pytest.fixture(scope="session")
def task_arrays(cassette_model):
    """Returns a function that makes the arrays of a task's examples, some or all of them."""
    tokenizer, ids = load_language_tokenizer(str(cassette_model))
    bpe, clip_ids = ClipBPE(), describe_clip_tokenizer()

    def make(task, labels, order=None):
        spec = find_task(task)
        rows = [
            Example(
                "0",
                tuple((TEXTS[n % 3], TEXTS[(n + k + 1) % 3])[: spec.sentences] for k in range(spec.choices or 1)),
                label,
                1,
            )
            for n, label in enumerate(labels)
        ]
        split = encode_examples(rows, spec.targets, tokenizer, bpe)
        (slots,) = validation_slots(len(rows), len(rows), 1, 0, len(rows))
        if order is not None:
            slots = Slots(slots.epochs[order], slots.sample_ids[order], slots.real[order])
        return TaskCollator(split, ids, clip_ids, max_length=64)(slots).arrays

    return make


@pytest.fixture(scope="session")
def region_table(tmp_path_factory):
    """Four pictures with 3, 5, 2 and 4 regions."""
    folder, rng = tmp_path_factory.mktemp("data") / "regions", np.random.default_rng(0)
    images = []
    for number, count in enumerate((3, 5, 2, 4)):
        corner = rng.uniform(0, 40, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 50, (count, 2))], 1).astype(np.float32)
        features = rng.standard_normal((count, 12)).astype(np.float32)
        images.append(RegionImage(f"picture-{number}", size=(100, 120), boxes=boxes, features=features))
    build_regions(images, folder, Detector(model="drawn", class_count=0))
    return RegionTable.open(folder)
