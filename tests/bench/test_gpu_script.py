"""scripts/gpu.sh as a whole, on the CPU in its tiny form: every part runs and leaves its findings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xdscale.bench import gpu_runs, gpu_step
from xdscale.ds_config import read_ds_config

ROOT = Path(__file__).parents[2]


def findings(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_every_part_runs_on_a_cpu(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "SECONDS_IN_ALL": "1500"}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu.sh", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert "ended with" not in done.stdout, done.stdout
    assert "left out, the time is up" not in done.stdout
    versions, card = findings(tmp_path / "versions.jsonl")
    assert versions["torch"]
    assert card["card"] == "none: on the CPU"
    kernels = findings(tmp_path / "kernels.jsonl")
    assert len(kernels) == 22
    assert all(found["passes"] for found in kernels if found["dtype"] == "float32")
    base, base_profile, large, _ = findings(tmp_path / "step.jsonl")
    assert base["device_ms"].keys() == {"forward", "backward", "optimizer"}
    assert len(base_profile["top_ms"]) == 10
    assert "aten::addmm" in (tmp_path / "profile-quickstart-2.txt").read_text()
    assert all(row["milliseconds"] for row in findings(tmp_path / "rivals.jsonl"))
    (twenty,) = findings(tmp_path / "definitions.jsonl")
    assert twenty["steps"] == 20
    assert twenty["largest_relative_difference"] < 1e-4
    ways = {found["way"]: found for found in findings(tmp_path / "step_rivals.jsonl")}
    assert all(0 < min(found["seconds"]) for found in ways.values())
    assert len(ways) == 4
    (repeated,) = findings(tmp_path / "repeats.jsonl")
    assert repeated["gradients"] > 40
    assert (repeated["differing"], repeated["losses"]) == ([], 1)
    (compared,) = findings(tmp_path / "compare.jsonl")
    assert compared["relative"] == compared["gradient"] == 0.0  # both are the CPU
    runs = {found["run"]: found for found in findings(tmp_path / "runs.jsonl") if "losses" in found}
    assert runs.keys() == {"zero0", "zero1", "zero2", "zero2-again", "zero2-killed", "zero3", "large"}
    for run in runs.values():
        assert run["steps"] == [1, 2, 3, 4]
    for stage in (0, 1, 3):
        assert runs[f"zero{stage}"]["losses"] == pytest.approx(runs["zero2"]["losses"], rel=1e-5)
    killed, again = [found for found in findings(tmp_path / "runs.jsonl") if "bitwise" in found]
    assert (killed["run"], again["run"]) == ("zero2-killed", "zero2-again")
    assert killed["compared_steps"] == again["compared_steps"] == 4
    assert killed["bitwise"]
    assert again["bitwise"]
    for found in findings(tmp_path / "planned.jsonl"):
        expected, measured = found["flops_per_sequence"]
        assert expected > 0 < measured


STAND_IN = """#!/usr/bin/env bash
case "$*" in
    -c*visible_gpus*) echo "$GPUS" ;;
    -c*gpu_of_device*) echo H200-141G ;;
    *gpu_runs\ zero0*) cp "$6" "$CALLS-zero0.json" ;;&
    *) echo "${*:2}" >>"$CALLS"; [[ "$*" != *"gpu $FAILS "* ]] ;;
