"""VL-BERT's batches: captions with regions of their image, and texts alone (spec VL-BERT §2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xdscale.data.collate import readable
from xdscale.data.hashing import Purpose, below, random_bits
from xdscale.data.masking import drawn_masks, mask_language_ids
from xdscale.data.pictures import blank, draw_flips, mirrored, read_pictures, scaled_boxes
from xdscale.data.visual_text import chosen_regions, region_rows
from xdscale.data.vlbert import mirrored_regions, objects_of, pack, with_whole_image
from xdscale.recipes.vlbert.schema import MaskedRegions, VLBERTRecipe
from xdscale.shards.regions import Regions, RegionTable
from xdscale.shards.sources.caption_build import CaptionBuild
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.shards.table import Table
from xdscale.systems.contract import MicroBatch, Slots

BLANK_SIDE = 32
"""Pixels of a side of the picture that a text has; ResNet-101's strides need so many."""
SUM_TOLERANCE = 0.1
"""A region is no target whose distribution sums to further from 1, as in the release."""


class Tokens(NamedTuple):
    """What is known of word pieces.

    Attributes:
        tokenizer: ids of [CLS], [SEP] and [MASK], and the size of the vocabulary.
        continues: bool [vocabulary]: whether a piece goes on with the word of the piece before it.
    """

    tokenizer: LanguageTokenizer
    continues: np.ndarray


