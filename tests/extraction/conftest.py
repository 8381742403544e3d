"""Small image files, and builds of the table of regions from them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

from xdscale.extraction.extract import ExtractOptions, region_source
from xdscale.shards.build import build_table
from xdscale.shards.regions import RegionTable

SIZES = ((96, 64), (64, 96), (96, 64), (120, 80), (64, 96), (96, 64), (33, 47))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        coarse = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"COCO_val2014_{number + 1:012}.png")
    return folder


@pytest.fixture
def extract(tmp_path):
    def run(names, network, out="table", *, encoding="fp16", class_probs=None, shard_images=3, workers=1, **options):
        names = [str(name) for name in ([names] if not isinstance(names, list) else names)]
        source = region_source(
            names,
            ExtractOptions(network, options.pop("weights", "random"), **options),
            encoding=encoding,
            class_probs=class_probs,
            shard_images=shard_images,
        )
        build_table(source, tmp_path / out, workers=workers)
        return RegionTable.open(tmp_path / out)

    return run


@pytest.fixture(scope="session")
def yolos(tmp_path_factory):
    """Folder of a small detector of transformers, with random weights."""
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(1)
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=12,
        num_labels=5,
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder
