"""VisualBERT's second phase: what a sample is for each kind of task, and what is masked in it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from xdscale.data.task_files import NO_LABEL, Example, Span
from xdscale.errors import XdscaleError
from xdscale.pretrained.language import own_tokenizer
from xdscale.recipe import load_recipe
from xdscale.systems.contract import Slots
from xdscale.tasks.vcr import VCR_QA, VCRTruth
from xdscale.tasks.visualbert_pretraining import TaskTextCollator

WORDS = ("is jessie near the dog ?", "casey is", "no")


def task_of(reads, **of):
    toy = {"name": "toy", "images": 1, "reads": reads, "choices": 0, "labels": (), "targets": lambda *_: None}
    return SimpleNamespace(**(toy | of))


@pytest.fixture
def collator(cassette_model, region_table):
    def of(task, examples, *overrides):
        name = "visualbert-nlvr2-task"
        values = ["model.region_size=12", "model.max_regions=null", f"model.language.name={cassette_model}", *overrides]
        return TaskTextCollator(load_recipe(name, values), task, examples, region_table)

    return of


def batch(collate, real=None, epoch=0):
    ids = np.arange(len(collate))
    return collate(Slots(np.full_like(ids, epoch), ids, np.ones(len(ids), bool) if real is None else np.array(real)))


def unmasked(arrays):
    """The word pieces of each sample as they were."""
    ids, starts = arrays["text_ids"].copy(), np.concatenate([[0], np.cumsum(arrays["text_lengths"])])
    ends = arrays["cu_seqlens"]
    row = np.searchsorted(ends, arrays["masked_lm_rows"], side="right") - 1
    ids[starts[row] + arrays["masked_lm_rows"] - ends[row]] = arrays["masked_lm_labels"]
    return [ids[start:end].tolist() for start, end in zip(starts, starts[1:])]


def spelled(cassette_model, *texts):
    tokenizer, ids = own_tokenizer(str(cassette_model))
    found = [ids.cls_id]
    for text in texts:
        found += [*tokenizer.encode(text, add_special_tokens=False).ids, ids.sep_id]
    return found


def test_a_question_is_read_with_its_commonest_answer(collator, cassette_model):
    examples = [
        Example("1", (("where is it ?",),), 1, 1, ("picture-0",)),
        Example("2", (("who ?",),), NO_LABEL, 2, ("picture-1",)),
    ]
    collate = collator(task_of("answer", labels=("here", "on the table")), examples, "objectives.match=null")
    made = batch(collate)
    texts = [spelled(cassette_model, "where is it ?", "on the table"), spelled(cassette_model, "who ?")]
    assert unmasked(made.arrays) == texts
    assert "match_labels" not in made.arrays
    assert np.diff(made.arrays["cu_seqlens"]).tolist() == [len(texts[0]) + 3, len(texts[1]) + 5]


def test_a_statement_of_two_images_is_true_or_false(collator):
    examples = [
        Example("1", (("both are red",),), 1, 1, ("picture-0", "picture-2")),
        Example("2", (("none is",),), 0, 2, ("picture-1", "picture-3")),
    ]
    made = batch(collator(task_of("input", images=2), examples), real=[True, False])
    assert made.arrays["match_labels"].tolist() == [1, NO_LABEL]
    assert made.arrays["region_segments"].tolist() == [0] * 3 + [1] * 2 + [0] * 5 + [1] * 4
    assert made.targets["match"] == 1
    assert made.arrays["masked_lm_rows"].max(initial=0) < made.arrays["text_lengths"][0]


@pytest.mark.parametrize("labelled", [True, False])
def test_choices_are_samples_of_their_own_or_the_right_one_is(collator, cassette_model, labelled):
    """Spec VisualBERT §2: the paper has masked words alone, the release the label of each choice too."""
    spans = tuple(((Span(3, 9, 1), Span(19, 22, 2)), ()) for _ in WORDS[1:])
    texts = tuple((WORDS[0], word) for word in WORDS[1:])
    example = Example("1", texts, 1, 1, ("picture-1",), spans)
    collate = collator(task_of("input", choices=2), [example], *([] if labelled else ["objectives.match=null"]))
    made = batch(collate)
    read = texts if labelled else texts[1:]
    assert unmasked(made.arrays) == [spelled(cassette_model, *pair) for pair in read]
    tokenizer, _ = own_tokenizer(str(cassette_model))
    pieces = tokenizer.encode(WORDS[0], add_special_tokens=False).tokens
    places = [pieces.index("jessie") + 1, pieces.index("dog") + 1]
    assert made.arrays["aligned_positions"].tolist() == places * len(read)
    assert made.arrays["aligned_regions"].tolist() == [row + 5 * n for n in range(len(read)) for row in (1, 2)]
    if labelled:
        assert made.arrays["match_labels"].tolist() == [0, 1]


def test_words_that_are_cut_off_are_aligned_with_nothing(collator):
    spans = (((Span(3, 9, 1), Span(19, 22, 2)), (Span(0, 5, 0),)),)
    example = Example("1", ((WORDS[0], WORDS[1]),), 0, 1, ("picture-1",), spans)
    made = batch(collator(task_of("input", choices=1), [example], "model.max_text=8"))
    assert made.arrays["text_lengths"].tolist() == [8]
    assert set(made.arrays["aligned_regions"].tolist()) == {1, 0}


def test_vcrs_second_phase_reads_what_its_finetuning_reads(collator, cassette_model):
    """Objects that nobody names are left out, and what is too long loses the second text's beginning."""
    spans = (((Span(3, 9, 1), Span(19, 22, 3)), (Span(0, 5, 0),)),)
    example = Example("1", ((WORDS[0], WORDS[1]),), 0, 1, ("picture-1",), spans, named=(0, 1, 3))
    every = batch(collator(task_of("input", choices=1), [example])).arrays
    whole = spelled(cassette_model, WORDS[0], WORDS[1])
    values = ["model.objects=named", f"model.max_text={len(whole) - 1}", "model.truncation=second_from_front"]
    made = batch(collator(task_of("input", choices=1), [example], *values))
    first = len(spelled(cassette_model, WORDS[0]))
    assert unmasked(made.arrays) == [whole[:first] + whole[first + 1 :]]
    np.testing.assert_array_equal(made.arrays["features"], every["features"][[0, 1, 3]])
    before = dict(zip(every["aligned_regions"].tolist(), every["aligned_positions"].tolist()))
    now = dict(zip(made.arrays["aligned_regions"].tolist(), made.arrays["aligned_positions"].tolist()))
    pieces_of_casey = len(spelled(cassette_model, "casey")) - 2
    wanted = {1: before[1], 2: before[3]} | ({0: before[0]} if pieces_of_casey > 1 else {})
    assert now == wanted
    unnamed = [Example("1", example.texts, 0, 1, ("picture-1",))]
    with pytest.raises(XdscaleError, match=r"model\.objects = named: vcr_qa does not say"):
        collator(task_of("input", choices=1), unnamed, "model.objects=named", "task=vcr_qa")


