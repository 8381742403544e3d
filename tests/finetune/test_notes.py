"""What is said of a task's examples before they are trained on."""

from dataclasses import replace

import pytest

from xdscale.data.task_files import Example
from xdscale.finetune.notes import notes_on, notes_on_recipe, notes_on_words
from xdscale.finetune.recipe import load_settings, resolve_run
from xdscale.finetune.run import FinetuneSystem
from xdscale.pretrained.language import own_tokenizer
from xdscale.systems.contract import Place
from xdscale.tasks.contract import TaskData, find_task
from xdscale.training.distributed import Ranks

SOURCES = {"train": "RTE/train.tsv", "dev": "RTE/dev.tsv", "RTE.tsv": "RTE/test.tsv"}


def examples(count, first=0, **change):
    """Pairs of texts that are all different, of both classes by turns."""
    numbers = range(first, first + count)
    return [replace(Example(str(n), ((f"text {n}", f"more {n}"),), n % 2, n + 2), **change) for n in numbers]


def notes(train, dev, test=(), task="rte"):
    return notes_on(TaskData(find_task(task), train, {"dev": dev}, {"RTE.tsv": list(test)}, {}, SOURCES))


def test_of_examples_as_they_should_be_nothing_is_said():
    """A twentieth of the development split may be trained on: published tasks have such pairs."""
    assert notes(examples(40), examples(40, first=38), examples(3, first=90, label=None)) == []


@pytest.mark.parametrize("wrong", ["train", "dev"])
def test_a_class_that_a_split_has_none_of_is_named(wrong):
    splits = {"train": examples(20), "dev": examples(20, first=50)}
    splits[wrong] = examples(20, first=90, label=0)
    assert notes(**splits) == [f"{SOURCES[wrong]}: none of 20 examples is of the class not_entailment"]


def test_of_answers_none_is_missed_and_of_many_classes_the_first_are_named():
    answers = replace(find_task("vqa"), labels=("yes", "no", "red"))
    many = replace(find_task("rte"), labels=tuple(f"class {number}" for number in range(9)))
    for task, told in ((answers, []), (many, ["RTE/dev.tsv", "RTE/train.tsv"])):
        data = TaskData(task, examples(20), {"dev": examples(20, first=50)}, {}, {}, SOURCES)
        wanted = "none of 20 examples is of the class class 2, class 3, class 4 and 4 more"
        assert sorted(notes_on(data)) == [f"{source}: {wanted}" for source in told]


def test_a_name_of_several_examples_is_told_where_predictions_name_them_so():
    own = replace(find_task("rte"), predicts_by_id=True, id="article")
    dev, test = examples(5, first=50), examples(6, first=90, label=None)
    named = [replace(example, id=name) for example, name in zip(test, "abcbab")]
    data = TaskData(own, examples(20), {"dev": dev}, {"RTE.tsv": named}, {}, SOURCES)
    assert notes_on(data) == ["RTE/test.tsv: 3 examples have the article 'b', by which predictions name them"]
    assert notes_on(replace(data, task=find_task("rte"))) == []


def test_what_is_trained_on_and_measured_on_is_counted():
    (note,) = notes(examples(40), examples(40, first=37))
    assert note.startswith(
        "RTE/dev.tsv: 3 of 40 examples are trained on, since they stand in RTE/train.tsv too, the first in line 39; "
    )
    shown = [replace(example, images=(example.id,)) for example in examples(40)]  # with other images it is another one
    assert notes(shown, [replace(example, images=("other",)) for example in shown]) == []


def test_empty_texts_are_counted_in_each_split():
    blank = [*examples(3), *examples(2, first=3, texts=(("a text", " "),))]
    found = notes(blank, examples(5, first=50), blank[2:4])
    assert found == [
        "RTE/train.tsv: 2 of 5 examples have an empty text, the first in line 5",
        "RTE/test.tsv: 1 of 2 examples have an empty text, the first in line 5",
    ]


def test_texts_in_letters_that_the_tokenizer_does_not_know_are_told(cassette_model):
    tokenizer, _ = own_tokenizer(str(cassette_model))
    data = TaskData(find_task("rte"), examples(9), {}, {}, {}, SOURCES)
    assert notes_on_words(data, tokenizer) == notes_on_words(data, None) == []
    other = examples(1, texts=(("text", "ጽሑፍ ጽሑፍ"),))  # of four words, as many pieces
    (note,) = notes_on_words(replace(data, train=examples(1) + other), tokenizer)
    assert note.startswith("RTE/train.tsv: 29% of the word pieces at its beginning are [UNK], unknown to the model's")


@pytest.mark.parametrize(
    ("recipe", "kind", "fitting"),
    [
        ("paper", "visualbert", "visualbert-vqa"),  # the default, which is XDBERT's
        ("visualbert-vqa", "vlbert", "vlbert-refcoco-e2e"),
        ("visualbert-vqa", "visualbert", None),
        ("quickstart-vqa", "visualbert", None),
        ("./visualbert-vqa.yaml", "vlbert", None),
        ("paper", "language", None),
    ],
)
def test_a_recipe_of_another_model_is_told_with_those_that_fit(recipe, kind, fitting):
    found = notes_on_recipe(recipe, kind)
    assert len(found) == (fitting is not None)
    if fitting is not None:
        assert found[0].startswith(f"note: --recipe {recipe} is not how a {kind} was finetuned as published: ")
        assert fitting in found[0].replace(" are", "").split(": ")[-1].split(", ")


def test_of_choices_and_numbers_no_class_is_missed():
    four = [replace(example, texts=example.texts * 4, label=0) for example in examples(9)]
    assert notes(four, examples(9, first=50), task="swag") == []
    assert notes(examples(9, label=2.5), examples(9, first=50, label=2.5), task="stsb") == []


def test_all_of_it_is_told_before_the_first_step(cassette_model, tmp_path):
    (tmp_path / "RTE").mkdir()
    for name in ("train", "dev"):
        lines = [f"{n}\tጽሑፍ {n}\t\tentailment\n" for n in range(4)]
        (tmp_path / "RTE" / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(lines))
    subject = {"name": str(cassette_model), "subject": "language", "size": "base", "weights_sha256": None}
    of_run = {"subject": subject, "source": tmp_path, "seed": 0, "label": "x", "folder": tmp_path / "run"}
    recipe = resolve_run(load_settings("quickstart", []), find_task("rte").read(tmp_path), **of_run)
    notes = "\n".join(FinetuneSystem(recipe).open(Place(Ranks(0, 1, 0), 2)).notes)
    told = (
        "4 of 4 examples have an empty text",
        "of the class not_entailment",
        "4 of 4 examples are trained on",
        "[UNK]",
    )
    assert [words for words in told if words not in notes] == []
