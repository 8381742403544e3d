"""Captions in pairs, masked, with the regions of their image: what is drawn, and what becomes of it."""

import numpy as np
import pytest

from xdscale.data.visualbert import VisualBERTCollator, compose, no_regions, second_captions
from xdscale.recipe import load_recipe
from xdscale.shards.cache import ShardCache
from xdscale.shards.manifest import Manifest
from xdscale.shards.regions import RegionTable
from xdscale.shards.remote import fetch_manifest, place_manifest
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.shards.table import Table
from xdscale.systems.contract import Slots

CLS, SEP, MASK = 101, 102, 103
TOKENIZER = LanguageTokenizer(
    name="none", sha256="0" * 64, vocab_size=30_522, cls_id=CLS, sep_id=SEP, mask_id=MASK, pad_id=0
)


def recipe(*overrides):
    return load_recipe("quickstart-visualbert", ["model.region_size=12", *overrides])


def slots_of(ids, epoch=0, real=None):
    ids = np.asarray(ids)
    return Slots(np.full(len(ids), epoch), ids, np.ones(len(ids), bool) if real is None else np.array(real))


@pytest.fixture(scope="module")
def train(captioned_pictures):
    return Table(captioned_pictures, "train", "captions")


@pytest.fixture
def collate(train):
    return VisualBERTCollator(train, recipe())


def samples(batch):
    """Each sample's (ids, segments, features) out of the packed arrays."""
    arrays, found = batch.arrays, []
    texts = len(arrays["text_ids"])
    for start, end, length in zip(arrays["cu_seqlens"], arrays["cu_seqlens"][1:], arrays["text_lengths"]):
        text, regions = np.split(arrays["rows"][start:end], [length])
        found.append((arrays["text_ids"][text], arrays["text_segments"][text], arrays["features"][regions - texts]))
    return found


def unmasked(batch):
    """The same batch with the right words in the place of the masks."""
    ids = batch.arrays["text_ids"].copy()
    ids[batch.arrays["rows"][batch.arrays["masked_lm_rows"]]] = batch.arrays["masked_lm_labels"]
    return [ids[rows] for rows in np.split(np.arange(len(ids)), np.cumsum(batch.arrays["text_lengths"])[:-1])]


def test_a_sample_is_two_captions_and_the_regions_of_the_first_ones_image(collate, train):
    slots = slots_of(np.arange(len(train)))
    batch = collate(slots)
    regions = RegionTable(train.linked("image"))
    images = train.read("image", slots.sample_ids)
    words, bounds = train.read_ragged("words", slots.sample_ids)
    texts = [words[start:end].tolist() for start, end in zip(bounds, bounds[1:])]
    by_image = {}
    for text, image in zip(texts, images.tolist()):
        by_image.setdefault(image, []).append(text)
    for row, (whole, (_, segments, features)) in enumerate(zip(unmasked(batch), samples(batch))):
        first, second = np.split(whole[1:], [whole.tolist().index(SEP)])
        assert whole[0] == CLS
        assert first.tolist() == [*texts[row], SEP]
        assert second[-1] == SEP
        assert segments.tolist() == [0] * (1 + len(first)) + [1] * len(second)
        assert np.array_equal(features, regions.read(images[row : row + 1].astype(int)).features)
        own = by_image[int(images[row])]
        if batch.arrays["match_labels"][row] == 1:
            assert second[:-1].tolist() in own
        else:
            assert second[:-1].tolist() in texts
    assert set(batch.arrays["match_labels"].tolist()) == {0, 1}
    assert batch.tokens == batch.arrays["cu_seqlens"][-1]
    assert batch.targets == {"mlm": len(batch.arrays["masked_lm_labels"]), "match": len(slots.sample_ids)}


def test_masks_are_in_words_alone(train):
    """Spec VisualBERT fact 5: 15 % ± .2 of the word pieces, 80/10/10 ± 1, never on [CLS], [SEP] or regions."""
    collate = VisualBERTCollator(train, recipe())
    counted, kept, masked, replaced, seen = 0, 0, 0, 0, set()
    for epoch in range(60):
        batch = collate(slots_of(np.arange(len(train)), epoch))
        arrays = batch.arrays
        places = arrays["rows"][arrays["masked_lm_rows"]]
        assert (places < len(arrays["text_ids"])).all()
        assert not np.isin(arrays["masked_lm_labels"], [CLS, SEP]).any()
        now, right = arrays["text_ids"][places], arrays["masked_lm_labels"]
        seen |= set(now[(now != MASK) & (now != right)].tolist())
        kept, masked = kept + (now == right).sum(), masked + (now == MASK).sum()
        replaced += ((now != MASK) & (now != right)).sum()
        counted += len(arrays["text_ids"]) - 3 * len(train)
    chosen = kept + masked + replaced
    assert counted > 200_000
    assert chosen / counted == pytest.approx(0.15, abs=0.002)
    assert [masked / chosen, replaced / chosen, kept / chosen] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert min(seen) < 1000 < 29_000 < max(seen) < 30_522


