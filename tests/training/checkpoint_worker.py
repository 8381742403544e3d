"""Three steps (or none) on small modules under several ZeRO stages and precisions, saved; or loaded, one step more.

Run by test_checkpoint_worlds. All ranks see the same batch, so the result does not depend
on how many there are. The first rank writes what each engine holds, gathered whole, to `OUT`.
"""

import argparse
import contextlib
import json
from pathlib import Path

from xdscale.training.environment import calm_environment

CASES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
RESHARDED = [(1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]


def main():
    parser = argparse.ArgumentParser()
    for name in ("--folder", "--out", "--local_rank"):
        parser.add_argument(name)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="before the checkpoint")
    parser.add_argument("--cases", nargs="*", help="default: all, or those that are converted")
    parser.add_argument("--optim", type=json.loads, default={}, help="values of the recipe's section")
    options = parser.parse_args()
    calm_environment()
    import torch

    from xdscale.recipe import Optim
    from xdscale.training import checkpoint as ckpt
    from xdscale.training import checkpoint_folder
    from xdscale.training.distributed import start_distributed
    from xdscale.training.resharding import needs_resharding, reshard
    from xdscale.training.weight_average import WeightAverage

    ranks = start_distributed()
    results, tensors = {}, {}
    optim = Optim(**options.optim)
    for stage, precision in RESHARDED if options.load else CASES:
        if options.cases and f"{stage}-{precision}" not in options.cases:
            continue
        folder = Path(options.folder) / f"{stage}-{precision}"
        source = found = ckpt.find_checkpoint(folder, ranks)
        convert = bool(found) and needs_resharding(ckpt.read_position(found), ranks.world_size)
        if convert:
            source = reshard(found, ranks)
        engine = make_engine(stage, precision, optim, seed=1 if options.load else 0, load_universal=convert)
        if source is not None:
            ckpt.load_checkpoint(engine, source, found, ranks)
            checkpoint_folder.remove_leftovers(folder, ranks)
        average = WeightAverage(engine, optim.ema_decay, ranks) if optim.ema_decay else None
        if average and found:
            average.load(found)
        for step in range(options.steps if options.load else 0, options.steps + 1):
            if step == options.steps and not options.load:
                position = ckpt.CheckpointPosition(
                    step=step,
                    epoch=0,
                    index=0,
                    world_size=ranks.world_size,
                    zero_stage=stage,
                    precision=precision,
                    data_fingerprints={"text": "f"},
                    draws_hash="h",
                    quarantined=[],
                )
                ckpt.save_checkpoint(engine, folder, position, checkpoint_folder.Retention(newest=1), ranks, average)
                tensors[f"{stage}-{precision} saved"] = whole(engine)
            make_step(engine, step, precision, optim)
            if average:
                average.update()
        tensors[f"{stage}-{precision} after"] = after = whole(engine)
        if average:
            own = held_out(engine, precision)
            with average.in_use():
                assert not torch.equal(held_out(engine, precision), own)
                tensors[f"{stage}-{precision} average"] = whole(engine)
            assert torch.equal(held_out(engine, precision), own)
            assert all(torch.equal(after[name], value) for name, value in whole(engine).items())
        results[f"{stage}-{precision}"] = {
            "converted": convert and source.name,
            "left": sorted(p.name for p in folder.iterdir() if p.suffix != ".py"),
        }
    if ranks.is_first:
        torch.save(tensors, options.out + ".pt")
        Path(options.out).write_text(json.dumps(results))
    ranks.barrier()


def make_engine(stage, precision, optim, seed, load_universal):
    import torch

    from xdscale.training.engine import build_engine

    torch.manual_seed(seed)
    # Odd sizes, so that every partition is padded.
    module = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 13), torch.nn.Linear(13, 3))
    # What no optimizer holds: of another seed, as from files that were exchanged.
    module[1].frozen = torch.nn.Parameter(torch.randn(27), requires_grad=False)
    module[1].few = torch.nn.Parameter(torch.randn(5), requires_grad=False)
    module[2].register_buffer("statistics", torch.randn(3))
    zero = {"stage": stage, "reduce_bucket_size": 1000}
    if stage == 3:
        # Several flat partitions, and parameters that stay gathered beside those that do not.
        zero |= {"sub_group_size": 50, "stage3_param_persistence_threshold": 12}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 2**31}
    if precision == "bf16":
        config |= {"bf16": {"enabled": True}}
        config |= {"data_types": {"grad_accum_dtype": "fp32"}} if stage else {}
    with contextlib.redirect_stdout(None):
        parts = {"first": module[0], "others": module[1:]}
        return build_engine(module, optim, config, load_universal=load_universal, parts=parts)


def make_step(engine, step, precision, optim):
    import torch

    from xdscale.training.optimizer import set_learning_rate

    set_learning_rate(engine, 1e-2 * (step + 1), optim, step)
    torch.manual_seed(step)
    inputs = torch.randn(4, 7).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    engine.backward(engine(inputs).float().square().sum())
    engine.step()


def held_out(engine, precision):
    """Returns what the module computes when it is validated."""
    import torch

    engine.eval()
    with torch.no_grad():
        outputs = engine(torch.ones(1, 7).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]))
    engine.train()
    return outputs


def whole(engine):
    """Returns all parameters, whole, and the buffers."""
    import deepspeed

    found = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        gather = deepspeed.zero.GatheredParameters if hasattr(parameter, "ds_id") else contextlib.nullcontext
        with gather(parameter):
            found[name] = parameter.detach().clone()
    return found


if __name__ == "__main__":
    main()
