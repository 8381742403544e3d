"""What a run wrote, read back with TensorBoard's own readers, as its dashboards do."""

import math
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from xdscale.recipe import load_recipe
from xdscale.systems.contract import Objective
from xdscale.training.board import describe, layout
from xdscale.training.monitor import Monitor
from xdscale.training.run_folder import RunFolder, read_log

OBJECTIVES = {
    "adaptation": {name: Objective(1.0) for name in ("mlm", "match", "clip_tokens")},
    "MLM alone": {"mlm": Objective(1.0)},
    "finetuning": {"task": Objective(1.0)},
    "other figures": {"regions": Objective(1.0, ("iou", "accuracy")), "features": Objective(0.5, ())},
}


class _Recipe:
    """What a monitor asks of a recipe."""

    training = type("Training", (), {"steps": 6})()

    def __init__(self, learning_rate=1e-4):
        self._learning_rate = learning_rate

    def to_yaml(self):
        return "a: 1\n"

    def model_dump(self, mode):
        return {"optim": {"learning_rate": self._learning_rate}}


@pytest.fixture(autouse=True)
def _files_in_the_order_of_writing(monkeypatch):
    """Names of files of one second, which runs hardly write twice, end in a number and are sorted as text."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def train(folder, objectives, start, stop, recipe=None):
    """What the loop tells the monitor from one step to another."""
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    monitor = Monitor(run, recipe or _Recipe(), start, objectives)
    learned = {f"{kind}/{name}": 0.5 for name, each in objectives.items() for kind in ("loss", *each.metrics)}
    if start == 0:
        monitor.validation(0, learned)
    for step in range(start + 1, stop + 1):
        other = ("optim/lr", "optim/grad_norm", "throughput/tokens_per_second", "throughput/mfu", "data/wait_fraction")
        other += ("memory/peak_gib", "health/skipped_steps", "health/loss_scale_overflows")
        monitor.step(step, {"loss/total": 1.5} | learned | dict.fromkeys(other, 0.25), "hash")
    monitor.validation(stop, learned)
    monitor.end(stop, [1.0], stopped=stop < 6)


def read(logdir):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    return multiplexer


@pytest.fixture(params=OBJECTIVES)
def objectives(request):
    return OBJECTIVES[request.param]


@pytest.fixture
def continued(tmp_path, objectives, capsys):
    """The folder of a run that was stopped after 4 steps and continued from a checkpoint after 3."""
    folder = tmp_path / "runs" / "first"
    train(folder, objectives, 0, 4)
    train(folder, objectives, 3, 6)
    return folder


def test_the_log_of_a_start_at_step_0_holds_nothing_of_before_and_a_later_one_all_up_to_its_step(tmp_path, capsys):
    def logged():
        entries = read_log(tmp_path / "log.jsonl")
        return [(entry["step"], entry["kind"]) for entry in entries]

    objectives = next(iter(OBJECTIVES.values()))
    train(tmp_path, objectives, 0, 4)
    train(tmp_path, objectives, 0, 1)
    first = [(0, "validation"), (1, "step"), (1, "validation"), (1, "end")]
    assert logged() == first
    train(tmp_path, objectives, 1, 2)
    assert logged() == [*first, (2, "step"), (2, "validation"), (2, "end")]


def test_a_run_that_was_continued_is_one_run_with_a_name(continued):
    assert list(read(continued / "tensorboard").Runs()) == ["first"]
    assert list(read(continued.parent).Runs()) == ["first/tensorboard/first"]
    multiplexer = read(continued / "tensorboard")
    assert [event.step for event in multiplexer.Tensors("first", "recipe/text_summary")] == [0]
    assert [event.step for event in multiplexer.Tensors("first", "loss/total")] == [1, 2, 3, 4, 5, 6]


def test_every_chart_of_the_layout_has_curves_and_every_curve_a_chart(continued, objectives):
    multiplexer = read(continued / "tensorboard")
    (event,) = multiplexer.Tensors("first", "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    written = {tag for tag in multiplexer.PluginRunToTagToContent("scalars")["first"]}
    shown = set()
    for category in layout.category:
        for chart in category.chart:
            assert set(chart.multiline.tag) & written, chart.title
            shown |= set(chart.multiline.tag)
    assert {tag for tag in written if not tag.startswith("final/")} - shown <= {"loss/total"}
    assert shown - written <= {"data/quarantined_shards"}
    assert ("loss/total" in shown) == (len(objectives) > 1)  # that of one objective is its own
    assert {f"validation/{kind}/{name}" for name, each in objectives.items() for kind in each.metrics} <= shown


def test_every_curve_has_a_title_and_a_description(continued):
    provider = MultiplexerDataProvider(read(continued / "tensorboard"), str(continued))
    found = provider.list_scalars(RequestContext(), experiment_id="", plugin_name="scalars")["first"]
    assert found
    for tag, curve in found.items():
        assert curve.display_name != tag
        assert curve.description
    assert "relative to what the same device reached on a plain square matrix product" in (
        found["throughput/mfu"].description
    )


def test_last_figures_stand_in_the_run_itself(continued, objectives):
    multiplexer = read(continued / "tensorboard")
    name = f"final/accuracy/{next(iter(objectives))}"
    assert multiplexer.Tensors("first", name)[-1].step == 6
    assert "_hparams_/session_start_info" in multiplexer.PluginRunToTagToContent("hparams")["first"]


@pytest.mark.parametrize(
    ("step", "stopped", "how"),
    [
        (9, False, "done after step 9 of 9; peak"),
        (4, True, "stopped by a signal after step 4 of 9; the same command continues; peak"),
        (5, False, "stopped after step 5 of 9, as run.stop_at_step = 5 says; the same command without it"),
        (4, False, "ended after step 4 of 9: 2 validations in a row had no better loss/mlm; peak"),
    ],
)
def test_the_last_line_says_why_a_run_ended(tmp_path, capsys, step, stopped, how):
    stated = ["training.steps=9", "run.stop_at_step=5", "training.best=loss/mlm", "training.patience=2"]
    Monitor(RunFolder(tmp_path), load_recipe("quickstart", stated), 0, {}).end(step, [1.0, 2.5], stopped=stopped)
    said = capsys.readouterr()
    assert how in said.out + said.err
    assert "peak memory 2.50 GiB per rank" in said.out + said.err


def test_a_patience_of_one_is_told_in_the_singular(tmp_path, capsys):
    stated = ["training.steps=9", "training.best=loss/mlm", "training.patience=1"]
    Monitor(RunFolder(tmp_path), load_recipe("quickstart", stated), 0, {}).end(4, [1.0], stopped=False)
    said = capsys.readouterr()
    assert "of 9: 1 validation in a row had no better loss/mlm; peak" in said.out + said.err


def test_settings_are_those_of_the_newest_end(tmp_path, capsys):
    """TensorBoard's HParams show the first settings that a run's files have."""
    train(tmp_path / "first", OBJECTIVES["MLM alone"], 0, 4)
    train(tmp_path / "first", OBJECTIVES["MLM alone"], 3, 6, _Recipe(learning_rate=2e-4))
    multiplexer = read(tmp_path / "first" / "tensorboard")
    stored = multiplexer.SummaryMetadata("first", "_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(stored).session_start_info.hparams
    assert settings["optim.learning_rate"].number_value == 2e-4


def test_units_stand_in_titles():
    assert describe("memory/peak_gib")[0] == "peak memory (GiB)"
    assert describe("validation/loss/mlm")[0] == "held-out loss, masked language modelling (per target)"
    assert describe("final/accuracy/task")[0] == "last held-out accuracy, the finetuning task (share)"
    assert describe("iou/regions") == ("iou, regions (per target)", "Mean over the targets of the global batch.")


def test_an_objective_without_held_out_targets_is_said_and_has_no_curve(tmp_path, capsys):
    monitor = Monitor(RunFolder(tmp_path), _Recipe(), 0, OBJECTIVES["adaptation"])
    monitor.validation(0, {"loss/mlm": 9.5, "accuracy/mlm": 0.25, "loss/match": 0.5, "accuracy/match": 0.5})
    monitor.end(0, [1.0], stopped=True)
    assert capsys.readouterr().err.startswith(
        "step 0: held-out loss/mlm 9.5, accuracy/mlm 0.25, loss/match 0.5, accuracy/match 0.5, "
        "clip_tokens – (no targets)\n"
    )
    tags = {tag for run in read(tmp_path).Runs().values() for tag in run["tensors"]}
    assert "validation/loss/match" in tags
    assert not any(tag.endswith("clip_tokens") for tag in tags)


def test_lines_of_a_log_say_how_long_the_run_will_take(tmp_path, monkeypatch, capsys):
    """By a clock: what this process did since its first step, which takes longer than others, is the pace.

    After 15 seconds nothing is said yet.
    """
    clock = iter((100.0, 160.0, 175.0, 190.5))
    monkeypatch.setattr("xdscale.training.monitor.time.monotonic", lambda: next(clock))
    monitor = Monitor(RunFolder(tmp_path), _Recipe(), 2, OBJECTIVES["finetuning"])
    for step in (3, 4, 5, 6):
        values = ("loss/total", "loss/task", "throughput/tokens_per_second", "data/wait_fraction")
        monitor.step(step, dict.fromkeys(values, 0.5), "hash")
    lines = [re.sub("  .*  ", " … ", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "step 3/6: loss total 0.500 … data wait 50.0%",
        "step 4/6: loss total 0.500 … 0:02:00 left",
        "step 6/6: loss total 0.500 … 0:00:00 left",
    ]


def test_a_narrow_terminal_shows_the_step_and_every_loss_and_texts_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich this is a terminal
    monkeypatch.setenv("COLUMNS", "80")
    train(tmp_path / "[" / "runs[/x]" / ("a" * 60), OBJECTIVES["adaptation"], 0, 4)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert f"run folder {tmp_path}/[/runs[/x]/{'a' * 60}\n" in shown
    *_, last = shown.split("step 4/6 ")
    for part in ("total 1.500", "mlm 0.500", "match 0.500", "clip_tokens 0.500", "0 tokens/s", "data wait 25.0%"):
        assert part in last


def suspects(count):
    return [{"rank": n, "micro_batch": n + 1, "sample_ids": [n, 9]} for n in range(count)]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (0, "the gradient is not finite"),
        (1, "the loss is not finite (rank 0, micro-batch 1, samples 0, 9)"),
        (4, "the loss is not finite (rank 0, micro-batch 1, samples 0, 9; rank 1, micro-batch 2, samples 1, 9; "
         "rank 2, micro-batch 3, samples 2, 9)"),
    ],
)  # fmt: skip
def test_a_step_that_is_left_out_is_said_with_the_first_suspects(tmp_path, capsys, named, said):
    monitor = Monitor(RunFolder(tmp_path), _Recipe(), 0, OBJECTIVES["finetuning"])
    monitor.skipped(
        3, {"suspects": suspects(named), "replay": "xdscale replay run 3", "loss/task": math.inf}, "hash", 2
    )
    assert capsys.readouterr().err == (f"warning: step 3 skipped on all ranks: {said}; see why: xdscale replay run 3\n")
    (entry,) = read_log(tmp_path / "log.jsonl")
    assert (entry["step"], entry["kind"], entry["health/skipped_steps"], entry["samples"]) == (3, "skipped", 2, "hash")
    assert (entry["loss/task"], entry["suspects"]) == ("inf", suspects(named))


def test_what_is_other_than_before_is_said_and_what_a_longer_run_means_for_the_rate(tmp_path, monkeypatch, capsys):
    monitor = Monitor(RunFolder(tmp_path), _Recipe(), 2, OBJECTIVES["finetuning"])
    texts = []
    monkeypatch.setattr(monitor._board.writer, "add_text", lambda *given: texts.append(given))
    monitor.changed(2, ["recipe.run.eval_every was 1, now 2", "environment.world_size was 1, now 2"])
    monitor.changed(2, ["recipe.training.steps was 4, now 6"])
    monitor.quarantine(2, {"a.tar": "a.tar is altered", "b.tar": "b.tar is missing"})
    monitor.quarantine(2, {})
    assert capsys.readouterr().err.splitlines() == [
        "changed since the last start: recipe.run.eval_every was 1, now 2; environment.world_size was 1, now 2",
        "changed since the last start: recipe.training.steps was 4, now 6; from step 3 on the learning rate is that of "
        "a run of 6 steps",
        "shards in quarantine from step 2 on: 2",
        "a.tar is altered",
        "b.tar is missing",
    ]
    shards = "a.tar is altered\n\nb.tar is missing", "none"
    assert texts == [("recipe", "```yaml\na: 1\n```", 2)] * 2 + [("quarantined shards", each, 2) for each in shards]
    assert [entry.get("data/quarantined_shards") for entry in read_log(tmp_path / "log.jsonl")] == [None, None, 2, 0]


def test_a_map_of_attention_is_scaled_to_its_largest_weight(tmp_path, monkeypatch):
    monitor = Monitor(RunFolder(tmp_path), _Recipe(), 0, OBJECTIVES["finetuning"])
    images = []
    monkeypatch.setattr(monitor._board.writer, "add_image", lambda *given, **options: images.append((given, options)))
    monitor.attention(4, 1, np.array([[0.0, 0.2], [0.1, 0.4]]))
    (((tag, image, step), options),) = images
    assert (tag, step, options) == ("cross_attention/layer_1", 4, {"dataformats": "HW"})
    np.testing.assert_allclose(image, [[0, 0.5], [0.25, 1]])


def test_the_layout_has_a_chart_for_each_kind_of_figure():
    """Of objectives with other metrics than accuracy too; a total is there where there are several losses."""
    tags = {
        "losses (per target)": ["loss/mlm", "loss/task"],
        "accuracies (share of targets)": ["accuracy/mlm", "accuracy/task"],
        "credits (per target)": ["credits/task"],
    }
    charts = layout({"mlm": Objective(1.0), "task": Objective(1.0, metrics=("accuracy", "credits"))})
    held_out = {f"held-out {title}": [f"validation/{tag}" for tag in names] for title, names in tags.items()}
    tags["losses (per target)"] = ["loss/total", *tags["losses (per target)"]]
    assert charts.pop("Learning") == {title: ["Multiline", names] for title, names in (tags | held_out).items()}
    rest = {title: names for named in charts.values() for title, (_, names) in named.items()}
    assert rest == {
        "learning rate": ["optim/lr"],
        "gradient norm, before clipping": ["optim/grad_norm"],
        "throughput (language tokens/s)": ["throughput/tokens_per_second"],
        "model FLOPs utilisation (share of the measured matrix rate)": ["throughput/mfu"],
        "waiting for data (share of the step)": ["data/wait_fraction"],
        "peak memory (GiB)": ["memory/peak_gib"],
        "left out (count so far)": ["health/skipped_steps", "health/loss_scale_overflows", "data/quarantined_shards"],
    }
    assert [*charts] == ["Optimiser", "Speed", "Health"]
    assert layout({"task": Objective(1.0)})["Learning"]["losses (per target)"] == ["Multiline", ["loss/task"]]


@pytest.mark.parametrize(
    ("tag", "title", "words"),
    [
        ("loss/total", "total loss", "The objectives' mean losses"),
        (
            "loss/mlm",
            "loss, masked language modelling (per target)",
            "Mean over the targets of the global batch: minus",
        ),
        ("accuracy/match", "accuracy, same text or not (MATCH) (share)", "Share of the targets"),
        ("credits/mine", "credits, mine (per target)", "Mean over the targets of the global batch."),
        ("validation/loss/task", "held-out loss, the finetuning task (per target)", "Always the same held-out samples"),
        ("final/accuracy/task", "last held-out accuracy, the finetuning task (share)", "The last held-out figure"),
    ],
)
def test_a_curve_says_what_it_is(tag, title, words):
    found, description = describe(tag)
    assert found == title
    assert description.startswith(words)
