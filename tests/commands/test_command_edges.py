"""What commands print where something is missing, damaged or too much for a screen."""

import pytest
import torch
from typer.testing import CliRunner

from xdscale.commands import kernel_report
from xdscale.commands.checkpoints import checkpoints_app
from xdscale.commands.kernel_report import BEGIN, END, as_markdown, documented_rows, print_report
from xdscale.commands.replay import SampleReplay, _print, _recipe, _too_early
from xdscale.errors import XdscaleError

from ..training import test_checkpoint_faults as faults


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 2 and 3."""
    (tmp_path / "recipe.yaml").write_text("{}")
    faults.make_run(tmp_path / "checkpoints")
    return tmp_path


def invoke(*words):
    return CliRunner().invoke(checkpoints_app, list(map(str, words)))


def test_a_checkpoint_whose_record_is_damaged_is_listed_with_what_is_wrong(run):
    checkpoints = run / "checkpoints"
    (checkpoints / "universal-step-00000003").mkdir()
    path = checkpoints / "step-00000002" / "position.json"
    path.write_text("{")
    second, third = [line for line in invoke("list", run).output.splitlines() if line.strip()[:1] in ("2", "3")]
    assert second.split()[2].startswith(str(path)[:20])
    assert third.split()[2:] == ["1", "1", "fp32", "yes", "all", "there"]
    size = sum(file.stat().st_size for file in (checkpoints / "step-00000003").rglob("*") if file.is_file())
    assert third.split()[:2] == ["3", f"{size / 2**20:.1f}"]


def test_a_conversion_is_verified_with_its_checkpoint(run):
    (run / "checkpoints" / "universal-step-00000003").mkdir()
    done = invoke("verify", run)
    assert isinstance(done.exception, XdscaleError)
    assert done.stderr.splitlines() == [
        "step-00000002: verified",
        "step-00000003: verified",
        "universal-step-00000003: damaged",
    ]


def test_a_checkpoint_that_any_number_of_ranks_loads_is_not_converted(run, monkeypatch):
    def chosen(run, step, ranks):
        assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0)
        return run / str(step)

    monkeypatch.setattr("xdscale.training.checkpoint.choose_checkpoint", chosen)
    stage = [0]
    found = type("Place", (), {"zero_stage": property(lambda self: stage[0])})()
    monkeypatch.setattr("xdscale.training.checkpoint.read_position", lambda path: found)
    monkeypatch.setattr("xdscale.training.resharding.reshard_ahead", lambda path: f"made of {path}")
    done = invoke("reshard", run, "--step", "2")
    assert str(done.exception) == f"{run / '2'}: nothing to convert: ZeRO stage 0 loads at any number of ranks"
    stage[0] = 1
    assert invoke("reshard", run, "--step", "2").output == f"made of {run / '2'}\n"


@pytest.mark.parametrize(("step", "is_there"), [(0, False), (1, True), (3, True), (4, False)])
def test_a_step_is_one_of_the_runs(tmp_path, step, is_there):
    (tmp_path / "recipe.yaml").write_text(
        "system: finetune\nmodel: {name: e, subject: language, size: base, weights_sha256: null}\n"
        "task: {name: rte, epochs: 1}\ndata: {folder: glue}\ntraining: {steps: 3, global_batch: 4}\n"
        "run: {label: A, max_damaged_shards: 1}\noutput: {folder: /run}\n"
    )
    if is_there:
        assert _recipe(tmp_path, step, []).run.verify is True
        return
    with pytest.raises(XdscaleError, match=rf"^{tmp_path}: no step {step}; the run has steps 1 to 3$"):
        _recipe(tmp_path, step, [])


def sample(number, culprit=None):
    return SampleReplay(0, 100 + number, {"mlm": float("nan") if culprit else 2.5}, 0.5, culprit)


def printed(capsys, found, module=None):
    _print(found, module or torch.nn.Linear(2, 2), "step 7 of a run")
    return capsys.readouterr().out


def test_twenty_samples_are_shown_and_the_others_counted(capsys):
    for samples, more in (
        (20, None),
        (21, "… and 1 more with smaller gradients"),
        (25, "… and 5 more with smaller gra"),
    ):
        told = printed(capsys, [sample(number) for number in range(samples)])
        assert "step 7 of a run" in told
        assert ("with smaller gradients" in told) == (more is not None)
        assert more is None or more in told
        assert ("119" in told, "120" in told) == (True, False)
        assert told.splitlines()[-1].startswith("every sample is finite here: dropout, the machine or")


def test_samples_and_weights_that_are_not_finite_are_named(capsys):
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.bias[0] = float("inf")
    told = printed(capsys, [sample(1, "mlm"), sample(2, "mlm"), sample(3)], module)
    assert "the weights themselves are not finite: bias and 0 more" in told
    assert told.splitlines()[-1] == "2 not finite: sample 101, 102"
    assert "the weights themselves" not in printed(capsys, [sample(1)])


@pytest.mark.parametrize(("steps", "text"), [(0, ""), (1, ", 1 step too early"), (2, ", 2 steps too early")])
def test_weights_of_an_earlier_step_are_told(steps, text):
    assert _too_early(steps) == text


ROW = {name: "1" for name in kernel_report.COLUMNS} | {
    "operation": "op", "kernel": "k", "target": "sm_80", "spill bytes": "0", "shared limit": "9", "ratio": "1.050",
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """Rows in the place of minutes of compiling."""
    rows = [ROW, ROW | {"kernel": "l", "ratio": "1.000"}]
    monkeypatch.setattr(kernel_report, "shipped_cases", lambda: ["k", "l"])
    monkeypatch.setattr(kernel_report, "measure_all", lambda positions: [rows[number].copy() for number in positions])
    return rows


def test_the_report_is_printed_written_and_compared(measured, tmp_path, capsys):
    path = tmp_path / "table.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    print_report(write=path)
    told = capsys.readouterr().out
    assert told.startswith(as_markdown(measured) + "\n")
    assert told.endswith(
        "\n2 configurations: no spills, shared memory within limits, bytes at most 1.050 x the least\n"
    )
    assert path.read_text() == f"before\n{BEGIN}\n{as_markdown(measured)}\n{END}\nafter\n"
    assert documented_rows(path) == measured
    print_report(check=path)
    measured[1]["registers"] = "2"
    with pytest.raises(SystemExit) as ended:
        print_report(check=path)
    assert "table.md" in str(ended.value.code)
    measured[1]["spill bytes"] = "4"
    with pytest.raises(SystemExit, match="op l sm_80: spills 4"):
        print_report()


def test_a_file_without_markers_is_told_before_anything_is_compiled(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_report, "measure_all", None)
    (tmp_path / "a.md").write_text("no markers")
    for where in ("write", "check"):
        with pytest.raises(XdscaleError, match=r"a\.md"):
            print_report(**{where: tmp_path / "a.md"})


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    from types import SimpleNamespace

    def fail(case):
        raise ValueError("ptxas")

    monkeypatch.setattr(kernel_report, "_compiled", fail)
    case = SimpleNamespace(target="sm_80", operation="loss", name="forward")
    with pytest.raises(RuntimeError, match="^loss forward does not compile for sm_80$"):
        kernel_report.measure(case)
