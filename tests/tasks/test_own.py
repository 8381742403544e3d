"""A user's own task: every format gives the same examples, what is left out is found, and what is wrong is named."""

import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from xdscale.errors import XdscaleError
from xdscale.finetune.recipe import TaskSection
from xdscale.tasks.own import read_own_task

ROWS = [
    {"n": "a", "text": 'She said "no", twice.', "more": "A", "score": "0.5", "grade": "10", "choice": "1"},
    {"n": "b", "text": "Zwölf, Ähren; {}", "more": "B b", "score": "-2", "grade": "2", "choice": "0"},
    {"n": "c", "text": "It is.", "more": "C", "score": "3.25", "grade": "2", "choice": "1"},
]
LABELS = ["label: grade", "labels: ['2', '10']"]


def write(path, rows):
    """One table in the format that its name says; JSON Lines and parquet hold numbers where they can."""
    numbers = [row | {"score": float(row["score"]), "grade": int(row["grade"])} for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in numbers), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbers), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_twice(path):
    """A parquet file in which two columns have one name."""
    columns = [pyarrow.array(["A", "B"])] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "grade", "grade"]), path)


@pytest.fixture
def describe(tmp_path):
    """Writes files and a description of them; returns the description's path."""

    def describe(*lines, suffix=".tsv", rows=ROWS, name="mine.yaml"):
        for split in ("train", "dev"):
            write(tmp_path / f"{split}{suffix}", rows)
        files = [
            f"{split}: {split}{suffix}" for split in ("train", "dev") if f"\n{split}:" not in "\n".join(["", *lines])
        ]
        (tmp_path / name).write_text("\n".join([*files, *lines]) + "\n", encoding="utf-8")
        return tmp_path / name

    return describe


def test_files_that_lie_elsewhere_are_named_whole(describe, tmp_path):
    _, data = read(describe("text: text", *LABELS, f"dev: {tmp_path / 'dev.tsv'}"))
    assert data.sources == {"train": "train.tsv", "dev": str(tmp_path / "dev.tsv")}


def read(path):
    task = read_own_task(path).task()
    return task, task.read(path.parent)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_all_formats_hold_the_same_examples(describe, suffix):
    task, data = read(describe("text: [text, more]", "label: grade", "id: n", suffix=suffix))
    assert task.labels == ("2", "10")  # found, in the order of numbers
    assert [example.texts for example in data.train] == [((row["text"], row["more"]),) for row in ROWS]
    assert [example.label for example in data.dev["dev"]] == [1, 0, 0]
    assert [example.id for example in data.train] == ["a", "b", "c"]
    assert [example.line for example in data.train] == ([1, 2, 3] if suffix in (".jsonl", ".parquet") else [2, 3, 4])
    task, data = read(describe("text: text", "target: score", suffix=suffix))
    assert (task.metrics, task.outputs, task.sentences) == (("rmse",), 1, 1)
    assert [example.label for example in data.train] == [0.5, -2, 3.25]
    assert [example.id for example in data.train] == ["0", "1", "2"]


def test_images_are_named_in_columns_and_count_in_what_is_compared(describe):
    for lines, images in ((["image: n"], ("a",)), (["image: [n, more]"], ("a", "A"))):
        path = describe("text: text", "label: grade", *lines)
        task, data = read(path)
        assert (task.images, task.reads, data.train[0].images, data.train[0].texts) == (
            len(images), "input", images, ((ROWS[0]["text"],),)
        )  # fmt: skip
        assert len(read_own_task(path).columns()["image"]) == len(images)
    assert "image" not in read_own_task(describe("text: text", "label: grade")).columns()


def test_choices_with_and_without_a_text_before_them(describe):
    task, data = read(describe("text: n", "choices: [text, more]", "label: choice", "labels: [0, 1]"))
    assert (task.choices, task.sentences, task.outputs, data.train[0].label) == (2, 2, 1, 1)
    assert data.train[2].texts == (("c", "It is."), ("c", "C"))
    task, data = read(describe("choices: [text, more]", "label: choice"))
    assert (task.choices, task.sentences, task.labels) == (2, 1, ("0", "1"))
    assert data.train[2].texts == (("It is.",), ("C",))


