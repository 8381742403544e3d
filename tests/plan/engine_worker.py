"""Builds the real engine for several DeepSpeed configurations and writes what each one holds and sends.

Run by the tests of this folder and by scripts/electra_large.sh under the deepspeed launcher. Each case makes two
optimiser steps of the real trainer on crafted batches. Model states are counted as the unique storages of all live
tensors that are not part of the batch, by what they belong to; collectives as the calls that reach torch.distributed.
"""

import argparse
import gc
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np

from xdscale.recipe import load_recipe
from xdscale.training.environment import calm_environment

COLLECTIVES = {
    "all_reduce": lambda tensor, *_: tensor,
    "reduce": lambda tensor, *_: tensor,
    "broadcast": lambda tensor, *_: tensor,
    "all_gather": lambda outputs, tensor, *_: tensor,
    "all_gather_into_tensor": lambda output, tensor, *_: tensor,
    "reduce_scatter": lambda output, inputs, *_: inputs[0],
    "reduce_scatter_tensor": lambda output, tensor, *_: tensor,
    "all_to_all_single": lambda output, tensor, *_: tensor,
}


class CollectiveCounter:
    """Counts calls and payload bytes of torch.distributed's collectives, as each rank hands them over."""

    def __init__(self):
        self.calls = Counter()
        self.bytes = Counter()

    def install(self):
        import torch.distributed as dist

        for name, payload in COLLECTIVES.items():
            setattr(dist, name, self._wrap(name, getattr(dist, name), payload))

    def _wrap(self, name, function, payload):
        def counted(*arguments, **keywords):
            tensor = payload(*arguments, *keywords.values())
            key = f"{name} {str(tensor.dtype).removeprefix('torch.')}"
            self.calls[key] += 1
            self.bytes[key] += tensor.numel() * tensor.element_size()
            return function(*arguments, **keywords)

        return counted

    def take(self):
        taken = {key: [self.calls[key], self.bytes[key]] for key in sorted(self.calls)}
        self.calls.clear()
        self.bytes.clear()
        return taken


