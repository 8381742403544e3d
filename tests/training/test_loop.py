"""The loop and the evaluation against plain sums, on an engine that remembers how it was called."""

import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.recipe import Optim, Run, Training
from xdscale.systems.contract import Objective, Term
from xdscale.training import loop
from xdscale.training.best import Best
from xdscale.training.evaluation import evaluate
from xdscale.training.optimizer import build_optimizer
from xdscale.training.prefetch import StepData
from xdscale.training.skipping import Skipped, describe_skip


@dataclass
class Micro:
    """A micro-batch of single numbers; `weight` makes the second objective's values."""

    values: list[float]
    weight: float = 2.0

    @property
    def arrays(self):
        return {"values": np.array(self.values, np.float32), "weight": np.array(self.weight)}

    @property
    def targets(self):
        return {"first": len(self.values), "second": 2 * len(self.values)}

    @property
    def tokens(self):
        return 10 * len(self.values)


class FakeEngine(nn.Module):
    """Losses are sums of the batch's numbers; it remembers in which mode each forward and each step was made."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.optimizer = self.basic_optimizer = build_optimizer(nn.ParameterList([self.scale]), Optim(), {})
        self.modes, self.seeds, self.updates = [], [], 0
        self.recording = []

    @property
    def module(self):
        return self

    def forward(self, batch):
        self.modes.append(self.training)
        self.seeds.append(torch.initial_seed())
        for maps in self.recording:
            maps.append(torch.eye(2) * len(batch["values"]))
        total = (batch["values"] * self.scale).sum()
        return {
            "first": Term.scored(total, batch["values"].gt(0).sum()),
            "second": Term.scored(total * batch["weight"], torch.tensor(1)),
        }

    @contextmanager
    def recorded_attention(self):
        self.recording.append([])
        yield self.recording[-1]
        self.recording.pop()

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.updates += 1

    def was_step_applied(self):
        return True

    def zero_optimization_stage(self):
        return 0

    def bfloat16_enabled(self):
        return False

    fp16_enabled = bfloat16_enabled


@dataclass
class FakeRanks:
    """One rank of several; what the others add to each sum is given."""

    rank: int = 0
    world_size: int = 1
    others: list = field(default_factory=list)

    @property
    def is_first(self):
        return self.rank == 0

    def sum(self, values):
        return values + self.others.pop(0).to(values) if self.others else values

    def gather(self, value):
        return [value] * self.world_size


OBJECTIVES = {"first": Objective(1.0), "second": Objective(0.5)}
HELD_OUT = [Micro([1.0, -2.0]), Micro([3.0])]


class Log:
    """Keeps what the loop hands to the monitor."""

    def __init__(self):
        self.steps, self.validations = [], []

    def step(self, step, scalars, samples):
        self.steps.append(scalars)

    def validation(self, step, scalars):
        self.validations.append((step, scalars))

    def attention(self, step, layer, weights):
        pass

    def checkpoint(self, step):
        pass


class Steps:
    """The same two micro-batches at every step."""

    wait_seconds = 0.0

    def __next__(self):
        return 0, StepData([Micro([1.0, -2.0]), Micro([4.0])], "samples")


def trainer(engine, ranks=None, start_step=0, **training):
    values = {"steps": 3, "global_batch": 3, "seed": 0, "eval_every": 100, "checkpoint_every": 100} | training
    length = Training(**{key: values.pop(key) for key in ("steps", "global_batch", "seed")})
    quiet = SimpleNamespace(enter=lambda *_: None)
    return loop.Trainer(
        engine=engine,
        recipe=SimpleNamespace(training=length, optim=Optim(), run=Run(**values)),
        ranks=ranks or FakeRanks(),
        objectives=OBJECTIVES,
        source=Steps(),
        order=None,
        validation=HELD_OUT,
        position=lambda step: step,
        flops=lambda arrays: 60.0,
        matmul_flops_per_second=100.0,
        run=None,
        checkpoints="checkpoints",
        monitor=Log(),
        stop=SimpleNamespace(requested=False),
        skipped=Skipped(),
        watchdog=quiet,
    )


@pytest.fixture
def saved(monkeypatch):
    """The steps that were saved, with how they are kept, instead of files."""
    calls = []
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda engine, folder, step, kept, ranks, average: calls.append((step, kept))
    )
    return calls


@pytest.mark.parametrize("start_step", [0, 1])
def test_every_forward_of_training_has_dropout_and_none_of_an_evaluation(saved, start_step):
    """Also in a run that continues: encoders come from transformers in evaluation mode."""
    engine = FakeEngine().eval()
    trainer(engine, eval_every=1).train(start_step, validate_first=False)
    assert engine.modes == [True, True, False, False] * (3 - start_step)


def test_dropout_is_a_function_of_seed_step_and_rank(saved):
    seeds = {}
    for seed, rank in itertools.product((0, 1), (0, 1)):
        engine = FakeEngine()
        trainer(engine, FakeRanks(rank, 1), seed=seed).train(0, validate_first=False)
        seeds[seed, rank] = engine.seeds[:6:2]  # two micro-batches in each of three steps, which share a seed
        engine = FakeEngine()
        trainer(engine, FakeRanks(rank, 1), seed=seed).train(2, validate_first=False)
        assert engine.seeds[0] == seeds[seed, rank][2]
    assert len({value for part in seeds.values() for value in part}) == 12


def test_what_is_saved_is_kept_as_the_recipe_says(saved):
    trainer(FakeEngine(), checkpoint_every=2, keep_checkpoints=5, keep_every=4).train(0, validate_first=False)
    assert [step for step, _ in saved] == [2, 3]
    assert {(kept.newest, kept.every) for _, kept in saved} == {(5, 4)}


def test_the_checkpoint_of_the_best_figure_is_saved_and_the_run_ends_after_patience(saved, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.0, 2.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: ({"loss/first": next(losses)}, []))
    run = trainer(FakeEngine(), steps=9, eval_every=2)
    run.best = Best("loss/first", 2)
    assert run.train(0, validate_first=False) == (False, 8)
    assert [(step, kept.best) for step, kept in saved] == [(2, 2), (4, 4), (8, 4)]
    assert run.train(8, validate_first=False) == (False, 8)  # as a run that is given again


def test_the_average_takes_in_updates_that_were_made_and_is_what_validation_measures(saved):
    class Average:
        updates, used = 0, False

        def update(self):
            self.updates += 1

        @contextmanager
        def in_use(self):
            self.used = True
            yield
            self.used = False

    class Watching(FakeEngine):
        def forward(self, batch):
            assert average.used != self.training
            return super().forward(batch)

        def was_step_applied(self):
            return self.updates != 4  # of two micro-batches each: the second update

    average, engine = Average(), Watching()
    run = trainer(engine, eval_every=1)
    run.average, run._skip = average, lambda *_: None
    run.train(0, validate_first=True)
    assert average.updates == 2
    assert engine.modes.count(False) == 8


def test_the_log_holds_means_over_the_targets_of_all_ranks_and_the_speed(saved, monkeypatch):
    """On two ranks; the other one has losses 7 and 8, 2 and 3 right ones, 5 and 10 targets, 70 tokens."""
    others = [torch.tensor([5, 10, 70, 0, 1, 1, 1, 1]), torch.tensor([7.0, 2.0, 8.0, 3.0])]
    ticks = itertools.count(step=4.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(ticks))
    run = trainer(FakeEngine(), FakeRanks(0, 2, others), steps=1)
    run._step(0)
    (entry,) = run.monitor.steps
    assert entry["loss/first"] == pytest.approx((3.0 + 7.0) / (3 + 5))
    assert entry["loss/second"] == pytest.approx((6.0 + 8.0) / (6 + 10))
    assert entry["loss/total"] == pytest.approx(entry["loss/first"] + 0.5 * entry["loss/second"])
    assert entry["accuracy/first"] == pytest.approx((2 + 2) / (3 + 5))
    assert entry["accuracy/second"] == pytest.approx((2 + 3) / (6 + 10))
    assert entry["throughput/tokens_per_second"] == pytest.approx((30 + 70) / 4.0)
    assert entry["throughput/mfu"] == pytest.approx(2 * 60.0 / 4.0 / 100.0)
    assert entry["optim/lr"] == pytest.approx(1e-4)


def test_what_deepspeed_left_out_is_an_overflow_in_fp16_and_else_a_skipped_step(saved, monkeypatch):
    """Gradients of the step before are forgotten first, each time."""
    order = []

    class LeavesOut(FakeEngine):
        fp16 = False

        def forward(self, batch):
            order.append("forward")
            return super().forward(batch)

        def was_step_applied(self):
            return False

        def fp16_enabled(self):
            return self.fp16

        def bfloat16_enabled(self):  # the norm is DeepSpeed's
            return True

        def get_global_grad_norm(self):
            return 2.5

    monkeypatch.setattr(loop, "forget_gradients", lambda engine: order.append("forget"))
    monkeypatch.setattr(loop, "describe_skip", lambda step, *rest: {"replay": "r", "step": step})
    run, told = trainer(LeavesOut(), steps=9, max_skipped_in_row=3), []
    run.monitor.skipped = lambda *given: told.append(given)
    assert run._step(4)
    assert (run.skipped.steps, run.skipped.in_row, run.skipped.overflows) == (1, 1, 0)
    assert told == [(5, {"replay": "r", "step": 4}, "samples", 1)]
    assert run.monitor.steps == []
    run.engine.fp16 = True
    assert run._step(5)
    assert (run.skipped.steps, run.skipped.in_row, run.skipped.overflows) == (1, 0, 1)
    ((entry,), told_still) = run.monitor.steps, len(told)
    assert (entry["health/skipped_steps"], entry["health/loss_scale_overflows"], told_still) == (1, 1, 1)
    assert entry["optim/grad_norm"] == 2.5
    assert order == ["forget", "forward", "forward"] * 2


def test_updates_that_were_skipped_do_not_count_for_bias_correction(saved, monkeypatch):
    counted = []
    monkeypatch.setattr(loop, "set_learning_rate", lambda engine, rate, optim, update: counted.append(update))
    run = trainer(FakeEngine(), steps=10)
    run.skipped = Skipped(steps=2, overflows=3)
    run._step(7)
    assert counted == [2]


def test_an_objective_without_targets_in_a_step_has_no_figure_and_counts_in_the_total_as_it_is(saved):
    """As where a small batch masks no region: a loss of 0 would show in each chart. What is not finite is seen."""
    others = [torch.tensor([-3, 0, 0, 0, 1, 1, 1, 1])]
    run = trainer(FakeEngine(), FakeRanks(0, 2, others), steps=1)
    run._step(0)
    (entry,) = run.monitor.steps
    assert [name for name in entry if "first" in name] == []
    assert entry["loss/second"] == pytest.approx(6.0 / 6)
    assert entry["loss/total"] == pytest.approx(3.0 + 0.5 * entry["loss/second"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_is_the_mean_over_all_targets_of_all_ranks(ranks):
    others = [torch.tensor([7.0, 2.0, 8.0, 3.0, 5.0, 10.0])] if ranks == 2 else []
    engine = FakeEngine()
    engine.train()
    metrics, maps = evaluate(engine, HELD_OUT, OBJECTIVES, FakeRanks(0, ranks, others), lambda number: True)
    more = ranks == 2
    assert metrics["loss/first"] == pytest.approx((2.0 + 7.0 * more) / (3 + 5 * more))
    assert metrics["accuracy/first"] == pytest.approx((2 + 2 * more) / (3 + 5 * more))
    assert metrics["loss/second"] == pytest.approx((4.0 + 8.0 * more) / (6 + 10 * more))
    assert metrics["accuracy/second"] == pytest.approx((2 + 3 * more) / (6 + 10 * more))
    assert engine.modes == [False, False]
    assert engine.training
    np.testing.assert_array_equal(maps, [2 * np.eye(2)])  # of the first batch alone
    assert not engine.recording


def test_an_objective_without_held_out_targets_has_no_figure():
    class Untargeted(Micro):
        targets = {"first": 2, "second": 0}

    metrics, _ = evaluate(FakeEngine(), [Untargeted([1.0, 2.0])], OBJECTIVES, FakeRanks(), lambda number: True)
    assert metrics == {"loss/first": pytest.approx(1.5), "accuracy/first": pytest.approx(1.0)}


def test_an_evaluation_that_is_broken_off_leaves_the_engine_in_training_mode():
    engine = FakeEngine()
    asked = []

    def go_on(number):
        asked.append(number)
        return number < 1

    assert evaluate(engine, HELD_OUT, OBJECTIVES, FakeRanks(), go_on) is None
    assert asked == [0, 1]
    assert engine.training


def test_one_objective_that_is_not_finite_makes_its_micro_batch_a_suspect():
    slots = [SimpleNamespace(sample_ids=np.array([n, 9]), real=np.array([True, False])) for n in (4, 5, 6)]
    order = SimpleNamespace(slots=lambda step: slots, global_batch_ids=lambda step: (np.zeros(3), np.arange(3)))
    losses = torch.tensor([[1.0, 2.0], [float("nan"), 2.0], [1.0, float("inf")]])
    entry = describe_skip(0, losses, {}, 1.0, order, FakeRanks(), "run")
    assert [(suspect["micro_batch"], suspect["sample_ids"]) for suspect in entry["suspects"]] == [(1, [5]), (2, [6])]


@pytest.mark.parametrize(("most", "told"), [(1, "1 step"), (2, "2 steps"), (3, "3 steps")])
def test_as_many_skipped_steps_in_a_row_as_the_recipe_says_stop_the_run(most, told):
    counts = Skipped(steps=4, in_row=0)
    for step in range(1, most):
        counts.add(step, most, "xdscale replay run 3")
    with pytest.raises(XdscaleError, match=rf"^{told} in a row up to step 9 had .*_in_row = {most}\); .*run 3'"):
        counts.add(9, most, "xdscale replay run 3")
    assert (counts.steps, counts.in_row) == (4 + most, most)


@pytest.mark.parametrize(
    ("zero", "refused"),
    [({}, False), ({"offload_optimizer": {"device": "none"}}, False), ({"offload_optimizer": {"device": "cpu"}}, True)],
)
def test_a_micro_batch_may_leave_an_objective_out_where_nothing_is_offloaded(zero, refused):
    run, stated = trainer(FakeEngine()), DeepSpeedZeroConfig(stage=2, **zero)
    run.engine.zero_offload_optimizer = lambda: stated.offload_optimizer
    with pytest.raises(XdscaleError, match="'second' is not in its targets") if refused else nullcontext():
        run._check_carried(0, np.array([[1, 0]]))
