"""VL-BERT's batches of captions and texts: what is masked, cut and predicted (spec VL-BERT §2, §10)."""

import time

import numpy as np
import pytest

from xdscale.data.draws import draws_hash
from xdscale.data.hashing import Purpose, random_bits
from xdscale.data.order import Order
from xdscale.data.vlbert import objects_of, with_whole_image
from xdscale.data.vlbert_pretraining import Tokens, VLBERTCollator, choose_regions, compose, shares
from xdscale.recipe import load_recipe
from xdscale.shards.regions import Regions, RegionTable
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.shards.table import Table
from xdscale.systems.contract import Slots
from xdscale.systems.vlbert import continuations

MASK = 103
IDS = LanguageTokenizer(
    name="memory", sha256="0" * 64, vocab_size=2000, cls_id=101, sep_id=102, mask_id=MASK, pad_id=0
)  # fmt: skip
GOES_ON = np.arange(2000) >= 1000  # ids from 1000 on go on with the word before


def recipe(*overrides):
    return load_recipe(
        "quickstart-vlbert", ["model.region_size=12", "model.region_classes=7", "model.max_elements=20", *overrides]
    )


def slots_of(ids, real=True, epoch=0):
    ids = np.asarray(ids)
    return Slots(np.full(len(ids), epoch), ids, np.full(len(ids), real))


@pytest.fixture(scope="module")
def collator(grounded_pictures):
    def of(*overrides, split="train", texts=True, flips=False):
        found = recipe(*overrides)
        tables = [Table(grounded_pictures, split, name) for name in ("captions", "text")[: 1 + texts]]
        return VLBERTCollator(*tables, recipe=found, continues=continuations(found.model.language), flips=flips)

    return of


def objects(counts, width=3):
    """Regions with features that name them."""
    total = sum(counts)
    features = np.arange(1, total * width + 1, dtype=np.float32).reshape(total, width)
    boxes = np.tile(np.array([1, 2, 30, 40], np.float32), (total, 1))
    sizes = np.full((len(counts), 2), (90, 50), np.uint16)
    return Regions(features, boxes, np.full(total, 0.5, np.float32), sizes, np.cumsum([0, *counts]))


def sample_of(batch):
    """The sample of each place in the row."""
    return np.repeat(np.arange(len(batch.arrays["text_lengths"])), np.diff(batch.arrays["cu_seqlens"]))