def crafted_batches(recipe, module, length, blocks, micro_batch, count, seed):
    """Batches of random tokens; every seventh position, about, is a target."""
    from xdscale.padding import clip_layout
    from xdscale.systems.contract import MicroBatch

    rng = np.random.default_rng(seed)
    vocabulary, clip_vocabulary = module.model.language.config.vocab_size, module.model.clip.tower.vocab_size
    batches = []
    for _ in range(count):
        arrays = {
            "language_ids": rng.integers(1, vocabulary, (micro_batch, length)),
            "clip_ids": rng.integers(1, clip_vocabulary, (micro_batch, blocks, 77)),
            "clip_lengths": np.full((micro_batch, blocks), 77),
            **clip_layout(np.full((micro_batch, blocks), 77), 77),
        }
        masked = np.sort(rng.permutation(micro_batch * length)[: micro_batch * length // 7])
        masked = masked[masked % length > 0]
        arrays["masked_lm_positions"] = masked
        arrays["masked_lm_labels"] = rng.integers(1, vocabulary, len(masked))
        targets = np.sort(rng.permutation(micro_batch * blocks * 77)[: micro_batch * blocks * 77 // 7])
        arrays["clip_positions"], arrays["clip_labels"] = targets, rng.integers(1, clip_vocabulary, len(targets))
        arrays["match_labels"] = rng.integers(0, 2, micro_batch)
        targets = {"mlm": len(masked), "match": micro_batch, "clip_tokens": len(targets)}
        batches.append(
            MicroBatch(arrays, {name: targets[name] for name in recipe.objectives.weights()}, micro_batch * length)
        )
    return batches


def storages(tensors):
    """Unique storages of tensors: {address: bytes}."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def live_tensors():
    """All tensors that Python knows, with their gradients."""
    import torch

    gc.collect()
    with torch.no_grad():
        live = [item for item in gc.get_objects() if torch.is_tensor(item) and item.device.type == "cpu"]
        live += [tensor.grad for tensor in live if tensor.is_leaf and tensor.grad is not None]
        return live + [tensor.grad_accum for tensor in live if getattr(tensor, "grad_accum", None) is not None]


def census(engine, excluded):
    """Bytes of all live tensors but the excluded storages, by owner: parameters, masters, moments, gradients, rest."""
    import torch

    with torch.no_grad():
        parameters = list(engine.module.parameters())
        shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        moments = [value for state in base.state.values() for value in state.values() if torch.is_tensor(value)]
        masters = [p for group in base.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        live = live_tensors()
    buffers = [getattr(engine.optimizer, "temp_grad_buffer_for_gpu_offload", None)]
    for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values():
        buffers += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
    owners = [
        ("buckets", storages(buffer for buffer in buffers if buffer is not None)),
        ("parameters", storages(p.data for p in parameters) | storages(shards)),
        ("masters", storages(masters)),
        ("moments", storages(moments)),
        ("gradients", storages(gradients)),
    ]
    result, seen = {}, set(excluded)
    for name, found in owners:
        result[name] = sum(size for address, size in found.items() if address not in seen)
        seen |= found.keys()
    rest = {address: size for address, size in storages(live).items() if address not in seen}
    return result | {"rest": sum(rest.values())}


def build_case(case, ranks):
    """Returns recipe, configuration, module and engine of a case."""
    import torch

    from xdscale.ds_config import activation_checkpointing, resolve_ds_config
    from xdscale.systems.contract import open_system, recompute_activations
    from xdscale.training.engine import build_engine
    from xdscale.training.stored import build_module

    recipe = load_recipe(case["recipe"], case["overrides"])
    config = resolve_ds_config(case["name"], case["ds_config"], recipe, ranks.world_size)
    torch.manual_seed(0)
    module = build_module(open_system(recipe), continued=False)
    if activation_checkpointing(config):
        recompute_activations(module)
    for name in case.get("frozen", ()):
        module.get_submodule(name).requires_grad_(False)
    return recipe, config, module, build_engine(module, recipe.optim, config, load_universal=False)


def build_trainer(recipe, engine, ranks, batches):
    """Returns the real trainer on the same batches at every step."""
    from xdscale.systems.contract import open_system
    from xdscale.training.loop import Trainer
    from xdscale.training.prefetch import StepData
    from xdscale.training.signals import StopRequest
    from xdscale.training.skipping import Skipped
    from xdscale.training.watchdog import Watchdog
    from xdscale.training.weight_average import WeightAverage

    class Source:
        wait_seconds = 0.0

        def __next__(self):
            return 0, StepData(batches, "")

    engine.train()
    decay = recipe.optim.ema_decay
    return Trainer(
        engine=engine,
        average=WeightAverage(engine, decay, ranks) if decay else None,
        recipe=recipe,
        ranks=ranks,
        objectives=open_system(recipe).objectives(),
        source=Source(),
        order=None,  # only asked about steps that are skipped
        validation=[],
        position=lambda step: None,
        flops=lambda arrays: 0.0,
        matmul_flops_per_second=1.0,
        run=Path("unused"),
        checkpoints=Path("unused"),
        monitor=None,
        stop=StopRequest(),
        skipped=Skipped(),
        watchdog=Watchdog(ranks, Path("unused"), recipe.run.hang_seconds),
    )


def run_case(case, ranks, counter):
    import torch

    from xdscale.systems.contract import open_system
    from xdscale.training.throughput import peak_memory_gib

    before = storages(live_tensors()).keys()
    result = {"name": case["name"], "imports_gib": peak_memory_gib(torch.device("cpu"))}
    began = time.perf_counter()
    recipe, config, module, engine = build_case(case, ranks)
    counter.take()
    micro_batch, count = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    if recipe.system == "xdbert":
        batches = crafted_batches(recipe, module, case["length"], case["blocks"], micro_batch, count, ranks.rank)
    else:
        batches = [open_system(recipe).example(module, micro_batch) for _ in range(count)]
    make_step = engine.step

    def step():
        moment = "boundary" if engine.is_gradient_accumulation_boundary() else "accumulating"
        if steps_done == 1 and moment not in result:
            result[moment] = census(engine, before)
        make_step()

    engine.step = step
    trainer = build_trainer(recipe, engine, ranks, batches)
    for steps_done in range(case.get("steps", 2)):
        trainer._step(steps_done)
        result["collectives"] = counter.take()
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    result |= {"parameters": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}
    result |= {"stage": engine.zero_optimization_stage(), "dtype": str(next(module.parameters()).dtype)}
    result |= {"seconds": time.perf_counter() - began, "peak_gib": peak_memory_gib(engine.device)}
    engine.destroy()
    return result


def main():
    parser = argparse.ArgumentParser()
    for name in ("--cases", "--out", "--local_rank"):
        parser.add_argument(name)
    options = parser.parse_args()
    calm_environment()
    counter = CollectiveCounter()
    counter.install()
    from deepspeed.accelerator import get_accelerator

    from xdscale.training.distributed import start_distributed

    ranks = start_distributed()
    # Without AVX512-FP16 oneDNN has no fp16 and DeepSpeed refuses it; PyTorch's own CPU operations still compute it.
    get_accelerator().is_fp16_supported = lambda: True
    results = []
    for case in json.loads(Path(options.cases).read_text()):
        results.append(run_case(case, ranks, counter))
        gc.collect()
    everything = ranks.gather(results)
    if ranks.is_first:
        Path(options.out).write_text(json.dumps(everything))
    ranks.barrier()


if __name__ == "__main__":
    main()
