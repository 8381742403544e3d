"""Real runs: learning a real task, all subjects and heads, failures, and a sweep that is stopped and continued."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import sklearn.metrics

from xdscale.errors import EXIT_FAULT, EXIT_STOPPED, XdscaleError
from xdscale.finetune.command import Request, default_ds_config, describe_subject, make_job, run_command
from xdscale.finetune.recipe import load_settings, resolve_run
from xdscale.finetune.sweep import SweepRunner, keep_best, what_is_kept
from xdscale.tasks.contract import find_task
from xdscale.tasks.own import read_own_task

WORKER = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


NOISE = """
import os, threading, time

def shout():
    while True:
        print('{"code": 1}', flush=True)
        os.write(1, b"stray line from C\\n")
        time.sleep(0.02)

threading.Thread(target=shout, daemon=True).start()
"""
"""A sitecustomize.py: whatever a worker runs, its stdout is full of lines that nobody asked for."""


@pytest.fixture(scope="module")
def swept(small_tasks, cassette_model, full_model, clip_tiny, tmp_path_factory):
    """One worker process works through runs of several models, tasks and subjects; two of them must fail."""
    out = tmp_path_factory.mktemp("out")
    cases = {
        "pretrained": (str(cassette_model), "language", "cola", ()),
        "random": (str(cassette_model), "language", "cola", ("model.weights=random",)),
        "full": (str(full_model), "cross-modal", "rte", ("training.epochs=1",)),
        "clip": (str(clip_tiny), "clip", "stsb", ("training.epochs=1", "model.clip_weights=random")),
        "mnli": (str(cassette_model), "language", "mnli", ("training.epochs=1", "model.max_length=24")),
        "choices": (str(cassette_model), "language", "own/follows.yaml", ("training.epochs=1",)),
        "number": (str(cassette_model), "language", "own/length.yaml", ("training.epochs=1",)),
        "no-data": (str(cassette_model), "language", "rte", ()),
        "no-loss": (
            str(cassette_model),
            "language",
            "cola",
            ("optim.learning_rate=1e30", "optim.gradient_clipping=1e30"),
        ),
    }
    jobs = []
    for name, (model, subject, task, overrides) in cases.items():
        settings = load_settings("quickstart", list(overrides))
        identity = describe_subject(model, subject, settings.model)
        own = read_own_task(small_tasks / task) if task.endswith(".yaml") else None
        source = small_tasks / "own" if own else small_tasks
        data = (own.task() if own else find_task(task)).read(source)
        source = source if name != "no-data" else out / "nowhere"
        of_run = {"subject": identity, "source": source, "seed": 0, "label": name, "folder": out / name, "own": own}
        recipe = resolve_run(settings, data, **of_run)
        jobs.append(make_job(recipe, "default", default_ds_config(gpu=False), out / f"{name}.log"))
    said = []
    noise = tmp_path_factory.mktemp("noise")
    (noise / "sitecustomize.py").write_text(NOISE)
    sweep = SweepRunner([WORKER | {"PYTHONPATH": str(noise)}], said.append)
    sweep.start_workers(1)
    code = sweep.run(jobs)
    return out, code, "\n".join(said)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def predictions(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pretrained_encoder_learns_what_one_with_random_weights_does_not(swept):
    """200 held-out sentences, half of each class: chance is .5 with a standard deviation of .035."""
    out, _, said = swept
    pretrained, random = (result(out / name)["metrics"]["accuracy"] for name in ("pretrained", "random"))
    assert pretrained > 0.7, said
    assert pretrained > random + 0.1


def test_results_are_what_the_predictions_say(swept):
    out, _, _ = swept
    found, lines = result(out / "pretrained"), predictions(out / "pretrained" / "predictions-dev.jsonl")
    labels, said = ([line[key] for line in lines] for key in ("label", "prediction"))
    assert found["examples"] == len(lines) == 200
    assert found["metrics"]["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, said), abs=1e-12)
    assert found["metrics"]["accuracy"] == pytest.approx(np.mean([line["correct"] for line in lines]), abs=1e-12)
    assert all(line["prediction"] == int(np.argmax(line["scores"])) for line in lines)
    assert found["score"] == {"name": "matthews", "value": found["metrics"]["matthews"], "higher_is_better": True}
    assert [entry["step"] for entry in found["curve"]] == list(range(1, found["settings"]["steps"] + 1))
    assert not (out / "pretrained" / "checkpoints").exists()


def test_stray_lines_of_a_worker_go_to_the_logs_alone(swept):
    out, _, said = swept
    assert "stray line from C" in (out / "pretrained.log").read_text()
    lines = said.partition("failed: ")[0].splitlines()  # of a run that failed the end of the log is shown
    assert not any("stray line" in line for line in lines if not line.startswith("running "))


def test_both_development_splits_of_mnli_are_measured_and_long_examples_are_named(swept):
    out, _, said = swept
    found = result(out / "mnli")
    for split, key in (("dev-m", "accuracy"), ("mismatched", "accuracy_mismatched")):
        lines = predictions(out / "mnli" / f"predictions-{split}.jsonl")
        assert found["metrics"][key] == pytest.approx(np.mean([line["correct"] for line in lines]))
        assert {len(line["scores"]) for line in lines} == {3}
    assert found["split"] == "dev-m"
    assert "note: MNLI/train.tsv: " in said
    assert "of 12 examples have more than 24 tokens and are cut, the first in line " in said


def test_unlabelled_splits_become_submissions(swept):
    """GLUE's format: index, prediction; words for classes, numbers for STS-B."""
    out, _, _ = swept
    rows = [line.split("\t") for line in (out / "full" / "predictions" / "RTE.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "prediction"]
    assert [row[0] for row in rows[1:]] == [str(n) for n in range(7)]
    assert {row[1] for row in rows[1:]} <= {"entailment", "not_entailment"}
    rows = (out / "clip" / "predictions" / "STS-B.tsv").read_text().splitlines()
    assert all(np.isfinite(float(row.split("\t")[1])) for row in rows[1:])
    lines = predictions(out / "clip" / "predictions-dev.jsonl")
    assert all(line["squared_error"] == pytest.approx((line["prediction"] - line["label"]) ** 2) for line in lines)
    assert result(out / "clip")["subject"] == "clip"


def test_tasks_of_ones_own_with_choices_and_with_a_number(swept, small_tasks):
    out, _, said = swept
    lines = predictions(out / "choices" / "predictions-dev.jsonl")
    rows = pyarrow.parquet.read_table(small_tasks / "own" / "dev.parquet").to_pylist()
    assert [(line["sentence1"], line["sentence2"]) for line in lines] == [
        (row["before"], [row["a"], row["b"], row["c"]]) for row in rows
    ]
    assert [line["label"] for line in lines] == ["xyz".index(row["right"]) for row in rows]
    assert {len(line["scores"]) for line in lines} == {3}
    found = result(out / "choices")
    assert found["metrics"]["accuracy"] == pytest.approx(np.mean([line["correct"] for line in lines]))
    assert (found["title"], found["settings"]["choices"]) == ("Follows", ["a", "b", "c"])
    lines, found = predictions(out / "number" / "predictions-dev.jsonl"), result(out / "number")
    errors = [(line["prediction"] - line["label"]) ** 2 for line in lines]
    assert found["metrics"]["rmse"] == pytest.approx(np.sqrt(np.mean(errors)))
    assert found["score"] == {"name": "rmse", "value": found["metrics"]["rmse"], "higher_is_better": False}
    assert [line["sentence2"] for line in lines] == [None] * len(lines)
    assert (out / "number" / "predictions" / "length.tsv").read_text().startswith("index\tprediction\n0\t")


def test_a_failed_run_is_named_with_the_end_of_its_log_and_the_others_go_on(swept):
    out, code, said = swept
    assert code == EXIT_FAULT
    assert "failed: rte seed 0\nexit code 2; last lines of" in said
    assert "has no RTE/train.tsv" in said
    assert "had no finite loss and gradient" in said
    assert not (out / "no-loss" / "result.json").exists()


def command(tasks, model, out):
    return [
        *("finetune", "--model", str(model), "--task", "cola", "--data", str(tasks)),
        *("--out", str(out), "--seeds", "1", "--recipe", "quickstart", "run.checkpoint_every=10"),
    ]


def test_a_stopped_sweep_continues_where_it_was(
    swept, small_tasks, cassette_model, tmp_path, capsys, fork, launch_ranks
):
    out = tmp_path / "sweep"
    arguments = command(small_tasks, cassette_model, out)
    stderr = tmp_path / "stderr.txt"
    process = fork("xdscale", *arguments, outputs=(os.devnull, stderr))
    checkpoints = out / "cola" / "seed-0" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == EXIT_STOPPED, stderr.read_text()
    assert "stopped by a signal, 0 of 1 run done; the same command continues" in stderr.read_text()
    assert not (out / "cola" / "seed-0" / "result.json").exists()
    again = launch_ranks("xdscale", *arguments, timeout_seconds=200)
    assert again.code == 0, again.stderr
    assert "the model of each task's best seed is kept, in the folder model of its run" in again.stderr
    assert (out / "cola" / "seed-0" / "model" / "model.safetensors").is_file()
    assert "continuing after step" in (out / "logs" / "cola-seed-0.log").read_text()
    unbroken = predictions(swept[0] / "pretrained" / "predictions-dev.jsonl")
    found = predictions(out / "cola" / "seed-0" / "predictions-dev.jsonl")
    np.testing.assert_allclose([line["scores"] for line in found], [line["scores"] for line in unbroken], atol=1e-5)
    summary = json.loads((out / "sweep.json").read_text())
    assert summary["tasks"] == {"cola": {"seeds": [0]}}
    assert summary["model"]["weights_sha256"] == "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"
    finished_at = (out / "cola" / "seed-0" / "result.json").stat().st_mtime_ns
    assert run_command(request(cassette_model, small_tasks, out)) == 0  # nothing is left to do
    assert (out / "cola" / "seed-0" / "result.json").stat().st_mtime_ns == finished_at
    assert "1 of 1" in capsys.readouterr().out
    other = shutil.copytree(small_tasks, tmp_path / "other")
    (other / "CoLA" / "dev.tsv").write_text("wiki\t1\t\tAnother sentence.\n")
    with pytest.raises(XdscaleError, match=r"seed-0/result\.json: this run is finished, but dev\.tsv of .*other is"):
        run_command(request(cassette_model, other, out))
    with pytest.raises(XdscaleError, match=r"holds a run of a different recipe \(optim\.learning_rate was"):
        run_command(request(cassette_model, small_tasks, out, overrides=["optim.learning_rate=1e-3"]))
    with pytest.raises(XdscaleError, match=r"sweep\.json: holds .* another model \(label was .*, now 'other'\)"):
        run_command(request(cassette_model, small_tasks, out, label="other"))


def request(model, data, out, **changes):
    values = {
        "model": str(model),
        "subject": "language",
        "tasks": ["cola"],
        "data": str(data),
        "out": out,
        "seeds": 1,
        "label": None,
        "recipe": "quickstart",
        "overrides": [],
        "ds_config": None,
        "jobs": None,
    }
    return Request(**(values | changes))


@pytest.mark.usefixtures("idle_workers")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["mrcp"]}, "no such task; did you mean 'mrpc'"),
        ({"tasks": ["qnli"]}, "has no QNLI/train.tsv"),
        ({"recipe": "papr"}, "no such finetuning recipe.*did you mean 'paper'"),
        ({"recipe": "vlbert-base-e2e"}, "no such finetuning recipe; .* one of 'xdscale train'"),
        ({"overrides": ["training.epoch=2"]}, "unknown key 'training.epoch'; did you mean 'epochs'"),
        ({"overrides": ["seeds.rtee=2"]}, "seeds: unknown task 'rtee'; did you mean 'rte'"),
        ({"tasks": ["own.yaml"]}, "^own.yaml: cannot be read: No such file or directory$"),
        ({"tasks": ["OWN/person.yaml"]}, "--data .*: nothing is read from there, since .*person.yaml says where its"),
        ({"tasks": ["OWN/person.yaml", "OWN/person.yml"], "data": None}, "are both named 'person'; rename one"),
        ({"tasks": ["refcoco"], "regions": "/none"}, "image regions, /none: no such .* with 'xdscale regions import'"),
        ({"model": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"overrides": ["model.max_length=1024"]}, r"model\.max_length = 1024: .* has 512 positions"),
        ({"subject": "cross-modal"}, "holds no cross_modal/config.json"),
        ({"out": Path("/dev/null")}, "--out /dev/null: exists and is not a folder"),
        ({"out": Path("/dev/null/out")}, "--out /dev/null/out: /dev/null is not a folder"),
        ({"out": Path("/proc/out")}, "/proc/out: cannot be written: "),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(small_tasks, cassette_model, tmp_path, changes, message):
    if "tasks" in changes:
        changes["tasks"] = [name.replace("OWN", str(small_tasks / "own")) for name in changes["tasks"]]
    with pytest.raises(XdscaleError, match=message):
        run_command(request(**({"model": cassette_model, "data": small_tasks, "out": tmp_path / "out"} | changes)))
    assert not (tmp_path / "out" / "cola").exists()


