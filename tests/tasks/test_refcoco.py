"""RefCOCO+'s public files: what is read of them, what is right, what is refused (spec VL-BERT §3, §5, §9)."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.shards.regions import Regions
from xdscale.tasks.contract import find_task

SPLITS = ("train", "val", "testA", "testB", "train")


def reference(number, split, **changes):
    sentences = [
        {"tokens": ["red", f"dog{number}"], "raw": "Red DOG!", "sent": "red dog", "sent_id": 10 * number},
        {"tokens": ["the", "left", "one"], "raw": "the left one", "sent": "the left one", "sent_id": 10 * number + 1},
    ]
    values = {
        "ref_id": number,
        "ann_id": 100 + number,
        "image_id": 7 + number % 3,
        "split": split,
        "file_name": "x.jpg",
    }
    return values | {"sentences": sentences, "sent_ids": [10 * number, 10 * number + 1], "category_id": 2} | changes


@pytest.fixture
def files(tmp_path):
    """Returns a function that writes the two files with some of their values changed."""

    def write(references=None, annotations=None, protocol=2):
        folder = tmp_path / "refcoco+"
        folder.mkdir(exist_ok=True)
        made = [reference(number, split) for number, split in enumerate(SPLITS)] if references is None else references
        (folder / "refs(unc).p").write_bytes(made if isinstance(made, bytes) else pickle.dumps(made, protocol))
        boxes = [
            {"id": 100 + n, "image_id": 7 + n % 3, "bbox": [10.0, 20.0, 30.0 + n, 40.5], "category_id": 2, "iscrowd": 0}
            for n in range(len(SPLITS))
        ]
        values = {"annotations": boxes if annotations is None else annotations}
        (folder / "instances.json").write_text(json.dumps(values | {"categories": [{"id": 2, "name": "dog"}]}))
        return tmp_path

    return write


TASK = find_task("refcoco_plus")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_each_expression_is_an_example_of_its_split(files, protocol):
    data = TASK.read(files(protocol=protocol))
    assert [example.id for example in data.train] == ["0#0", "0#1", "4#40", "4#41"]
    assert {name: len(examples) for name, examples in data.dev.items()} == {"val": 2, "testA": 2, "testB": 2}
    one = data.dev["testA"][0]
    assert (one.texts, one.images) == ((("red dog2",),), ("9",))
    assert one.truth == (((10.0, 20.0, 42.0, 60.5),), ("dog",))
    (((span,),),) = one.spans
    assert (span.start, span.end, span.region) == (0, 8, -1)
    assert data.files["refs(unc).p"]["rows"] == 10
    assert (TASK.images, TASK.reads, TASK.score) == (1, "region", "recall_at_1")
    assert set(data.sources) == {"train", "val", "testA", "testB"}


PUBLISHED = {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889}


@pytest.mark.proof
def test_the_public_files_splits_are_counted(files):
    """Spec VL-BERT fact 11: of RefCOCO+ 141,564 in all, two or three of each thing, and nobody is told of them."""
    made, number = [], 0
    for split, count in PUBLISHED.items():
        while count:
            taken = min(count, 2 + number % 2)
            sentences = [{"tokens": ["red", str(n)], "sent_id": 3 * number + n} for n in range(taken)]
            made.append(
                reference(number, split, sentences=sentences, ann_id=100 + number % 15, image_id=7 + number % 3)
            )
            number, count = number + 1, count - taken
    boxes = [
        {"id": 100 + n, "image_id": 7 + n % 3, "bbox": [10.0, 20.0, 30.0, 40.5], "category_id": 2} for n in range(15)
    ]
    data = TASK.read(files(references=made, annotations=boxes))
    assert {"train": len(data.train)} | {split: len(examples) for split, examples in data.dev.items()} == PUBLISHED
    assert data.files["refs(unc).p"]["rows"] == 141_564
    assert len({example.id for example in data.train}) == 120_191
    assert data.notes == ()


def test_a_file_with_other_counts_than_the_public_one_is_told(files, capsys):
    """Spec VL-BERT fact 11: the known totals stand beside those found. Reading says nothing: all ranks do."""
    (note,) = TASK.read(files()).notes
    assert note.endswith(
        "refs(unc).p: holds 4 (train), 2 (val), 2 (testA), 2 (testB): 10 expressions; RefCOCO+ has 120,191 (train), "
        "10,758 (val), 5,726 (testA), 4,889 (testB): 141,564 expressions"
    )
    assert capsys.readouterr().err == ""


def test_more_than_a_half_is_right_in_training_and_a_half_at_test(files):
    """Spec VL-BERT §9: with sides that are a pixel longer than their difference."""
    example = TASK.read(files()).train[0]
    # gold is 31 × 41.5 with the pixel; half of its union with a box inside is that box if it is 15.5 wide: 14.5 + 1
    boxes = np.array([[10, 20, 24.5, 60.5], [10, 20, 24.6, 60.5], [10, 20, 24.4, 60.5], [0, 0, 5, 5]], np.float32)
    regions = Regions(np.empty((4, 0)), boxes, boxes[:, 0], np.ones((1, 2), np.uint16), np.array([0, 4]))
    assert TASK.targets([example], regions).tolist() == [[0, 1, 0, 0]]
    for best, credit in ((0, 1.0), (1, 1.0), (2, 0.0), (3, 0.0)):
        logits = np.zeros((1, 4))
        logits[0, best] = 9
        ranked = TASK.predict(logits, regions)
        assert TASK.measure(ranked, [example]) == {"recall_at_1": credit, "upper_bound": 1.0}
        answer = TASK.answer(example, ranked[0].tolist())
        assert (answer["prediction"], answer["phrase"], answer["types"]) == (credit, "red dog0", ["dog"])
    logits = torch.zeros(1, 4, requires_grad=True)
    loss, right = TASK.loss(logits, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([True]))
    assert loss.item() == pytest.approx(np.log(4))
    assert right.item() == 0


def changed(number=0, **changes):
    made = [reference(n, split) for n, split in enumerate(SPLITS)]
    made[number] |= changes
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": changed(1, ref_id=0)}, r"\[1\]: ref_id 0 stands twice"),
        ({"references": changed(2, ann_id=999)}, r"\[2\]: ann_id 999 of image 9 is not there in .*instances\.json"),
        ({"references": changed(2, ann_id=100)}, r"\[2\]: ann_id 100 of image 9 is of image 7 in"),
        ({"references": changed(3, split="val")}, r"holds no expression of the split 'testB'"),
        (
            {"references": changed(4, split="testa")},
            r"\[4\]: split = 'testa'; expected train, val, testA or testB; leave references of other splits out",
        ),
        ({"references": changed(0, image_id="7")}, r"\[0\]\.image_id = '7': expected a valid integer"),
        ({"references": changed(0, sentences=[{"tokens": [], "sent_id": 1}])}, r"\[0\]: sentences\[0\] has no words"),
        (
            {"references": changed(0, sentences=[{"tokens": ["red"], "sent_id": 1}] * 2)},
            r"\[0\]: sent_id 1 stands twice; each sentence has its own",
        ),
        ({"references": changed(0, ref_id=10**5000)}, r"\[0\]\.ref_id = a number too long to be shown"),
        ({"references": changed(0, ann_id=-(10**5000))}, r"\[0\]\.ann_id = a number too long to be shown"),
        ({"references": b"\x80\x02nonsense"}, r"refs\(unc\)\.p: not a readable pickle"),
        ({"references": {"a": 1}}, "expected a valid list"),
        (
            {"annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, -3, 4], "category_id": 2}]},
            r"annotations\[0\]: bbox = \[1\.0, 2\.0, -3\.0, 4\.0\]; expected left, top, width and height",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, 3, 4], "category_id": 5}]},
            r"annotations\[0\]: category_id 5 is not among the file's categories",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, 3, 4], "category_id": 2}] * 2},
            r"annotations\[1\]: id 1 stands twice",
        ),
    ],
)
def test_what_is_not_in_order_is_refused(files, change, message):
    with pytest.raises(XdscaleError, match=message):
        TASK.read(files(**change))


def test_an_object_of_one_pixel_is_a_box(files):
    """Public files have such: a width or a height of 0."""
    for size, box in (([3, 0], (1, 2, 4, 2)), ([0, 3], (1, 2, 1, 5))):
        found = [
            {"id": 100 + n, "image_id": 7 + n % 3, "bbox": [1, 2, *size], "category_id": 2} for n in range(len(SPLITS))
        ]
        assert TASK.read(files(annotations=found)).train[0].truth.boxes == (box,)


def test_a_pickle_that_would_run_something_is_refused(files, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    with pytest.raises(XdscaleError, match="the pickle asks for .*; only plain containers"):
        TASK.read(files(pickle.dumps([Trap()])))
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_missing_are_named(files, tmp_path):
    with pytest.raises(XdscaleError, match=r"has no refcoco\+/refs\(unc\)\.p"):
        TASK.read(tmp_path / "nowhere")
    folder = files()
    (folder / "refcoco+/instances.json").unlink()
    with pytest.raises(XdscaleError, match=r"instances\.json: no such file; it lies beside the expressions"):
        TASK.read(folder)
