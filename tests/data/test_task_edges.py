"""Of examples of tasks: what is fetched ahead, cut, left out, and what cannot be read."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from xdscale.data import visual_tasks
from xdscale.data.json_shapes import read_lines, read_whole
from xdscale.data.masked_lm import MaskedLMCollator
from xdscale.data.task_batches import TaskCollator, cut_longest_first, cut_second_from_front
from xdscale.data.task_files import read_rows
from xdscale.data.visual_tasks import VisualTaskCollator
from xdscale.errors import XdscaleError
from xdscale.shards.regions import Regions


def slots(*samples):
    return SimpleNamespace(sample_ids=np.array(samples))


def test_the_rows_of_a_step_are_fetched_ahead():
    asked = []
    regions = SimpleNamespace(prefetch=lambda rows: asked.append(rows.tolist()))
    of_images = SimpleNamespace(
        _task=SimpleNamespace(images=2), _regions=regions, _rows=np.array([[3, 4], [5, 6], [7, 8]])
    )
    VisualTaskCollator.prefetch(of_images, [slots(2), slots(0, 2)])
    of_images._task.images = 0
    VisualTaskCollator.prefetch(of_images, [slots(2)])
    MaskedLMCollator.prefetch(SimpleNamespace(split=regions), [slots(9, 1), slots(4)])
    assert asked == [[7, 8, 3, 4, 7, 8], [9, 1, 4]]


@pytest.mark.parametrize(("width", "adds"), [(4, False), (10, True)])
def test_features_without_the_places_of_regions_gain_them(monkeypatch, width, adds):
    found = Regions(np.ones((2, 4), np.float16), np.zeros((2, 4), np.float32), None, None, None)
    asked = []
    regions = SimpleNamespace(read=lambda rows, boxes_only: asked.append((rows.tolist(), boxes_only)) or found)
    monkeypatch.setattr(visual_tasks, "with_spatial", lambda regions: (regions, "with places"))
    collator = SimpleNamespace(_task=SimpleNamespace(images=1), _regions=regions, _width=width, _pictures=None)
    rows = np.array([[5], [2]])
    assert VisualTaskCollator._read(collator, rows) == ((found, "with places") if adds else found)
    collator._pictures = object()
    assert VisualTaskCollator._read(collator, rows) is found
    assert asked == [([5, 2], False), ([5, 2], True)]


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ([5], 5, [5]),
        ([6], 5, [5]),
        ([3, 2], 5, [3, 2]),
        ([4, 2], 5, [3, 2]),
        ([9, 9], 5, [2, 3]),  # of equals the second keeps one more
        ([10, 9], 5, [3, 2]),
        ([9, 10], 5, [2, 3]),
        ([1, 9], 5, [1, 4]),
        ([9, 1], 5, [4, 1]),
    ],
)
def test_the_longer_text_is_cut_first(lengths, room, kept):
    parts = [np.arange(length) for length in lengths]
    found = cut_longest_first(parts, room)
    assert [part.tolist() for part in found] == [list(range(length)) for length in kept]


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ([6], 5, [range(5)]),
        ([3, 2], 5, [range(3), range(2)]),
        ([3, 4], 5, [range(3), range(2, 4)]),
        ([4, 3], 5, [range(4), range(2, 3)]),
        ([5, 3], 5, [range(1, 5), range(2, 3)]),  # one id of the second stays
        ([6, 0], 5, [range(1, 6), range(0)]),
    ],
)
def test_the_second_text_is_cut_from_its_front(lengths, room, kept):
    found = cut_second_from_front([np.arange(length) for length in lengths], room)
    assert [part.tolist() for part in found] == [list(part) for part in kept]


def test_nothing_is_drawn_for_examples_and_without_a_language_encoder_none_is_cut():
    split = SimpleNamespace(language=None, __len__=lambda: 3)
    collator = TaskCollator(split, None, None, max_length=9)
    assert (collator.first_cut(), collator.draws(slots(1)), collator.prefetch([slots(1)])) == ((0, -1), [], None)


@pytest.mark.parametrize(("name", "end"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_empty_lines_of_a_table_are_no_rows(tmp_path, name, end):
    path = tmp_path / name
    path.write_text(
        end.join(["text", "label"]) + "\n\n" + end.join(["a", "1"]) + "\n\n" + end.join(["b", "2"]) + "\n\n"
    )
    rows = list(read_rows(path, ["text", "label"], "task"))
    assert [row for _, row in rows] == [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]
    assert [line for line, _ in rows] == [3, 5]


def rows_of(path, value):
    """The rows of a file of one value."""
    if path.suffix == ".jsonl":
        path.write_text(f'\n{{"text": {json.dumps(value)}, "more": 1}}\n\n')
    else:
        parquet.write_table(pyarrow.table({"text": [value], "more": [1]}), path)
    return list(read_rows(path, ["text"], "task", optional=["note"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(("value", "text"), [("a b", "a b"), (True, "true"), (3, "3"), (-0.5, "-0.5"), ("", "")])
def test_values_are_what_a_table_of_text_would_hold(tmp_path, name, value, text):
    assert rows_of(tmp_path / name, value) == [(2 if name == "a.jsonl" else 1, {"text": text})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "no value"),
        (float("nan"), "the value nan"),
        (float("inf"), "the value inf"),
        ([1], "a list"),
        ({"a": 1}, "a dict"),
    ],
)
def test_values_that_are_no_text_are_named(tmp_path, name, value, words):
    where = "line 2" if name == "a.jsonl" else "row 1"
    message = f"^{tmp_path / name}, {where}: column 'text' has {words}; expected a text, or a number$"
    with pytest.raises(XdscaleError, match=message):
        rows_of(tmp_path / name, value)


def test_lines_that_are_not_there_are_named(tmp_path):
    with pytest.raises(XdscaleError, match=f"^{tmp_path / 'a.jsonl'}: cannot be read: No such file or directory$"):
        list(read_lines(tmp_path / "a.jsonl", dict))
    for read in (read_lines, read_whole):  # of others than this one nothing would ever end
        with pytest.raises(
            XdscaleError, match="/dev/null: is a pipe or a device, which may never end; expected a file"
        ):
            list(read(Path("/dev/null"), dict))


def test_only_where_words_name_regions_a_batch_says_which():
    """Where nothing is aligned an encoder adds nothing."""
    regions = Regions(np.ones((2, 4), np.float16), np.zeros((2, 4), np.float32), np.ones(2), None, np.array([0, 1, 2]))
    collator = SimpleNamespace(_seen=lambda slots, regions, packed: packed)
    texts, none = [np.arange(3), np.arange(2)], np.empty((0, 3), np.int64)
    for pairs, aligned in ((none, None), (np.array([[0, 1, 1]]), [1])):
        places = np.zeros(2, np.int64)
        found = VisualTaskCollator._pack(collator, None, texts, texts, regions, places, [none, pairs])
        assert ("aligned_regions" in found) == (aligned is not None)
        assert aligned is None or found["aligned_regions"].tolist() == aligned