def test_a_step_has_as_many_captions_as_texts_and_each_table_once_an_epoch(collator):
    """Spec VL-BERT §3: 1 : 1."""
    collate = collator()
    captions, texts = collate.sizes
    order = Order(*collate.sizes, shares=(1, 1), seed=0, global_batch=16, world_size=2, rank=1, micro_batch=4)
    for step in range(3):
        for slots in order.slots(step):
            assert (slots.sample_ids < captions).sum() == 2
    ids = np.concatenate([order.global_batch_ids(step)[1] for step in range(captions // 8)])
    assert len(np.unique(ids[ids < captions])) == captions // 8 * 8
    batch = collate(slots_of([3, captions + 1, 4, captions]))
    assert batch.targets.keys() == {"mlm", "text_mlm", "masked_region"}
    counts = np.diff(batch.arrays["cu_seqlens"]) - batch.arrays["text_lengths"] - 1
    assert (counts[1::2] == 0).all()
    assert (counts[::2] >= 2).all()
    assert batch.arrays["text_lengths"][1::2].tolist() == [20, 20]  # no [CLS], no [SEP]
    assert len(collate.texts) == texts


def test_captions_stand_in_front_of_their_regions(collator):
    collate = collator("model.max_elements=60", "objectives.mlm.select=0.001", "objectives.masked_region.select=0.001")
    batch = collate(slots_of([7]))
    words = collate.captions.read_ragged("words", np.array([7])).values
    image = collate.captions.read("image", np.array([7])).astype(int)
    table = RegionTable(collate.captions.linked("image")).read(image)
    assert batch.arrays["text_ids"].tolist() == [101, *words, 102]
    assert len(batch.arrays["features"]) == 1 + len(table.features)
    np.testing.assert_allclose(batch.arrays["features"][0], table.features.mean(0, dtype=np.float32), atol=1e-3)
    np.testing.assert_array_equal(batch.arrays["features"][1:], table.features)
    assert batch.arrays["places"][0].tolist() == [50, 50, 100, 100]


def test_the_mean_of_what_is_seen_stands_for_the_whole_image():
    """Spec VL-BERT §1.3: masked regions are not in it, in fp64 against a loop; without any it is 0."""
    found = objects((3, 1, 2, 1))
    seen = np.array([True, False, True, False, True, True, True])
    regions, whole = with_whole_image(found, seen)
    assert np.flatnonzero(whole).tolist() == regions.offsets[:-1].tolist() == [0, 4, 6, 9]
    features = found.features.astype(np.float64)
    for place, mine in ((0, [0, 2]), (6, [4, 5]), (9, [6])):
        np.testing.assert_allclose(regions.features[place], features[mine].mean(0), rtol=1e-6)
    assert not regions.features[4].any()
    assert regions.boxes[4].tolist() == [0, 0, 90, 50]
    again, kept = objects_of(regions, True)
    for one, other in zip(again, found):
        np.testing.assert_array_equal(one, other)
    assert (kept == ~whole).all()
    assert objects_of(found, False)[1].all()


def test_the_mean_of_features_is_quickly_made():
    """The thread that prepares batches makes it of every image: `np.add.at`, of the same bits, takes far longer."""
    found = objects([36] * 8)
    found = found._replace(features=np.random.default_rng(0).standard_normal((288, 2048)).astype(np.float16))
    seconds, sums = {"add.at": 9.0, "ours": 9.0}, None
    for _ in range(3):
        began, sums = time.perf_counter(), np.zeros((8, 2048), np.float32)
        np.add.at(sums, np.repeat(np.arange(8), 36), found.features)
        seconds["add.at"] = min(seconds["add.at"], time.perf_counter() - began)
        began = time.perf_counter()
        regions, whole = with_whole_image(found)
        seconds["ours"] = min(seconds["ours"], time.perf_counter() - began)
    np.testing.assert_array_equal(regions.features[whole], (sums / np.full((8, 1), 36)).astype(np.float16))
    assert seconds["ours"] < seconds["add.at"] / 2


@pytest.mark.parametrize("room", [20, 21, 64])
def test_the_longer_side_is_cut_first(room):
    """Spec VL-BERT §3, against the release's loop."""
    for text in range(2, 2 * room):
        for regions in range(1, 2 * room):
            words, boxes = text, regions
            while words + boxes > room:
                if boxes > words:
                    boxes -= 1
                else:
                    words -= 1
            assert shares(text, regions, room) == (words, boxes)
    assert shares(90, 0, room) == (room, 0)


def test_what_is_cut_off_is_no_target():
    found = recipe(
        "model.region_size=3",
        "objectives.masked_region.select=0.999",
        "objectives.mlm.select=0.999",
        "objectives.text_mlm.select=0.999",
    )
    words = [np.arange(200, 240), np.arange(300, 340)]
    probs = np.full((30, 7), 1 / 7, np.float32)
    batch = compose(
        found, Tokens(IDS, GOES_ON), slots_of([0, 500]), words, np.array([True, False]), objects((30,)), probs
    )
    assert np.diff(batch.arrays["cu_seqlens"]).tolist() == [21, 21]
    assert batch.arrays["text_lengths"].tolist() == [10, 20]
    assert batch.arrays["mlm_labels"].tolist() == list(range(200, 208))
    assert batch.arrays["mlm_rows"].tolist() == list(range(1, 9))
    assert batch.arrays["text_mlm_labels"].tolist() == list(range(300, 320))
    assert batch.arrays["text_mlm_rows"].tolist() == list(range(21, 41))
    assert batch.arrays["masked_region_rows"].tolist() == list(range(11, 20))  # 10 is the whole image
    assert batch.arrays["text_ids"][[0, 9]].tolist() == [101, 102]
    assert batch.targets == {"mlm": 8, "text_mlm": 20, "masked_region": 9}
    assert batch.tokens == 42


def masked_counts(found, samples, counts):
    chosen, masked = choose_regions(np.full(samples, counts), slots_of(np.arange(samples)), found, seed=3)
    return chosen, masked


def test_rates_of_masking(collator):
    """Spec VL-BERT fact 7: 15 % of words, 15 % of regions of which 90 % are masked, never the whole image."""
    found = recipe().objectives
    chosen, masked = masked_counts(found.masked_region, 4000, 50)
    assert chosen.mean() == pytest.approx(0.15, abs=0.003)
    assert masked.sum() / chosen.sum() == pytest.approx(0.9, abs=0.005)
    assert not (masked & ~chosen).any()
    collate, chosen_words, all_words, masks = collator(), 0, 0, 0
    captions = collate.sizes[0]
    whole = []
    for epoch in range(12):
        ids = np.concatenate([np.arange(captions), captions + np.arange(collate.sizes[1])])
        batch = collate(slots_of(ids, epoch=epoch))
        rows = np.concatenate([batch.arrays["mlm_rows"], batch.arrays["text_mlm_rows"]])
        tokens = batch.arrays["text_ids"][batch.arrays["rows"][rows]]
        labels = np.concatenate([batch.arrays["mlm_labels"], batch.arrays["text_mlm_labels"]])
        original = batch.arrays["text_ids"].copy()
        original[batch.arrays["rows"][rows]] = labels
        first = ~collate.tokens.continues[original] & (original != 101) & (original != 102)
        all_words += first.sum()
        chosen_words += (~collate.tokens.continues[labels]).sum()
        masks += (tokens[~collate.tokens.continues[labels]] == MASK).sum()
        starts = np.cumsum(np.diff(batch.arrays["cu_seqlens"]) - batch.arrays["text_lengths"] - 1)
        whole.append(batch.arrays["masked_regions"][np.concatenate([[0], starts[: captions - 1]])].sum())
    # texts begin within words, so that a few more first pieces are counted as chosen than as words
    assert chosen_words / all_words == pytest.approx(0.15, abs=0.003)
    assert masks / chosen_words == pytest.approx(0.8, abs=0.01)
    assert sum(whole) == 0


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("images", [True, False])
def test_all_pieces_of_a_word_are_masked_together(whole, images):
    """One draw for a word, of its number, or one for each piece, of its position; the same as one after the other.

    The first piece of a text begins a word, whatever it is; texts without an image have no [CLS] before it.
    """
    name = "mlm" if images else "text_mlm"
    found = recipe(
        "model.max_elements=64", f"objectives.{name}.whole_words={str(whole).lower()}", "model.region_size=3"
    )
    chance = np.random.default_rng(1)
    words = [chance.integers(200, 2000, length) for length in (9, 30, 5, 40, 21)]
    for text in words:
        text[:2] = 1500, 300
    ids, regions = np.array([4, 9, 70, 3, 11]), objects((1,) * 5 * images)
    batch = compose(
        found, Tokens(IDS, GOES_ON), slots_of(ids), words, np.full(5, images), regions,
        np.full((len(regions.boxes), 7), 1 / 7),
    )  # fmt: skip
    rows, labels = batch.arrays[f"{name}_rows"].tolist(), batch.arrays[f"{name}_labels"].tolist()
    wanted = []
    for sample, text in enumerate(words):
        bits, number = random_bits(0, 0, ids[sample : sample + 1], Purpose.MASKED_POSITION, 64)[0], -1
        for place, piece in enumerate(text):
            number += place == 0 or piece < 1000
            if bits[number if whole else place + images] < round(0.15 * 2**32):
                wanted.append((batch.arrays["cu_seqlens"][sample] + images + place, piece))
    assert list(zip(rows, labels)) == wanted
    assert len(wanted) > 5


def test_the_paper_always_masks_and_has_specials_around_texts(grounded_pictures):
    found = load_recipe("vlbert-base-precomputed-paper")
    batch = compose(
        found, Tokens(IDS, GOES_ON), slots_of([1, 2]), [np.arange(200, 220)] * 2, np.array([True, False]),
        objects((4,)), np.full((4, 1601), 1 / 1601),
    )  # fmt: skip
    rows = np.concatenate([batch.arrays[f"{name}_rows"] for name in ("mlm", "text_mlm")])
    assert (batch.arrays["text_ids"][batch.arrays["rows"][rows]] == MASK).all()
    assert batch.arrays["text_ids"][[0, 21, 22, 43]].tolist() == [101, 102, 101, 102]


def test_a_region_whose_distribution_is_none_is_no_target():
    """Spec VL-BERT §2: its sum is to be 1 ± .1; it is masked all the same."""
    found = recipe("model.region_size=3", "objectives.masked_region.select=0.999", "objectives.masked_region.mask=1.0")
    probs = np.eye(7, dtype=np.float32)[:4] * np.array([[1.0], [0.89], [1.09], [1.2]], np.float32)
    batch = compose(
        found, Tokens(IDS, GOES_ON), slots_of([0]), [np.arange(200, 203)], np.array([True]), objects((4,)), probs
    )
    assert batch.targets["masked_region"] == 2
    np.testing.assert_array_equal(batch.arrays["masked_region_labels"], probs[[0, 2]])
    assert batch.arrays["masked_region_rows"].tolist() == [6, 8]
    assert batch.arrays["masked_regions"].tolist() == [0, 1, 1, 1, 1]


def test_the_paper_has_the_likeliest_class_as_the_target(collator):
    """Spec VL-BERT §2, 2: softmax cross-entropy of it."""
    wide = "objectives.masked_region.select=0.5"
    soft, hard = (
        collator(wide, f"objectives.masked_region.target={target}")(slots_of(range(40)))
        for target in ("distribution", "class")
    )
    assert len(soft.arrays["masked_region_labels"]) > 20
    assert soft.arrays["masked_region_labels"].dtype == hard.arrays["masked_region_labels"].dtype == np.float32
    for found, wanted in zip(hard.arrays["masked_region_labels"], soft.arrays["masked_region_labels"], strict=True):
        likeliest = max(range(7), key=wanted.tolist().__getitem__)
        assert found.tolist() == [float(number == likeliest) for number in range(7)]
    np.testing.assert_array_equal(hard.arrays["masked_region_rows"], soft.arrays["masked_region_rows"])


def test_padding_counts_for_nothing(collator):
    collate = collator()
    batch = collate(slots_of([1, collate.sizes[0]], real=False))
    assert batch.targets == {"mlm": 0, "text_mlm": 0, "masked_region": 0}
    assert batch.tokens == 0
    assert not batch.arrays["masked_regions"].any()


def test_a_sample_is_the_same_in_any_batch_and_its_draws_are_hashed(collator):
    collate = collator()
    captions = collate.sizes[0]
    ids = np.array([5, captions + 3, 17, captions + 8, 2])
    together, alone = collate(slots_of(ids, epoch=2)), [collate(slots_of([one], epoch=2)) for one in ids]
    for name in ("text_ids", "features", "masked_regions", "mlm_labels", "text_mlm_labels", "masked_region_labels"):
        np.testing.assert_array_equal(
            together.arrays[name], np.concatenate([batch.arrays[name] for batch in alone]), err_msg=name
        )
    epochs = np.full(5, 2)
    assert draws_hash(collate, epochs, ids) == draws_hash(collator(), epochs, ids)
    assert draws_hash(collate, epochs, ids) != draws_hash(collate, epochs + 1, ids)
    for other in (
        collator("objectives.masked_region.select=0.1"),
        collator("model.flip=0.5", flips=True),
        collator("model.flip=0.9", flips=True),
    ):
        assert draws_hash(collate, epochs, ids) != draws_hash(other, epochs, ids)
        collate = other


def test_held_out_captions_and_texts_alternate(collator):
    collate = collator(split="validation")
    ids = collate.alternating(slots_of(np.arange(6))).sample_ids
    assert ids.tolist() == [0, (first := len(collate.captions)), 1, first + 1, 2, first + 2]
    captions_alone = collator("objectives.text_mlm=null", texts=False)
    assert captions_alone.alternating(slots_of(np.arange(3))).sample_ids.tolist() == [0, 1, 2]
    assert "text_mlm" not in captions_alone(slots_of([1])).targets


def test_samples_of_shards_in_quarantine_have_no_weight(grounded_pictures):
    manifest = Table(grounded_pictures, "train", "captions").manifest
    damaged = {manifest.tables[name].splits[split].shards[0].file: "damaged" for name, split in
               (("captions", "train"), ("text", "train"), ("regions", "all"))}  # fmt: skip
    found = recipe()
    tables = [Table(grounded_pictures, "train", name, quarantined=damaged) for name in ("captions",)]
    collate = VLBERTCollator(*tables, recipe=found, continues=np.zeros(30522, bool))
    last = len(collate.captions) - 1
    batch = collate(slots_of([0, last]))
    sample = sample_of(batch)
    assert set(sample[batch.arrays["mlm_rows"]].tolist()) <= {1}
    assert batch.tokens == np.diff(batch.arrays["cu_seqlens"])[1]
    collate.prefetch([slots_of([0, last])])
