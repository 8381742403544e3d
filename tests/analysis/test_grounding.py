"""Grounding by attention heads: made-up heads whose figures are known, and a plain loop."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdscale.analysis.grounding import (
    PUBLISHED_ARCS,
    PUBLISHED_ENTITIES,
    ArcCounts,
    HeadCounts,
    arcs_csv,
    head_name,
    heads_csv,
)

GOLD = np.array([[0.0, 0, 10, 10]])
BOXES = np.array([[50.0, 50, 60, 60], [0, 0, 10, 9], [20, 0, 30, 10]])
"""Of three regions the second is right."""


def word(*heads):
    """Attention of one layer: for each head what each of three regions gets, of a row of sum 1."""
    return np.array([heads], np.float32)


@pytest.mark.parametrize(("share", "active"), [(0.25, True), (0.15, False), (0.2, False), (0.2001, True)])
def test_a_head_is_active_if_more_than_a_fifth_goes_to_regions(share, active):
    """Spec VisualBERT fact 9: the gold region gets `share`, words the rest."""
    counts = HeadCounts()
    for _ in range(7):
        counts.add(word([0, share, 0]), BOXES, np.ones(3), GOLD)
    found = counts.result()
    assert found.accuracy.tolist() == [[1.0]]
    assert found.mass[0, 0] == pytest.approx(share)
    assert found.active.tolist() == [[active]]
    assert found.best(active=True) == ((0, 0) if active else None)
    assert found.best(active=False) == (0, 0)


def test_the_rule_is_of_the_mean_over_words():
    counts = HeadCounts()
    for share in (0.05, 0.05, 0.6):
        counts.add(word([0, share, 0]), BOXES, np.ones(3), GOLD)
    assert counts.result().active.tolist() == [[True]]


CASES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2**32 - 1)), min_size=1, max_size=5)


def draw(case):
    """A word's attention in 2 layers of 3 heads, its image's boxes and confidences, and its gold boxes."""
    regions, seed = case
    generator = np.random.default_rng(seed)
    attention = generator.dirichlet(np.ones(regions + 4), (2, 3))[..., :regions].astype(np.float32)
    corners = generator.integers(0, 4, (regions + 2, 2))
    boxes = np.concatenate([corners, corners + generator.integers(1, 4, (regions + 2, 2))], 1).astype(float)
    return attention, boxes[:regions], generator.random(regions), boxes[regions:]


def right(box, gold):
    """Whether a box is right, by counting unit squares."""

    def cells(one):
        return {(x, y) for x in range(int(one[0]), int(one[2])) for y in range(int(one[1]), int(one[3]))}

    return any(2 * len(cells(box) & cells(other)) >= len(cells(box) | cells(other)) for other in gold)


@given(CASES)
def test_shares_are_those_of_a_plain_loop(cases):
    counts, words = HeadCounts(), [draw(case) for case in cases]
    for one in words:
        counts.add(*one)
    found = counts.result()
    for layer, head in np.ndindex(2, 3):
        hits = [right(boxes[np.argmax(row[layer, head])], gold) for row, boxes, _, gold in words]
        assert found.accuracy[layer, head] == pytest.approx(np.mean(hits))
        mass = np.mean([row[layer, head].sum() for row, *_ in words])
        assert found.mass[layer, head] == pytest.approx(mass, abs=1e-6)
    assert found.baseline == pytest.approx(
        np.mean([right(boxes[np.argmax(sure)], gold) for _, boxes, sure, gold in words])
    )


@given(CASES, st.integers(0, 2**32 - 1))
def test_the_baseline_depends_on_image_and_gold_alone(cases, seed):
    """Spec VisualBERT fact 10: other attention gives the same baseline."""
    generator = np.random.default_rng(seed)
    one, other = HeadCounts(), HeadCounts()
    for attention, *rest in map(draw, cases):
        one.add(attention, *rest)
        other.add(generator.random(attention.shape), *rest)
    assert one.result().baseline == other.result().baseline


@given(CASES)
def test_with_one_region_every_head_is_the_baseline(cases):
    """Spec VisualBERT fact 10."""
    counts = HeadCounts()
    for _, seed in cases:
        counts.add(*draw((1, seed)))
    found = counts.result()
    assert (found.accuracy == found.baseline).all()


def test_a_relation_has_its_own_active_heads():
    """The best head of a relation is the best of those that are active for its own words."""
    counts = ArcCounts()
    for _ in range(3):
        counts.add("det", word([0, 0.1, 0], [0.2, 0.1, 0.1]), BOXES, np.array([0.1, 0.9, 0.2]), GOLD)
    counts.add("amod", word([0, 0.5, 0], [0, 0.1, 0]), BOXES, np.array([0.9, 0.1, 0.2]), GOLD)
    found = counts.result()
    assert list(found) == ["det", "amod"]
    assert found["det"].accuracy.tolist() == [[1, 0]]
    assert (found["det"].best(active=True), found["det"].best(active=False)) == ((0, 1), (0, 0))
    assert (found["amod"].best(active=True), found["det"].baseline, found["amod"].baseline) == ((0, 0), 1, 0)
    rows = list(csv.DictReader(io.StringIO(arcs_csv(found))))
    assert rows[0] == {
        "relation": "det", "arcs": "3", "baseline": "1.000000", "accuracy": "0.000000", "head": "1-2",
        "published_baseline": "19.59", "published_accuracy": "54.01", "published_head": "10-1",
    }  # fmt: skip


def test_a_relation_without_an_active_head_has_none():
    counts = ArcCounts()
    counts.add("root", word([0, 0.1, 0]), BOXES, np.ones(3), GOLD)
    (row,) = csv.DictReader(io.StringIO(arcs_csv(counts.result())))
    assert (row["accuracy"], row["head"], row["published_head"]) == ("", "", "")


def test_heads_are_written_from_one():
    counts = HeadCounts()
    counts.add(np.full((12, 12, 3), 0.1), BOXES, np.ones(3), GOLD)
    rows = list(csv.DictReader(io.StringIO(heads_csv(counts.result()))))
    assert (rows[0]["layer"], rows[0]["head"], rows[-1]["layer"], rows[-1]["head"]) == ("1", "1", "12", "12")
    assert (len(rows), rows[0]["active"], rows[0]["words"]) == (144, "1", "1")
    assert head_name(9, 0) == "10-1"


def test_published_heads_are_better_than_the_baseline():
    assert len(PUBLISHED_ARCS) == 10
    sums = [sum(getattr(one, name) for one in PUBLISHED_ARCS.values()) for name in ("baseline", "accuracy")]
    assert sums == pytest.approx([193.43, 445.39])  # as printed, line by line
    assert all(one.accuracy > one.baseline for one in PUBLISHED_ARCS.values())
    assert PUBLISHED_ENTITIES["best head"] > PUBLISHED_ENTITIES["baseline"]