class VLBERTCollator:
    """Turns slots into batches; what is drawn depends on (seed, epoch, sample id) alone.

    Sample ids count captions, then texts. Arrays, with b samples: those of `xdscale.data.vlbert.pack`, and for the
    objectives that are on
        mlm_rows [m]: places in the row of packed tokens; mlm_labels [m]: the original ids.
        text_mlm_rows, text_mlm_labels [m]: the same of texts alone.
        masked_region_rows [r]: places in the row; masked_region_labels fp32 [r, classes]: the detector's distributions,
            or 1 at its likeliest class.
    With `model.pixels` there are, in the place of features, for each sample i of the batch:
        picture_i fp32 [3, height, width], see `xdscale.data.pictures`; boxes_i fp32 [k, 4]: its regions there. A text
            has a small blank one without regions, so that all ranks have as many.
    """

    def __init__(
        self,
        captions: Table,
        texts: Table | None = None,
        *,
        recipe: VLBERTRecipe,
        continues: np.ndarray,
        flips: bool = False,
    ) -> None:
        """Sets the collator up.

        Args:
            captions: a split of that table.
            texts: the same split of packed text; None where `text_mlm` is off.
            recipe: objectives, lengths, and the seed of all draws.
            continues: see `Tokens`.
            flips: whether a share `model.flip` of the images is mirrored; held-out ones never are.
        """
        self.captions, self.texts, self.recipe = captions, texts, recipe
        self._flip = recipe.model.flip if flips else 0.0
        self.regions = RegionTable(captions.linked("image"))
        self.tokens = Tokens(CaptionBuild.of(captions.manifest).language_tokenizer, continues)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each table."""
        return (len(self.captions),) if self.texts is None else (len(self.captions), len(self.texts))

    def __call__(self, slots: Slots) -> MicroBatch:
        """Reads and prepares the samples of one micro-batch."""
        slots, captions, texts, images = self._find(slots)
        has_image = self._has_image(slots)
        words: list[np.ndarray] = [np.empty(0, np.int64)] * len(has_image)
        found, bounds = self.captions.read_ragged("words", captions)
        for place, start, end in zip(np.flatnonzero(has_image), bounds, bounds[1:]):
            words[place] = found[start:end]
        if self.texts is not None:
            for place, ids in zip(np.flatnonzero(~has_image), self.texts.read("language", texts)):
                words[place] = ids
        found = self.regions.read(images)
        objects, kept = objects_of(found, self.regions.build.whole_image_first)
        wanted = self.recipe.objectives.masked_region is not None
        probabilities = self.regions.class_probs(images)[kept] if wanted else None
        pixels = self.recipe.model.pixels
        pictures = None if pixels is None else read_pictures(self.regions, images, found.sizes, pixels)
        flipped = has_image & draw_flips(slots, self._flip, self.recipe.training.seed)
        return compose(self.recipe, self.tokens, slots, words, has_image, objects, probabilities, pictures, flipped)

    def prefetch(self, step: list[Slots]) -> None:
        """Says that the samples of a step and their images will be read soon.

        Which images these are stands in the captions' own shards: it waits for those.
        """
        parts = [self._find(slots)[1:] for slots in step]
        captions, texts, images = (np.concatenate(part) for part in zip(*parts))
        self.captions.prefetch(captions)
        self.regions.prefetch(images)
        if self.texts is not None:
            self.texts.prefetch(texts)

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns masked positions and what is put there, then which regions are to be predicted and which are masked,
        and which images are mirrored.

        No shard is read: every text and every image counts as the longest, of ids 0.
        """
        has_image, most = self._has_image(slots), self.recipe.model.max_elements
        drawn = []
        for which, on in ((has_image, self.recipe.objectives.mlm), (~has_image, self.recipe.objectives.text_mlm)):
            seed, tokenizer = self.recipe.training.seed, self.tokens.tokenizer
            drawn += drawn_masks(most, slots.where(which), on, tokenizer, seed=seed, everywhere=True)
        if (regions := self.recipe.objectives.masked_region) is not None:
            part = slots.where(has_image)
            counts = np.full(len(part.sample_ids), most)
            drawn += choose_regions(counts, part, regions, seed=self.recipe.training.seed)
        if self._flip:
            drawn.append(has_image & draw_flips(slots, self._flip, self.recipe.training.seed))
        return drawn

    def alternating(self, slots: Slots) -> Slots:
        """Returns slots whose even sample ids count captions, and whose odd ones count texts."""
        if self.texts is None:
            return slots
        row, is_text = np.divmod(slots.sample_ids, 2)
        return Slots(slots.epochs, row + is_text * len(self.captions), slots.real)

    def _has_image(self, slots: Slots) -> np.ndarray:
        return slots.sample_ids < len(self.captions)

    def _find(self, slots: Slots) -> tuple[Slots, np.ndarray, np.ndarray, np.ndarray]:
        """Returns the slots, and the rows of captions, texts and images.

        A sample that touches a quarantined shard keeps its place and its draws, but has weight zero. What is read in
        its place does not matter.
        """
        has_image = self._has_image(slots)
        usable = np.ones(len(has_image), bool)
        captions, texts = slots.sample_ids[has_image], slots.sample_ids[~has_image] - len(self.captions)
        usable[has_image], captions = readable(self.captions, captions)
        if self.texts is not None:
            usable[~has_image], texts = readable(self.texts, texts)
        images_usable, images = readable(self.regions.table, self.captions.read("image", captions).astype(np.int64))
        usable[has_image] &= images_usable
        return Slots(slots.epochs, slots.sample_ids, slots.real & usable), captions, texts, images


def choose_regions(counts: np.ndarray, slots: Slots, recipe: MaskedRegions, *, seed: int) -> list[np.ndarray]:
    """Draws which regions are to be predicted, and which of them are masked; the whole image is not among them.

    Args:
        counts: int64 [n], regions of each sample's image.
        slots: the n samples.
        recipe: rates.
        seed: below 2**32.

    Returns:
        Both bool [total].
    """
    bits = random_bits(seed, slots.epochs, slots.sample_ids, Purpose.MASKED_REGION, int(counts.max(initial=0)))
    mine = np.arange(bits.shape[1]) < counts[:, None]
    real = np.repeat(slots.real, counts)
    return [below(bits, share)[mine] & real for share in (recipe.select, recipe.select * recipe.mask)]


