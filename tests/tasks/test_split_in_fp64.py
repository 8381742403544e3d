"""Sums over global target counts make the gradient independent of the micro-batch: exactly, in fp64."""

import torch

from xdscale.data.collate import XDBERTCollator
from xdscale.data.order import Order
from xdscale.recipe import load_recipe
from xdscale.shards.table import Table
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.engine import to_device


def test_split_in_fp64(wiki_shards):
    recipe = load_recipe("quickstart", ["model.dropout=0"])
    split = Table(wiki_shards, "train")
    collate = XDBERTCollator(split, seed=0, objectives=recipe.objectives)
    torch.set_num_threads(1)

    def gradient(micro_batch):
        torch.manual_seed(0)
        module = build_adaptation(recipe).double().train()
        order = Order(len(split), seed=0, global_batch=4, world_size=1, rank=0, micro_batch=micro_batch)
        batches = [collate(slots) for slots in order.slots(0)]
        counts = {name: sum(batch.targets[name] for batch in batches) for name in batches[0].targets}
        for batch in batches:
            terms = module(to_device(batch.arrays, torch.device("cpu")))
            sum(terms[name][0] / counts[name] for name in counts).backward()
        return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}

    # Micro-batches of three and one (and two of padding) have very different numbers of targets.
    whole, parts = gradient(4), gradient(3)
    assert len(whole) > 100
    difference = sum((whole[name] - parts[name]).square().sum() for name in whole)
    assert difference.sqrt() <= 1e-12 * sum(value.square().sum() for value in whole.values()).sqrt()
