"""Flickr30K Entities from its public files; recall against a plain reading of its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from xdscale.data.task_files import Example, Span
from xdscale.errors import XdscaleError
from xdscale.shards.regions import Regions
from xdscale.tasks.flickr30k_entities import FLICKR30K_ENTITIES, Phrase, recall

SENTENCE = (
    "[/EN#1/people A man] in [/EN#2/clothing/bodyparts a red shirt] and [/EN#0/notvisual nothing] by "
    "[/EN#3/scene a sea] ."
)


def item(names, box=None, flag="nobndbox"):
    tags = "".join(f"<name>{name}</name>" for name in names)
    if box is None:
        return f"<object>{tags}<scene>0</scene><{flag}>1</{flag}></object>"
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object>{tags}<bndbox>{sides}</bndbox></object>"


def annotation(*items):
    size = "<size><width>500</width><height>300</height><depth>3</depth></size>"
    return f"<annotation><filename>x.jpg</filename>{size}{''.join(items)}</annotation>"


ITEMS = (item([1], (1, 1, 101, 201)), item([1, 2], (11, 21, 51, 81)), item([3]))


class World:
    def __init__(self, folder):
        self.data, self.folder = folder, folder / "Flickr30kEntities"
        for name in ("Sentences", "Annotations"):
            (self.folder / name).mkdir(parents=True)

    def write(self, split, **images):
        """Lists images in a split; each is (sentences, XML)."""
        (self.folder / f"{split}.txt").write_text("".join(f"{image[1:]}\n" for image in images))
        for image, (sentences, xml) in images.items():
            (self.folder / "Sentences" / f"{image[1:]}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
            (self.folder / "Annotations" / f"{image[1:]}.xml").write_text(xml, encoding="utf-8")

    def read(self):
        return FLICKR30K_ENTITIES.read(self.data)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.write("train", i36979=([SENTENCE, "[/EN#1/people He] waits ."], annotation(*ITEMS)))
    world.write("val", i65567=(["[/EN#9/animals Two dogs] ."], annotation(item([9], (5, 5, 9, 9)))))
    world.write("test", i1007=(["[/EN#8/other It] ."], annotation(item([8], (5, 5, 9, 9)))))
    return world


def regions(*images):
    """Regions with given boxes; nothing else of them is asked for."""
    total = sum(map(len, images))
    boxes = np.concatenate([np.array(image, np.float32).reshape(-1, 4) for image in images])
    offsets = np.cumsum([0, *map(len, images)])
    return Regions(np.zeros((total, 0)), boxes, np.ones(total), np.full((len(images), 2), 500, np.uint16), offsets)


def test_each_phrase_with_boxes_is_an_example(world):
    man, shirt, he = world.read().train
    caption = "A man in a red shirt and nothing by a sea ."
    assert [example.texts for example in (man, shirt, he)] == [((caption,),), ((caption,),), (("He waits .",),)]
    assert [example.id for example in (man, shirt, he)] == ["36979#0#0", "36979#0#1", "36979#1#0"]
    assert [example.line for example in (man, shirt, he)] == [1, 1, 2]
    assert man.images == ("36979",)
    (((span,),),) = shirt.spans
    assert (caption[span.start : span.end], span.region) == ("a red shirt", -1)
    assert man.truth == Phrase(((1, 1, 101, 201), (11, 21, 51, 81)), ("people",))  # of both objects that name it
    assert shirt.truth == Phrase(((11, 21, 51, 81),), ("clothing", "bodyparts"))


@pytest.mark.parametrize("box", [(0, 5, 9, 9), (5, 0, 9, 9), (5, 5, 5, 9), (5, 5, 9, 5)])
def test_a_box_may_begin_at_an_edge_and_be_one_pixel_wide(world, box):
    world.write("val", i65567=(["[/EN#9/animals Two dogs] ."], annotation(item([9], box))))
    (example,) = world.read().dev["dev"]
    assert example.truth.boxes == (box,)


def test_a_phrase_that_stands_twice_is_marked_where_it_stands(world):
    world.write("val", i65567=(["a dog and [/EN#9/animals a dog]"], annotation(item([9], (5, 5, 9, 9)))))
    (example,) = world.read().dev["dev"]
    (((span,),),) = example.spans
    assert (span.start, span.end) == (10, 15)


def test_splits_files_and_kind(world):
    data = world.read()
    assert (list(data.dev), data.test) == (["dev", "test"], {})
    assert data.files["phrases of Flickr30kEntities/train.txt"]["rows"] == 3
    before = data.fingerprints()
    world.write("val", i65567=(["[/EN#9/animals Two dogs] ."], annotation(item([9], (5, 5, 9, 10)))))
    assert world.read().fingerprints() != before
    assert (data.task.reads, data.task.images, data.task.sentences, data.task.choices) == ("region", 1, 1, 0)


def test_targets_are_uniform_over_regions_that_match_any_box(world):
    man, shirt, he = world.read().train
    first = [(1, 1, 101, 201), (300, 200, 301, 201), (11, 21, 51, 81), (1, 1, 101, 101)]  # the last: exactly half
    second = [(300, 200, 301, 201)]
    found = FLICKR30K_ENTITIES.targets([man, shirt, he], regions(first, first, second))
    np.testing.assert_allclose(found, [[1 / 3, 0, 1 / 3, 1 / 3], [0, 0, 1, 0], [0, 0, 0, 0]])


def test_the_loss_is_kl_divergence_over_the_regions_that_are_there():
    torch.manual_seed(0)
    logits = torch.randn(4, 4)
    logits[1, 2:] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    real = torch.tensor([True, True, True, False])
    loss, right = FLICKR30K_ENTITIES.loss(logits, targets, real)
    expected = F.kl_div(logits[0].log_softmax(-1), targets[0], reduction="sum")
    expected += F.kl_div(logits[1, :2].log_softmax(-1), targets[1, :2], reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert right.item() == sum(targets[row, logits[row].argmax()].item() > 0 for row in (0, 1))
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[2:].abs().sum() == 0


def example(*gold, image="1"):
    return Example(
        "1#0#0", (("a dog",),), 1, 1, images=(image,), spans=(((Span(0, 5, -1),),),), truth=Phrase(gold, ("animals",))
    )


GOLD, MISS = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=14), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_recall_grows_with_the_rank_up_to_its_upper_bound(images, seed):
    """Spec VisualBERT fact 11: R@1 <= R@5 <= R@10 <= upper bound, and R@(number of regions) is the upper bound."""
    generator = np.random.default_rng(seed)
    longest = max(map(len, images))
    logits = np.full((len(images), longest), -np.inf)
    for row, image in zip(logits, images):
        row[: len(image)] = generator.permutation(len(image))
    ranked = FLICKR30K_ENTITIES.predict(
        logits, regions(*[[GOLD if hit else MISS for hit in image] for image in images])
    )
    found = FLICKR30K_ENTITIES.measure(ranked, [example(GOLD)] * len(images))
    assert found["recall_at_1"] <= found["recall_at_5"] <= found["recall_at_10"] <= found["upper_bound"]
    assert found["upper_bound"] == pytest.approx(np.mean([any(image) for image in images]))
    plain = [[hit for _, hit in sorted(zip(-row, image))] for row, image in zip(logits, images)]
    for first in (1, 5, 10):
        assert found[f"recall_at_{first}"] == pytest.approx(np.mean([any(image[:first]) for image in plain]))
    assert all(recall(np.array(image), len(image)) == any(image) for image in images)


@pytest.mark.parametrize("place", [0, 1, 4, 5, 9, 10, 13])
def test_a_region_that_is_right_counts_from_its_place_on(place):
    """Spec VisualBERT fact 11, place by place: beyond the tenth it counts for the upper bound alone."""
    boxes = [GOLD if number == place else MISS for number in range(14)]
    ranked = FLICKR30K_ENTITIES.predict(-np.arange(14.0)[None], regions(boxes))
    found = FLICKR30K_ENTITIES.measure(ranked, [example(GOLD)])
    assert found == {f"recall_at_{first}": float(place < first) for first in (1, 5, 10)} | {"upper_bound": 1.0}


def test_phrases_that_no_region_matches_count_as_wrong():
    """Three phrases: found first, found second, and never, since the detector has no such region."""
    ranked = FLICKR30K_ENTITIES.predict(
        np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0]]), regions([GOLD, MISS], [GOLD, MISS], [MISS, MISS])
    )
    found = FLICKR30K_ENTITIES.measure(ranked, [example(GOLD)] * 3)
    assert found == {
        "recall_at_1": pytest.approx(1 / 3), "recall_at_5": pytest.approx(2 / 3), "recall_at_10": pytest.approx(2 / 3),
        "upper_bound": pytest.approx(2 / 3),
    }  # fmt: skip


def test_half_a_box_is_enough_and_any_box_counts():
    half, less = (0.0, 0.0, 10.0, 5.0), (0.0, 0.0, 10.0, 4.9)
    for box, expected in ((half, 1.0), (less, 0.0)):
        ranked = FLICKR30K_ENTITIES.predict(np.zeros((1, 1)), regions([box]))
        assert FLICKR30K_ENTITIES.measure(ranked, [example(MISS, GOLD)])["recall_at_1"] == expected


def test_what_is_written_down_of_a_phrase():
    (ranked,) = FLICKR30K_ENTITIES.predict(np.array([[0.0, 2.0, 1.0, -np.inf]]), regions([GOLD, MISS, GOLD]))
    assert FLICKR30K_ENTITIES.answer(example(GOLD), ranked) == {
        "label": 1, "prediction": 0, "phrase": "a dog", "types": ["animals"], "boxes": [[0, 0, 10, 10]],
        "regions": [1, 2, 0], "box": [50, 50, 60, 60],
        "credits": {"recall_at_1": 0, "recall_at_5": 1, "recall_at_10": 1, "upper_bound": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation><object></annotation>", "not readable XML: mismatched tag"),
        ("", "not readable XML: no element found"),
        ("<html></html>", "holds <html>, expected <annotation>"),
        (annotation(item([9], (9, 5, 5, 9))), "object 0: box 9, 5, 5, 9; expected 0 <= xmin <= xmax"),
        (annotation(ITEMS[2], item([9], (5, "x", 9, 9))), "object 1: ymin = 'x'; expected a whole number"),
        (annotation(item([9], (5, -5, 9, 9))), "object 0: ymin = '-5'; expected a whole number"),
        (annotation(item(["dog"], (5, 5, 9, 9))), "object 0: name = 'dog'; expected a whole number"),
        (annotation(item([], (5, 5, 9, 9))), "object 0: no name"),
        (annotation(item([0], (5, 5, 9, 9))), "object 0: entity 0 has a box"),
        (
            '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><object><name>&x;</name></object></annotation>',
            "not readable XML: a document type is declared",
        ),
        (
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>',
            "not readable XML: a document type is declared",
        ),
    ],
)
def test_odd_annotations_are_named_and_nothing_outside_is_read(world, xml, message):
    world.write("val", i65567=(["[/EN#9/animals Two dogs] ."], xml))
    with pytest.raises(XdscaleError, match=rf"Annotations/65567\.xml: {message}"):
        world.read()


@pytest.mark.parametrize(
    "sentence",
    [
        "[/EN#9/animals Two dogs",
        "[/EN#9 Two dogs]",
        "[/EN#x/animals Two dogs]",
        "[/EN#9/animals a [b] c]",
        f"[/EN#{'9' * 5000}/animals A]",
    ],
)
def test_odd_marks_are_named(world, sentence):
    world.write("val", i65567=(["Fine .", sentence], annotation(item([9], (5, 5, 9, 9)))))
    with pytest.raises(
        XdscaleError, match=r"65567\.txt, line 2: .*a phrase is not marked as \[/EN#entity/type words\]"
    ):
        world.read()


def test_odd_lists_and_missing_files_are_named(world):
    path = world.folder / "val.txt"
    for text, message in (
        ("65567\n\n65567\n", "line 3: image 65567 stands in line 1 already"),
        ("65567\n../../x\n", r"line 2: '../../x' is not an image id"),
        ("12\n", r"line 1: image 12 has no Sentences/12\.txt"),
        ("\n", "no phrase of its images has a box"),
    ):
        path.write_text(text)
        with pytest.raises(XdscaleError, match=rf"val\.txt(, |: ){message}"):
            world.read()
    path.write_text("65567\n")
    (world.folder / "Annotations" / "65567.xml").unlink()
    with pytest.raises(XdscaleError, match=r"val\.txt, line 1: image 65567 has no Annotations/65567\.xml"):
        world.read()
    (world.folder / "Sentences" / "65567.txt").write_bytes(b"\xff")
    (world.folder / "Annotations" / "65567.xml").write_text(annotation())
    with pytest.raises(XdscaleError, match=r"65567\.txt: not UTF-8 text"):
        world.read()


def test_of_regions_that_are_equally_likely_the_earlier_comes_first():
    """However a machine sorts: 200 regions of three scores."""
    scores = np.random.default_rng(0).integers(0, 3, 200)
    (ranked,) = FLICKR30K_ENTITIES.predict(scores[None].astype(float), regions([MISS] * 200))
    assert ranked[:, 0].tolist() == sorted(range(200), key=lambda region: (-scores[region], region))