def shares(text: int, regions: int, room: int) -> tuple[int, int]:
    """Returns how many words and regions are kept, the longer side losing first, and words where both are equal."""
    regions = min(regions, max(room - text, (room + 1) // 2))
    return min(text, room - regions), regions


def compose(
    recipe: VLBERTRecipe,
    tokens: Tokens,
    slots: Slots,
    words: Sequence[np.ndarray],
    has_image: np.ndarray,
    objects: Regions,
    probabilities: np.ndarray | None,
    pictures: Sequence[np.ndarray] | None = None,
    flipped: np.ndarray | None = None,
) -> MicroBatch:
    """Makes a micro-batch of samples that are read: masks, cuts and packs.

    Args:
        recipe: objectives and lengths.
        tokens: of the vocabulary.
        slots: which samples they are.
        words: of each sample: ids without [CLS] and [SEP].
        has_image: bool [b]; the others are texts alone.
        objects: of each sample that has an image, without the whole image.
        probabilities: [total, classes] of these; None without `masked_region`.
        pictures: of each sample that has an image, scaled; what is in masked regions is taken out of them. None where
            features are read.
        flipped: bool [b], whose image is mirrored with its boxes; None for none.
    """
    chosen, masked = _drawn(recipe, slots, has_image, objects, probabilities)
    regions, whole = with_whole_image(objects, ~masked)
    specials = 2 * (has_image | bool(recipe.objectives.text_mlm and recipe.objectives.text_mlm.specials))
    lengths, kept = _cut(words, specials, regions, has_image, recipe.model.max_elements)
    ids, maskable = _laid_out(words, lengths, specials, tokens.tokenizer)
    found = _mask(recipe, tokens, slots, ids, maskable, has_image)
    texts = [row[:length] for row, length in zip(ids, lengths)]
    inserted, is_target = np.zeros_like(whole), np.zeros_like(whole)
    inserted[~whole], is_target[~whole] = masked, chosen
    mine = _of_samples(chosen_regions(regions, kept), has_image)
    flipped = np.zeros_like(has_image) if flipped is None else flipped
    segments, seen = [np.zeros_like(text) for text in texts], mirrored_regions(mine, flipped)
    packed = pack(texts, segments, seen, masked=inserted[kept])
    arrays, targets = {}, {}
    if pictures is not None:
        del packed["features"]
        arrays |= _seen(pictures, objects, masked, mine, has_image, flipped)
    for name, (row, column, labels) in found.items():
        arrays[f"{name}_rows"], arrays[f"{name}_labels"] = packed["cu_seqlens"][row] + column, labels
        targets[name] = len(labels)
    if (on := recipe.objectives.masked_region) is not None:
        arrays["masked_region_rows"] = region_rows(packed, mine.offsets)[is_target[kept]]
        arrays["masked_region_labels"] = _region_labels(probabilities[(is_target & kept)[~whole]], on.target)
        targets["masked_region"] = len(arrays["masked_region_rows"])
    return MicroBatch(packed | arrays, targets, tokens=int(np.diff(packed["cu_seqlens"])[slots.real].sum()))


def _drawn(
    recipe: VLBERTRecipe, slots: Slots, has_image: np.ndarray, objects: Regions, probabilities: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which regions are targets, of those that may be, and which are masked: bool [total]; see `compose`."""
    on = recipe.objectives.masked_region
    if on is None:
        none = np.zeros(len(objects.boxes), bool)
        return none, none
    counts = np.diff(objects.offsets)
    chosen, masked = choose_regions(counts, slots.where(has_image), on, seed=recipe.training.seed)
    return chosen & (np.abs(probabilities.sum(1) - 1) < SUM_TOLERANCE), masked


def _cut(
    words: Sequence[np.ndarray], specials: np.ndarray, regions: Regions, has_image: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many tokens of each text are kept, with its specials, int64 [b], and which regions, bool [total]."""
    counts = np.zeros(len(words), np.int64)
    counts[has_image] = np.diff(regions.offsets)
    sizes = [shares(len(ids) + extra, count, room) for ids, extra, count in zip(words, specials, counts.tolist())]
    lengths, kept = np.array(sizes, np.int64).T
    within = np.arange(regions.offsets[-1]) - np.repeat(regions.offsets[:-1], counts[has_image])
    return lengths, within < np.repeat(kept[has_image], counts[has_image])


def _region_labels(probabilities: np.ndarray, target: str) -> np.ndarray:
    """Returns what is to be predicted of regions, fp32 [r, classes]: their distributions, or 1 at the likeliest."""
    labels = probabilities.astype(np.float32)
    return np.eye(labels.shape[1], dtype=np.float32)[labels.argmax(1)] if target == "class" else labels


def _mask(
    recipe: VLBERTRecipe,
    tokens: Tokens,
    slots: Slots,
    ids: np.ndarray,
    maskable: np.ndarray,
    has_image: np.ndarray,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Masks words in place; returns of captions and texts the samples, the positions and the original ids."""
    begins = maskable & ~tokens.continues[ids]
    begins[:, 1:] |= maskable[:, 1:] & ~maskable[:, :-1]  # the first piece of a text, whatever it is
    begins[:, 0] = maskable[:, 0]
    of_words, found = np.maximum(np.cumsum(begins, 1) - 1, 0), {}
    for name, which in (("mlm", has_image), ("text_mlm", ~has_image)):
        on = getattr(recipe.objectives, name)
        if on is None:
            continue
        samples = np.flatnonzero(which)
        part, mine = slots.where(which), ids[which]
        positions, labels = mask_language_ids(
            mine, part, on, tokens.tokenizer, seed=recipe.training.seed, maskable=maskable[which],
            words=of_words[which] if on.whole_words else None,
        )  # fmt: skip
        ids[which] = mine
        row, column = np.divmod(positions, ids.shape[1])
        found[name] = samples[row], column, labels
    return found


def _seen(
    pictures: Sequence[np.ndarray],
    objects: Regions,
    masked: np.ndarray,
    regions: Regions,
    has_image: np.ndarray,
    flipped: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns the picture of each sample, with what is masked taken out, and its regions' boxes there.

    Args:
        pictures: of each sample that has an image; changed.
        objects: of each of these, without the whole image.
        masked: bool, of `objects`.
        regions: of each sample of the batch, those that are kept.
        has_image: bool [b].
        flipped: bool [b].
    """
    arrays, captions = {}, iter(range(len(pictures)))
    for sample, (image, start, end) in enumerate(zip(has_image.tolist(), regions.offsets, regions.offsets[1:])):
        picture, boxes = np.zeros((3, BLANK_SIDE, BLANK_SIDE), np.float32), regions.boxes[start:end]
        if image:
            number = next(captions)
            picture, size, mirror = pictures[number], tuple(objects.sizes[number].tolist()), bool(flipped[sample])
            if mirror:
                picture = mirrored(picture)
            part, scaled = slice(*objects.offsets[number : number + 2]), picture.shape[:0:-1]
            blank(picture, scaled_boxes(objects.boxes[part][masked[part]], size, scaled, mirror=mirror))
            boxes = scaled_boxes(boxes, size, scaled, mirror=mirror)
        arrays |= {f"picture_{sample}": picture, f"boxes_{sample}": boxes}
    return arrays


def _laid_out(
    words: Sequence[np.ndarray], lengths: np.ndarray, specials: np.ndarray, tokenizer: LanguageTokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids [b, longest], with [CLS] and [SEP] where they belong, and which of them are words, bool."""
    ids = np.zeros((len(words), int(lengths.max(initial=1))), np.int64)
    maskable = np.zeros_like(ids, bool)
    for row, (text, length, extra) in enumerate(zip(words, lengths.tolist(), specials.tolist())):
        part = slice(extra // 2, length - extra // 2)
        ids[row, part], maskable[row, part] = text[: length - extra], True
        if extra:
            ids[row, 0], ids[row, length - 1] = tokenizer.cls_id, tokenizer.sep_id
    return ids, maskable


def _of_samples(regions: Regions, has_image: np.ndarray) -> Regions:
    """Returns the regions of some samples as those of all; the others have none."""
    counts, sizes = np.zeros(len(has_image), np.int64), np.ones((len(has_image), 2), np.uint16)
    counts[has_image], sizes[has_image] = np.diff(regions.offsets), regions.sizes
    return regions._replace(sizes=sizes, offsets=np.concatenate([[0], np.cumsum(counts)]))