@pytest.mark.usefixtures("idle_workers")
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda out: out.symlink_to("nowhere"), "--out .*: exists and is not a folder"),
        (lambda out: out.mkdir() or (out / "sweep.json").symlink_to("/dev/full"), "holds files but no sweep.json"),
        (lambda out: out.mkdir() or (out / "sweep.json").write_text("{"), r"sweep\.json: not JSON: EOF"),
        (lambda out: out.mkdir() or (out / "sweep.json").write_text("{}"), r"sweep\.json: format is missing"),
    ],
)
def test_a_folder_that_is_no_sweep_is_named_and_stays(small_tasks, cassette_model, tmp_path, prepare, message):
    prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(XdscaleError, match=message):
        run_command(request(cassette_model, small_tasks, tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_of_a_tasks_seeds_the_best_models_weights_stay(tmp_path):
    """Those that are kept anyway stay too, and where less is better less is best."""
    for task, higher, stay in (("cola", True, [1, 4]), ("stsb", False, [0, 4])):
        for seed, (value, kept) in enumerate(((0.2, "best"), (0.8, "best"), (0.5, "best"), (0.9, False), (0.1, True))):
            folder = tmp_path / task / f"seed-{seed}"
            (folder / "model").mkdir(parents=True)
            found = {"format": 1, "task": task, "seed": seed, "split": "dev", "metrics": {}, "examples": 1, "data": {}}
            found |= {"score": {"name": "x", "value": value, "higher_is_better": higher}, "settings": {}, "curve": []}
            (folder / "result.json").write_text(json.dumps(found | {"kept_model": kept}))
            if kept is False:
                (folder / "model").rmdir()
        (tmp_path / task / "seed-5" / "model").mkdir(parents=True)  # of a run that is under way
        keep_best(tmp_path / task)
        assert sorted(path.parent.name for path in (tmp_path / task).glob("*/model")) == [
            f"seed-{seed}" for seed in (*stay, 5)
        ]


@pytest.mark.parametrize(
    ("kind", "keep", "told"),
    [
        ("clip", False, "results alone are kept, no weights: what is finetuned as clip is not exported"),
        ("vlbert", False, "no weights, and a finished run cannot give them later: run.keep_model=best keeps the model"),
        ("language", "best", "the model of each task's best seed is kept, in the folder model of its run (4 bytes for"),
        ("visualbert", True, "the models of all seeds are kept, in the folder model of its run (4 bytes for each"),
    ],
)
def test_what_is_left_of_a_sweep_is_said_before_it(kind, keep, told):
    assert told in what_is_kept(kind, keep)
