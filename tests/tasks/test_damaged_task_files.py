"""Files of the tasks with images, damaged at random: each is read as it is, or refused in one message."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.tasks.contract import find_task

STATEMENT = {"identifier": "dev-850-0-0", "sentence": "Two dogs.", "label": "True"}
QUESTION = {"question_id": 7, "image_id": 42, "question": "What is it?"}
ANNOTATION = {
    "question_id": 7, "image_id": 42, "multiple_choice_answer": "cat",
    "answers": [{"answer": "cat", "answer_id": 1}] * 10,
}  # fmt: skip
STORY = {
    "annot_id": "val-0", "img_fn": "a/0.jpg", "metadata_fn": "a/0.json", "objects": ["person", "car"],
    "question": ["Why", "is", [0], "?"], "answer_choices": [["Because", [1], "."]] * 4, "answer_label": 0,
    "rationale_choices": [[[0, 1], "go", "."]] * 4, "rationale_label": 3,
}  # fmt: skip
METADATA = {"names": ["person", "car"], "boxes": [[0, 0, 9, 9, 1.0]] * 2, "width": 10, "height": 10}
XML = (
    "<annotation><object><name>9</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object>"
    "<object><name>9</name><name>8</name><nobndbox>1</nobndbox></object></annotation>"
)
VQA = {
    f"VQA/v2_{kind}_{split}_{name}.json": {name: [entry]}
    for split in ("train2014", "val2014")
    for kind, name, entry in (
        ("OpenEnded_mscoco", "questions", QUESTION),
        ("mscoco", "annotations", ANNOTATION),
    )
}
FILES = {
    "vqa": VQA | {"VQA/answers.json": ["cat", "dog"]},
    "nlvr2": {f"NLVR2/{name}.json": STATEMENT for name in ("train", "dev")},
    "vcr_qa": {"VCR/train.jsonl": STORY, "VCR/val.jsonl": STORY, "VCR/vcr1images/a/0.json": METADATA},
    "flickr30k_entities": {
        "Flickr30kEntities/Sentences/1.txt": "[/EN#9/animals Two dogs] run .\n",
        "Flickr30kEntities/Annotations/1.xml": XML,
    } | {f"Flickr30kEntities/{split}.txt": "1\n" for split in ("train", "val", "test")},
}  # fmt: skip
FILES["vcr_qar"] = FILES["vcr_qa"]


def text(value):
    return value if isinstance(value, str) else json.dumps(value) + "\n"


def places(value, path=()):
    """The paths to all values within a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def replaced(value, path, other):
    if not path:
        return other
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = other
    return value


JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        5,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "\x00",
        "é" * 9,
        [],
        {},
        [[]],
        [-1],
        {"a": 1},
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read(name, folder):
    write(folder, name, {})
    assert find_task(name).read(folder).train


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_told_in_one_message_or_does_no_harm(name, folder, data):
    file = data.draw(st.sampled_from(sorted(FILES[name])))
    stored = FILES[name][file]
    if isinstance(stored, str) or data.draw(st.booleans()):
        whole = text(stored).encode()
        start = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(start, min(len(whole), start + 20)))
        damaged = (
            whole[:start]
            + data.draw(st.binary(max_size=6) | st.sampled_from([b"<", b"[", b"]", b"\n", b"&x;"]))
            + whole[end:]
        )
    else:
        damaged = text(replaced(stored, data.draw(st.sampled_from(list(places(stored)))), data.draw(JUNK))).encode()
    write(folder, name, {file: damaged})
    read, message = None, ""
    try:
        read = find_task(name).read(folder)
    except XdscaleError as error:
        message = str(error)
    if read is None:
        assert str(folder) in message
    else:
        for example in (*read.train, *(one for split in read.dev.values() for one in split)):
            assert all(isinstance(one, str) and one for texts in example.texts for one in texts)


def write(folder: Path, name, damaged):
    shutil.rmtree(folder, ignore_errors=True)
    for file, stored in FILES[name].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged.get(file) if file in damaged else text(stored).encode())
