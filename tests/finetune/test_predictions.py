"""What is predicted of a split and written down; what cannot be written is one message, not a traceback."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xdscale.data.order import validation_slots
from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.finetune.predictions import Predicted, predict, write_predictions, write_submission
from xdscale.finetune.run import FinetuneSystem
from xdscale.recipe import load_recipe
from xdscale.systems.contract import MicroBatch
from xdscale.tasks.contract import find_task

NOTHING = Predicted(np.empty(0), np.empty((0, 2)))


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "predictions").write_text("")
    with pytest.raises(XdscaleError, match=rf"cannot write predictions in {tmp_path}: .*File exists.*make room"):
        write_submission(tmp_path / "predictions" / "RTE.tsv", find_task("rte"), [], NOTHING)
    (tmp_path / "dev.jsonl").mkdir()
    with pytest.raises(XdscaleError, match=rf"cannot write dev.jsonl in {tmp_path}: .*a directory"):
        write_predictions(tmp_path / "dev.jsonl", find_task("rte"), [], NOTHING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.jsonl", "predictions"]


def test_a_finished_run_that_is_started_again_says_so(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    recipe = load_recipe("quickstart", [f"output.folder={tmp_path}"])
    with pytest.raises(XdscaleError, match=r"result\.json: this run is finished; to run it again, delete its folder"):
        FinetuneSystem(recipe).open(None)


class Engine:
    """Gives for each sample the logits that `of` makes of its number."""

    device = torch.device("cpu")

    def __init__(self, of):
        self._of, self.modes = of, []

    def eval(self):
        self.modes.append("eval")

    def __call__(self, arrays):
        assert not torch.is_grad_enabled()
        return {"logits": torch.stack([torch.as_tensor(self._of(sample)) for sample in arrays["ids"].tolist()])}


def predicted(of, *, size=5, ranks=1, regions=None, stopped=False):
    """Predicts a split of samples in passes of two, by ranks that are threads; all of them know it all."""
    task = SimpleNamespace(predict=lambda logits, *more: (logits.argmax(1) + 100.0 * len(more)).astype(np.float64))
    together, shares = threading.Barrier(ranks), {}

    def collate(slots):
        return MicroBatch({"ids": slots.sample_ids}, {}, 0, regions=regions)

    def run(rank):
        def gather(mine):
            shares[rank] = mine
            together.wait(60)
            return [shares[other] for other in range(ranks)]

        setup = SimpleNamespace(
            stop=SimpleNamespace(requested=stopped),
            watchdog=SimpleNamespace(enter=lambda *_: None),
            recipe=SimpleNamespace(training=SimpleNamespace(steps=7)),
            ranks=SimpleNamespace(is_first=rank == 0, sum=lambda flag: flag, gather=gather),
        )
        engine = Engine(of)
        found = predict(setup, task, engine, "dev", validation_slots(size, size, ranks, rank, 2), collate)
        assert engine.modes == ["eval"]
        return found

    with ThreadPoolExecutor(ranks) as threads:
        first, *others = threads.map(run, range(ranks))
    assert all(np.array_equal(other.values, first.values) for other in others)
    return first


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_example_is_predicted_once_in_the_order_of_the_file(ranks):
    found = predicted(lambda sample: [0.0, 1.0, 2.0][sample % 3 :] + [9.0, 0.5][: sample % 3] + [5.0], ranks=ranks)
    assert found.values.tolist() == [3, 2, 1, 3, 2]
    assert found.scores.shape == (5, 4)
    assert found.scores[1].tolist() == [1, 2, 9, 5]


@pytest.mark.parametrize(("outputs", "kept"), [(1, True), (100, True), (101, False)])
def test_at_most_100_scores_are_kept(outputs, kept):
    found = predicted(lambda sample: np.arange(outputs, dtype=np.float32) + sample)
    assert found.values.tolist() == [outputs - 1] * 5
    assert (found.scores is not None) == kept
    if kept:
        assert found.scores[3].tolist() == [3 + number for number in range(outputs)]


def test_images_of_fewer_regions_are_filled_up():
    found = predicted(lambda sample: np.full(2 + sample // 2, float(sample), np.float32), size=6, regions="theirs")
    assert found.values.tolist() == [100] * 6
    assert found.scores.tolist() == [
        [0, 0, -np.inf, -np.inf], [1, 1, -np.inf, -np.inf], [2, 2, 2, -np.inf], 
        [3, 3, 3, -np.inf], [4, 4, 4, 4], [5, 5, 5, 5]
    ]  # fmt: skip


def test_a_request_to_stop_ends_it():
    assert predicted(lambda sample: [0.0], stopped=True) is None


@pytest.mark.parametrize(
    ("task", "example", "value", "scores", "line"),
    [
        (
            "cola", Example("7", (("Ähren.",),), 1, 2), 1.0, [[-0.5, 2.0]],
            {"id": "7", "sentence1": "Ähren.", "sentence2": None, "label": 1, "prediction": 1, "correct": True,
             "scores": [-0.5, 2.0]},
        ),
        (
            "stsb", Example("8", (("a", "b"),), 2.5, 2), 1.0, [[1.0]],
            {"id": "8", "sentence1": "a", "sentence2": "b", "label": 2.5, "prediction": 1.0, "squared_error": 2.25,
             "scores": [1.0]},
        ),
        (
            "swag", Example("9", tuple(("a", f"a {n}") for n in range(4)), 3, 2), 0.0, None,
            {"id": "9", "sentence1": "a", "sentence2": ["a 0", "a 1", "a 2", "a 3"], "label": 3, "prediction": 0,
             "correct": False},
        ),
        (
            "swag", Example("9", tuple((f"a {n}",) for n in range(4)), 0, 2, images=("x",)), 0.0, [[1.0, -np.inf]],
            {"id": "9", "sentence1": "", "sentence2": ["a 0", "a 1", "a 2", "a 3"], "images": ["x"], "label": 0,
             "prediction": 0, "correct": True, "scores": [1.0]},
        ),
    ],
)  # fmt: skip
def test_what_is_written_down_of_an_example(tmp_path, task, example, value, scores, line):
    scores = None if scores is None else np.array(scores * 2, np.float32)
    write_predictions(tmp_path / "dev.jsonl", find_task(task), [example] * 2, Predicted(np.full(2, value), scores))
    written = (tmp_path / "dev.jsonl").read_text(encoding="utf-8")
    assert [json.loads(one) for one in written.splitlines()] == [{"index": n} | line for n in range(2)]
    assert example.texts[0][0] in written  # as a person reads it
