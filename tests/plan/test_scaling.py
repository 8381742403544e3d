"""docs/scaling.md says what the plan says."""

import functools
from pathlib import Path

import pytest

from xdscale.errors import XdscaleError
from xdscale.plan import profile
from xdscale.plan.profile import profile_model
from xdscale.plan.report import machine_from, run_scaling
from xdscale.plan.scaling import FEWEST_PER_GPU, chart, markdown, scale
from xdscale.recipe import load_recipe

DOCS = Path(__file__).parents[2] / "docs"
NAME = "xdelectra-large-wikipedia"


@functools.cache
def profiled():
    return profile_model(load_recipe(NAME), precision="bf16")


@functools.cache
def curves(gpu):
    spec, machine = load_recipe(NAME, ["training.steps=22000"]), machine_from(gpu, 8, None, None, 0.4, None)
    return {
        "batch of the recipe": scale(NAME, spec, machine, profiled(), grow=False),
        "growing batch": scale(NAME, spec, machine, profiled(), grow=True),
    }


@pytest.mark.parametrize("gpu", ["A100-80G", "H100-80G"])
def test_tables_in_the_documentation(gpu):
    text = (DOCS / "scaling.md").read_text()
    for points in curves(gpu).values():
        assert markdown(points) in text


def test_chart_in_the_documentation():
    assert (DOCS / "scaling.svg").read_text() == chart(curves("A100-80G"), f"{NAME}, A100-80G: hours over GPUs")


def test_every_point_covers_the_corpus_once():
    for points in curves("A100-80G").values():
        for point in points:
            assert 0 <= point.steps * point.global_batch - 22_000 * 288 < point.global_batch
            assert point.cost == pytest.approx(point.gpus * point.hours * 2.0)
            assert point.efficiency <= 1.0001
    assert [point.gpus for point in curves("A100-80G")["growing batch"]] == [2**power for power in range(11)]
    assert all(point.global_batch >= FEWEST_PER_GPU * point.gpus for point in curves("A100-80G")["growing batch"][5:])


def test_length_precision_and_recomputing_count_here_too(monkeypatch):
    asked = {"sequence_length": 128, "precision": "fp16", "checkpointing": True}

    def profiled(spec, **options):
        assert options == asked
        raise StopIteration

    monkeypatch.setattr(profile, "profile_model", profiled)
    machine = machine_from("A100-80G", 8, None, None, 0.4, None)
    with pytest.raises(StopIteration):
        run_scaling(NAME, [], machine, **asked, as_json=True, chart=None)
    with pytest.raises(XdscaleError, match="--precision fp8: A100-80G computes in bf16 or fp16"):
        run_scaling(NAME, [], machine, **asked | {"precision": "fp8"}, as_json=True, chart=None)


@pytest.mark.parametrize(("batch", "last"), [(256, 256), (255, 128), (1, 1)])
def test_every_gpu_has_a_sequence_of_the_recipes_batch(batch, last):
    machine = machine_from("A100-80G", 8, None, None, 0.4, None)
    spec = load_recipe(NAME, ["training.steps=22000", f"training.global_batch={batch}"])
    points = scale(NAME, spec, machine, profiled(), grow=False)
    assert [point.gpus for point in points][-1] == last
    assert {point.global_batch for point in points} == {batch}
    assert [point.nodes for point in points] == [-(-point.gpus // 8) for point in points]


def test_what_fits_on_no_number_of_gpus_is_told():
    machine = machine_from("A100-80G", 8, None, 1.7, 0.4, None)
    with pytest.raises(XdscaleError, match=f"^{NAME}: fits on no number of A100-80G up to 1024$"):
        scale(NAME, load_recipe(NAME), machine, profiled(), grow=True)


def test_scaling_is_printed_as_tables_and_drawn_where_that_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "profile_model", lambda spec, **options: profiled())
    machine, path = machine_from("A100-80G", 8, None, None, 0.4, None), tmp_path / "chart.svg"
    how = {"sequence_length": None, "precision": None, "checkpointing": False}
    run_scaling(NAME, ["training.steps=22000"], machine, **how, as_json=False, chart=path)
    found = curves("A100-80G")
    assert capsys.readouterr().out == "\n\n".join(f"{name}:\n\n{markdown(found[name])}" for name in found) + "\n"
    assert path.read_text() == chart(found, f"{NAME}, A100-80G: hours over GPUs")