def test_of_a_name_that_loses_its_beginning_the_first_piece_that_is_left_is_aligned(collator, cassette_model):
    """As in finetuning."""
    name, text = "trafficlight", "trafficlight is"
    pieces = len(spelled(cassette_model, name)) - 2
    assert pieces > 1
    example = Example("1", ((WORDS[0], text),), 0, 1, ("picture-1",), (((), (Span(0, len(name), 2),)),))
    first = len(spelled(cassette_model, WORDS[0]))
    for cut in range(pieces + 1):
        length = len(spelled(cassette_model, WORDS[0], text)) - cut
        values = [f"model.max_text={length}", "model.truncation=second_from_front"]
        arrays = batch(collator(task_of("input", choices=1), [example], *values)).arrays
        assert arrays.get("aligned_regions", np.empty(0)).tolist() == [2] * (cut < pieces)
        assert arrays.get("aligned_positions", np.empty(0)).tolist() == [first] * (cut < pieces)


def test_regions_that_are_left_out_are_aligned_with_nothing(collator):
    """Else they would be the first regions of the next sample's image."""
    spans = tuple(((Span(3, 9, 1), Span(19, 22, 2)), ()) for _ in WORDS[1:])
    example = Example("1", tuple((WORDS[0], word) for word in WORDS[1:]), 1, 1, ("picture-1",), spans)
    made = batch(collator(task_of("input", choices=2), [example], "model.max_regions=2"))
    assert len(made.arrays["features"]) == 4
    assert made.arrays["aligned_regions"].tolist() == [1, 3]
    assert made.arrays["aligned_counts"].tolist() == [1, 1]


@pytest.mark.parametrize("objects", ["all", "named"])
def test_a_table_without_the_regions_that_a_choice_counts_on_is_refused(collator, objects):
    """VCR's words would be aligned with other objects than they name, in silence."""
    spans = (((Span(3, 9, 1), Span(19, 22, 3)), (Span(0, 5, 0),)),)
    truth = VCRTruth(7, None, ("person",) * 6, Path("none.json"))
    example = Example("x-1", ((WORDS[0], WORDS[1]),), 0, 1, ("picture-1",), spans, truth, named=(0, 1, 6))
    collate = collator(VCR_QA, [example], f"model.objects={objects}", "task=vcr_qa")
    with pytest.raises(XdscaleError, match="x-1: image picture-1 has 5 regions in the table, its question needs 7"):
        batch(collate)


def test_a_caption_is_one_sample_for_all_of_its_phrases(collator, cassette_model):
    caption = "a dog and a cat"
    examples = [Example(str(n), ((caption,),), 1, 1, ("picture-0",), (((span,),),)) for n, span in enumerate("ab")]
    examples.append(Example("3", ((caption,),), 1, 1, ("picture-1",)))
    collate = collator(task_of("region"), examples, "objectives.match=null")
    assert len(collate) == 2
    assert unmasked(batch(collate).arrays) == [spelled(cassette_model, caption)] * 2


def test_masks_are_drawn_anew_in_each_epoch_and_known_without_reading(collator):
    examples = [Example(str(n), ((WORDS[0] * 4,),), 1, n, ("picture-0",)) for n in range(8)]
    collate = collator(task_of("input"), examples)
    first, again, other = batch(collate), batch(collate), batch(collate, epoch=1)
    assert first.arrays["masked_lm_rows"].tolist() == again.arrays["masked_lm_rows"].tolist()
    assert first.arrays["masked_lm_rows"].tolist() != other.arrays["masked_lm_rows"].tolist()
    ids = np.arange(8)
    positions, _ = collate.draws(Slots(np.zeros(8, int), ids, np.ones(8, bool)))
    row, column = np.divmod(positions, 128)
    drawn = {(r, c) for r, c in zip(row.tolist(), column.tolist())}
    ends = first.arrays["cu_seqlens"]
    found = np.searchsorted(ends, first.arrays["masked_lm_rows"], side="right") - 1
    assert {(r, p - ends[r]) for r, p in zip(found.tolist(), first.arrays["masked_lm_rows"].tolist())} <= drawn


def test_match_without_anything_true_or_false_is_refused(collator):
    with pytest.raises(XdscaleError, match=r"vqa has nothing that is true or false; write objectives\.match=null"):
        collator(task_of("answer"), [Example("1", (("who ?",),), 0, 1, ("picture-0",))], "task=vqa")