def test_pairs(train):
    """Spec VisualBERT fact 6: positive 50 % ± 1 and another caption of the image; negative one of another image."""
    rows, images = np.arange(len(train)), train.read("image", np.arange(len(train)))
    collate, positive, seconds = VisualBERTCollator(train, recipe()), 0, []
    for epoch in range(120):
        _, second, found, labels = collate._pair(slots_of(rows, epoch))
        same = images[second] == images
        assert np.array_equal(labels == 1, same)
        assert (second != rows).all()
        assert np.array_equal(found, images)
        positive += same.sum()
        seconds.append(second)
    assert positive / len(rows) / 120 == pytest.approx(0.5, abs=0.01)
    assert len(np.unique(np.stack(seconds)[:, 7])) > 40


def test_second_captions_are_uniform():
    """Of an image with captions 4, 5, 6 of 10 in all: the others of it, and all seven of the rest, alike often."""
    chance, n = np.random.default_rng(0), 70_000
    bits = chance.integers(0, 2**32, (n, 3), dtype=np.uint64).astype(np.uint32)
    rows, siblings = np.full(n, 5), np.tile([4, 3], (n, 1))
    for other, wanted in ((False, [4, 6]), (True, [0, 1, 2, 3, 7, 8, 9])):
        second, labels = second_captions(rows, siblings, 10, np.full(n, other), bits)
        found, counts = np.unique(second, return_counts=True)
        assert found.tolist() == wanted
        assert counts == pytest.approx(np.full(len(wanted), n / len(wanted)), rel=0.03)
        assert (labels == 1 - other).all()


def test_one_image_alone_has_no_other():
    second, labels = second_captions(
        np.array([0, 1]), np.array([[0, 2], [0, 2]]), 2, np.array([True, True]), np.zeros((2, 3), np.uint32)
    )
    assert second.tolist() == [1, 0]
    assert labels.tolist() == [1, 1]


def test_any_split_into_batches_gives_the_same_samples(collate, train):
    ids = np.random.default_rng(2).permutation(len(train))[:24]
    whole = collate(slots_of(ids, 3))
    parts = [collate(slots_of(part, 3)) for part in np.split(ids, [5, 6, 20])]
    found = [sample for part in parts for sample in samples(part)]
    for alone, together in zip(found, samples(whole), strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(alone, together))
    assert sum(part.targets["mlm"] for part in parts) == whole.targets["mlm"]
    labels = np.concatenate([part.arrays["match_labels"] for part in parts])
    assert np.array_equal(labels, whole.arrays["match_labels"])


def test_padding_has_no_target(collate):
    batch = collate(slots_of([3, 4, 5], real=[True, False, True]))
    assert batch.arrays["match_labels"][1] == -1
    assert batch.targets["match"] == 2
    start, end = batch.arrays["cu_seqlens"][1:3]
    assert not ((batch.arrays["masked_lm_rows"] >= start) & (batch.arrays["masked_lm_rows"] < end)).any()
    assert batch.tokens == batch.arrays["cu_seqlens"][-1] - (end - start)


def test_draws_hang_on_seed_epoch_and_sample(train, collate):
    slots = slots_of(np.arange(20), 1)
    again = VisualBERTCollator(train, recipe()).draws(slots)
    assert all(np.array_equal(one, other) for one, other in zip(collate.draws(slots), again, strict=True))
    assert all(array.dtype.kind in "biu" for array in again)
    for changed in (slots_of(np.arange(20), 2), slots_of(np.arange(1, 21), 1)):
        assert not any(np.array_equal(one, other) for one, other in zip(collate.draws(changed), again))
    other = VisualBERTCollator(train, recipe("training.seed=1")).draws(slots)
    assert not any(np.array_equal(one, two) for one, two in zip(other, again))


def test_nothing_is_drawn_for_objectives_that_are_off(train, collate):
    slots = slots_of(np.arange(20), 1)
    every = collate.draws(slots)
    for name, left in (("mlm", every[2:]), ("match", every[:2])):
        drawn = VisualBERTCollator(train, recipe(f"objectives.{name}=null")).draws(slots)
        assert all(map(np.array_equal, drawn, left))
        assert len(drawn) == len(left) == 2


def test_what_is_drawn_is_what_is_done(collate, train):
    """Masked places and words are those of the batch, where its texts reach so far."""
    slots = slots_of(np.arange(30))
    positions, put = collate.draws(slots)[:2]
    batch = collate(slots)
    row, column = np.divmod(positions, 64)
    starts, done = batch.arrays["cu_seqlens"], dict(zip(batch.arrays["masked_lm_rows"].tolist(), range(10**6)))
    drawn = dict(zip((starts[row] + column).tolist(), zip(row, column, put)))
    for place in done:
        now = batch.arrays["text_ids"][batch.arrays["rows"][place]]
        assert place in drawn
        right = batch.arrays["masked_lm_labels"][done[place]]
        assert now == drawn[place][2] or (drawn[place][2] == 0 and now == right)


