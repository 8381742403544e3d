"""What is asked of a DeepSpeed engine, and what becomes of its answers; on one that only remembers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.training import engine as engines


def stepping(applied=True, fails=None):
    """Returns an engine whose steps are its optimizer's, or fail, and the list of the updates that it makes."""
    made = []

    class Optimizer:
        def step(self):
            made.append("update")

    def step():
        if fails is not None:
            raise fails
        optimizer.step()

    optimizer = Optimizer()
    return SimpleNamespace(basic_optimizer=optimizer, step=step, was_step_applied=lambda: applied), made


@pytest.mark.parametrize("applied", [True, False])
def test_a_step_is_left_out_alone(applied):
    """The next one is made again; whether it was made is what DeepSpeed says."""
    engine, made = stepping(applied)
    assert engines.make_step(engine, skip=True) is False
    assert made == []
    assert engines.make_step(engine, skip=False) is applied
    assert made == ["update"]
    assert engines.make_step(engine, skip=True) is False
    assert made == ["update"]


@pytest.mark.parametrize("skip", [True, False])
def test_only_an_overflow_at_the_smallest_scale_is_told_as_one(skip):
    engine, made = stepping(fails=RuntimeError("Current loss scale already at minimum - cannot decrease scale anymore"))
    with pytest.raises(XdscaleError, match="^fp16: the gradients overflow even at the smallest loss scale; lower opt"):
        engines.make_step(engine, skip=skip)
    engine.step = lambda: engine.basic_optimizer.step()
    engines.make_step(engine, skip=False)
    assert made == ["update"]  # no longer left out
    engine, _ = stepping(fails=RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="^CUDA error$"):
        engines.make_step(engine, skip=skip)


def module():
    return torch.nn.ModuleDict({"a": torch.nn.Linear(2, 1), "b": torch.nn.Linear(1, 1)})


def test_other_weights_are_put_in_the_place_of_all():
    engine = SimpleNamespace(module=module())
    engine.module["b"].weight.requires_grad_(False)
    state = {name: torch.full_like(value, number) for number, (name, value) in enumerate(module().state_dict().items())}
    parameters = list(engine.module.parameters())
    engines.put_weights(engine, state)
    assert all(torch.equal(value, state[name]) for name, value in engine.module.state_dict().items())
    assert all(one is other for one, other in zip(parameters, engine.module.parameters()))


@pytest.mark.parametrize(
    ("stage", "bf16", "fp16", "told"),
    [
        (0, False, False, True),
        (1, False, False, False),
        (3, False, False, False),
        (0, True, False, False),
        (0, False, True, False),
    ],
)
def test_the_norm_is_computed_where_deepspeed_keeps_none(stage, bf16, fp16, told):
    """Of all parameters that have a gradient."""
    engine = SimpleNamespace(
        module=module(),
        zero_optimization_stage=lambda: stage,
        bfloat16_enabled=lambda: bf16,
        fp16_enabled=lambda: fp16,
    )
    engine.module["a"].weight.grad = torch.tensor([[3.0, 0.0]])
    engine.module["b"].bias.grad = torch.tensor([4.0])
    assert engines.plain_gradient_norm(engine) == (5.0 if told else None)
    engine.module["b"].bias.grad[0] = math.inf
    assert engines.plain_gradient_norm(engine) == (math.inf if told else None)


def test_arrays_become_tensors_and_numbers_stay_numbers():
    arrays = {"ids": np.arange(3, dtype=np.int32), "most": np.array(7), "share": np.array(0.5), "none": np.zeros(0)}
    found = engines.to_device(arrays, torch.device("cpu"))
    assert (found["ids"].tolist(), found["ids"].dtype, found["none"].shape) == ([0, 1, 2], torch.int32, (0,))
    assert [(type(found[name]), found[name]) for name in ("most", "share")] == [(int, 7), (float, 0.5)]


def test_old_gradients_are_forgotten_where_they_would_be_used_again():
    buffer = torch.ones(3)
    engines.forget_gradients(SimpleNamespace(optimizer=SimpleNamespace(grad_partitions_flat_buffer=buffer)))
    assert buffer.tolist() == [0, 0, 0]
    engines.forget_gradients(SimpleNamespace(optimizer=SimpleNamespace()))
