"""The run folder: taken, refused, and never begun again over a run whose checkpoints are only out of sight."""

import errno
import fcntl
import json
import os
import platform
import re
from types import SimpleNamespace

import pytest

from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe
from xdscale.training import run_folder
from xdscale.training.monitor import Monitor
from xdscale.training.run_folder import RunFolder, read_log


@pytest.fixture
def run(tmp_path):
    """A run that has saved a checkpoint after step 2 and logged step 3."""
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step-00000002").mkdir(parents=True)
    entries = [{"step": 1, "kind": "step"}, {"step": 2, "kind": "checkpoint"}, {"step": 3, "kind": "step"}]
    folder.log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 4, "ki')
    return folder


def remove(folder):
    (folder / "step-00000002").rmdir()
    folder.rmdir()


def empty(folder):
    (folder / "step-00000002").rmdir()


def link_to_nowhere(folder):
    remove(folder)
    folder.symlink_to("/mnt/unmounted/checkpoints")


def link_to_an_empty_folder(folder):
    remove(folder)
    (folder.parent / "disk").mkdir()
    folder.symlink_to("disk")


def replace_by_a_file(folder):
    remove(folder)
    folder.write_text("moved to the archive")


@pytest.mark.parametrize("lose", [remove, empty, link_to_nowhere, link_to_an_empty_folder, replace_by_a_file])
def test_a_run_whose_checkpoints_are_out_of_sight_is_not_begun_again(run, lose):
    log = run.log.read_bytes()
    run.check_checkpoints(found=True)
    lose(run.checkpoints)
    with pytest.raises(XdscaleError, match="bring the folder back") as error:
        run.check_checkpoints(found=False)
    assert str(error.value).startswith(f"{run.checkpoints}: ")
    assert f"to begin again at step 0, delete all of {run.folder}" in str(error.value)
    assert run.log.read_bytes() == log


def test_a_run_killed_before_its_first_checkpoint_begins_again(run):
    empty(run.checkpoints)
    run.log.write_text('{"step": 1, "kind": "step"}\n{"step": 2, "kind": "st')
    run.check_checkpoints(found=False)
    run.log.unlink()
    run.check_checkpoints(found=False)


def test_a_dangling_link_is_refused_before_the_first_step(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.symlink_to(tmp_path / "nowhere")
    with pytest.raises(XdscaleError, match="is no folder, but a link to .*nowhere"):
        folder.check_checkpoints(found=False)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys, code):
    def refuse(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunFolder(tmp_path / "run").claim()
    said = capsys.readouterr().err
    assert f"warning: {tmp_path / 'run'}: its file system has no locks ({os.strerror(code)})" in said


def test_a_folder_in_use_names_who_uses_it(tmp_path):
    first = RunFolder(tmp_path / "run")
    first.claim()
    with pytest.raises(XdscaleError, match=rf"in use by process {os.getpid()} on "):
        RunFolder(tmp_path / "run").claim()
    first.release()
    RunFolder(tmp_path / "run").claim()


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/run", "/sys/run", "file/run", "nowhere/run"])
def test_a_place_that_takes_no_folder_is_named(tmp_path, place):
    """Such places refuse root too."""
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "unmounted")
    folder = RunFolder(tmp_path / place)
    folder.check(load_recipe("quickstart"))
    with pytest.raises(XdscaleError, match=r"cannot write a run in .*make it writable"):
        folder.claim()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(XdscaleError, match=r"^output\.folder = .*/run: exists and is not a folder$"):
        RunFolder(tmp_path / "run").check(load_recipe("quickstart"))


def test_what_a_process_left_that_was_killed_while_it_looked_goes(tmp_path):
    alone = SimpleNamespace(rank=0, is_first=True, gather=lambda value: [value], barrier=lambda: None)
    (tmp_path / f"{run_folder._TOKEN}0123").touch()
    (tmp_path / "notes").touch()
    RunFolder(tmp_path).check_shared(alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]


STOP = "stopped after .* as run.stop_at_step = 5 says"


