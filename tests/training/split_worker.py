"""One optimiser step of the real trainer on a crafted global batch, split in several ways; rank 0 saves the gradients.

Run by test_gradient_split with different numbers of ranks.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from xdscale.recipe import load_recipe
from xdscale.training.environment import calm_environment

PACKED = {
    "visualbert": {"mlm": ("masked_lm_rows", "masked_lm_labels")},
    "vlbert": {name: (f"{name}_rows", f"{name}_labels") for name in ("mlm", "text_mlm", "masked_region")},
}
"""Of each objective the places of its targets in the row of packed tokens, and the targets."""


def keep_few_targets(batch, slots, system):
    """Leaves nearly all targets of every fifth sample and nearly none of the others: very unequal micro-batches."""
    arrays, targets = dict(batch.arrays), dict(batch.targets)
    if system == "xdbert":
        widths = {"mlm": arrays["language_ids"].shape[1], "clip_tokens": arrays["clip_ids"][0].size}
        names = {"mlm": ("masked_lm_positions", "masked_lm_labels"), "clip_tokens": ("clip_positions", "clip_labels")}
    else:
        widths, names = {}, PACKED[system]
    for task, (positions, labels) in names.items():
        if widths:
            row, inside = np.divmod(arrays[positions], widths[task])
        else:
            row = np.searchsorted(arrays["cu_seqlens"], arrays[positions], side="right") - 1
            inside = arrays[positions] - arrays["cu_seqlens"][row]
        sample = slots.sample_ids[row]
        keep = (sample % 5 == 0) | ((sample % 5 == 1) & (inside < 9))
        arrays[positions], arrays[labels] = arrays[positions][keep], arrays[labels][keep]
        targets[task] = int(keep.sum())
    return type(batch)(arrays, targets, batch.tokens)


def main():
    parser = argparse.ArgumentParser()
    for name in ("--systems", "--out", "--splits", "--local_rank"):
        parser.add_argument(name)
    options = parser.parse_args()
    calm_environment()
    from xdscale.training.distributed import start_distributed

    ranks = start_distributed()
    for name, arguments in json.loads(options.systems).items():
        for micro_batch, stage in json.loads(options.splits):
            out = Path(options.out) / f"{name}-{ranks.world_size}-{micro_batch}-{stage}"
            measure(arguments, out, micro_batch, stage, ranks)


def measure(arguments, out, micro_batch, stage, ranks):
    import torch
    from deepspeed.utils import safe_get_full_grad

    from xdscale.ds_config import resolve_ds_config
    from xdscale.systems.contract import Place, open_system
    from xdscale.training.engine import build_engine
    from xdscale.training.loop import Trainer
    from xdscale.training.prefetch import StepData
    from xdscale.training.signals import StopRequest
    from xdscale.training.skipping import Skipped
    from xdscale.training.watchdog import Watchdog

    fixed = ["training.global_batch=12", "model.dropout=0", "optim.gradient_clipping=1e9", "training.steps=9"]
    recipe = load_recipe(arguments[0], [*fixed, *arguments[1:]])
    values = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
    }
    config = resolve_ds_config("test", values, recipe, ranks.world_size)
    system = open_system(recipe)
    torch.manual_seed(0)
    module = system.build()
    engine = build_engine(module, recipe.optim, config, load_universal=False)
    data = system.open(Place(ranks, config["train_micro_batch_size_per_gpu"], lambda: None))
    batches = [keep_few_targets(data.collate(slots), slots, recipe.system) for slots in data.order.slots(0)]

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
        objectives=system.objectives(),
        source=Source(),
        order=data.order,
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
