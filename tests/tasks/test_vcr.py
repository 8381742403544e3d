"""VCR from its public files: tags, names, alignment and the leaderboard's columns."""

import csv
import hashlib
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdscale.data.outlines import object_mask
from xdscale.errors import XdscaleError
from xdscale.shards.regions import Detector, Regions, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.tasks.contract import read_task
from xdscale.tasks.vcr import NAMES, VCR_QA, VCR_QAR, _named, _render


def entry(number=0, **more):
    """One question in the public form; person 2 is asked about."""
    return {
        "movie": "3015_CHARLIE_ST_CLOUD",
        "objects": ["person", "person", "person", "car"],
        "img_fn": "lsmdc/0.jpg",
        "metadata_fn": "lsmdc/0.json",
        "question": ["Does", [2], "feel", "comfortable", "?"],
        "answer_choices": [
            ["Yes", "."],
            ["No", [0], "does", "not", "."],
            [[3], "is", "red", "."],
            [[0, 1], "sit", "."],
        ],
        "answer_label": 1,
        "rationale_choices": [["Snow", "."], [[2], "stands", "."], [[1], "smiles", "."], ["It", "rains", "."]],
        "rationale_label": 3,
        "annot_id": f"train-{number}",
    } | more


class World:
    def __init__(self, folder):
        self.data, self.folder = folder, folder / "VCR"
        self.folder.mkdir()

    def write(self, name, *rows):
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write_metadata(self, **more):
        path = self.folder / "vcr1images" / "lsmdc" / "0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"names": entry()["objects"], "boxes": [[0, 1.5, 20, 30, 0.9]] * 4, "width": 40, "height": 40}
        path.write_text(json.dumps(stored | {"segms": [[]] * 4} | more))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.write("train.jsonl", entry(0), entry(1))
    world.write("val.jsonl", entry(2))
    return world


def aligned(example):
    """What each choice says of which region: [choice][sentence] of (words, region)."""
    return [
        [[(text[span.start : span.end], span.region) for span in spans] for text, spans in zip(texts, marked)]
        for texts, marked in zip(example.texts, example.spans)
    ]


def test_tags_are_rendered_and_aligned_as_in_r2c(world):
    example = VCR_QA.read(world.data).train[0]
    assert (example.id, example.label, example.images, example.truth.regions) == ("train-0", 1, ("lsmdc/0.jpg",), 5)
    assert [texts[0] for texts in example.texts] == ["Does Casey feel comfortable ?"] * 4
    # A person whom the question does not name is called by the first name again: so r2c and VisualBERT do.
    assert [texts[1] for texts in example.texts] == [
        "Yes .",
        "No Casey does not .",
        "car is red .",
        "Casey Riley sit .",
    ]
    assert aligned(example) == [
        [[("Casey", 3)], []], [[("Casey", 3)], [("Casey", 1)]], [[("Casey", 3)], [("car", 4)]],
        [[("Casey", 3)], [("Casey", 1), ("Riley", 2)]],
    ]  # fmt: skip


def test_a_reason_is_read_after_question_and_right_answer(world):
    example = VCR_QAR.read(world.data).train[0]
    assert example.texts[0] == ("Does Casey feel comfortable ? No Riley does not .", "Snow .")
    assert [texts[1] for texts in example.texts] == ["Snow .", "Casey stands .", "Casey smiles .", "It rains ."]
    assert (example.label, example.truth.answer) == (3, 1)
    assert aligned(example)[1] == [[("Casey", 3), ("Riley", 1)], [("Casey", 3)]]


def test_both_are_choices_from_four_of_two_sentences(world):
    for task in (VCR_QA, VCR_QAR):
        assert (task.choices, task.sentences, task.outputs, task.images) == (4, 2, 1, 1)
        assert task.targets(task.read(world.data).train).tolist() == [1, 1] if task is VCR_QA else [3, 3]


WORDS = st.sampled_from(["it", "Everyone", "is", "everyones", "."])
SPOKEN = st.lists(st.one_of(WORDS, st.lists(st.integers(0, 4), max_size=2)), min_size=1, max_size=4)


