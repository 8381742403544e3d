"""NLVR2 from its public files; consistency against a plain reading of its definition."""

import json
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.tasks.nlvr2 import NLVR2


def statement(identifier, label="True", **more):
    return {"identifier": identifier, "sentence": f"Sentence of {identifier}.", "label": label, "writer": "1"} | more


def write(folder, name, rows):
    folder = folder / "NLVR2"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    write(tmp_path, "train.json", [statement("train-10171-0-1"), statement("train-10171-3-0", "False")])
    write(tmp_path, "dev.json", [statement("dev-850-0-0")])
    return tmp_path


def test_images_are_named_without_the_sentences_digit(data):
    """Left, then right: which is which matters to an encoder (spec VisualBERT fact 8)."""
    first, second = NLVR2.read(data).train
    assert first.images == ("train-10171-0-img0", "train-10171-0-img1")
    assert (first.id, first.texts, first.label, first.line) == (
        "train-10171-0-1", (("Sentence of train-10171-0-1.",),), 1, 1
    )  # fmt: skip
    assert (second.images, second.label) == (("train-10171-3-img0", "train-10171-3-img1"), 0)


def test_labelled_test_files_are_measured_and_predicted_where_they_are_there(data):
    assert list(NLVR2.read(data).dev) == ["dev"]
    write(data, "test1.json", [statement("test1-0-0-0", "False")])
    found = NLVR2.read(data)
    assert list(found.dev) == ["dev", "test-P"]
    assert found.dev["test-P"][0].label == 0
    assert [example.label for example in found.test["NLVR2-test1.csv"]] == [None]
    assert (found.task.images, found.task.sentences, found.task.outputs) == (2, 1, 2)


def test_the_predictions_file_has_a_line_for_each_statement_and_no_header(data):
    found = NLVR2.read(data)
    text = found.task.submission("NLVR2-test1.csv", found.train, np.array([1.0, 0.0]))
    assert text == "train-10171-0-1,True\ntrain-10171-3-0,False\n"


IDS = st.tuples(st.sampled_from(["dev-1", "dev-2", "test1-1"]), st.integers(0, 3), st.integers(0, 1))


@given(st.dictionaries(IDS, st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1))
def test_a_sentence_is_consistent_if_all_its_pairs_are_right(judged):
    examples = [Example(f"{s}-{pair}-{k}", (("x",),), label, 1) for (s, pair, k), (label, _) in judged.items()]
    predictions = np.array([said for _, said in judged.values()], float)
    found = NLVR2.measure(predictions, examples)
    rows = sorted(((s, k), label == said) for (s, _, k), (label, said) in judged.items())
    groups = [[right for _, right in group] for _, group in groupby(rows, key=lambda row: row[0])]
    assert found["accuracy"] == pytest.approx(sum(right for _, right in rows) / len(rows))
    assert found["consistency"] == pytest.approx(sum(map(all, groups)) / len(groups))


def test_by_hand():
    """Two sentences of one set: the first is judged rightly of both pairs, the second of one."""
    ids = ["dev-5-0-0", "dev-5-1-0", "dev-5-0-1", "dev-5-1-1"]
    examples = [Example(name, (("x",),), 1, 1) for name in ids]
    assert NLVR2.measure(np.array([1.0, 1, 1, 0]), examples) == {"accuracy": 0.75, "consistency": 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (statement("dev-850-0"), "identifier = 'dev-850-0'; expected split-set-pair-sentence"),
        (statement("dev-850-0-0"), "identifier dev-850-0-0 stands in line 1 already"),
        (statement("dev-850-1-0", "true"), "label = 'true'; expected 'False' or 'True'"),
        ({"identifier": "dev-850-1-0", "sentence": "x"}, "label = None; expected 'False' or 'True'"),
        ({"identifier": "dev-850-1-0", "label": "True"}, "sentence is missing; found 'identifier', 'label'"),
        (statement("dev-850-1-0", True), "label = True: expected a valid string"),
        ([], r"expected an object, found \[\]"),
    ],
)
def test_odd_lines_are_named(data, row, message):
    write(data, "dev.json", [statement("dev-850-0-0"), row])
    with pytest.raises(XdscaleError, match=rf"dev\.json, line 2: {message}"):
        NLVR2.read(data)


def test_a_file_that_is_no_json_or_empty_is_named(data):
    write(data, "dev.json", [])
    with pytest.raises(XdscaleError, match=r"dev\.json: holds no examples"):
        NLVR2.read(data)
    (data / "NLVR2" / "dev.json").write_text("\n{'identifier'")
    with pytest.raises(XdscaleError, match=r"dev\.json, line 2: not JSON: key must be a string"):
        NLVR2.read(data)
