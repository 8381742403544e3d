"""VisualBERT's batches: captions with the regions of their image (spec VisualBERT §2)."""

from collections.abc import Sequence

import numpy as np

from xdscale.data.collate import readable
from xdscale.data.hashing import Purpose, below, random_bits
from xdscale.data.masking import drawn_masks, mask_language_ids
from xdscale.data.pairing import OTHER_TEXT, PADDING, SAME_TEXT, one_of
from xdscale.data.task_batches import cut_second_from_front
from xdscale.data.visual_text import first_regions, pack, with_spatial
from xdscale.recipes.visualbert.schema import VisualBERTRecipe, VisualModel
from xdscale.shards.regions import Regions, RegionTable
from xdscale.shards.sources.caption_build import CaptionBuild
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.shards.table import Table
from xdscale.systems.contract import MicroBatch, Slots

Alignments = Sequence[Sequence[tuple[int, int, int, int]]]
"""Of each sample: a region, the text that names it (0 or 1), and the first and the last word piece of that name."""


class VisualBERTCollator:
    """Turns slots into batches; what is drawn depends on (seed, epoch, sample id) alone.

    A sample is a caption, with another one where `match` is on, and the regions of the first one's image. Arrays, with
    b samples: those of `xdscale.data.visual_text.pack`, and for the objectives that are on
        masked_lm_rows [m]: places in the row of packed tokens; masked_lm_labels [m]: the original ids.
        match_labels [b]: 1 both captions are of the image, 0 the second is of another one, -1 padding sample.
    """

    def __init__(self, captions: Table, recipe: VisualBERTRecipe) -> None:
        """Sets the collator up.

        Args:
            captions: a split of that table.
            recipe: objectives, lengths, and the seed of all draws.
        """
        self.captions, self.recipe = captions, recipe
        self.regions = RegionTable(captions.linked("image")) if recipe.model.images else None
        self.tokenizer = CaptionBuild.of(captions.manifest).language_tokenizer

    def __call__(self, slots: Slots) -> MicroBatch:
        """Reads and prepares the samples of one micro-batch."""
        slots, second, images, labels = self._pair(slots)
        texts = [self._words(slots.sample_ids)] + ([] if second is None else [self._words(second)])
        if self.regions is None:
            regions = no_regions(len(images), self.recipe.model.region_size)
        else:
            regions = self.regions.read(images)
        return compose(self.recipe, self.tokenizer, slots, list(zip(*texts)), labels, regions)

    def prefetch(self, step: list[Slots]) -> None:
        """Says that the samples of a step, their second captions and their images will be read soon.

        Which these are stands in the captions' own shards: it waits for those.
        """
        pairs = [self._pair(slots) for slots in step]
        rows = [part for slots, second, _, _ in pairs for part in (slots.sample_ids, second) if part is not None]
        self.captions.prefetch(np.concatenate(rows))
        if self.regions is not None:
            self.regions.prefetch(np.concatenate([images for _, _, images, _ in pairs]))

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns masked positions and what is put there, which pairs mismatch, and what second captions follow from.

        No shard is read: every text counts as the longest, of ids 0.
        """
        on, seed = self.recipe.objectives, self.recipe.training.seed
        drawn = drawn_masks(self.recipe.model.max_text, slots, on.mlm, self.tokenizer, seed=seed, everywhere=True)
        return drawn if on.match is None else drawn + pair_bits(slots, on.match.mismatch, seed=seed)

    def _words(self, rows: np.ndarray) -> list[np.ndarray]:
        words, bounds = self.captions.read_ragged("words", rows)
        return [words[start:end] for start, end in zip(bounds, bounds[1:])]

    def _pair(self, slots: Slots) -> tuple[Slots, np.ndarray | None, np.ndarray, np.ndarray | None]:
        """Finds second captions and images, and turns samples that touch a quarantined shard into padding.

        Such a sample keeps its place in the batch, so that all other draws stay as they are, but has weight zero. What
        is read in its place does not matter.

        Returns:
            The slots, the rows of second captions or None, the rows of images, and labels or None.
        """
        table, match = self.captions, self.recipe.objectives.match
        usable, rows = readable(table, slots.sample_ids)
        images = table.read("image", rows).astype(np.int64)
        second = labels = None
        if match is not None:
            bits = pair_bits(slots, match.mismatch, seed=self.recipe.training.seed)
            second, labels = second_captions(rows, table.read("siblings", rows).astype(np.int64), len(table), *bits)
            of_second, second = readable(table, second)
            usable &= of_second
        if self.regions is not None:
            of_images, images = readable(self.regions.table, images)
            usable &= of_images
        slots = Slots(slots.epochs, rows, slots.real & usable)
        return slots, second, images, None if labels is None else np.where(slots.real, labels, PADDING)


def pair_bits(slots: Slots, mismatch: float, *, seed: int) -> list[np.ndarray]:
    """Draws what second captions follow from, without reading which captions are of one image.

    Args:
        slots: the n samples.
        mismatch: share of the pairs whose second caption is of another image.
        seed: below 2**32.

    Returns:
        bool [n]: of another image; uint32 [n, 3]: which caption it is.
    """
    other = below(random_bits(seed, slots.epochs, slots.sample_ids, Purpose.MATCH, 1)[:, 0], mismatch)
    return [other, random_bits(seed, slots.epochs, slots.sample_ids, Purpose.PARTNER, 3)]


def second_captions(
    rows: np.ndarray, siblings: np.ndarray, size: int, other: np.ndarray, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the second caption of each sample: another one of the same image, or any one of the other images.

    Captions of one image stand one after the other, so that both are uniform and found at once: nothing is drawn again
    until it fits.

    Args:
        rows: int64 [n], of the first captions.
        siblings: int64 [n, 2]: first row of the captions of that image, and their number.
        size: captions in the split; where all are of one image, none is of another.
        other: bool [n] and
        bits: uint32 [n, 3], as `pair_bits`.

    Returns:
        (rows int64 [n], labels int64 [n]): 1 = of the same image, 0 = of another one.
    """
    first, count = siblings.T
    other = other & (count < size)
    same = first + (rows - first + 1 + one_of(count - 1, bits[:, 2])) % count
    place = one_of(size - count, bits[:, 1], bits[:, 0])
    elsewhere = place + np.where(place >= first, count, 0)
    return np.where(other, elsewhere, same), np.where(other, OTHER_TEXT, SAME_TEXT)