@given(st.lists(SPOKEN, min_size=9, max_size=9), st.sampled_from(["person", "car"]))
def test_named_are_the_objects_that_r2c_keeps(texts, last):
    """Against its rule word by word: of question, answers and reasons, whichever are asked for; else all persons."""
    objects = ["car", "person", "cat", "person", last]
    keeps = [False] * 5
    for text in texts:
        for token in text:
            if token in ("Everyone", "everyones"):
                keeps = [kept or thing == "person" for kept, thing in zip(keeps, objects)]
            elif isinstance(token, list):
                for tag in token:
                    keeps[tag] = True
    if not any(keeps):
        keeps = [thing == "person" for thing in objects]
    question, answers, reasons = texts[0], texts[1:5], texts[5:]
    item = entry(objects=objects, question=question, answer_choices=answers, rationale_choices=reasons)
    assert _named(item) == (0, *(number for number, kept in enumerate(keeps, 1) if kept))


def test_a_tag_of_what_is_not_asked_for_may_name_nothing():
    assert _named(entry(rationale_choices=[[[4]], [[-1]], ["It"], ["It"]])) == (0, 1, 2, 3, 4)
    assert _named(entry(question=["It"], answer_choices=[["Yes"]] * 4, rationale_choices=[[[4], [2]]] * 4)) == (0, 3)


def test_every_example_of_an_item_names_the_same_objects(world):
    world.write("train.jsonl", entry(0, rationale_choices=[["Snow"], [[2], "stands"], [[1]], ["It"]]))
    world.write("val.jsonl", entry(1, objects=["car", "dog", "person", "cat"], answer_choices=[["Yes"]] * 4))
    for task in (VCR_QA, VCR_QAR):
        data = task.read(world.data)
        assert [example.named for example in data.train] == [(0, 1, 2, 3, 4)]
        assert [example.named for example in data.dev["dev"]] == [(0, 2, 3)]


def test_there_are_fifteen_names_and_one_twice():
    assert (len(NAMES), len(set(NAMES))) == (15, 14)
    text, _, _ = _render("here", [[n] for n in range(17)], ["person"] * 17, {})
    assert text.split() == [*NAMES, "Casey", "Riley"]


TOKENS = st.lists(st.one_of(st.sampled_from(["it", "is", "?"]), st.lists(st.integers(0, 4), max_size=3)), min_size=1)


@given(TOKENS.filter(lambda tokens: any(tokens)))
def test_spans_cut_out_exactly_the_words_of_tags(tokens):
    objects = ["person", "car", "dining table", "person", "cat"]
    text, spans, names = _render("here", tokens, objects, {})
    tags = [tag for token in tokens if isinstance(token, list) for tag in token]
    assert [span.region for span in spans] == [tag + 1 for tag in tags]
    assert [text[span.start : span.end] for span in spans] == [names[tag] for tag in tags]
    flat = [part for token in tokens for part in (token if isinstance(token, list) else [token])]
    assert text == " ".join(names[part] if isinstance(part, int) else part for part in flat)
    assert all(names[tag] == objects[tag] for tag in tags if objects[tag] != "person")


def test_the_leaderboards_columns(world):
    entries = [entry(4), entry(5), entry(6, annot_id="train#6")]
    world.write("test.jsonl", *({k: v for k, v in one.items() if not k.endswith("label")} for one in entries))
    qa, qar = VCR_QA.read(world.data).test["vcr_qa.csv"], VCR_QAR.read(world.data).test["vcr_qar.csv"]
    assert [example.id for example in qar[:5]] == ["train-4#0", "train-4#1", "train-4#2", "train-4#3", "train-5#0"]
    assert qar[2].texts[0][0] == "Does Casey feel comfortable ? car is red ."
    for task, examples, columns in (
        (VCR_QA, qa, ["answer"]),
        (VCR_QAR, qar, [f"rationale_conditioned_on_a{n}" for n in range(4)]),
    ):
        logits = np.random.default_rng(1).normal(size=(len(examples), 4)).astype(np.float32)
        rows = list(csv.reader(io.StringIO(task.submission("x.csv", examples, task.predict(logits)))))
        assert rows[0] == ["annot_id", *(f"{column}_{n}" for column in columns for n in range(4))]
        assert [row[0] for row in rows[1:]] == ["train-4", "train-5", "train#6"]
        found = np.array([row[1:] for row in rows[1:]], float).reshape(-1, 4)
        exponents = np.exp(logits.astype(float))
        np.testing.assert_allclose(found, exponents / exponents.sum(1, keepdims=True), atol=1e-6)