@pytest.mark.parametrize(("step", "why"), [(3, "ended after .*: 2 validations in a row"), (5, STOP), (8, STOP)])
def test_the_last_line_says_what_ended_the_run(tmp_path, capfd, step, why):
    """A run that has gone on beyond `run.stop_at_step` before is at its end too."""
    (tmp_path / "run").mkdir()
    stated = ["training.steps=20", "run.stop_at_step=5", "training.best=loss/mlm", "training.patience=2"]
    Monitor(RunFolder(tmp_path / "run"), load_recipe("quickstart", stated), step, ["mlm"]).end(step, [1.0], False)
    assert re.search(why, capfd.readouterr().err)


def test_a_full_disk_under_the_log_is_one_message(tmp_path):
    (tmp_path / "run").mkdir()
    monitor = Monitor(RunFolder(tmp_path / "run"), load_recipe("quickstart"), 0, {})
    monitor._log.close()
    with open("/dev/full", "ab", buffering=0) as full:
        monitor._log = full
        with pytest.raises(XdscaleError, match=r"the disk is full .*MiB are free there; make room") as error:
            monitor.checkpoint(1)
    assert str(tmp_path / "run") in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: \xff", "recipe.yaml: cannot be read: 'utf-8' codec"),
        (b"", "holds a run of another system or version"),
        (b"steps: 2026-02-30", "holds a run of another system or version"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(run, content, message):
    (run.folder / "recipe.yaml").write_bytes(content)
    with pytest.raises(XdscaleError, match=message):
        run.check(load_recipe("quickstart"))


def records(run):
    return [json.loads((run.folder / name).read_text()) for name in ("ds_config.json", "environment.json")]


def test_records_tell_of_the_newest_start_and_the_list_of_all(tmp_path):
    run = RunFolder(tmp_path)
    recipe = load_recipe("quickstart")
    longer = load_recipe("quickstart", ["training.steps=70", "run.eval_every=9"])
    assert run.write_records(recipe, {"zero_optimization": {"stage": 1}}, 2, 0, continued=False) == []
    assert run.write_records(recipe, {"zero_optimization": {"stage": 1}}, 2, 3, continued=True) == []
    changes = run.write_records(longer, {"zero_optimization": {"stage": 2}}, 4, 5, continued=True)
    assert changes == [
        "ds_config.zero_optimization.stage was 1, now 2",
        "environment.world_size was 2, now 4",
        f"recipe.run.eval_every was {recipe.run.eval_every}, now 9",
        f"recipe.training.steps was {recipe.training.steps}, now 70",
    ]
    config, environment = records(run)
    assert (config["zero_optimization"]["stage"], environment["world_size"]) == (2, 4)
    assert load_recipe(str(tmp_path / "recipe.yaml")) == longer
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["environment"]["world_size"]) for start in starts] == [(0, 2), (3, 2), (5, 4)]
    assert [start["recipe"]["training"]["steps"] for start in starts] == [recipe.training.steps] * 2 + [70]
    assert set(environment["xdscale"]) == {"version", "commit"}
    assert environment["python"] == platform.python_version()
    for name, values in (("ds_config.json", config), ("environment.json", environment)):  # as people read them
        assert (tmp_path / name).read_text() == json.dumps(values, indent=2) + "\n"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start["time"]) for start in starts)


STATED = b'{"recipe": {}, "ds_config": {}, "environment": "of then"}\n'


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"recipe": {}}\n', STATED, b"\xff", b"[" * 100_000])
def test_a_damaged_list_of_starts_is_named_and_nothing_is_written(tmp_path, content):
    (tmp_path / "starts.jsonl").write_bytes(content)
    with pytest.raises(XdscaleError, match=r"starts\.jsonl: its last line is no record of a start .*; mend"):
        RunFolder(tmp_path).write_records(load_recipe("quickstart"), {}, 1, 1, continued=True)
    assert os.listdir(tmp_path) == ["starts.jsonl"]


def test_pipes_among_the_records_are_not_waited_for(run):
    recipe = load_recipe("quickstart")
    for name, read in (
        ("log.jsonl", lambda: read_log(run.log)),
        ("recipe.yaml", lambda: run.check(recipe)),
        ("starts.jsonl", lambda: run.write_records(recipe, {}, 1, 1, continued=True)),
    ):
        path = run.folder / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(XdscaleError, match=rf"{name}: is a pipe or a device"):
            read()


def test_half_of_a_last_line_is_passed_over(run):
    assert [entry["step"] for entry in read_log(run.log)] == [1, 2, 3]