def compose(
    recipe: VisualBERTRecipe,
    tokenizer: LanguageTokenizer,
    slots: Slots,
    texts: Sequence[Sequence[np.ndarray]],
    labels: np.ndarray | None,
    regions: Regions,
    *,
    images: int = 1,
    alignments: Alignments | None = None,
    from_front: bool = False,
) -> MicroBatch:
    """Makes a micro-batch of samples that are read: cuts, masks and packs.

    Args:
        recipe: objectives and lengths.
        tokenizer: ids of [CLS], [SEP] and [MASK], and the size of the vocabulary.
        slots: which samples they are.
        texts: of each sample its texts, one or two: ids without [CLS] and [SEP].
        labels: int64 [b] of the pairs; None without `match`.
        regions: of each sample's images.
        images: of a sample; of several, each has a visual segment of its own.
        alignments: the first word piece that is left is aligned; what was cut off is with nothing, and neither are
            regions that are left out.
        from_front: whether texts that are too long lose the second one's beginning, not ends, the longer one's first.
    """
    model, mlm = recipe.model, recipe.objectives.mlm
    cut = cut_second_from_front if from_front else _cut
    pieces = [cut(sample, model.max_text - 1 - len(sample)) for sample in texts]
    ids, segments, maskable, lengths = _padded(pieces, tokenizer)
    arrays, targets = {}, {}
    if mlm is not None:
        places, arrays["masked_lm_labels"] = mask_language_ids(
            ids, slots, mlm, tokenizer, seed=recipe.training.seed, maskable=maskable
        )
        targets["mlm"] = len(places)
    if labels is not None:
        arrays["match_labels"], targets["match"] = labels, int(slots.real.sum())
    regions, alignments = _shown(model, regions, alignments)
    aligned = None
    if alignments is not None:
        aligned = [_kept(*one, from_front=from_front) for one in zip(texts, pieces, alignments, strict=True)]
    words, segments = ([row[:length] for row, length in zip(part, lengths)] for part in (ids, segments))
    joint = regions._replace(offsets=np.ascontiguousarray(regions.offsets[::images]))
    of_images = np.repeat(np.arange(len(regions.sizes)) % images, np.diff(regions.offsets))
    packed = pack(words, segments, joint, of_images, aligned)
    if mlm is not None:
        row, column = np.divmod(places, ids.shape[1])
        arrays["masked_lm_rows"] = packed["cu_seqlens"][row] + column
    return MicroBatch(packed | arrays, targets, tokens=int(np.diff(packed["cu_seqlens"])[slots.real].sum()))


