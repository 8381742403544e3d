"""One optimiser step of the real trainer on a crafted global batch, split in several ways; rank 0 saves the gradients.

Run by test_gradient_split with different numbers of ranks.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from xdscale.recipe import load_recipe
from xdscale.training.environment import calm_environment


def keep_few_targets(batch, slots):
    """Leaves nearly all targets of every fifth sample and nearly none of the others: very unequal micro-batches."""
    arrays, targets = dict(batch.arrays), dict(batch.targets)
    widths = {"mlm": arrays["language_ids"].shape[1], "clip_tokens": arrays["clip_ids"][0].size}
    names = {"mlm": ("masked_lm_positions", "masked_lm_labels"), "clip_tokens": ("clip_positions", "clip_labels")}
    for task, (positions, labels) in names.items():
        sample = slots.sample_ids[arrays[positions] // widths[task]]
        inside = arrays[positions] % widths[task]
        keep = (sample % 5 == 0) | ((sample % 5 == 1) & (inside < 9))
        arrays[positions], arrays[labels] = arrays[positions][keep], arrays[labels][keep]
        targets[task] = int(keep.sum())
    return type(batch)(arrays, targets, batch.tokens)


def main():
    parser = argparse.ArgumentParser()
    for name in ("--shards", "--out", "--splits", "--local_rank"):
        parser.add_argument(name)
    options = parser.parse_args()
    calm_environment()
    from xdscale.training.distributed import start_distributed

    ranks = start_distributed()
    for micro_batch, stage in json.loads(options.splits):
        measure(Path(options.shards), Path(f"{options.out}-{micro_batch}-{stage}"), micro_batch, stage, ranks)


def measure(shards, out, micro_batch, stage, ranks):
    import torch
    from deepspeed.utils import safe_get_full_grad

    from xdscale.data.collate import XDBERTCollator
    from xdscale.data.order import Order
    from xdscale.ds_config import resolve_ds_config
    from xdscale.shards.table import Table
    from xdscale.systems.contract import open_system
    from xdscale.systems.xdbert import build_adaptation
    from xdscale.training.engine import build_engine
    from xdscale.training.loop import Trainer
    from xdscale.training.prefetch import StepData
    from xdscale.training.signals import StopRequest
    from xdscale.training.skipping import Skipped
    from xdscale.training.watchdog import Watchdog

    recipe = load_recipe(
        "quickstart", ["training.global_batch=12", "model.dropout=0", "optim.gradient_clipping=1e9", "training.steps=9"]
    )
    values = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
    }
    config = resolve_ds_config("test", values, recipe, ranks.world_size)
    torch.manual_seed(0)
    module = build_adaptation(recipe)
    engine = build_engine(module, recipe.optim, config, load_universal=False)
    split = Table(shards, "train")
    order = Order(
        len(split),
        seed=0,
        global_batch=12,
        world_size=ranks.world_size,
        rank=ranks.rank,
        micro_batch=micro_batch,
    )
    collate = XDBERTCollator(split, seed=0, objectives=recipe.objectives)
    batches = [keep_few_targets(collate(slots), slots) for slots in order.slots(0)]

    class Source:
        wait_seconds = 0.0

        def __next__(self):
            return 0, StepData(batches, "")

    saved = {}
    make_step = engine.step

    def step():
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradient = safe_get_full_grad(parameter)
                    saved[name] = None if gradient is None else gradient.numpy().copy()
        make_step()

    engine.step = step
    trainer = Trainer(
        engine=engine,
        recipe=recipe,
        ranks=ranks,
        objectives=open_system(recipe).objectives(),
        source=Source(),
        order=order,
        validation=[],
        position=lambda step: None,
        flops=lambda arrays: 0.0,
        matmul_flops_per_second=1.0,
        run=out,
        checkpoints=out,
        monitor=None,
        stop=StopRequest(),
        skipped=Skipped(),
        watchdog=Watchdog(ranks, out, 45),
    )
    trainer._step(0)
    if ranks.is_first:
        np.savez(f"{out}.npz", **{name: value for name, value in saved.items() if value is not None})
        counts = [batch.targets for batch in batches]
        Path(f"{out}.json").write_text(json.dumps(counts))
    ranks.barrier()


if __name__ == "__main__":
    main()
