"""The loop's own exchanges, as the plan counts them; test_engines compares all collectives with real engines."""

from types import SimpleNamespace

import pytest
import torch

from xdscale.plan.settings import Settings
from xdscale.plan.traffic import collectives
from xdscale.systems.contract import MicroBatch
from xdscale.training.loop import Trainer
from xdscale.training.prefetch import StepData

NAMES = ("mlm", "match", "clip_tokens")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
def test_the_exchange_of_counts_is_as_long_as_the_plan_says(names, accumulation):
    handed_over = []

    def add_up(tensor):
        handed_over.append(tensor)
        return tensor * 2

    engine = SimpleNamespace(device=torch.device("cpu"), zero_offload_optimizer=lambda: False)
    ranks = SimpleNamespace(world_size=2, sum=add_up)
    trainer = SimpleNamespace(engine=engine, ranks=ranks, stop=SimpleNamespace(requested=False))
    trainer.objectives = dict.fromkeys(names)
    trainer._check_carried = lambda step, carrying: Trainer._check_carried(trainer, step, carrying)
    batches = [MicroBatch({}, dict.fromkeys(names, 5), 64)] * accumulation
    counts, tokens, stopped = Trainer._agree_on_counts(trainer, 0, StepData(batches, ""))
    assert (counts, tokens, stopped) == (dict.fromkeys(names, 10 * accumulation), 128 * accumulation, False)
    settings = Settings(stage=0, precision="fp32", micro_batch=2)
    (planned,) = [one for one in collectives([], settings, 2, accumulation, len(names)) if one.dtype == "int64"]
    assert [tensor.nbytes for tensor in handed_over] == [planned.payload_bytes]
