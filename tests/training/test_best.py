"""The best held-out figure: kept over restarts, exported, and the end of a run that no longer gets better."""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from xdscale.errors import XdscaleError
from xdscale.export import export_run
from xdscale.finetune.run import FinetuneSystem
from xdscale.recipe import Training, load_recipe
from xdscale.systems.contract import Objective, open_system
from xdscale.training import session
from xdscale.training.best import best_so_far, check_held_out, check_metric, final_step
from xdscale.training.checkpoint_folder import Retention, checkpoint_name, list_checkpoints, step_of
from xdscale.training.consolidate import consolidated_state
from xdscale.training.distributed import Ranks
from xdscale.training.run_folder import read_log


def log_of(metric, values):
    for step, value in enumerate(values):
        yield {"step": step, "kind": "step"}
        yield {"step": step, "kind": "validation", f"validation/{metric}": value, "validation/other": 0.0}


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, math.inf, "nan"]), min_size=1, max_size=12), st.integers(1, 4))
def test_the_best_is_the_first_least_loss_and_the_wait_counts_from_it(values, patience):
    training = Training(steps=100, global_batch=1, best="loss/a", patience=patience)
    found = best_so_far(training, log_of("loss/a", values))
    finite = {step: float(value) for step, value in enumerate(values) if step and math.isfinite(float(value))}
    assert found.step == (min(finite, key=finite.get) if finite else None)
    assert found.waited == len(values) - 1 - (found.step or 0)
    assert found.ended == (found.waited >= patience)


def test_of_an_accuracy_more_is_better():
    training = Training(steps=9, global_batch=1, best="accuracy/a")
    found = best_so_far(training, log_of("accuracy/a", [0.9, 0.5, 0.7, 0.7, 0.6]))
    assert (found.step, found.value, found.waited, found.ended) == (2, 0.7, 2, False)
    assert best_so_far(Training(steps=9, global_batch=1), log_of("accuracy/a", [0.9, 0.5])).step is None


@pytest.mark.parametrize("line", ["7", "[]", '{"kind": "step"}', '{"step": "a", "kind": "validation"}'])
def test_a_log_or_recipe_that_no_run_wrote_is_named(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 0, "kind": "step"}}\n{line}\n')
    with pytest.raises(XdscaleError, match=r"log\.jsonl, line 2: .*: expected an object with its kind and step"):
        read_log(log)
    log.write_bytes(b"\xff")
    with pytest.raises(XdscaleError, match=r"log\.jsonl: cannot be read: .*utf-8"):
        read_log(log)
    for value in ({}, {"validation/loss/b": None}, {"validation/loss/b": []}, {"validation/loss/b": "many"}):
        entry = {"step": 3, "kind": "validation", "validation/loss/a": 1.0} | value
        with pytest.raises(XdscaleError, match=r"training.best = loss/b: the validation after step 3 has no such .*/a"):
            best_so_far(Training(steps=9, global_batch=1, best="loss/b"), [entry])


def test_its_checkpoint_outlives_newer_ones(tmp_path):
    paths = [tmp_path / checkpoint_name(step) for step in (2, 4, 6, 8, 10)]
    assert [step_of(path) for path in Retention(newest=2, best=4).outdated(paths, 10)] == [2, 6]
    assert [step_of(path) for path in Retention(newest=2, best=10).outdated(paths, 10)] == [2, 4, 6]
    assert [step_of(path) for path in Retention(newest=1, every=6, best=4).outdated(paths, 10)] == [2, 8]


def test_a_figure_that_is_not_measured_is_refused():
    objectives = {"mlm": Objective(1.0), "regions": Objective(1.0, ())}
    for known in ("loss/mlm", "accuracy/mlm", "loss/regions", None):
        check_metric(Training(steps=1, global_batch=1, best=known), objectives)
    with pytest.raises(XdscaleError, match=r"training.best = accuracy/mml: not measured here; .*'accuracy/mlm'"):
        check_metric(Training(steps=1, global_batch=1, best="accuracy/mml"), objectives)


def held_out(**targets):
    return SimpleNamespace(targets=targets)


class TwoRanks(Ranks):
    """The other rank has what is given."""

    def __init__(self, *others):
        super().__init__(0, 2, 0)
        object.__setattr__(self, "others", list(others))

    def gather(self, value):
        return [value, self.others.pop(0)]


def test_a_figure_without_held_out_targets_is_refused_instead_of_being_best_at_zero():
    training = Training(steps=1, global_batch=1, best="loss/a")
    other = [["a", "b"]]
    check_held_out(training, "ab", [held_out(a=0, b=4)], TwoRanks(other, 1))
    with pytest.raises(XdscaleError, match=r"training.best = loss/a: the held-out samples have no targets of 'a'; "):
        check_held_out(training, "ab", [held_out(a=0, b=4)], TwoRanks(other, 0))
    check_held_out(Training(steps=1, global_batch=1), "ab", [held_out(a=0, b=4)], TwoRanks(other))