esac
"""


def calls(tmp_path, *, gpus, seconds="590", fails="none", chosen="", script=ROOT / "scripts" / "gpu.sh", out="out"):
    """Runs the script with a stand-in for Python, on a machine with so many GPUs; returns its calls and its words."""
    python, called = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    called.touch()
    environment = os.environ | {
        "PYTHON": str(python.absolute()),
        "GPUS": str(gpus),
        "CALLS": str(called.absolute()),
        "FAILS": fails,
    }
    environment |= {"SECONDS_IN_ALL": seconds, "SHARDS": "", "PARTS": chosen, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", script, tmp_path / out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line.split() for line in called.read_text().splitlines()], done.stdout


def parts(made):
    return [words[1] for words in made if words[1] != "plan"]


ORDER = ["versions", "kernels", "step", "shards", "zero2", "zero2-killed", "rivals", "step", "zero1", "zero3", "zero0"]
ORDER += ["zero2-again", "large", "definitions", "repeats", "compare", "step_rivals", "tiles", "planned"]


def test_what_matters_most_comes_first_and_a_part_that_fails_stops_none(tmp_path):
    for fails in ("none", "kernels"):
        made, said = calls(tmp_path, gpus=0, fails=fails)
        assert parts(made) == ORDER
        assert ("ended with 1" in said) == (fails == "kernels")
        (tmp_path / "calls").unlink()


def test_on_a_gpu_the_true_shapes_run(tmp_path):
    made, said = calls(tmp_path, gpus=8)
    assert said.startswith("GPUs: 8, of which one is used\n")
    assert parts(made) == ORDER
    assert made[2][3:] == ["xdbert-base-wikitext103", "36", "144"]
    shipped = read_ds_config("bert-base-zero2")
    del shipped["data_types"]  # which stage 0 does not have
    shipped["zero_optimization"]["stage"] = 0
    assert read_ds_config(str(tmp_path / "calls-zero0.json")) == shipped
    zero2 = next(words for words in made if words[1] == "zero2")
    assert zero2[4:6] == ["bert-base-zero2", "xdbert-base-wikitext103"]
    plans = [words for words in made if words[1] == "plan"]
    assert [words[2] for words in plans] == ["xdbert-base-wikitext103", "xdelectra-large-wikitext103"]
    assert all("H200-141G" in words for words in plans)


def test_a_python_without_xdscale_is_refused_before_anything_is_written(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    for python, why in ((bare, "No module named 'typer'"), (tmp_path / "none", "No such file or directory")):
        command = ["bash", ROOT / "scripts" / "gpu.sh", tmp_path / "out"]
        done = subprocess.run(
            command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert re.fullmatch(rf"error: PYTHON: {python} has no xdscale .*{why}\); activate .*\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_no_part_begins_when_the_time_is_up(tmp_path):
    made, said = calls(tmp_path, gpus=0, seconds="0")
    assert said.startswith("no GPU was found: a tiny form runs on the CPU\n")
    assert parts(made) == ["planned"]  # what is there already is only put side by side
    assert "== versions: left out, the time is up" in said


def test_only_the_chosen_parts_run(tmp_path):
    made, said = calls(tmp_path, gpus=1, chosen="versions\n runs-zero3 definitions")
    assert parts(made) == ["versions", "shards", "zero3", "definitions"]  # a run needs shards
    assert "plan" not in {words[1] for words in made}
    assert "== kernels" not in said


def test_each_part_can_be_chosen_by_the_name_that_is_printed_and_others_are_refused(tmp_path):
    made, said = calls(tmp_path, gpus=1)
    names = list(dict.fromkeys(re.findall(r"(?m)^== ([\w-]+), from", said)))
    assert parts(calls(tmp_path, gpus=1, chosen=" ".join(names))[0][len(made) :]) == ORDER
    with pytest.raises(subprocess.CalledProcessError) as refused:
        calls(tmp_path, gpus=1, chosen="versions kernel")
    assert refused.value.returncode == 2
    assert refused.value.stderr == f"error: PARTS: no part kernel; there are {' '.join(names)}\n"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SECONDS_IN_ALL", "10m", "error: SECONDS_IN_ALL: 10m; expected a number of seconds, such as 590"),
        ("SECONDS_IN_ALL", "-5", "error: SECONDS_IN_ALL: -5; expected a number"),
        ("SHARDS", "nowhere", "error: SHARDS: {}/nowhere holds no dataset.json; make it with"),
    ],
)
def test_odd_settings_are_refused_before_anything_is_written(tmp_path, name, value, message):
    environment = os.environ | {"PYTHON": sys.executable, "SHARDS": "", name: value}
    command = ["bash", ROOT / "scripts" / "gpu.sh", "out"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message.format(tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_clock_and_the_folder_do_not_come_from_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDS", "5000")
    monkeypatch.setenv("CDPATH", str(tmp_path))
    (tmp_path / ROOT.name / "scripts").mkdir(parents=True)
    monkeypatch.chdir(ROOT.parent)
    made, _ = calls(tmp_path, gpus=1, chosen="versions", seconds="0590", script=Path(ROOT.name, "scripts", "gpu.sh"))
    assert parts(made) == ["versions"]


def test_where_findings_cannot_be_written_nothing_is_done(tmp_path):
    (tmp_path / "out" / "parts.txt").mkdir(parents=True)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        calls(tmp_path, gpus=0)
    assert refused.value.returncode == 2
    assert f"{tmp_path}/out/parts.txt: Is a directory" in refused.value.stderr
    assert not (tmp_path / "calls").read_text()


def test_the_folder_is_meant_as_the_caller_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("out", "at 12:30"):
        _, said = calls(Path(), gpus=1, chosen="versions", out=out)
        assert f"everything is in {tmp_path}/{out}" in said
        assert (tmp_path / out / "parts.txt").read_text() == "versions\n"


def test_a_folder_with_somebodys_files_is_refused_and_one_of_its_own_is_not(tmp_path):
    """What an earlier run found makes room first."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        calls(tmp_path, gpus=0)
    assert refused.value.returncode == 2
    assert f"{out}: holds other files" in refused.value.stderr
    assert [path.read_text() for path in out.iterdir()] == ["mine"]
    (out / "notes.txt").unlink()
    calls(tmp_path, gpus=0, chosen="kernels")
    (out / "kernels.jsonl").write_text("{}")
    _, said = calls(tmp_path, gpus=0, chosen="step")
    assert (out / "parts.txt").read_text() == "step\n"
    (earlier,) = out.glob("until-*")
    assert f"is now in {earlier}" in said
    assert {"parts.txt", "kernels.txt", "kernels.jsonl"} == {path.name for path in earlier.iterdir()}
    assert not (out / "kernels.jsonl").exists()


