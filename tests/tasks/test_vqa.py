"""VQA v2 from its public files, and VQA accuracy against all ten ways to leave one answer out."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from xdscale.errors import XdscaleError
from xdscale.tasks.vqa import VQA, VQA_TRAINVAL
from xdscale.tasks.vqa_accuracy import credit, normal_form

TRAIN, VAL = "train2014", "val2014"


def questions_file(split):
    return f"v2_OpenEnded_mscoco_{split}_questions.json"


def annotations_file(split):
    return f"v2_mscoco_{split}_annotations.json"


def ten(*answers):
    """Ten answers: those given, then the last one again."""
    return [*answers, *[answers[-1]] * (10 - len(answers))]


class World:
    """A folder in the public layout; each question is (id, image, text, ten answers)."""

    def __init__(self, folder):
        self.folder = folder / "VQA"
        self.folder.mkdir()
        self.data = folder

    def write(self, split, rows):
        questions = [{"question_id": q, "image_id": image, "question": text} for q, image, text, _ in rows]
        annotations = [
            {
                "question_id": q,
                "image_id": image,
                "multiple_choice_answer": max(answers, key=answers.count),
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)
                ],
                "answer_type": "other",
            }
            for q, image, _, answers in rows
        ]
        self.dump(questions_file(split), {"info": {}, "questions": questions})
        if not split.startswith("test"):
            self.dump(annotations_file(split), {"info": {}, "annotations": annotations})

    def dump(self, name, value):
        (self.folder / name).write_text(json.dumps(value), encoding="utf-8")

    def change(self, name, change):
        """Applies a function to what a file holds."""
        value = json.loads((self.folder / name).read_text(encoding="utf-8"))
        change(value)
        self.dump(name, value)

    def read(self):
        return VQA.read(self.data)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.write(TRAIN, [(7, 42, "What is it?", ten("A cat", "cat.", "dog")), (8, 42, "How many?", ten("two", "2"))])
    world.write(VAL, [(9, 43, "What colour?", ten("red", "red", "rot")), (10, 44, "Why?", ten("nobody knows"))])
    world.dump("answers.json", ["dog", "cat", "2", "red", "two", "<unk>"])
    return world


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Two", "2"), ("none", "0"), ("ten", "10"), ("eleven", "eleven"), ("The dog.", "dog"), ("an A the", ""),
        ("dont know", "don't know"), ("it's", "it's"), ("thats", "that's"), ("Im", "im"), ("somebody'd", "somebodyd"),
        ("1,000", "1000"), ("3.5", "3.5"), ("3.", "3"), (".5", ".5"), ("U.S.A.", "usa"),
        ("yes/no", "yes no"), ("yes / no", "yes no"), ("yes/no /", "yesno"), ("t-shirt", "t shirt"), ("- 5", "5"),
        ("red, white", "red white"), ("red,white", "red white"), ("1,000 red/blue", "1000 redblue"), ("What?!", "what"),
        ('"x"', "x"), ("a;b", "b"), ("c:d", "c:d"), ("{c}", "c"), ("#1", "#1"), ("50%", "50%"), ("$5", "$5"),
        ("." * 33 + "x", ".x"), ("", ""),
    ],
)  # fmt: skip
def test_normal_forms_worked_by_hand(answer, form):
    assert normal_form(answer) == form


@pytest.mark.parametrize(("equal", "expected"), enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]))
def test_soft_scores_are_the_mean_of_all_ten_ways_to_leave_one_answer_out(equal, expected):
    """Spec VisualBERT fact 7."""
    given = ["yes"] * equal + ["no"] * (10 - equal)
    ways = [min(nine.count("yes") / 3, 1) for nine in itertools.combinations(given, 9)]
    assert len(ways) == 10
    assert credit("yes", given) == pytest.approx(np.mean(ways), abs=1e-12) == pytest.approx(expected, abs=1e-12)


WORDS = st.lists(st.sampled_from(["a", "the", "cat", "Cat", "two", "2", "cats.", "?", "wont", "won't"]), max_size=3)


@given(WORDS.map(" ".join), st.lists(WORDS.map(" ".join), min_size=10, max_size=10), st.randoms())
def test_credit_is_that_of_ten_ways_whatever_the_order(answer, given, random):
    forms = [one.strip() for one in given]
    asked = answer.strip()
    if len(set(forms)) > 1:  # the public evaluation leaves unanimous answers as they are
        forms, asked = [normal_form(one) for one in forms], normal_form(asked)
    ways = [min(nine.count(asked) / 3, 1) for nine in itertools.combinations(forms, 9)]
    assert credit(answer, given) == pytest.approx(np.mean(ways), abs=1e-12)
    random.shuffle(given)
    assert credit(answer, given) == pytest.approx(np.mean(ways), abs=1e-12)


def test_targets_are_five_numbers(world):
    """Spec VL-BERT fact 10: an answer of the list that 0, 1, 2, 3, 4 … of ten people gave earns 0, .3, .6, .9, 1."""
    answers = [f"{number} things" for number in range(11)]
    world.write(
        TRAIN, [(number, 42, "?", [answer] * number + ["?"] * (10 - number)) for number, answer in enumerate(answers)]
    )
    world.dump("answers.json", answers)
    data = world.read()
    found = data.task.targets(data.train)
    assert found.shape == (11, 11)
    np.testing.assert_array_equal(found, np.diag([0, 0.3, 0.6, 0.9, *[1] * 7]))


def test_examples_hold_what_each_answer_of_the_list_earns(world):
    data = world.read()
    cat, number = data.train
    assert (cat.id, cat.texts, cat.images, cat.label) == ("7", (("What is it?",),), ("42",), 0)
    assert dict(cat.truth) == {0: 1.0, 1: 0.6}  # "A cat" and "cat." are both "cat"
    assert dict(number.truth) == {2: 1.0, 4: 1.0}  # "two" on the list is worth as much as "2"
    red, unknown = data.dev["dev"]
    assert dict(red.truth) == {3: 0.6}  # "rot" is not on the list
    assert (unknown.truth, unknown.label) == ((), -1)
    assert data.task.outputs == 6
    for example, answers in zip(data.train, (ten("A cat", "cat.", "dog"), ten("two", "2"))):
        for answer, target in zip(data.task.labels, data.task.targets([example])[0]):
            assert target == credit(answer, answers)


def test_ten_equal_answers_are_compared_as_they_are(world):
    """The public evaluation brings nothing into normal form there, so that "2" is no answer to ten times "two"."""
    world.write(VAL, [(9, 43, "How many?", ten("two"))])
    (example,) = world.read().dev["dev"]
    assert dict(example.truth) == {4: 1.0}
    assert (credit("2", ten("two")), credit("two", ten("two"))) == (0.0, 1.0)


def test_nobody_answers_unknown(world):
    world.write(VAL, [(9, 43, "What?", ten("unk", "red"))])
    (example,) = world.read().dev["dev"]
    assert dict(example.truth) == {3: 1.0}


def test_accuracy_answers_and_the_servers_file(world):
    world.write("test2015", [(11, 45, "Where?", ten("x")), (12, 45, "When?", ten("x"))])
    data = world.read()
    task, dev = data.task, data.dev["dev"]
    predictions = task.predict(np.array([[0, 0, 0, 9, 0, 0], [9, 0, 0, 0, 0, 0]]))
    assert task.measure(predictions, dev) == {"vqa_accuracy": pytest.approx((0.6 + 0) / 2)}
    assert task.answer(dev[0], 3.0) == {
        "label": 3, "prediction": 3, "best": "red", "answer": "red", "credits": {"vqa_accuracy": 0.6},
    }  # fmt: skip
    assert task.answer(dev[1], 0.0)["best"] is None
    (name,) = data.test
    assert name == "v2_OpenEnded_mscoco_test2015_results.json"
    written = json.loads(task.submission(name, data.test[name], np.array([1.0, 2.0])))
    assert written == [{"question_id": 11, "answer": "cat"}, {"question_id": 12, "answer": "2"}]
    world.dump("answers.json", ["café", "cat", "2", "red", "two", "<unk>"])
    assert world.read().task.submission(name, data.test[name][:1], np.array([0.0])) == (
        '[{"question_id": 11, "answer": "café"}]\n'
    )


def test_the_loss_is_kl_divergence_from_credits_that_do_not_sum_to_one(world):
    task = world.read().task
    torch.manual_seed(0)
    logits = torch.randn(3, 6, requires_grad=True)
    targets = torch.tensor([[1, 0.6, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0]])
    loss, earned = task.loss(logits, targets, torch.tensor([True, True, False]))
    expected = F.kl_div(logits[:2].log_softmax(-1), targets[:2], reduction="batchmean") * 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert earned.item() == pytest.approx(targets[0, logits[0].argmax()].item())
    loss.backward()
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1:].abs().sum() == 0  # nothing is learned where no answer is on the list, or from padding


def test_the_list_is_made_of_the_commonest_answers_of_both_splits(tmp_path):
    world = World(tmp_path)
    rows = [*[("Yes",) * 10] * 9, *[("no",) * 10] * 10, *[("A bird.",) * 10] * 4, *[("rare",) * 10] * 8]
    world.write(TRAIN, [(n, n, "?", list(answers)) for n, answers in enumerate(rows)])
    world.write(VAL, [(100 + n, n, "?", ten("bird")) for n in range(5)])
    data = world.read()
    assert data.task.labels == ("no", "bird", "yes")  # ten times, then nine times in the order of the alphabet
    found = data.files["list of answers"]
    assert found == {"sha256": hashlib.sha256(b"no\nbird\nyes").hexdigest(), "rows": 3}
    assert data.files[annotations_file(VAL)]["rows"] == 5


def test_two_answers_are_a_list(tmp_path):
    world = World(tmp_path)
    world.write(TRAIN, [(n, n, "?", [("yes", "no")[n % 2]] * 10) for n in range(18)])
    world.write(VAL, [(100, 100, "?", ten("yes"))])
    assert world.read().task.labels == ("yes", "no")


def test_joined_validation_images_are_trained_on_but_for_a_tenth(world):
    world.write(VAL, [(100 + n, 50 + n // 3, "?", ten("red")) for n in range(300)])
    apart, joined = VQA.read(world.data), VQA_TRAINVAL.read(world.data)
    assert joined.task.name == "vqa_trainval"
    assert joined.train[:2] == apart.train
    seen, measured = ({example.images for example in part} for part in (joined.train[2:], joined.dev["dev"]))
    assert not seen & measured  # the questions of an image stay together
    assert len(seen | measured) == 100
    assert 4 <= len(measured) <= 18
    assert sorted(map(hash, joined.train[2:] + joined.dev["dev"])) == sorted(map(hash, apart.dev["dev"]))
    world.write(VAL, [(9, 43, "?", ten("red"))])
    with pytest.raises(XdscaleError, match=r"val2014_questions\.json: has too few images to hold a tenth of them out"):
        VQA_TRAINVAL.read(world.data)


def test_a_list_may_be_an_object_from_answer_to_number(world):
    world.dump("answers.json", {"red": 1, "2": 0, "cat": 2})
    data = world.read()
    assert data.task.labels == ("2", "red", "cat")
    assert dict(data.train[0].truth) == {2: 0.6}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (["red", "cat", "red"], "'red' stands twice, as answers 0 and 2"),
        ({"red": 0, "cat": 0}, "'red' and 'cat' both have number 0"),
        ({"red": 0, "cat": 2}, "'cat' has number 2; expected 0 to 1, each of them once"),
        (["red"], "holds 1 answer; at least 2 are needed"),
        (["red", 2], r"list\[str\]\[1\] = 2: expected a valid string"),
    ],
)
def test_a_list_that_is_not_in_order_is_refused(world, stored, message):
    world.dump("answers.json", stored)
    with pytest.raises(XdscaleError, match=rf"answers\.json: {message}"):
        world.read()


def test_without_frequent_answers_a_list_is_asked_for(world):
    (world.folder / "answers.json").unlink()
    with pytest.raises(XdscaleError, match=r"0 answers are the commonest one of 9 questions.*answers\.json"):
        world.read()


def questions(split, change):
    return questions_file(split), lambda stored: change(stored["questions"])


def annotations(split, change):
    return annotations_file(split), lambda stored: change(stored["annotations"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (questions(TRAIN, lambda v: v.append(v[0])), r"questions\[2\]: question_id 7 stands twice"),
        (
            questions(TRAIN, lambda v: v.pop()),
            r"train2014_annotations.json: annotations\[1\]: question_id 8 is no quest",
        ),
        (
            questions(VAL, lambda v: v[1].update(image_id=5)),
            r"questions\[1\]: question_id 10 is about image 5, .* says 44",
        ),
        (
            questions(VAL, lambda v: v[0].update(question_id="9")),
            r"questions\[0\].question_id = '9': expected a valid int",
        ),
        (questions(VAL, lambda v: v[0].pop("image_id")), r"questions\[0\].image_id is missing; found 'question_id', "),
        (questions(VAL, lambda v: v[0].update(question="")), r"questions\[0\].question = '': expected at least 1 char"),
        (questions(VAL, lambda v: v.clear()), "val2014_questions.json: questions is empty"),
        ((questions_file(VAL), lambda v: v.clear()), "questions is missing; found no key"),
        (
            annotations(VAL, lambda v: v.pop()),
            r"questions\[1\]: question_id 10 has no annotation in v2_mscoco_val2014_an",
        ),
        (annotations(VAL, lambda v: v.append(v[1])), r"annotations\[2\]: question_id 10 stands twice; the other is 1"),
        (annotations(VAL, lambda v: v[1]["answers"].pop()), r"annotations\[1\]: .* 10 has 9 answers, expected 10"),
        (
            annotations(VAL, lambda v: v[0]["answers"][3].update(answer=None)),
            r"\[0\].answers\[3\].answer = None: expected",
        ),
    ],
)
def test_odd_entries_are_named(world, changed, message):
    world.change(*changed)
    with pytest.raises(XdscaleError, match=message):
        world.read()


def test_missing_and_broken_files_are_named(world):
    path = world.folder / annotations_file(VAL)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(XdscaleError, match=r"val2014_annotations\.json: not JSON: EOF while parsing .* column 100"):
        world.read()
    path.write_bytes(whole.replace(b"red", b"r\xff"))
    with pytest.raises(XdscaleError, match=r"val2014_annotations\.json: not JSON: invalid unicode"):
        world.read()
    path.unlink()
    with pytest.raises(XdscaleError, match=r"val2014_annotations\.json: cannot be read: No such file"):
        world.read()
    (world.folder / questions_file(VAL)).unlink()
    with pytest.raises(XdscaleError, match=r"val2014_questions\.json: no such file; the development split of VQA v2"):
        world.read()