def test_ranks_that_would_exchange_other_things_are_told():
    with pytest.raises(XdscaleError, match=r"held-out micro-batch 1: rank 1 has \['a', 'b'\] in its .* 0 \['b'\]"):
        check_held_out(None, "ab", [held_out(a=1, b=1), held_out(b=1)], TwoRanks([["a", "b"], ["a", "b"]]))


def test_a_figure_of_an_objective_that_is_off_is_refused_before_ranks_start():
    with pytest.raises(XdscaleError, match=r"training.best = loss/mml: no figure of an objective .* such as loss/mlm"):
        load_recipe("quickstart", ["training.best=loss/mml"])
    with pytest.raises(XdscaleError, match=r"training.best = loss/match: no figure"):
        load_recipe("quickstart", ["training.best=loss/match", "objectives.match=null"])


def test_no_checkpoint_is_read_for_a_system_that_does_nothing_at_the_end(tmp_path):
    """Each rank would read all of it, every rank's part of the optimizer too."""
    (tmp_path / "checkpoints" / checkpoint_name(2)).mkdir(parents=True)
    lines = [json.dumps(entry) + "\n" for entry in log_of("loss/mlm", [3.0, 2.0, 1.0])]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    recipe = load_recipe("quickstart", ["training.best=loss/mlm"])
    assert final_step(tmp_path, recipe) == 2
    setup = SimpleNamespace(recipe=recipe, run=SimpleNamespace(folder=tmp_path), ranks=Ranks(0, 1, 0))
    assert session.finish(open_system(recipe), setup, None) == 0
    with pytest.raises(XdscaleError, match="step-00000002: damaged"):
        session.finish(FinetuneSystem(recipe), setup, SimpleNamespace(engine=None))


def test_the_log_of_a_run_without_such_a_figure_is_not_read(tmp_path):
    """Its export needs none of it, and a received one may hold anything."""
    (tmp_path / "log.jsonl").write_text("null\n")
    assert final_step(tmp_path, load_recipe("quickstart")) is None


@pytest.fixture(scope="module")
def ended_run(adapt, short_shards, narrow_model, tmp_path_factory):
    """A run at a rate that spoils it, stopped after two steps and continued; its held-out loss must rise."""
    folder = tmp_path_factory.mktemp("ended")
    config = folder / "zero3.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}))
    values = {"training.steps": 50, "training.global_batch": 4, "training.best": "loss/mlm", "training.patience": 3}
    values |= {"run.eval_every": 1, "run.eval_samples": 4, "run.checkpoint_every": 1000, "run.keep_checkpoints": 1}
    values |= {"optim.learning_rate": 0.3, "optim.warmup_ratio": 0.1, "data.shards": short_shards}
    values |= {"output.folder": folder / "run"}
    model = [value for value in narrow_model if not value.startswith("optim.")]
    command = ["quickstart", *model, *(f"{key}={value}" for key, value in values.items())]
    said = []
    for more in (["run.stop_at_step=2"], [], []):
        done = adapt(*command, *more, "--deepspeed_config", config)
        assert done.code == 0, done.stderr
        said.append(done.stderr)
    return folder / "run", said


def test_a_run_ends_when_its_figure_is_not_better_for_long_also_over_restarts(ended_run):
    run, said = ended_run
    log = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] in ("step", "validation")]
    losses = {e["step"]: float(e["validation/loss/mlm"]) for e in log if e["kind"] == "validation" and e["step"]}
    best = min(losses, key=losses.get)
    assert [entry["step"] for entry in log if entry["kind"] == "step"] == list(range(1, best + 4))
    for step in range(3, best + 3):  # it did not end later than it had to
        assert step - min(range(1, step + 1), key=losses.get) < 3
    assert "ended after step" in said[1]
    assert "3 validations in a row had no better loss/mlm" in said[1]
    assert "ended after step" in said[2]


def test_the_best_checkpoint_stays_beside_the_last_and_is_what_an_export_holds(ended_run, tmp_path):
    run, _ = ended_run
    last = max(entry["step"] for entry in read_log(run / "log.jsonl") if entry["kind"] == "step")
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [last - 3, last]
    assert final_step(run, load_recipe(str(run / "recipe.yaml"))) == last - 3
    assert checkpoint_name(last - 3) in export_run(run, tmp_path / "out")
    weights = consolidated_state(run / "checkpoints" / checkpoint_name(last - 3))
    for name, value in load_file(tmp_path / "out" / "cross_modal" / "model.safetensors").items():
        assert (value == weights[name]).all()
