"""What a finetuning run reads, predicts, keeps and writes down in the end; with stand-ins for model and engine."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from xdscale.data.task_files import Example
from xdscale.errors import EXIT_STOPPED, XdscaleError
from xdscale.finetune import run as runs
from xdscale.finetune.predictions import Predicted
from xdscale.finetune.recipe import load_settings, resolve_run
from xdscale.shards.regions import Detector
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.systems.contract import Objective, Place
from xdscale.tasks.contract import TaskData, find_task

EXAMPLES = [Example(str(number), (("a", "b"),), number % 2, number + 2) for number in range(4)]
NOTES = ("torn", "other features", "noted", "unknown words of t")
FILES = {"train.tsv": {"sha256": "1" * 64, "rows": 4}}


class Split(list):
    """Stands for what makes batches of a split."""

    def __init__(self, name):
        super().__init__(EXAMPLES)
        self.name = name
        self.first_cut = lambda: (0, None)


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A run of RTE in a folder, and what happens in it."""
    calls = []
    data = TaskData(
        find_task("rte"), EXAMPLES, {"dev": EXAMPLES, "more": EXAMPLES}, {"RTE.tsv": EXAMPLES}, FILES,
        {"train": "RTE/train.tsv", "dev": "RTE/dev.tsv", "more": "RTE/more.tsv", "RTE.tsv": "RTE/test.tsv"}, ("torn",),
    )  # fmt: skip
    subject = SimpleNamespace(
        reads_outlines=lambda: False, notes=lambda: ["other features"], tokenizer=lambda: "t",
        objectives=lambda: {"more": Objective(2.0)},
        export=lambda task, state, out: calls.append(("export", task.name, state, out)) or "said",
    )  # fmt: skip
    splits = {"dev": Split("dev"), "more": Split("more")}
    material = runs.Material(data, subject, Split("train"), splits, {"RTE.tsv": Split("RTE.tsv")})

    def make(*overrides):
        model = {"name": "m", "subject": "language", "size": "base", "weights_sha256": "2" * 64}
        of_run = {"subject": model, "source": tmp_path, "seed": 3, "label": "l", "folder": tmp_path / "run"}
        made = runs.FinetuneSystem(resolve_run(load_settings("paper", [*overrides]), data, **of_run))
        monkeypatch.setattr(runs.FinetuneSystem, "_material", material)
        monkeypatch.setattr(runs.FinetuneSystem, "_subject", subject)
        made.calls, made.material = calls, material
        (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        return made

    return make


def setup_of(system, folder, *, first=True):
    ranks = SimpleNamespace(world_size=2, rank=int(not first), is_first=first)
    return SimpleNamespace(
        recipe=system.recipe,
        ds_config={"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}},
        ranks=ranks,
        watchdog=SimpleNamespace(enter=lambda *place: system.calls.append(place)),
        run=SimpleNamespace(folder=folder, checkpoints=folder / "checkpoints", log=folder / "log.jsonl"),
    )


def test_the_development_split_that_comes_first_is_validated_on(system, monkeypatch):
    made = system("run.eval_samples=3")
    place = Place(SimpleNamespace(world_size=2, rank=1), 2)
    monkeypatch.setattr(runs, "notes_on", lambda data: ("noted",))
    monkeypatch.setattr(runs, "notes_on_words", lambda data, tokenizer: (f"unknown words of {tokenizer}",))
    held_out = []
    monkeypatch.setattr(runs, "held_out_batches", lambda collate, slots: held_out.append((collate, slots)) or "v")
    found = made.open(place)
    assert (found.collate, found.validation, found.notes) == (made.material.train, "v", NOTES)
    assert found.fingerprints == made.material.data.fingerprints()
    ((dev, slots),) = held_out
    assert dev is made.material.dev["dev"]
    assert [sample for part in slots for sample in part.sample_ids[part.real].tolist()] == [2]  # the last of three
    assert made.objectives() == {"task": Objective(1.0), "more": Objective(2.0)}


def test_outlines_that_are_read_stand_in_the_fingerprints(system, monkeypatch):
    made, seen = system(), []
    made.material.subject.reads_outlines = lambda: True
    task = SimpleNamespace(
        outlines_sha256=lambda examples: seen.append(examples) or "3" * 64, outline_notes=lambda examples: ("odd",)
    )
    material = made.material._replace(data=replace(made.material.data, task=task))
    monkeypatch.setattr(type(made), "_material", material)
    monkeypatch.setattr(runs, "notes_on", lambda data: ())
    monkeypatch.setattr(runs, "notes_on_words", lambda data, tokenizer: ())
    monkeypatch.setattr(runs, "held_out_batches", lambda *_: [])
    found = made.open(Place(SimpleNamespace(world_size=1, rank=0), 2))
    assert found.fingerprints == made.material.data.fingerprints() | {"outlines of objects": "3" * 64}
    assert found.notes == ("torn", "other features", "odd")
    assert seen == [EXAMPLES * 4]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("keep", ["best", "true", "false"])
@pytest.mark.parametrize("stops_at", [None, "more"])
def test_every_split_is_predicted_whole_and_the_first_rank_writes(system, monkeypatch, tmp_path, first, keep, stops_at):
    made = system(f"run.keep_model={keep}")
    asked = []

    def predict(setup, task, engine, split, slots, collate):
        asked.append(
            (split, collate.name, [sample for part in slots for sample in part.sample_ids[part.real].tolist()])
        )
        assert (task.name, engine) == ("rte", "engine")
        return None if split == stops_at else f"predicted {split}"

    monkeypatch.setattr(runs, "predict", predict)
    monkeypatch.setattr(runs.FinetuneSystem, "_write", lambda self, setup, found: made.calls.append(found))
    code = made.finish(setup_of(made, tmp_path, first=first), "engine")
    mine = [0, 1] if first else [2, 3]
    names = ["dev", "more", "RTE.tsv"][: 2 if stops_at else 3]
    assert asked == [(name, name, mine) for name in names]
    assert code == (EXIT_STOPPED if stops_at else 0)
    places = [("prediction", made.recipe.training.steps)] * len(names)
    if not stops_at:
        places += [("saving", made.recipe.training.steps)] * (keep != "false")
        places += [{name: f"predicted {name}" for name in names}] * first
    assert made.calls == places


@pytest.mark.parametrize(("keep", "kept"), [("best", "best"), ("true", True), ("false", False)])
def test_what_a_finished_run_leaves(system, monkeypatch, tmp_path, keep, kept):
    made, folder = system(f"run.keep_model={keep}"), tmp_path / "run"
    (folder / "model").mkdir()
    (folder / "model" / "half").touch()  # of a start that was killed
    entries = [{"kind": "step", "step": 1, "loss/total": 0.5}, {"kind": "validation", "step": 1, "loss/task": 0.25}]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    exported = []
    monkeypatch.setattr(runs, "export_run", lambda *given, step: exported.append((*given, step)))
    scores = np.array([[1.0, 0.0]] * 4, np.float32)
    right = Predicted(np.array([0.0, 1.0, 0.0, 1.0]), scores)
    half = Predicted(np.array([0.0, 1.0, 1.0, 0.0]), scores)
    made._write(setup_of(made, folder), {"dev": half, "more": right, "RTE.tsv": right})
    result = json.loads((folder / "result.json").read_text())
    assert result.pop("seconds") >= 0
    assert result.pop("settings")["precision"] == "bf16"
    assert result == {
        "format": 1, "task": "rte", "title": "RTE", "subject": "language", "label": "l", "seed": 3, "split": "dev",
        "metrics": {"accuracy": 0.5, "accuracy_more": 1.0},
        "score": {"name": "accuracy", "value": 0.5, "higher_is_better": True},
        "examples": 4, "data": FILES, "model": {"weights_sha256": "2" * 64, "clip_weights": "openai"},
        "curve": [{"step": 1, "loss": 0.5}],
        "best_step": None, "kept_model": kept,
    }  # fmt: skip
    assert (folder / "result.json").read_text().startswith('{\n  "format": 1,\n')
    assert exported == ([(folder, folder / "model", 1)] if kept else [])
    written = {"result.json", "log.jsonl", "predictions", "predictions-dev.jsonl", "predictions-more.jsonl"}
    assert {path.name for path in folder.iterdir()} == written | (set() if kept else {"model"})
    lines = [json.loads(line) for line in (folder / "predictions-dev.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, True, False, False]
    assert (folder / "predictions" / "RTE.tsv").read_text().splitlines()[1:] == [
        "0\tentailment", "1\tnot_entailment", "2\tentailment", "3\tnot_entailment",
    ]  # fmt: skip


def test_an_export_is_the_subjects(system, tmp_path):
    made = system()
    assert made.export({"subject.a": 1, "other.b": 2}, tmp_path, tmp_path / "out") == "said"
    assert made.calls == [("export", "rte", {"a": 1}, tmp_path / "out")]


@pytest.mark.parametrize(
    ("reads", "stated"),
    [("features", {"model": "drawn", "sha256": "ab" * 32}), ("pixels", None), ("texts", {"model": "first"})],
)
def test_an_export_says_what_features_it_was_finetuned_on(system, tmp_path, monkeypatch, reads, stated):
    """Not those of pretraining; of texts alone these stay the last ones. Pixels have a branch that lies beside."""
    made, out, run = system(), tmp_path / "out", tmp_path / "run"
    out.mkdir()
    image = RegionImage("a", (9, 9), np.array([[0, 0, 5, 5]], np.float32), np.zeros((1, 2), np.float32))
    build_regions([image], tmp_path / "regions", Detector(model="drawn", sha256="ab" * 32))
    (out / "config.json").write_text('{"hidden_size": 8, "features_of": {"model": "first"}}')
    model = SimpleNamespace(reads_pixels=reads == "pixels")
    data = SimpleNamespace(regions=None if reads == "texts" else str(tmp_path / "regions"))
    made.recipe = SimpleNamespace(model=model, data=data, task=made.recipe.task)
    made.keep(run)
    made.export({}, run, out)
    assert json.loads((out / "config.json").read_text()) == {"hidden_size": 8, "features_of": stated}


def test_a_pooler_is_left_as_it_is_where_there_is_one():
    module = nn.ModuleDict({"pooler": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    runs.freeze_pooler(module)
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert trained == {"pooler.weight": False, "pooler.bias": False, "head.weight": True, "head.bias": True}
    with pytest.raises(XdscaleError, match="model.freeze_pooler = true: this model has no pooler; leave it out"):
        runs.freeze_pooler(nn.ModuleDict({"head": nn.Linear(2, 2)}))


@pytest.mark.parametrize("trunk", [None, nn.Linear(1, 1)])
def test_parts_are_encoder_trunk_and_head(trunk):
    subject = nn.Module()
    subject.encoder = nn.Linear(2, 2)
    subject.trunk = trunk
    found = runs.FinetuneSystem.parts(None, SimpleNamespace(subject=subject))
    assert found == {"encoder": subject.encoder, **({} if trunk is None else {"trunk": trunk}), "head": subject}