def test_names_and_metrics_are_filled_in_and_files_may_lie_elsewhere(describe, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "test.csv").write_text("text\nUnlabelled.\n")
    path = describe("title: My own", "text: text", *LABELS, f"test: {elsewhere}/test.csv", "metrics: [f1, accuracy]")
    task, data = read(path)
    assert (task.name, task.title, task.score, task.metrics) == ("mine", "My own", "f1", ("f1", "accuracy"))
    assert data.test["mine.tsv"][0].texts == (("Unlabelled.",),)
    assert data.test["mine.tsv"][0].label is None
    assert data.files["dev.tsv"]["rows"] == 3


@pytest.mark.parametrize("dev", ["./train.tsv", "folder/../train.tsv", "link.tsv"])
def test_a_tenth_is_held_out_where_dev_is_the_training_file(describe, tmp_path, dev):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.tsv").symlink_to("train.tsv")
    rows = [row | {"text": f"{number}"} for number in range(200) for row in ROWS[:2]]
    task, data = read(describe(f"dev: {dev}", "text: text", "label: grade", rows=rows))
    assert 15 < len(data.dev["dev"]) < 70
    assert len(data.train) + len(data.dev["dev"]) == 400
    assert {example.id for example in data.train}.isdisjoint(example.id for example in data.dev["dev"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["text: text"], "needs one of label .* and target"),
        (["text: text", "label: grade", "target: score"], "needs one of label .* and target"),
        (["label: grade"], "names nothing to read; needs text"),
        (["text: [n, text, more]", "label: grade"], "text: 3 columns; expected one, or the two of a pair"),
        (["text: [n, text]", "choices: [more, score]", "label: choice"], "text: expected one column, since"),
        (["text: n", "image: [text, more, score]", "label: grade"], "image: 3 columns; expected one, or the two of a"),
        (["text: n", "image: photo", "label: grade"], "no column 'photo'"),
        (["text: n", "image: n", "label: grade"], "'n' is named twice"),
        (["text: n", "choices: more", "label: choice"], "choices: one column; expected one for each of at least two"),
        (["text: n", "choices: [text, more]", "label: choice", "labels: [a, b, c]"], "labels: 3 of them, but 2"),
        (["text: text", "target: score", "labels: [a, b]"], "labels and choices go with label; target is a number"),
        (["text: grade", "label: grade"], "'grade' is named twice"),
        (
            ["text: grade", "image: n", "label: grade", "labels: [n, y, x, b, y, b, x, n]"],
            "'b', 'grade', 'n', 'x', 'y' is named twice",
        ),
        (["text: text", "label: grade", "labels: [2, 2]"], "'2' is named twice"),
        (["text: text", "label: grade", "labels: 2"], "labels: only .*; expected at least two"),
        (["text: text", "label: grade", "metrics: [rmse]"], "metrics: 'rmse'; with label they are accuracy"),
        (["text: text", "target: score", "metrics: accuracy"], "metrics: 'accuracy'; with target they are pearson"),
        (["text: text", "label: n", "metrics: f1"], "f1 is of the second of two labels, there are 3; macro_f1"),
        (["text: text", "label: grade", "name: My Task"], "name = 'My Task': expected small letters"),
        (["text: text", "label: grade", "name: others"], "name = 'others': expected small letters"),
        (["text: text", "label: grade", "name: cola"], "name = 'cola': there is a task of this name already"),
        (["text: text", "label: grade", "name: sweep.json"], "name = 'sweep.json': expected small letters"),
        (["text: text", "label: grade", f"name: {'a' * 101}"], "name = 'a+': expected small letters"),
        (["text: text", "label: grade", 'title: "a\\nb"'], r"title = 'a\\nb': expected one line"),
        (["text: text", "label: ''"], "needs one of label .* and target"),
        (["text: text", "label: grade", f"dev: {'a' * 5000}.tsv"], r"dev = .*a\.tsv: no such file; names are relative"),
        (["text: text", "lable: grade"], "unknown key 'lable'; did you mean 'label'"),
        (["text: text", "label: grade", "train: 7"], "mine.yaml: train = 7: "),
        (["text: text", "label: grade", "train: no.tsv"], r"train = .*no\.tsv: no such file; names are relative"),
        (["text: text", "label: grade", "dev: mine.yaml"], r"dev = 'mine\.yaml': expected a name that ends with \.tsv"),
        (["text: txt", "label: grade"], r"train\.tsv, line 1: no column 'txt'; .*found n, text, more, score, grade"),
        (["text: text", "label: grade", "id: key"], r"train\.tsv, line 1: no column 'key'"),
        (["text: text", "label: grade", "labels: [2, 3]"], r"train\.tsv, line 2: grade = '10': not a label of mine"),
        (["text: text", "target: more"], r"train\.tsv, line 2: more = 'A': expected a number"),
        (["text: [text"], "mine.yaml: not a YAML recipe"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_with_the_file_and_the_value(describe, lines, message):
    path = describe(*lines)
    with pytest.raises(XdscaleError, match=message) as caught:
        read(path)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".tsv", lambda path: path.write_text(""), r"train\.tsv: is empty; expected a header line"),
        (".tsv", lambda path: path.write_text("text\tgrade\n"), r"train\.tsv: no examples in it"),
        (".tsv", lambda path: path.write_text("text\tgrade\nA\t1\nB\t1\n"), r"only \['1'\] in 'grade'; expected"),
        (".tsv", lambda path: path.write_text("text\tgrade\nA\t1\nB\n"), r"train\.tsv, line 3: 1 column, expected 2"),
        (".tsv", lambda path: path.write_text("text\tgrade\nA\t1\nB\t\n"), r"train\.tsv, line 3: grade is empty"),
        (".tsv", lambda path: path.write_text("text\tgrade\nA\tyes\nB\tno\nC\tyes \n"), r"holds 'yes' and 'yes '"),
        (".tsv", lambda path: path.write_text("text\tgrade\nA\t1\nB\t0\nC\t1.0\n"), r"holds '1' and '1\.0'; make them"),
        (".tsv", lambda path: path.write_text("text\ttext\tgrade\n"), r"line 1: two columns are named 'text'"),
        (".tsv", lambda path: path.write_bytes(b"text\tgrade\n\xff\t1\n"), r"train\.tsv: not UTF-8 text"),
        (
            ".tsv",
            lambda path: path.write_text("text\t\tgrade \nA\t\t1\n"),
            r"no column 'grade'; .*, found text, '', 'grade '$",
        ),
        (".csv", lambda path: path.write_text("text;grade\nA;1\n"), r"no column 'text', 'grade'; .* found text;grade"),
        (".jsonl", lambda path: path.write_text(""), r"train\.jsonl: no examples in it"),
        (".jsonl", lambda path: path.write_text('{"text": "A", "grade": 1}\n{"text": "B"}\n'), r"line 2: no column"),
        (".jsonl", lambda path: path.write_text('{"text": "A", "grade": null}\n'), r"line 1: column 'grade' has no"),
        (".jsonl", lambda path: path.write_text('{"text": "A", "grade": NaN}\n'), r"line 1: column 'grade' has the"),
        (".jsonl", lambda path: path.write_text('{"text": 1e999, "grade": 1}\n'), r"line 1: column 'text' has the"),
        (".jsonl", lambda path: path.write_text('{"text": "A", "text": "B"}\n'), r"line 1: .* key 'text' stands twice"),
        (".jsonl", lambda path: path.write_text('{"text": ["A"], "grade": 1}\n'), r"line 1: column 'text' has a list"),
        (".jsonl", lambda path: path.write_text('{"text": "\\ud800", "grade": 1}\n'), r"'text' is not valid Unicode"),
        (".jsonl", lambda path: path.write_text("\n{text: 1}\n"), r"line 2: not JSON: .*; expected an object"),
        (".jsonl", lambda path: path.write_text("[1]\n"), r"line 1: list, expected a JSON object"),
        (".parquet", lambda path: path.write_text("text"), r"train\.parquet: not readable parquet"),
        (
            ".parquet",
            lambda path: write(path, [ROWS[0], ROWS[1] | {"text": None}]),
            r"train\.parquet, row 2: column 'text' has no value",
        ),
        (".parquet", write_twice, r"train\.parquet: two columns are named 'grade'"),
        (".parquet", lambda path: write(path, [{"score": "0", "grade": "1"}]), r"parquet: no column 'text'; .* found"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_named_with_its_line(describe, suffix, change, message):
    path = describe("text: text", "label: grade", suffix=suffix)
    change(path.with_name(f"train{suffix}"))
    with pytest.raises(XdscaleError, match=message):
        read(path)


def test_a_column_of_texts_or_numbers_is_not_taken_for_labels(describe):
    rows = [ROWS[0] | {"text": f"{number}"} for number in range(101)]
    assert len(read(describe("text: more", "label: text", rows=rows[:100]))[0].labels) == 100
    path = describe("text: more", "label: text", rows=rows)
    with pytest.raises(XdscaleError, match=r"line 102: more than 100 labels in 'text', such as '100'; for a number"):
        read(path)


def test_labels_of_thousands_of_digits_are_labels(describe):
    rows = [row | {"n": digit * 5000} for row, digit in zip(ROWS, "212")]
    assert read(describe("text: text", "label: n", rows=rows))[0].labels == ("1" * 5000, "2" * 5000)


@pytest.mark.parametrize(("key", "value"), [("name", "../../elsewhere"), ("metrics", []), ("label", None)])
def test_a_description_in_a_run_folder_that_was_changed_is_refused(describe, key, value):
    own = read_own_task(describe("text: text", "label: grade"))
    section = TaskSection(name="mine", epochs=1, own=own.model_dump() | {key: value})
    with pytest.raises(XdscaleError, match=rf"^task\.own: .*{key}"):
        section.find()


def test_a_label_that_only_the_development_file_has_is_refused(describe):
    path = describe("text: text", "label: grade")
    write(path.with_name("dev.tsv"), [ROWS[0], ROWS[1] | {"grade": "3"}])
    with pytest.raises(XdscaleError, match=r"dev\.tsv, line 3: grade = '3': not a label of mine; expected 2 or 10"):
        read(path)


def test_switches_and_numbers_are_labels_as_files_hold_them(describe):
    rows = [row | {"right": right} for row, right in zip(ROWS, (True, False, True))]
    task, data = read(describe("text: text", "label: right", "labels: [false, true]", suffix=".jsonl", rows=rows))
    assert task.labels == ("false", "true")
    assert [example.label for example in data.train] == [1, 0, 1]


def test_predictions_name_examples_as_the_file_does(describe):
    """By the column of their ids if one is named; one with a tab is quoted, else quotes are text as in files read."""
    path = describe("text: text", "label: grade", "test: train.csv", "id: n", suffix=".csv")
    rows = [row | {"n": name} for row, name in zip(ROWS, ("a", 'b\t"c"', "7"))]
    write(path.parent / "train.csv", rows)
    task = read_own_task(path).task()
    examples = task.read(path.parent).test["mine.tsv"]
    said = task.submission("mine.tsv", examples, np.array([0.0, 1, 1]))
    assert said == 'n\tprediction\na\t2\n"b\t""c"""\t10\n7\t10\n'
    said = task.submission("mine.tsv", [replace(examples[0], id='5" disk')], np.array([0.0]))
    assert said == 'n\tprediction\n5" disk\t2\n'
    unnamed = read_own_task(describe("text: text", "label: grade", "test: train.csv", suffix=".csv")).task()
    assert unnamed.submission("mine.tsv", examples, np.array([0.0, 1, 1])) == "index\tprediction\n0\t2\n1\t10\n2\t10\n"
