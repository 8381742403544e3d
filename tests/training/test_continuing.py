"""Runs that are continued, changed on purpose, stopped while the disk is full, or refused, each by a real launch."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from xdscale.commands.replay import replay
from xdscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED
from xdscale.export import export_run
from xdscale.recipe import Optim
from xdscale.training.checkpoint_folder import list_checkpoints, step_of
from xdscale.training.run_folder import read_log
from xdscale.training.schedule import learning_rate

FAULTY = Path(__file__).with_name("faulty_worker.py")


class Run:
    """A run of the narrow quickstart, whose command can be varied."""

    def __init__(self, shards, model, folder):
        self.shards, self.model, self.base, self.folder = shards, model, folder, folder / "run"

    def command(self, stage=0, **values):
        config = self.base / f"zero-{stage}.json"
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}))
        settings = {"data.shards": self.shards, "output.folder": self.folder, "training.global_batch": 4}
        settings |= {"training.steps": 6, "run.eval_every": 1000, "run.eval_samples": 4}
        settings |= {key.replace("__", "."): value for key, value in values.items()}
        chosen = [f"{key}={value}" for key, value in settings.items()]
        return ["quickstart", *self.model, *chosen, "--deepspeed_config", str(config)]

    def entries(self, kind):
        return [entry for entry in read_log(self.folder / "log.jsonl") if entry["kind"] == kind]

    def checkpoints(self):
        return [step_of(path) for path in list_checkpoints(self.folder / "checkpoints")]


@pytest.fixture(scope="module")
def make_run(short_shards, narrow_model, tmp_path_factory):
    return lambda: Run(short_shards, narrow_model, tmp_path_factory.mktemp("continuing"))


@pytest.fixture(scope="module")
def stopped_on_purpose(make_run, adapt):
    run = make_run()
    done = adapt(*run.command(run__stop_at_step=3))
    assert done.code == 0, done.stderr[-3000:]
    return run, done


def test_the_message_of_stop_at_step_says_how_to_go_on(stopped_on_purpose):
    _, done = stopped_on_purpose
    assert "stopped after step 3 of 6, as run.stop_at_step = 3 says;" in done.stderr
    assert "the same command without it, or with a later one, continues" in done.stderr


@pytest.fixture(scope="module")
def extended(stopped_on_purpose, adapt):
    """The same run, to be longer than was meant, and by two ranks."""
    run, _ = stopped_on_purpose
    done = adapt(*run.command(training__steps=9), ranks=2)
    assert done.code == 0, done.stderr[-3000:]
    return run, done


def test_a_run_is_extended_by_a_larger_number_of_steps(extended):
    """From the step that it continues from on, the rate is that of a run that was meant to be so long."""
    run, done = extended
    rates = [entry["optim/lr"] for entry in run.entries("step")]
    expected = [learning_rate(step, Optim(learning_rate=1e-2), 6 if step < 3 else 9) for step in range(9)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert "continuing after step 3 of 9" in done.stderr
    assert "recipe.training.steps was 6, now 9" in done.stderr
    assert "from step 4 on the learning rate is that of a run of 9 steps" in done.stderr


def test_the_records_of_a_changed_run_tell_of_now_and_of_before(extended):
    run, _ = extended
    (change,) = run.entries("changed")
    assert change["step"] == 3
    assert "recipe.training.steps was 6, now 9" in change["changes"]
    assert "environment.world_size was 1, now 2" in change["changes"]
    starts = [json.loads(line) for line in (run.folder / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["recipe"]["training"]["steps"]) for start in starts] == [(0, 6), (3, 9)]
    assert json.loads((run.folder / "environment.json").read_text())["world_size"] == 2
    assert json.loads((run.folder / "ds_config.json").read_text())["gradient_accumulation_steps"] == 1
    assert "steps: 9" in (run.folder / "recipe.yaml").read_text()


def test_a_run_cannot_be_made_shorter_than_it_is(extended, adapt):
    run, _ = extended
    before = (run.folder / "log.jsonl").read_bytes()
    done = adapt(*run.command(training__steps=8))
    assert done.code == EXIT_BAD_INPUT
    assert f"training.steps = 8: the run in {run.folder} has done 9 steps already" in done.stderr
    assert (run.folder / "log.jsonl").read_bytes() == before


def test_a_run_that_has_come_to_its_end_may_be_started_again(extended, adapt, tmp_path):
    run, _ = extended
    copy = Run(run.shards, run.model, tmp_path)
    shutil.copytree(run.folder, copy.folder)
    done = adapt(*copy.command(training__steps=9), ranks=2)
    assert done.code == 0, done.stderr[-3000:]
    assert copy.entries("step") == run.entries("step")
    assert copy.entries("checkpoint") == run.entries("checkpoint")


def test_another_recipe_is_refused_once_and_says_what_may_change(extended, launch_ranks):
    run, _ = extended
    done = launch_ranks("xdscale.train", *run.command(optim__learning_rate=0.5), ranks=2)
    assert done.code == EXIT_BAD_INPUT
    assert done.stderr.count("holds a run of a different recipe (optim.learning_rate was 0.01, now 0.5)") == 1
    assert "only training.steps, where its data lies and the keys of `run` may be other than before" in done.stderr


def test_a_run_whose_checkpoints_are_gone_is_left_as_it_is(extended, adapt, tmp_path):
    run, _ = extended
    copy = Run(run.shards, run.model, tmp_path)
    shutil.copytree(run.folder, copy.folder)
    shutil.rmtree(copy.folder / "checkpoints")
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file() and path.name != ".lock"}
    done = adapt(*copy.command(training__steps=9))
    assert done.code == EXIT_BAD_INPUT, done.stderr[-3000:]
    assert "holds no checkpoint, though" in done.stderr
    assert "tells of one after step 9" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(path.read_bytes() == text for path, text in before.items())


@pytest.mark.parametrize("source", ["run", "export"])
def test_a_new_run_begins_with_the_weights_and_heads_of_another(extended, adapt, tmp_path, source):
    """With other objectives and another rate; it first measures what the other measured last."""
    old, _ = extended
    if source == "export":
        export_run(old.folder, tmp_path / "export")
    start = old.folder if source == "run" else tmp_path / "export"
    new = Run(old.shards, old.model, tmp_path)
    changes = {
        "model__start": start,
        "objectives__clip_tokens": "null",
        "optim__learning_rate": 1e-3,
        "training__steps": 1,
    }
    done = adapt(*new.command(**changes))
    assert done.code == 0, done.stderr[-3000:]
    before, after = old.entries("validation")[-1], new.entries("validation")[0]
    assert (before["step"], after["step"]) == (9, 0)
    for task in ("mlm", "match"):
        assert after[f"validation/loss/{task}"] == pytest.approx(before[f"validation/loss/{task}"], rel=1e-5)
    assert new.entries("step")[0]["optim/lr"] == 1e-3
    if source == "export":  # may be gone when the run goes on, and when a step of it is looked at
        shutil.rmtree(start)
        done = adapt(*new.command(**changes | {"training__steps": 2}))
        assert done.code == 0, done.stderr[-3000:]
        assert len(replay(new.folder, 2)) == 4


def test_weights_to_begin_with_that_do_not_fit_are_named(extended, adapt, tmp_path):
    old, _ = extended
    new = Run(old.shards, old.model, tmp_path)
    for start, words in (
        (tmp_path, "neither a run folder"),
        (old.folder, "holds no fitting weights for model.layers.2"),
    ):
        done = adapt(*new.command(model__start=start, model__cross_layers=3))
        assert (done.code, words in done.stderr) == (EXIT_BAD_INPUT, True), done.stderr[-3000:]
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_on_a_full_disk_is_not_called_saved(make_run, launch_ranks, rank):
    """A limit on the size of files stands for the disk; the rank alone that is asked to stop meets it."""
    run = make_run()
    done = launch_ranks(FAULTY, f"full,{rank},2", *run.command(stage=2), ranks=2)
    assert done.code == EXIT_BAD_INPUT, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"cannot write checkpoint {run.folder}/checkpoints/step-00000002 (about " in line
    assert "MiB are needed, " in line
    assert f"the run has no older checkpoint): rank {rank}: " in line
    assert "File too large" in line
    assert "unexpected pos" not in line
    assert "Traceback" not in done.stderr
    assert run.checkpoints() == []


def test_a_stop_with_room_is_saved(make_run, launch_ranks):
    run = make_run()
    done = launch_ranks(FAULTY, "stopped,0,2", *run.command())
    assert (done.code, run.checkpoints()) == (EXIT_STOPPED, [2]), done.stderr[-3000:]


def test_a_port_in_use_is_named_with_the_option(make_run, launch_ranks, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        worker = tmp_path / "worker.py"
        worker.write_text(
            "import os, sys\nfrom xdscale import train\n"
            f"os.environ['MASTER_PORT'] = '{port}'\nsys.exit(train.main(sys.argv[1:]))\n"
        )
        done = launch_ranks(worker, *make_run().command(), ranks=2)
    assert done.code == EXIT_BAD_INPUT
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"port {port} of 127.0.0.1, where the ranks meet, is in use" in line
    assert "--master_port" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "gone",
    [
        "reader, writer = os.pipe()",
        "reader, writer = os.openpty()",
        "reader, writer = None, os.open('/dev/full', os.O_WRONLY)",
    ],
    ids=["tee that Ctrl-C ended", "closed terminal", "full disk"],
)
def test_a_run_goes_on_when_nobody_can_read_its_words(make_run, launch_ranks, tmp_path, gone):
    run = make_run()
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import os, sys\nfrom xdscale import train\n{gone}\n"
        "for stream in (1, 2): os.dup2(writer, stream)\n"
        "if reader: os.close(reader)\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    done = launch_ranks(worker, *run.command(training__steps=2))
    assert (done.code, run.checkpoints()) == (0, [2])
    assert not list(run.folder.glob("faults/*"))
