"""How well attention heads ground words in image regions, without having been taught to (spec VisualBERT §7).

A head is asked from the row of a word's attention, over all positions of the input: which region gets most of it, and
how much of it goes to regions at all. Only the columns of regions are looked at for the former, so nothing has to be
normalised anew. Heads are numbered layer-head from 1, as "10-1" in VisualBERT's tables may be.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from xdscale.files import csv_text
from xdscale.shards.region_comparison import box_iou
from xdscale.tasks.flickr30k_entities import MATCH

ACTIVE = np.float32(0.2)
"""A head is active if more than this share of its attention goes to regions, in the mean over all words asked."""


class PublishedArc(NamedTuple):
    """A line of the paper's table of relations: accuracies times 100, and the best active head."""

    baseline: float
    accuracy: float
    head: str


PUBLISHED_ENTITIES = {"best head": 50.77, "baseline": 17.33}
"""Accuracy times 100 on the validation split of Flickr30K Entities (VisualBERT, §5.1)."""

PUBLISHED_ARCS = {
    "det": PublishedArc(19.59, 54.01, "10-1"),
    "pobj": PublishedArc(17.34, 32.82, "11-11"),
    "amod": PublishedArc(18.67, 45.96, "10-9"),
    "nsubj": PublishedArc(23.19, 44.64, "5-1"),
    "prep": PublishedArc(20.61, 49.27, "9-11"),
    "dobj": PublishedArc(9.82, 30.24, "11-11"),
    "punct": PublishedArc(23.32, 48.80, "3-6"),
    "partmod": PublishedArc(21.41, 38.15, "4-9"),
    "nn": PublishedArc(16.33, 34.06, "10-9"),
    "num": PublishedArc(23.15, 67.44, "9-11"),
}
"""By relation, most frequent first (VisualBERT, Table 7)."""


@dataclass(frozen=True)
class HeadAccuracy:
    """How well each head grounds words.

    Attributes:
        words: how many were asked.
        accuracy: float64 [layers, heads]: share of words whose most attended region is right.
        mass: float64 [layers, heads]: mean share of the words' attention that goes to regions.
        active: bool [layers, heads]: whether that is more than `ACTIVE`.
        baseline: accuracy of the region that the detector is surest of, the same for every word of an image; nan
            where it does not say how sure it is.
    """

    words: int
    accuracy: np.ndarray
    mass: np.ndarray
    active: np.ndarray
    baseline: float

    def best(self, *, active: bool) -> tuple[int, int] | None:
        """Returns layer and head, counted from 0, of the highest accuracy; of equals the earlier.

        Args:
            active: whether to look at active heads alone; None where there is none.
        """
        heads = np.where(self.active, self.accuracy, -1.0) if active else self.accuracy
        layer, head = np.unravel_index(heads.argmax(), heads.shape)
        return (int(layer), int(head)) if heads[layer, head] >= 0 else None


@dataclass
class HeadCounts:
    """Counts what heads do, word by word; its size does not depend on how many words there are."""

    words: int = 0
    hits: np.ndarray | int = 0
    mass: np.ndarray | float = 0.0
    sure: float = 0

    def add(self, attention: np.ndarray, boxes: np.ndarray, confidences: np.ndarray, gold: np.ndarray) -> None:
        """Counts one word.

        Args:
            attention: float [layers, heads, regions], the columns of regions in the word's rows of sum 1.
            boxes: [regions, 4], of the image.
            confidences: [regions], the detector's; nan where it states none.
            gold: [m, 4], what the word stands for; any of them counts.
        """
        right = (box_iou(boxes, gold) >= MATCH).any(1)
        self.words += 1
        self.hits = self.hits + right[attention.argmax(-1)]
        self.mass = self.mass + attention.sum(-1, dtype=np.float64)
        surest = np.argmax(confidences)
        self.sure += np.nan if np.isnan(confidences[surest]) else int(right[surest])

    def result(self) -> HeadAccuracy:
        """Returns the shares; at least one word must have been counted."""
        mass = self.mass / self.words
        # In fp32, as attention comes: a share of exactly .2 in fp32 is more than .2 in fp64.
        return HeadAccuracy(
            self.words, self.hits / self.words, mass, mass.astype(np.float32) > ACTIVE, self.sure / self.words
        )


@dataclass
class ArcCounts:
    """Counts by dependency relation.

    Of an arc w1 → w2 the head is asked from w2, the dependent, and w1's boxes are gold.
    """

    relations: dict[str, HeadCounts] = field(default_factory=lambda: defaultdict(HeadCounts))

    def add(
        self, relation: str, attention: np.ndarray, boxes: np.ndarray, confidences: np.ndarray, gold: np.ndarray
    ) -> None:
        """Counts one arc; see `HeadCounts.add`."""
        self.relations[relation].add(attention, boxes, confidences, gold)

    def result(self) -> dict[str, HeadAccuracy]:
        """Returns the shares by relation, the most frequent one first."""
        found = {relation: counts.result() for relation, counts in self.relations.items()}
        return dict(sorted(found.items(), key=lambda item: (-item[1].words, item[0])))


def head_name(layer: int, head: int) -> str:
    """Returns the name of a head whose layer and number are counted from 0: "1-1" is the first head of the first."""
    return f"{layer + 1}-{head + 1}"


def heads_csv(found: HeadAccuracy) -> str:
    """Returns one line for each head: layer, head (both from 1), accuracy, mass, active, baseline, words."""
    rows = [
        [layer + 1, head + 1, f"{found.accuracy[layer, head]:.6f}", f"{found.mass[layer, head]:.6f}",
         int(found.active[layer, head]), f"{found.baseline:.6f}", found.words]
        for layer, head in np.ndindex(found.accuracy.shape)
    ]  # fmt: skip
    return csv_text(["layer", "head", "accuracy", "region_mass", "active", "baseline", "words"], rows)


def arcs_csv(found: Mapping[str, HeadAccuracy]) -> str:
    """Returns one line for each relation with its best active head, and the published figures where there are some."""
    rows = []
    for relation, one in found.items():
        best, printed = one.best(active=True), PUBLISHED_ARCS.get(relation)
        shown = ["", ""] if best is None else [f"{one.accuracy[best]:.6f}", head_name(*best)]
        rows.append([relation, one.words, f"{one.baseline:.6f}", *shown, *(printed or ("", "", ""))])
    return csv_text(
        ["relation", "arcs", "baseline", "accuracy", "head"]
        + ["published_baseline", "published_accuracy", "published_head"],
        rows,
    )
