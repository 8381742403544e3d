"""What the command asks for, what it says in the end, and what it leaves as it is."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from xdscale.data.task_files import Example
from xdscale.errors import EXIT_FAULT, XdscaleError
from xdscale.finetune import command
from xdscale.finetune.command import Request, TaskSource
from xdscale.finetune.finished import print_table, require_model, require_same_files
from xdscale.finetune.recipe import load_settings
from xdscale.report.sweep import FinetunedModel
from xdscale.tasks.contract import TaskData, find_task, task_names

SUBJECT = {"name": "m", "subject": "language", "encoder": "bert", "weights_sha256": "ab", "size": "base"}

NAMELESS = FinetunedModel(name="m", label="mine", subject="language", encoder="bert")  # of weights that nobody hashed


def data_of(task, **files):
    stated = {name: {"sha256": digest, "rows": 1} for name, digest in files.items()}
    return TaskData(find_task(task), [], {}, {}, stated, {})


def write_result(out, task, seed, score, **files):
    """A finished run as its folder says it."""
    folder = out / task / f"seed-{seed}"
    folder.mkdir(parents=True)
    score = {"name": "accuracy", "value": score, "higher_is_better": True}
    data = {name: {"sha256": digest, "rows": 1} for name, digest in files.items()}
    values = {"format": 1, "task": task, "seed": seed, "split": "dev", "metrics": {}, "score": score, "examples": 1}
    (folder / "result.json").write_text(json.dumps(values | {"data": data, "settings": {}, "curve": []}))
    return folder / "result.json"


def test_the_table_has_a_row_for_each_task_with_a_finished_seed(tmp_path, capsys):
    out = tmp_path / "[bold]"  # which is no markup
    for seed, score in enumerate((0.5, 0.75, 0.125)):
        write_result(out, "rte", seed, score)
    tasks = {task: find_task(task) for task in ("rte", "cola")}
    print_table(out, tasks, {"rte": [0, 1, 2, 3], "cola": [0]})
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if "RTE" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "RTE", "accuracy", "0.5000", "0.1250", "0.7500", "3 of 4", "none"
    ]  # fmt: skip
    assert "CoLA" not in shown
    assert "[bold]" in "".join(shown.split())
    print_table(out, tasks, {"cola": [0]})
    assert capsys.readouterr().out == ""


def request(**values):
    known = {
        "model": "m", "subject": None, "tasks": ["rte"], "data": "d", "out": Path("o"), "seeds": None, "label": None,
        "recipe": "paper", "overrides": [], "ds_config": None, "jobs": None,
    }  # fmt: skip
    return Request(**known | values)


@pytest.mark.parametrize("regions", [None, "r"])
def test_all_are_the_tasks_with_images_or_those_without(monkeypatch, tmp_path, regions):
    read = []
    monkeypatch.setattr(command, "open_regions", lambda name: None)
    monkeypatch.setattr(command, "read_task", lambda task, folder, regions: read.append((task.name, folder)))
    asked = request(tasks=["all", "rte" if regions is None else "vqa"], data=str(tmp_path), regions=regions)
    found = command._read_data(asked, load_settings("paper", []))
    wanted = [name for name in task_names() if bool(find_task(name).images) == (regions is not None)]
    assert list(found) == wanted
    assert read == [(name, tmp_path) for name in wanted]
    assert {source.folder for source in found.values()} == {tmp_path}


def test_tasks_are_fetched_where_no_folder_is_named(monkeypatch):
    fetched = []
    monkeypatch.setattr(type(find_task("rte")), "fetch", lambda task, folder: fetched.append((task.name, folder)))
    monkeypatch.setattr(command, "read_task", lambda *_: None)
    command._read_data(request(tasks=["rte", "cola"], data=None), load_settings("paper", []))
    assert fetched == [("rte", command.HUB_DATA), ("cola", command.HUB_DATA)]


def test_a_sweep_goes_on_with_more_seeds_and_tasks_of_the_same_model(tmp_path):
    first = command._summary(tmp_path / "new", SUBJECT, "mine", {"rte": [0, 2]})
    assert {task: entry.seeds for task, entry in first.tasks.items()} == {"rte": [0, 2]}
    (tmp_path / "lost+found").mkdir()  # of the disk
    assert command._summary(tmp_path, SUBJECT, "mine", {"rte": [0, 2]}) == first
    (tmp_path / "sweep.json").write_text(first.model_dump_json())
    more = command._summary(tmp_path, SUBJECT, "mine", {"rte": [1, 0], "cola": [0]})
    assert {task: entry.seeds for task, entry in more.tasks.items()} == {"rte": [0, 1, 2], "cola": [0]}
    with pytest.raises(XdscaleError, match=r"sweep of another model \(label was 'mine', now 'other'\); choose another"):
        command._summary(tmp_path, SUBJECT, "other", {"rte": [0]})
    moved = command._summary(tmp_path, SUBJECT | {"name": "elsewhere/m/"}, "mine", {"rte": [0]})  # the same weights
    assert (moved.model.name, moved.tasks) == ("elsewhere/m/", first.tasks)
    for change in ({"weights_sha256": "cd"}, {"name": "n", "weights_sha256": None}, {"name": "n", "encoder": "other"}):
        with pytest.raises(XdscaleError, match="holds the sweep of another model"):
            command._summary(tmp_path, SUBJECT | change, "mine", {"rte": [0]})
    (tmp_path / "sweep.json").write_text(moved.model_copy(update={"model": NAMELESS}).model_dump_json())
    with pytest.raises(XdscaleError, match=r"another model \(name was 'm', now 'n'\)"):
        command._summary(tmp_path, SUBJECT | {"name": "n", "weights_sha256": None}, "mine", {"rte": [0]})
    (tmp_path / "sweep.json").rename(tmp_path / "else.json")
    with pytest.raises(XdscaleError, match=r"holds files but no sweep\.json; choose an empty or new folder"):
        command._summary(tmp_path, SUBJECT, "mine", {"rte": [0]})


def test_a_finished_run_stays_where_its_files_are_the_same_and_its_model_is_kept(tmp_path):
    path = write_result(tmp_path, "rte", 0, 0.5, train="1", dev="2")
    require_same_files(path, data_of("rte", dev="2", train="1"), tmp_path)
    for files, name in (({"train": "1", "dev": "3"}, "dev"), ({"dev": "2"}, "train"), ({"a": "1"}, "a")):
        with pytest.raises(XdscaleError, match=f"this run is finished, but {name} of .* is another file than then"):
            require_same_files(path, data_of("rte", **files), tmp_path)
    with pytest.raises(XdscaleError, match=r"this run is finished, but has kept no model \(run\.keep_model\)"):
        require_model(path)
    (path.parent / "model").mkdir()
    (path.parent / "model" / "config.json").write_text("{}")
    require_model(path)


def test_each_worker_has_its_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    for jobs, threads in ((1, "7"), (3, "2"), (7, "1"), (9, "1")):
        slots = command._slots(jobs, [])
        assert [slot["OMP_NUM_THREADS"] for slot in slots] == [threads] * jobs
        assert {slot["DS_ACCELERATOR"] for slot in slots} == {"cpu"}
        assert not any("CUDA_VISIBLE_DEVICES" in slot for slot in slots)
    slots = command._slots(5, ["4", "6"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["4", "6", "4", "6", "4"]
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"1"}
    assert not any("DS_ACCELERATOR" in slot for slot in slots)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert {slot["OMP_NUM_THREADS"] for slot in (*command._slots(9, []), *command._slots(1, ["0"]))} == {"3"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu = None: expected a whole number"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping = 0\.5 contradicts the recipe: optim\.gradient_clipping"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "fp16 = enabled, but .* has no GPU"),
    ],
)
def test_a_deepspeed_config_that_no_run_could_take_is_refused_before_the_first(monkeypatch, tmp_path, values, message):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr("xdscale.training.environment.uses_gpus", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    monkeypatch.setattr(command, "describe_subject", lambda *_, **__: SUBJECT)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"train_micro_batch_size_per_gpu": 3} | values))
    sources = {"cola": TaskSource(data_of("cola"), tmp_path / "cola")}
    asked = request(model="m", out=tmp_path / "out", ds_config=str(own)), load_settings("paper", []), sources
    with pytest.raises(XdscaleError, match=rf"own\.json: {message}"):
        command._plan(*asked, {"cola": [1]}, gpu=False)
    assert not (tmp_path / "out").exists()


def test_of_every_task_the_first_seeds_come_first_and_finished_ones_stay(monkeypatch, tmp_path):
    asked_of = []

    def describe(*given, **more):
        asked_of.append((given, more))
        return SUBJECT

    monkeypatch.setattr(command, "describe_subject", describe)
    checked = []
    monkeypatch.setattr(command, "RunFolder", lambda folder: SimpleNamespace(check=lambda _: checked.append(folder)))
    examples = [Example("0", (("a", "b"),), 0, 1)] * 10
    sources = {
        task: TaskSource(TaskData(find_task(task), examples, {}, {}, {}, {}), tmp_path / task)
        for task in ("rte", "cola")
    }
    asked = request(model="models/mine/", out=tmp_path / "out"), load_settings("paper", []), sources
    jobs = command._plan(*asked, {"rte": [0, 1, 2], "cola": [0, 1]}, gpu=False)
    assert [job.name for job in jobs] == ["rte seed 0", "cola seed 0", "rte seed 1", "cola seed 1", "rte seed 2"]
    assert sorted(checked) == sorted(job.result.parent for job in jobs)
    tasks = [source.data.task for source in sources.values()]
    assert asked_of == [(("models/mine/", None, asked[1].model, tasks), {"keep_model": False, "regions": None})]
    last, folder = jobs[-1], tmp_path / "out" / "rte" / "seed-2"
    assert (last.result, last.log) == (folder / "result.json", tmp_path / "out" / "logs" / "rte-seed-2.log")
    assert (last.message["log"], last.stops_early) == (str(last.log), False)
    assert last.message["ds_config_name"] == "the default DeepSpeed configuration"
    assert last.message["ds_config"] == command.default_ds_config(gpu=False)
    own = tmp_path / "own.json"
    own.write_text('{"train_micro_batch_size_per_gpu": 3}')
    stated = request(model="m", out=tmp_path / "stated", ds_config=str(own)), *asked[1:]
    (job,) = command._plan(*stated, {"cola": [1]}, gpu=False)
    assert (job.message["ds_config_name"], job.message["ds_config"]) == (str(own), json.loads(own.read_text()))
    pixels = load_settings("visualbert-vcr-answer-e2e", [])
    monkeypatch.setattr(command, "computes_in_bf16", lambda: False)
    monkeypatch.setattr(command, "describe_subject", lambda *_, **__: SUBJECT | {"subject": "visualbert"})
    (job,) = command._plan(request(out=tmp_path / "p"), pixels, sources, {"cola": [1]}, gpu=True)
    assert job.message["ds_config"] == command.default_ds_config(gpu=True, bf16=False, micro_batch=4)
    monkeypatch.setattr(command, "describe_subject", describe)
    recipe = last.message["recipe"]
    assert (recipe["training"]["seed"], recipe["run"]["label"], recipe["output"]["folder"]) == (2, "mine", str(folder))
    assert recipe["data"]["folder"] == str(tmp_path / "rte")
    write_result(tmp_path / "out", "cola", 0, 0.5)
    again = command._plan(*asked, {"rte": [0, 1, 2], "cola": [0, 1]}, gpu=False)
    assert [job.name for job in again] == ["rte seed 0", "rte seed 1", "cola seed 1", "rte seed 2"]
    kept = asked[0], load_settings("paper", ["run.keep_model=true"]), sources
    with pytest.raises(XdscaleError, match=r"cola/seed-0/result\.json: this run is finished, but has kept no model"):
        command._plan(*kept, {"cola": [0]}, gpu=False)
    assert asked_of[-1][1] == {"keep_model": True, "regions": None}
    other = sources | {"cola": TaskSource(data_of("cola", train="1"), tmp_path / "cola")}
    with pytest.raises(XdscaleError, match=r"this run is finished, but train of .*/cola is another file than then"):
        command._plan(*asked[:2], other, {"cola": [0]}, gpu=False)
    stated = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (stated["model"]["label"], stated["tasks"]["rte"]["seeds"]) == ("mine", [0, 1, 2])


def test_what_a_sweep_says_goes_to_stderr_as_it_is(monkeypatch, capsys, tmp_path):
    said = f"[1/2] rte[/b] [bold]{'long ' * 60}end"
    started = []

    class Sweep:
        def __init__(self, slots, say):
            self.say, self.run = say, lambda jobs: say(said) or EXIT_FAULT
            started.append(len(slots))

        def start_workers(self, most):
            started.append(most)

        def end_workers(self):
            started.append("ended")

    monkeypatch.setattr(command, "SweepRunner", Sweep)
    monkeypatch.setattr(command, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(command, "_read_data", lambda *_: {"rte": TaskSource(data_of("rte"), tmp_path)})
    monkeypatch.setattr(command, "_plan", lambda *_, gpu: [])
    write_result(tmp_path / "out", "rte", 1, 0.25)
    assert command.run_command(request(subject="language", out=tmp_path / "out", seeds=3)) == EXIT_FAULT
    assert started == [2, 2, "ended"]  # workers for the GPUs, and no more than there are runs to do
    printed = capsys.readouterr()
    assert printed.err == said + "\n"
    assert "1 of 3" in printed.out
