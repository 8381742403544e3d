"""In what order a run is opened, trained and ended, and what its records begin with; with stand-ins for all of it."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from xdscale.ds_config import split_batch
from xdscale.errors import XdscaleError
from xdscale.systems.contract import Slots, System
from xdscale.training import session
from xdscale.training.distributed import Ranks


@pytest.fixture
def told(monkeypatch):
    """The calls of a monitor."""
    calls = []

    class Monitor:
        def __init__(self, run, recipe, step, objectives):
            calls.append(("opened", run, step, objectives))

        def __getattr__(self, name):
            return lambda *given: calls.append((name, *given))

    monkeypatch.setattr(session, "Monitor", Monitor)
    return calls


SPLIT = split_batch(12, 2, 4)


@pytest.mark.parametrize(
    ("step", "continued", "changes", "damaged", "wanted"),
    [
        (0, False, [], {}, []),
        (3, True, [], {}, [("message", "continuing after step 3 of 9"), ("quarantine", 3, {})]),
        (0, True, [], {}, [("checkpoint", 0)]),
        (3, True, ["a"], {"x": "y"}, [
            ("message", "continuing after step 3 of 9"), ("changed", 3, ["a"]), ("quarantine", 3, {"x": "y"})
        ]),
        (0, False, [], {"x": "y"}, [("quarantine", 0, {"x": "y"})]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_tokens", [False, True])
def test_the_records_say_how_a_start_begins(told, step, continued, changes, damaged, wanted, by_tokens):
    training = SimpleNamespace(steps=9, global_batch=12, batch_tokens=100 if by_tokens else None)
    setup = SimpleNamespace(
        recipe=SimpleNamespace(training=training), run="run", ranks=Ranks(0, 2, 0),
        ds_config={"train_micro_batch_size_per_gpu": 4},
    )  # fmt: skip
    data = SimpleNamespace(order=SimpleNamespace(split="by tokens"), damaged=damaged)
    begun = SimpleNamespace(start_step=step, continued=continued, changes=changes)
    session._open_monitor(setup, data, begun, {"mlm": 1})
    split = "by tokens" if by_tokens else SPLIT
    assert told == [("opened", "run", step, {"mlm": 1}), ("split", step, split), *wanted]


@pytest.mark.parametrize("best", [None, 4])
def test_what_follows_the_last_step_has_the_best_weights_or_the_average(monkeypatch, best):
    calls, average = [], SimpleNamespace(in_use=lambda: using_average())

    @contextmanager
    def using_average():
        calls.append("average")
        yield

    class Following(System):
        open = build = parts = None

        def finish(self, setup, engine):
            calls.append(("finish", setup, engine))
            return 5

    ranks = SimpleNamespace(gather=lambda value: [value, "another rank's"])
    setup = SimpleNamespace(run=SimpleNamespace(folder="run"), recipe="recipe", ranks=ranks)
    begun = SimpleNamespace(engine="engine", average=average)
    monkeypatch.setattr(session, "final_step", lambda run, recipe: calls.append((run, recipe)) or best)
    monkeypatch.setattr(session, "final_state", lambda checkpoint: f"state of {checkpoint}")
    monkeypatch.setattr(session.ckpt, "choose_checkpoint", lambda run, step, ranks: f"{run} {step} {ranks.world_size}")
    monkeypatch.setattr(session, "put_weights", lambda *given: calls.append(given))
    assert session.finish(Following(None), setup, begun) == 5
    weights = "average" if best is None else ("engine", "state of run 4 1")
    assert calls == [("run", "recipe"), weights, ("finish", setup, "engine")]
    calls.clear()

    class Plain(System):
        open = build = parts = None

    assert session.finish(Plain(None), setup, begun) == 0
    assert calls == []


def test_samples_are_those_of_a_step_or_of_a_micro_batch_without_padding():
    slots = [Slots.of(np.array([5, 7])), Slots(np.zeros(2), np.array([9, 9]), np.array([True, False]))]
    assert session._sample_ids(slots, None) == [5, 7, 9]
    assert [session._sample_ids(slots, number) for number in (0, 1)] == [[5, 7], [9]]


def test_a_position_tells_what_a_run_can_be_continued_with(monkeypatch):
    monkeypatch.setattr(session, "draws_hash", lambda collate, epochs, ids: f"{collate} {epochs} {ids}")
    order = SimpleNamespace(
        position=lambda step: SimpleNamespace(epoch=step // 2, index=step % 2),
        global_batch_ids=lambda step: ("e", step),
    )
    data = SimpleNamespace(
        order=order, collate="c", data_fingerprints=None, fingerprints={"t": "f"}, damaged={"b": 1, "a": 2}
    )
    values = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    found = session._positions(values, data, Ranks(1, 3, 1))(5)
    assert vars(found) == {
        "step": 5, "epoch": 2, "index": 1, "world_size": 3, "zero_stage": 2, "precision": "bf16",
        "data_fingerprints": {"t": "f"}, "draws_hash": "c e 5", "quarantined": ["a", "b"],
    }  # fmt: skip


class Run:
    """A whole run of stand-ins; what happens is written down."""

    def __init__(self, monkeypatch, *, first=True, step=0, code=0, early=False, fails=None):
        self.calls = calls = []
        self.code, self.fails, self.step = code, fails, step
        self.ranks = SimpleNamespace(
            is_first=first, rank=int(not first), world_size=2, on_first=lambda action: first and action()
        )
        recipe = SimpleNamespace(
            output=SimpleNamespace(folder="folder"), run=SimpleNamespace(hang_seconds=45), training="t",
            stops_early=early,
        )  # fmt: skip
        self.folder = SimpleNamespace(
            folder="folder", check=lambda recipe: calls.append("check"), claim=lambda: calls.append("claim"),
            check_shared=lambda ranks: calls.append("shared"), release=lambda: calls.append("release"),
        )  # fmt: skip
        watchdog = SimpleNamespace(
            tick="tick",
            end=lambda: calls.append("end"),
            report=lambda error, stopping: calls.append((str(error), stopping)) or 70,
        )
        monkeypatch.setattr(session, "RunFolder", lambda folder: self.folder)
        monkeypatch.setattr(session, "Watchdog", lambda ranks, folder, seconds: nullcontext(watchdog))
        monkeypatch.setattr(session, "check_metric", lambda *given: calls.append(("metric", *given)))
        monkeypatch.setattr(session, "check_held_out", lambda *given: calls.append(("held out", *given[:3])))
        monkeypatch.setattr(session, "writing", lambda *given: nullcontext())
        monkeypatch.setattr(session, "open_session", self.open)
        monkeypatch.setattr(session, "train_session", self.train)
        monkeypatch.setattr(session, "finish", lambda *given: calls.append("finish") or 6)
        self.system = SimpleNamespace(
            recipe=recipe, objectives=lambda: "o", open=self.data, keep=lambda folder: calls.append(("keep", folder))
        )

    def data(self, place):
        assert (place.ranks, place.micro_batch, place.tick) == (self.ranks, 4, "tick")
        self.calls.append("open data")
        order = SimpleNamespace(slots=lambda step: ["a", "b", "c"])
        return SimpleNamespace(notes=("one", "two"), order=order, validation="v")

    def open(self, setup, data, system):
        assert setup.ds_config == {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
        self.calls.append("open session")
        engine = SimpleNamespace(destroy=lambda: self.calls.append("destroy"))
        return SimpleNamespace(start_step=self.step, engine=engine)

    def train(self, setup, data, begun, objectives):
        self.calls.append("train")
        if self.fails:
            raise self.fails
        return self.code

    def go(self):
        said = []
        stop = SimpleNamespace(requested=True)
        code = session.train_run(self.system, {"train_micro_batch_size_per_gpu": 4}, self.ranks, stop, said.append)
        return code, said


BEGIN = ["check", ("metric", "t", "o"), "open data", ("held out", "t", "o", "v"), "claim", "shared", "open session"]


@pytest.mark.parametrize(
    ("settings", "code", "rest"),
    [
        ({}, 6, [("keep", "folder"), "train", "finish", "end", "destroy", "release"]),
        ({"step": 3}, 6, ["train", "finish", "end", "destroy", "release"]),
        ({"code": 75}, 75, [("keep", "folder"), "train", "end", "destroy", "release"]),
        ({"early": True}, 0, [("keep", "folder"), "train", "end", "destroy", "release"]),
        ({"fails": XdscaleError("no")}, 70, [("keep", "folder"), "train", ("no", True), "release"]),
    ],
)
def test_a_run_goes_its_way(monkeypatch, settings, code, rest):
    run = Run(monkeypatch, **settings)
    assert run.go() == (code, ["one", "two"])
    assert run.calls == [*BEGIN, *rest]


def test_what_concerns_all_ranks_only_the_first_one_does(monkeypatch):
    run = Run(monkeypatch, first=False)
    assert run.go() == (6, [])
    assert run.calls == [*(call for call in BEGIN if call not in ("check", "claim")), "train", "finish", "end",
                         "destroy", "release"]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "logged", "validates"),
    [
        (0, [], True),
        (0, [{"kind": "validation", "step": 0}], False),
        (4, [{"kind": "validation", "step": 2}], True),
        (4, [{"kind": "step", "step": 4}], True),
        (4, [{"kind": "validation", "step": 4}], False),
        (3, [], False),  # none is due
        (9, [], True),  # the last one always is
    ],
)
@pytest.mark.parametrize("stopped", [True, False])
def test_training_begins_with_the_validation_that_is_missing(monkeypatch, start, logged, validates, stopped):
    made, prepared, ended = [], [], []

    def trainer(**given):
        made.append(given)
        return SimpleNamespace(train=lambda step, validate_first: made.append((step, validate_first)) or (stopped, 8))

    def prefetcher(prepare, steps, hint):
        prepared.extend([prepare, steps, hint])
        return nullcontext("source")

    monitor = SimpleNamespace(message="message", end=lambda *given: ended.append(given))
    flops, rate = [], []
    for name, value in {
        "_open_monitor": lambda *_: monitor,
        "read_log": lambda path: logged,
        "skipped_so_far": lambda entries: ("skipped", entries),
        "best_so_far": lambda training, entries: ("best", training, entries),
        "Prefetcher": prefetcher,
        "Trainer": trainer,
        "TracedFlops": lambda *given: flops.append(given) or "flops",
        "matmul_flops_per_second": lambda *given: rate.append(given) or 2.0,
        "peak_memory_gib": lambda device: 1.5,
        "sample_hash": lambda *ids: f"hash of {ids}",
        "_positions": lambda *_: "positions",
    }.items():
        monkeypatch.setattr(session, name, value)
    recipe = SimpleNamespace(training=SimpleNamespace(steps=9), run=SimpleNamespace(eval_every=2))
    folder = SimpleNamespace(log="log", folder="folder", checkpoints="checkpoints")
    ranks = SimpleNamespace(is_first=True, gather=lambda value: [value, None])
    setup = session.Setup(recipe, {"bf16": {"enabled": True}}, folder, ranks, "stop", "watchdog")
    order = SimpleNamespace(slots=lambda step: [step, -step], global_batch_ids=lambda step: (0, step))

    class Collate:
        hinted = []

        def __call__(self, slots):
            return f"batch of {slots}"

        def prefetch(self, slots):
            self.hinted.append(slots)

    data = SimpleNamespace(order=order, collate=Collate(), remote=stopped, validation="held out")
    begun = session.Session(SimpleNamespace(device="cpu"), "shapes", "average", start, False, [])
    assert session.train_session(setup, data, begun, {"mlm": 1}) == (75 if stopped else 0)
    given, begins = made
    assert begins == (start, validates)
    prepare, steps, hint = prepared
    assert (prepare(3).batches, prepare(3).samples) == (["batch of 3", "batch of -3"], "hash of (0, 3)")
    assert (steps, hint is not None) == (range(start, 9), stopped)  # hints are for what is fetched
    if hint is not None:
        hint(5)
        assert data.collate.hinted[-1] == [5, -5]
    assert (flops, rate) == ([("shapes", {"mlm": 1}, "message")], [("cpu", session.torch.bfloat16)])
    assert ended == [(8, [1.5, None], stopped)]
    told = {"skipped": ("skipped", logged), "best": ("best", recipe.training, logged), "average": "average"}
    told |= {"position": "positions", "run": "folder", "checkpoints": "checkpoints", "stop": "stop", "order": order}
    told |= {"watchdog": "watchdog", "source": "source", "validation": "held out", "monitor": monitor, "flops": "flops"}
    assert {name: given[name] for name in told} == told
    assert (given["matmul_flops_per_second"], given["ranks"], given["recipe"]) == (2.0, ranks, recipe)