def test_accuracy_is_of_the_likeliest_choice(world):
    examples = VCR_QA.read(world.data).train
    predictions = VCR_QA.predict(np.array([[0.0, 3, 1, 2], [4.0, 3, 1, 2]]))
    assert VCR_QA.measure(predictions, examples) == {"accuracy": 0.5}
    assert VCR_QA.answer(examples[1], predictions[1]) == {"label": 1, "prediction": 0, "correct": False}


def test_an_image_with_other_regions_is_refused(world):
    examples = VCR_QA.read(world.data).train

    def regions(*counts):
        total = sum(counts)
        boxes = np.zeros((total, 4), np.float32)
        sizes = np.ones((len(counts), 2), np.uint16)
        return Regions(np.zeros((total, 2)), boxes, np.ones(total), sizes, np.cumsum([0, *counts]))

    assert VCR_QA.targets(examples, regions(5, 5)).tolist() == [1, 1]
    with pytest.raises(
        XdscaleError, match=r"train-1: image lsmdc/0.jpg has 4 regions in the table, .* needs 5: the whole"
    ):
        VCR_QA.targets(examples, regions(5, 4))


BOXES = np.array([[0, 0, 40, 40], *[[0, 1.5, 20, 30]] * 3, [22.25, 3, 39.75, 24]], np.float32)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda boxes: boxes, None),
        (lambda boxes: boxes.astype(np.float16) - [0, 0, 1, 1], None),
        (lambda boxes: boxes[[0, 4, 2, 3, 1]], "region 1 in the table is (55.6%, 7.5%, 99.4%, 60.0%)"),
        (lambda boxes: boxes[[1, 1, 2, 3, 4]], "region 0 in the table is (0.0%, 3.8%, 50.0%, 75.0%)"),
        (lambda boxes: boxes + np.array([[0] * 4] * 4 + [[0, 0, -2.5, 0]]), "region 4 in the table"),
    ],
)
@pytest.mark.parametrize("scale", [1, 3])
def test_a_table_of_other_boxes_is_refused(world, tmp_path, change, wrong, scale):
    """Before a run and in each batch: words and masks would be of other objects. Scaled images have the same boxes."""
    world.write_metadata(boxes=[[*box, 0.9] for box in BOXES[1:].tolist()])
    examples, boxes = VCR_QA.read(world.data).train, (change(BOXES) * scale).astype("<f4")
    image = RegionImage("lsmdc/0.jpg", (40 * scale, 40 * scale), boxes, np.zeros((5, 2), np.float32))
    build_regions([image], tmp_path / "regions", Detector(model="d"))
    table = RegionTable.open(tmp_path / "regions")
    checks = (VCR_QA.check_regions, lambda some, table: VCR_QA.targets(some, table.read(table.rows(["lsmdc/0.jpg"]))))
    for check in checks:
        if wrong is None:
            check(examples[:1], table)
            continue
        with pytest.raises(XdscaleError, match=re.escape(wrong)) as refused:
            check(examples[:1], table)
        assert str(refused.value).startswith("train-0: image lsmdc/0.jpg: region")
        assert str(world.folder / "vcr1images" / "lsmdc" / "0.json") in str(refused.value)
    if wrong is not None:
        with pytest.raises(XdscaleError, match=r"VCR/train\.jsonl: train-\d: image lsmdc/0\.jpg: region"):
            read_task(VCR_QA, world.data, table)


