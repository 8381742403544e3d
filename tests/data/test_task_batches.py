"""Finetuning batches, against transformers' own tokenizer and against appendix B's rules for CLIP."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from xdscale.data.order import validation_slots
from xdscale.data.task_batches import TaskCollator, cut_longest_first, encode_examples
from xdscale.data.task_files import NO_LABEL, Example
from xdscale.shards.clip_bpe import ClipBPE, describe_clip_tokenizer
from xdscale.shards.language import load_language_tokenizer
from xdscale.tasks.contract import find_task

SHORT = "Albedo is a measure of reflection."
LONG = "The albedo of fresh snow is high, and that of the open ocean is low. " * 12


@pytest.fixture(scope="module")
def tokenizer(cassette_model):
    return load_language_tokenizer(str(cassette_model))


@pytest.fixture(scope="module")
def reference(cassette_model):
    return AutoTokenizer.from_pretrained(cassette_model)


def collate(task, examples, tokenizer=None, clip=None, max_length=128, micro_batch=None):
    language = tokenizer[0] if tokenizer else None
    split = encode_examples(examples, find_task(task).targets, language, clip)
    slots = validation_slots(len(split), len(split), 1, 0, micro_batch or len(split))
    ids = tokenizer[1] if tokenizer else None
    return TaskCollator(split, ids, describe_clip_tokenizer() if clip else None, max_length=max_length)(slots[0])


def example(first, *seconds, label=0):
    return Example("0", tuple((first, second) for second in seconds) or ((first,),), label, 1)


@pytest.mark.parametrize("max_length", [16, 17, 64, 512])
@pytest.mark.parametrize("pair", [(SHORT, LONG), (LONG, SHORT), (LONG, LONG), (SHORT, SHORT), (SHORT, "")])
def test_pairs_are_what_transformers_makes_of_them(tokenizer, reference, pair, max_length):
    batch = collate("rte", [example(*pair), example("A", "b [SEP] c")], tokenizer, max_length=max_length).arrays
    wanted = reference([pair[0]], [pair[1]], truncation=True, max_length=max_length)
    length = len(wanted["input_ids"][0])
    assert batch["language_ids"][0, :length].tolist() == wanted["input_ids"][0]
    assert batch["segments"][0, :length].tolist() == wanted["token_type_ids"][0]
    assert batch["language_mask"].sum(1)[0] == length
    assert not batch["language_ids"][0, length:].any()  # [PAD] is 0 in this vocabulary
    assert (batch["language_ids"][1] == 102).sum() == 2  # text that spells [SEP] is no separator


@pytest.mark.parametrize("text", [SHORT, LONG])
def test_single_sentences_are_what_transformers_makes_of_them(tokenizer, reference, text):
    batch = collate("cola", [example(text)], tokenizer)
    wanted = reference([text], truncation=True, max_length=128, return_tensors="np")
    assert np.array_equal(batch.arrays["language_ids"], wanted["input_ids"])
    assert not batch.arrays["segments"].any()
    assert batch.tokens == wanted["attention_mask"].sum()


def test_cutting_never_touches_the_shorter_text_before_both_are_equal():
    parts = [np.arange(5), np.arange(30)]
    assert [len(part) for part in cut_longest_first(parts, 20)] == [5, 15]
    assert [len(part) for part in cut_longest_first(parts[::-1], 20)] == [15, 5]
    assert [len(part) for part in cut_longest_first([np.arange(30), np.arange(30)], 21)] == [10, 11]


def test_choices_are_a_dimension_of_their_own_and_padding_weighs_nothing(tokenizer):
    examples = [example(SHORT, "one", "two", "three", "four words in all", label=3) for _ in range(3)]
    batch = collate("swag", examples, tokenizer, micro_batch=4)
    assert batch.arrays["language_ids"].shape[:2] == (4, 4)
    assert batch.arrays["labels"].tolist() == [3, 3, 3, NO_LABEL]
    assert batch.arrays["real"].tolist() == [True, True, True, False]
    assert batch.targets == {"task": 3}
    assert batch.tokens == batch.arrays["language_mask"][:3].sum()


def test_clip_reads_two_blocks_per_sentence_and_sentences_share_none():
    """Appendix B: 2 blocks of 77 for one sentence, 4 for a pair."""
    bpe, ids = ClipBPE(), describe_clip_tokenizer()
    single = collate("cola", [example(SHORT), example(LONG)], clip=bpe).arrays
    assert single["clip_ids"].shape == (2, 2, 77)
    assert single["clip_lengths"].tolist() == [[len(bpe.encode([SHORT])[0]) + 2, 0], [77, 77]]
    pair = collate("rte", [example(SHORT, LONG), example(LONG, "")], clip=bpe).arrays
    assert pair["clip_ids"].shape == (2, 4, 77)
    assert np.array_equal(pair["clip_ids"][0, :2], single["clip_ids"][0])
    assert np.array_equal(pair["clip_ids"][0, 2:], single["clip_ids"][1])
    assert pair["clip_lengths"][1].tolist() == [77, 77, 2, 0]
    assert pair["clip_ids"][1, 2, :2].tolist() == [ids.start_id, ids.end_id]
    blocks = bpe.encode([LONG])[0][:150].reshape(2, 75)
    assert np.array_equal(pair["clip_ids"][1, :2, 1:-1], blocks)


def test_where_clip_alone_reads_its_tokens_are_counted():
    """Of real examples, with start and end of each block; padding weighs nothing."""
    bpe = ClipBPE()
    for task, choices in (("cola", ()), ("swag", ("one", "two words"))):
        batch = collate(task, [example(SHORT, *choices) for _ in range(3)], clip=bpe, micro_batch=4)
        first, *others = (len(ids) + 2 for ids in bpe.encode([SHORT, *choices]))
        wanted = first + sum(others) + first * (len(others) > 1)
        assert batch.arrays["clip_lengths"].reshape(4, -1).sum(1).tolist() == [wanted] * 4
        assert batch.tokens == 3 * wanted


def test_examples_that_are_too_long_are_counted(tokenizer, reference):
    texts = [(SHORT, SHORT), (SHORT, LONG), (LONG, SHORT)]
    split = encode_examples([example(*pair) for pair in texts], find_task("rte").targets, tokenizer[0], None)
    lengths = [len(ids) for ids in reference([a for a, _ in texts], [b for _, b in texts])["input_ids"]]
    for longest, cut in ((max(lengths), (0, -1)), (lengths[0], (2, 1)), (lengths[0] - 1, (3, 0))):
        assert TaskCollator(split, tokenizer[1], None, max_length=longest).first_cut() == cut