def no_regions(samples: int, width: int) -> Regions:
    """Returns the regions of samples that have none."""
    none = np.zeros((0, 4), np.float32)
    sizes = np.ones((samples, 2), np.uint16)
    return Regions(np.zeros((0, width), np.float32), none, none[:, 0], sizes, np.zeros(samples + 1, np.int64))


def _shown(model: VisualModel, regions: Regions, alignments: Alignments | None) -> tuple[Regions, Alignments | None]:
    """Returns the regions that the model reads, with what it reads of them, and the alignments with these."""
    if model.max_regions is not None:
        regions = first_regions(regions, model.max_regions)
        if alignments is not None:
            alignments = [[one for one in sample if one[0] < model.max_regions] for sample in alignments]
    return with_spatial(regions) if model.spatial else regions, alignments


def _padded(
    samples: Sequence[Sequence[np.ndarray]], tokenizer: LanguageTokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lays texts out as [CLS] first [SEP] second [SEP].

    Returns:
        ids and segments int64 [b, longest], bool [b, longest] where words stand, and the lengths int64 [b].
    """
    lengths = np.array([1 + sum(len(text) + 1 for text in sample) for sample in samples])
    ids = np.zeros((len(samples), lengths.max(initial=0)), np.int64)
    words, segments = np.zeros_like(ids, bool), np.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, 0], end = tokenizer.cls_id, 1
        for segment, text in enumerate(sample):
            start, end = end, end + len(text) + 1
            ids[row, start : end - 1], ids[row, end - 1] = text, tokenizer.sep_id
            words[row, start : end - 1], segments[row, start:end] = True, segment
    return ids, segments, words, lengths


def _kept(
    whole: Sequence[np.ndarray],
    texts: Sequence[np.ndarray],
    aligned: Sequence[tuple[int, int, int, int]],
    *,
    from_front: bool,
) -> np.ndarray:
    """Returns regions and positions, behind [CLS] and the [SEP] between texts, of the words that were not cut off."""
    begins = (1, 2 + len(texts[0]))
    gone = [(len(one) - len(kept)) * from_front * (len(texts) > 1) for one, kept in zip(whole, texts)]
    left = [(region, text, max(first, gone[text]) - gone[text]) for region, text, first, last in aligned
            if last >= gone[text]]  # fmt: skip
    pairs = [(region, begins[text] + place) for region, text, place in left if place < len(texts[text])]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _cut(texts: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """Cuts the ends of one or two texts so that they have room together, the longer one first."""
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = map(len, texts)
    first = min(first, max(room - second, (room + 1) // 2))
    return [texts[0][:first], texts[1][: room - first]]