def test_metadata_are_checked_where_they_are_there(world):
    world.write_metadata()
    assert len(VCR_QA.read(world.data).train) == 2
    elsewhere = (world.folder / "vcr1images").rename(world.data / "elsewhere")
    (world.folder / "vcr1images").symlink_to(elsewhere)  # as on a cluster's other disk
    assert len(VCR_QA.read(world.data).train) == 2
    world.write_metadata(names=["person", "person", "car", "car"])
    with pytest.raises(
        XdscaleError, match=r"train\.jsonl, line 1: objects are person, .*0\.json names person, person, car"
    ):
        VCR_QA.read(world.data)
    world.write_metadata(boxes=[[0, 1, 20, 30, 0.9]] * 3)
    with pytest.raises(XdscaleError, match=r"0\.json: 3 boxes, but 4 names"):
        VCR_QA.read(world.data)
    for box in ([20, 1, 0, 30], [20, 1, 20, 30], [0, 30, 20, 30], [0, 1, 42.5, 30], [0, 1, 20, 42.5]):
        world.write_metadata(boxes=[[0, 1, 20, 30, 0.9]] * 3 + [[*box, 0.9]])
        with pytest.raises(
            XdscaleError,
            match=rf"0\.json: boxes\[3\] = \[{box[0]}\.0, .*\]; expected x1 < x2, y1 < y2 .* within 40 × 40",
        ):
            VCR_QA.read(world.data)
    world.write_metadata(boxes=[[0, 1, 42, 42, 0.9]] * 4)
    np.testing.assert_array_equal(VCR_QA.read(world.data).train[0].truth.stated.boxes[1], np.float32([0, 0.025, 1, 1]))
    for side in ("width", "height"):
        world.write_metadata(**{side: 0})
        with pytest.raises(XdscaleError, match=rf"0\.json: {side} = 0: expected greater than or equal to 1"):
            VCR_QA.read(world.data)
    odd = {"4 boxes and 3 segms; the question has 4 objects": [[]] * 3, "segms = None: expected a": None}
    for told, outlines in odd.items():
        world.write_metadata(segms=outlines)
        examples = VCR_QA.read(world.data).train  # who reads features has no need of outlines
        with pytest.raises(XdscaleError, match=rf"0\.json: {told}"):
            VCR_QA.outlines_sha256(examples)
    world.write("val.jsonl", entry(2, metadata_fn="lsmdc/1.json"))
    world.write_metadata()
    with pytest.raises(XdscaleError, match=r"val\.jsonl, line 1: metadata_fn = 'lsmdc/1\.json' is not in "):
        VCR_QA.read(world.data)
    world.write("val.jsonl", entry(2, metadata_fn="../val.jsonl"))
    with pytest.raises(XdscaleError, match=r"metadata_fn = '\.\./val\.jsonl' leads out of "):
        VCR_QA.read(world.data)
    world.write("val.jsonl", entry(2, metadata_fn="x" * 5000))
    with pytest.raises(XdscaleError, match=r"val\.jsonl, line 1: metadata_fn = 'xxx.*' is not in "):
        VCR_QA.read(world.data)


def test_messages_about_metadata_have_a_bearable_length(world):
    for more in ({"names": ["car", "9" * 5000, "x", "x"]}, {"boxes": [[0] * 5000] * 4}):
        world.write_metadata(**more)
        with pytest.raises(XdscaleError) as refused:
            VCR_QA.read(world.data)
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["/etc/passwd", "../val.jsonl"])
def test_metadata_lie_nowhere_else_where_they_are_not_there_either(world, name):
    world.write("val.jsonl", entry(2, metadata_fn=name))
    with pytest.raises(XdscaleError, match=rf"val\.jsonl, line 1: metadata_fn = '{name}' leads out of "):
        VCR_QA.read(world.data)


def test_the_hash_of_outlines_is_that_of_the_files_in_the_order_of_their_names(world):
    world.write_metadata()
    path = world.folder / "vcr1images" / "lsmdc" / "0.json"
    (path.parent / "00.json").write_text(path.read_text() + " ")
    world.write("train.jsonl", entry(0, metadata_fn="lsmdc/00.json"), entry(1), entry(3))
    wanted = hashlib.sha256()
    for name in ("0.json", "00.json"):
        wanted.update(hashlib.sha256((path.parent / name).read_bytes()).digest())
    assert VCR_QA.outlines_sha256(VCR_QA.read(world.data).train) == wanted.hexdigest()


def test_objects_without_an_outline_are_counted_and_without_any_refused(world):
    triangle = [[[1, 2], [3, 4], [5, 2]]]
    world.write_metadata(segms=[triangle, [[], *triangle], [], [[[1, 2], [3, 4]]]])
    told = r"^2 of 4 objects have no outline of three points or more, the first in .*0\.json; their masks are empty"
    assert re.match(told, *VCR_QA.outline_notes(VCR_QA.read(world.data).train))
    world.write_metadata(segms=[triangle] * 4)
    assert VCR_QA.outline_notes(VCR_QA.read(world.data).train) == []
    world.write_metadata()
    with pytest.raises(XdscaleError, match=r"^4 of 4 objects have no outline .*: is the download whole\?"):
        VCR_QA.outline_notes(VCR_QA.read(world.data).train)


def test_metadata_that_are_changed_during_a_run_are_refused(world):
    world.write_metadata()
    examples = VCR_QA.read(world.data).train[:1]
    world.write_metadata(width=41)
    with pytest.raises(XdscaleError, match=r"0\.json: was changed since the task was read; start again"):
        VCR_QA.object_masks(examples)