def test_regions_are_cut_and_boxes_appended(train):
    every, few = (
        VisualBERTCollator(train, recipe(*more)) for more in ((), ("model.max_regions=2", "model.spatial=true"))
    )
    slots = slots_of(np.arange(40))
    wide = samples(few(slots))
    table = RegionTable(train.linked("image"))
    for row, (whole, cut) in enumerate(zip(samples(every(slots)), wide)):
        found = table.read(train.read("image", slots.sample_ids[row : row + 1]).astype(int))
        assert np.array_equal(cut[2][:, :12], whole[2][:2])
        width, height = found.sizes[0].tolist()
        left, top, right, bottom = (found.boxes[:2] / [width, height, width, height]).T
        wanted = np.stack([left, top, right, bottom, right - left, bottom - top], 1)
        np.testing.assert_allclose(cut[2][:, 12:], wanted, atol=1e-6)
    assert {len(features) for _, _, features in wide} == {1, 2}


def test_captions_alone(train):
    batch = VisualBERTCollator(train, recipe("model.images=false", "objectives.match=null"))(slots_of(np.arange(10)))
    assert batch.arrays["features"].shape == (0, 12)
    assert "match_labels" not in batch.arrays
    assert batch.targets.keys() == {"mlm"}
    words, bounds = train.read_ragged("words", np.arange(10))
    for row, ids in enumerate(unmasked(batch)):
        assert ids.tolist() == [CLS, *words[bounds[row] : bounds[row + 1]], SEP]


@pytest.mark.parametrize(
    ("lengths", "kept"), [((3, 4), (3, 4)), ((9, 2), (5, 2)), ((2, 9), (2, 5)), ((9, 9), (4, 3)), ((4, 5), (4, 3))]
)
def test_the_longer_caption_is_cut_first(lengths, kept):
    """As BERT's own code takes one piece after the other from the longer one, from the second where both are equal."""
    texts = [[np.arange(200, 200 + length)] for length in lengths]
    first, second = (list(text[0]) for text in texts)
    while len(first) + len(second) > 7:
        (first if len(first) > len(second) else second).pop()
    assert (len(first), len(second)) == kept
    few = recipe("model.max_text=10", "objectives.mlm=null")
    batch = compose(few, TOKENIZER, slots_of([0]), list(zip(*texts)), np.array([1]), no_regions(1, 12))
    assert batch.arrays["text_ids"].tolist() == [CLS, *first, SEP, *second, SEP]


def test_samples_in_quarantine_become_padding(captioned_pictures):
    """Damaged captions, and damaged regions: their samples keep their places, all others stay as they are."""
    ids = np.arange(len(Table(captioned_pictures, "train", "captions")))
    whole = VisualBERTCollator(Table(captioned_pictures, "train", "captions"), recipe())
    for damaged in ("captions-train-000001.tar", "regions-all-000002.tar"):
        table = Table(captioned_pictures, "train", "captions", quarantined={damaged})
        collate = VisualBERTCollator(table, recipe())
        found, expected = collate(slots_of(ids)), whole(slots_of(ids))
        labels = found.arrays["match_labels"]
        assert 0 < (labels == -1).sum() < len(ids)
        assert found.targets["match"] == (labels != -1).sum()
        assert (labels == expected.arrays["match_labels"])[labels != -1].all()
        for row in np.flatnonzero(labels != -1):
            assert all(map(np.array_equal, samples(found)[row], samples(expected)[row]))
        assert all(map(np.array_equal, collate.draws(slots_of(ids)), whole.draws(slots_of(ids))))


def test_shards_that_are_fetched_when_they_are_needed_give_the_same_batches(captioned_pictures, tmp_path):
    """Within a budget that holds the captions and the regions of a batch, but not the dataset."""
    folder = place_manifest(fetch_manifest(f"file://{captioned_pictures}"), tmp_path / "cache")
    records = Manifest.load(folder).shards
    budget = sum(record.bytes for record in records) - max(record.bytes for record in records)
    cache = ShardCache(f"file://{captioned_pictures}", folder, records, budget=budget, sharers=1)
    remote = VisualBERTCollator(Table(folder, "train", "captions", cache=cache), recipe())
    local = VisualBERTCollator(Table(captioned_pictures, "train", "captions"), recipe())
    ids = np.random.default_rng(3).permutation(len(local.captions))[:40].reshape(-1, 2)
    steps = [[slots_of(row, 1)] for row in ids]
    for step, ahead in zip(steps, steps[1:]):
        remote.prefetch(ahead)
        found, expected = remote(step[0]), local(step[0])
        assert found.targets == expected.targets
        assert all(np.array_equal(found.arrays[name], expected.arrays[name]) for name in expected.arrays)
    assert 0 < sum(path.stat().st_size for path in folder.glob("*.tar")) <= budget