def test_a_continued_run_is_compared_with_the_whole_one(tmp_path):
    path = tmp_path / "runs.jsonl"
    tell = gpu_runs.teller(path)
    tell(run="whole", losses=[2.0, 1.0])
    gpu_runs._compare(tell, path, "killed", [2.0, 1.0], "whole")
    gpu_runs._compare(tell, path, "killed", [2.0, 1.001], "whole")
    gpu_runs._compare(tell, path, "killed", [2.0], "whole")
    same, other, short = findings(path)[1:]
    assert (same["run"], same["compared_with"], same["bitwise"]) == ("killed", "whole", True)
    assert not other["bitwise"]
    assert other["largest_relative_difference"] == pytest.approx(1e-3)
    assert "nothing to compare" in short["problem"]


def test_rivals_of_a_step_that_does_not_fit_are_not_compared_with_each_other(monkeypatch, tmp_path):
    times = iter([RuntimeError("out of memory"), *[2.0] * 7, *[4.0] * 7, *[1.0] * 7])

    def seconds(run, device):
        if isinstance(found := next(times), Exception):
            raise found
        return found

    monkeypatch.setattr(gpu_step, "_seconds", seconds)
    told = []
    gpu_step.step_rivals(lambda **found: told.append(found), tmp_path, ["quickstart", "model.cross_layers=1", "2"])
    assert "out of memory" in told[0]["problem"]
    assert [(found["seconds"][0], found["times_ours"]) for found in told[1:]] == [(2.0, None), (4.0, None), (1.0, None)]