def test_outlines_become_masks_as_either_release_makes_them(world):
    outline, box = [[1, 2], [19, 3], [9, 29]], [0, 1.5, 20, 30]
    world.write_metadata(segms=[[outline, []]] * 4)
    examples = VCR_QA.read(world.data).train[:1]
    masks = {centres: VCR_QA.object_masks(examples, centres=centres)[0] for centres in (False, True)}
    for centres, found in masks.items():
        np.testing.assert_array_equal(found, [object_mask([np.array(outline)], box, centres=centres)] * 4)
    assert (masks[False] != masks[True]).any()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_what_is_no_number_is_no_box_and_no_outline(world, number):
    """JSON has none of these, but many write and read them."""
    world.write_metadata(segms=[[[[1, 2], [30, 2], [7777, 40]]]] * 4)
    examples = VCR_QA.read(world.data).train
    assert VCR_QA.object_masks(examples[:1])[0].any((1, 2)).all()
    path = world.folder / "vcr1images" / "lsmdc" / "0.json"
    path.write_text(path.read_text().replace("7777", number))
    for read in (VCR_QA.object_masks, lambda _: VCR_QA.outlines_sha256(VCR_QA.read(world.data).train)):
        with pytest.raises(
            XdscaleError, match=r"0\.json: segms\[0\]\[0\]\[2\]\[0\] = (nan|inf|-inf): expected a finite"
        ):
            read(examples[:1])
    world.write_metadata(boxes=[[0, 1, 7777, 30, 0.9]] * 4)
    path.write_text(path.read_text().replace("7777", number))
    with pytest.raises(XdscaleError, match=r"0\.json: boxes\[0\]\[2\] = (nan|inf|-inf): expected a finite"):
        VCR_QA.read(world.data)


def test_outlines_far_from_any_image_are_refused(world):
    """1e308 was multiplied until it was no number, and the object's mask was empty."""
    world.write_metadata(segms=[[[[1, 2], [30, 2], [-1e6, 40]]]] * 4)
    examples = VCR_QA.read(world.data).train[:1]
    assert VCR_QA.object_masks(examples)[0].any()
    world.write_metadata(segms=[[[[1, 2], [30, 2], [1e308, 40]]]] * 4)
    with pytest.raises(XdscaleError, match=r"segms\[0\]\[0\]\[2\]\[0\] = 1e\+308: expected less than or equal"):
        VCR_QA.outlines_sha256(VCR_QA.read(world.data).train)
    world.write_metadata(boxes=[[0, 1, 1e308, 30, 0.9]] * 4)
    with pytest.raises(XdscaleError, match=r"0\.json: boxes\[0\]\[2\] = 1e\+308: expected less than or equal"):
        VCR_QA.read(world.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ["Does", [4], "?"]}, "tag 4 names no object; there are 4, counted from 0"),
        ({"question": ["Does", [-1], "?"]}, "tag -1 names no object"),
        ({"question": [[], ""]}, "a question, an answer or a reason has no words"),
        ({"question": "Does it?"}, "question = 'Does it\\?': expected a valid array"),
        ({"answer_choices": [["Yes"]] * 3}, "answer_choices has 3 choices, expected 4"),
        ({"rationale_choices": []}, "rationale_choices has 0 choices, expected 4"),
        ({"answer_label": 4}, "answer_label = 4; expected 0 to 3"),
        ({"answer_label": "1"}, "answer_label = '1': expected a valid integer"),
        ({"annot_id": "train-0"}, "annot_id train-0 stands in line 1 already"),
        ({"objects": [1]}, r"objects\[0\] = 1: expected a valid string"),
    ],
)
def test_odd_entries_are_named(world, change, message):
    world.write("train.jsonl", entry(0), entry(1, **change))
    with pytest.raises(XdscaleError, match=rf"train\.jsonl, line 2: {message}"):
        VCR_QA.read(world.data)


def test_labels_are_needed_but_in_the_test_file(world):
    unlabelled = entry(3)
    del unlabelled["answer_label"]
    world.write("val.jsonl", unlabelled)
    for task in (VCR_QA, VCR_QAR):
        with pytest.raises(XdscaleError, match=r"val\.jsonl, line 1: answer_label = None; expected 0 to 3"):
            task.read(world.data)
