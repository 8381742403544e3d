"""Trains a small module in a real engine under each of many DeepSpeed configurations, saves it, and continues it.

Run by test_configs_run on one rank. A case is a configuration and the one it continues with. It makes four steps of
two micro-batches, of which the second step has no finite gradient. What each case found is written to OUT.
"""

import contextlib
import json
import sys
from pathlib import Path

from xdscale.training.environment import calm_environment

STEPS, BROKEN = 4, 1


def main(cases, out, folder):
    calm_environment()
    from deepspeed.accelerator import get_accelerator

    from xdscale.training.distributed import start_distributed

    # PyTorch computes in fp16 on every CPU; DeepSpeed refuses to where it is not fast.
    get_accelerator().is_fp16_supported = lambda: True
    ranks = start_distributed()
    found = {}
    for name, (values, then) in json.loads(Path(cases).read_text()).items():
        try:
            found[name] = run(values, then, Path(folder) / name.replace(" ", "-"), ranks)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(found))


def run(values, then, folder, ranks):
    """Returns the norms of the steps, the next losses of the run and of a continued one, and the weights."""
    from xdscale.ds_config import precision, zero_stage
    from xdscale.training import checkpoint as ckpt
    from xdscale.training.checkpoint_folder import Retention
    from xdscale.training.consolidate import consolidated_state

    engine = make_engine(values, seed=0)
    norms = [make_step(engine, number, broken=number == BROKEN) for number in range(STEPS)]
    position = ckpt.CheckpointPosition(
        step=STEPS,
        epoch=0,
        index=0,
        world_size=1,
        zero_stage=zero_stage(values),
        precision=precision(values),
        data_fingerprints={"text": "f"},
        draws_hash="h",
        quarantined=[],
    )
    ckpt.save_checkpoint(engine, folder, position, Retention(newest=1), ranks, None)
    saved = ckpt.find_checkpoint(folder, ranks)
    state = {name: value.tolist() for name, value in consolidated_state(saved).items()}
    continued = make_engine(then, seed=1)
    ckpt.load_checkpoint(continued, saved, saved, ranks)
    losses = [loss(part, batches(STEPS)[0]).item() for part in (engine, continued)]
    return {"norms": norms, "losses": losses, "state": state}


def make_module():
    import torch

    module = torch.nn.Sequential(
        torch.nn.Linear(7, 11), torch.nn.GELU(), torch.nn.LayerNorm(11), torch.nn.Linear(11, 3)
    )
    module[3].frozen = torch.nn.Parameter(torch.randn(27), requires_grad=False)
    return module


def batches(step):
    import torch

    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 7, generator=generator) for _ in range(2)]


def make_engine(values, seed):
    import torch

    from xdscale.recipe import Optim
    from xdscale.training.engine import build_engine

    torch.manual_seed(seed)
    given = values | {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 4}
    with contextlib.redirect_stdout(None):
        return build_engine(make_module(), Optim(), given, load_universal=False)


def loss(engine, inputs):
    return engine(inputs.to(next(engine.module.parameters()).dtype)).float().square().mean()


def make_step(engine, number, *, broken=False):
    """Makes a step as the trainer does; returns its gradient's norm, NaN where it left the weights as they are."""
    import math

    from xdscale.recipe import Optim
    from xdscale.training import engine as engines
    from xdscale.training.optimizer import set_learning_rate

    set_learning_rate(engine, 1e-2, Optim(), number)
    engines.forget_gradients(engine)
    for which, inputs in enumerate(batches(number)):
        engine.backward(loss(engine, inputs) * (math.inf if broken else 1.0))
        if which == 0:
            engine.step()  # only counts
    norm = engines.plain_gradient_norm(engine)
    applied = engines.make_step(engine, skip=norm is not None and not math.isfinite(norm))
    return float(engine.get_global_grad_norm() if norm is None else norm) if applied else math.nan


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
