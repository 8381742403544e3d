"""Builds finetuning batches of texts with image regions for encoders that read both packed (spec VisualBERT §5)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from xdscale.data.task_batches import (
    Texts,
    cut_longest_first,
    cut_second_from_front,
    distinct_texts,
    first_longer,
    label_arrays,
)
from xdscale.data.task_files import Example, Span
from xdscale.data.task_pictures import Look, TaskPictures
from xdscale.data.visual_text import chosen_regions, pack, region_rows, with_spatial
from xdscale.errors import XdscaleError
from xdscale.shards.regions import Regions, RegionTable
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.systems.contract import MicroBatch, Slots

if TYPE_CHECKING:
    from xdscale.tasks.contract import Task

ALL, LONGEST_FIRST = "all", "longest_first"
"""Which regions are read, and how texts that are too long are cut, unless a recipe says otherwise."""

SPATIAL = 6
"""Numbers of `spatial`, which are appended to features where an encoder was trained with them (Flickr30K)."""


def table_widths(width: int) -> tuple[int, int]:
    """Returns how wide a table's features may be for an encoder that reads so many: `spatial` is appended to fewer."""
    return width, width - SPATIAL


class VisualTaskCollator:
    """Turns slots into finetuning batches: one packed row of [CLS] first [SEP] second [SEP] regions for each input.

    Of b examples with c choices (1 where there are none) an encoder gets b × c inputs, those of an example one after
    the other. Beside what `pack` returns:
        real bool [b], labels [b, …]: as `xdscale.data.task_batches.TaskCollator`.
        answer_rows int64 [b]: where an open question is answered: the place in the row of the [MASK] behind it.
        query_rows int64 [b]: where a region is asked for: the last word piece of the first text's marked words.
        region_rows int64 [r]: the places of all regions in the row; region_samples int64 [r]: whose they are;
            region_slots int64 [r]: their flat index into b × most_regions.
        most_regions int64 []: of the input that has most.
    With pictures there is, in the place of features, what `xdscale.data.task_pictures.TaskPictures` returns.
    """

    own_regions = 0
    """Regions of an input that the encoder has before those of the task."""
    separates_answers = False
    """Whether [MASK] stands behind a [SEP], in the second segment; else right behind the question."""

    def __init__(
        self,
        task: "Task",
        examples: Sequence[Example],
        tokenizer: tuple[Tokenizer, LanguageTokenizer],
        regions: RegionTable | None,
        *,
        width: int,
        max_length: int,
        objects: str = ALL,
        truncation: str = LONGEST_FIRST,
        look: Look | None = None,
    ) -> None:
        """Tokenises a split and finds its images.

        Args:
            task: whose.
            examples: in file order.
            tokenizer: of the encoder, set to give plain ids.
            regions: of the images; None where the task has none.
            width: numbers that the encoder reads of a region; the table must have one of `table_widths`.
            max_length: word pieces with [CLS], [SEP] and [MASK].
            objects: "named" reads the regions that an example speaks of alone.
            truncation: "second_from_front", or "longest_first", from its end.
            look: how pictures are read; None where features are.

        Raises:
            XdscaleError: images are missing, nobody says what is named, or pictures are to be read and the table has
                none, or objects are unknown.
        """
        self._task, self.examples, self._tokens, self._regions = task, examples, tokenizer[1], regions
        self._width, self._max_length, self._from_front = width, max_length, truncation != LONGEST_FIRST
        self._named = objects != ALL
        if self._named:
            require_named(task.name, [example.named for example in examples])
        self._pictures = None
        if look is not None:
            self._pictures = TaskPictures(task, regions, look, named=self._named)
            self._pictures.check(examples)
        self._specials = 1 + task.sentences + (task.reads == "answer") * (1 + self.separates_answers)
        images = [image for example in examples for image in example.images] if task.images else []
        self._rows = regions.rows(images).reshape(-1, task.images) if images else np.zeros((len(examples), 0), np.int64)
        texts, self._index = distinct_texts(examples)  # [n, choices or 1, sentences]
        self._ids, self._begins = tokenise(texts, tokenizer[0], begins=any(one.spans for one in examples))

    def __len__(self) -> int:
        return len(self.examples)

    def first_cut(self) -> tuple[int, int]:
        """Returns how many examples are longer than the encoder reads, and the first one."""
        return first_longer(self._ids, self._index, self._max_length - self._specials)

    def prefetch(self, step: list[Slots]) -> None:
        """Has the regions of a step fetched."""
        if self._task.images:
            self._regions.prefetch(self._rows[np.concatenate([slots.sample_ids for slots in step])].ravel())

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns nothing: an example is read as it is."""
        return []

    def __call__(self, slots: Slots) -> MicroBatch:
        """Prepares the examples of one micro-batch."""
        samples = slots.sample_ids
        examples, index = self._examples_of(slots), self._index[samples]
        of_images = self._read(self._rows[samples])
        targets = self._task.targets(examples, *([of_images] if self._task.images else []))
        choices, per_example = index.shape[1], max(1, self._task.images)
        shown = named_regions(of_images, [example.named for example in examples]) if self._named else of_images
        regions = _repeated(shown, per_example, choices)
        segments = np.repeat(np.arange(len(regions.sizes)) % per_example, np.diff(regions.offsets))
        joint = regions._replace(offsets=np.ascontiguousarray(regions.offsets[::per_example]))
        if not self._task.images:  # texts alone: as many inputs, none with a region
            joint = joint._replace(offsets=np.zeros(index.shape[0] * choices + 1, np.int64))
        texts, text_segments, alignments, marked = [], [], [], []
        for place, (example, one) in enumerate(zip(examples, index.tolist())):
            for choice, texts_of_choice in enumerate(one):
                spans = example.spans[choice] if example.spans else ()
                numbers = example.named if self._named else range(np.diff(joint.offsets)[place * choices + choice])
                ids, segment, pairs, mark = self._input(texts_of_choice, spans, numbers)
                texts.append(ids), text_segments.append(segment), alignments.append(pairs), marked.append(mark)
        packed = self._pack(slots, texts, text_segments, joint, segments, alignments)
        arrays = label_arrays(targets, slots.real) | packed | self._places(packed, joint.offsets, np.array(marked))
        lengths = np.diff(packed["cu_seqlens"]).reshape(len(samples), choices).sum(1)
        return MicroBatch(
            arrays, {"task": int(slots.real.sum())}, int(lengths[slots.real].sum()),
            of_images if self._task.images else None,
        )  # fmt: skip

    def _pack(
        self,
        slots: Slots,
        texts: list[np.ndarray],
        text_segments: list[np.ndarray],
        regions: Regions,
        region_segments: np.ndarray,
        alignments: list[np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Packs the inputs of examples, which share an image where they are choices.

        Alignments are of each input int [m, 3]: a region, and the word pieces that name it, first and last.
        Regions follow the text in the row, behind `own_regions` that the encoder has of its own.
        """
        first = [pairs[:, :2] for pairs in alignments]
        aligned = first if any(len(pairs) for pairs in first) else None
        return self._seen(slots, regions, pack(texts, text_segments, regions, region_segments, aligned))

    def _seen(
        self, slots: Slots, regions: Regions, packed: dict[str, np.ndarray], flipped: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Puts pictures in the place of features if they are read; arguments as `TaskPictures.__call__`."""
        if self._pictures is None:
            return packed
        del packed["features"]
        return packed | self._pictures(self._examples_of(slots), self._rows[slots.sample_ids, 0], regions, flipped)

    def _examples_of(self, slots: Slots) -> list[Example]:
        return [self.examples[sample] for sample in slots.sample_ids.tolist()]

    def _read(self, rows: np.ndarray) -> Regions:
        """Returns the regions of images, one after the other, at the width that the encoder reads."""
        if not self._task.images:
            none = np.empty((0, self._width), np.float16)
            empty = np.empty((0, 4), np.float32)
            return Regions(none, empty, empty[:, 0], np.empty((0, 2), np.uint16), np.zeros(1, np.int64))
        regions = self._regions.read(rows.ravel(), boxes_only=self._pictures is not None)
        if self._pictures is not None or regions.features.shape[1] == self._width:
            return regions
        return with_spatial(regions)

    def _input(
        self, texts: list[int], spans: Sequence[Sequence[Span]], regions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Returns ids and segments of an input, its alignments, and the position of [MASK] or of the marked words.

        Args:
            texts: their numbers.
            spans: of each text.
            regions: the numbers, as spans have them, of those that are read.
        """
        tokens, answers, apart = self._tokens, self._task.reads == "answer", int(self.separates_answers)
        cut = cut_second_from_front if self._from_front else cut_longest_first
        parts = cut([self._ids[text] for text in texts], self._max_length - self._specials)
        behind = [*[tokens.sep_id] * apart, tokens.mask_id, tokens.sep_id] if answers else [tokens.sep_id]
        ids = [np.array([tokens.cls_id])]
        pairs, mark, begin, segments = [], len(parts[0]) + 1 + apart if answers else 0, 1, [np.zeros(1, np.int64)]
        for number, part in enumerate(parts):
            begins = self._begins[texts[number]] if spans else np.empty(0, np.int64)
            begins = begins[len(begins) - len(part) :] if self._from_front and len(parts) > 1 else begins[: len(part)]
            for span in spans[number] if spans else ():
                first, last = pieces_of(begins, span)
                if first is None:
                    continue  # cut off
                if span.region < 0:
                    mark = begin + last
                elif span.region in regions:
                    pairs.append((regions.index(span.region), begin + first, begin + last))
            ids += [part, np.array(behind if number == 0 else [tokens.sep_id])]
            segments.append(np.full(len(part) + len(ids[-1]), number))
            begin += len(part) + len(ids[-1])
        if answers and apart:
            segments[-1][-2:] = 1
        return np.concatenate(ids), np.concatenate(segments), np.array(pairs, np.int64).reshape(-1, 3), mark

    def _places(self, packed: dict[str, np.ndarray], offsets: np.ndarray, marked: np.ndarray) -> dict[str, np.ndarray]:
        """Returns where a task's head looks."""
        begins = packed["cu_seqlens"][:-1].astype(np.int64)
        if self._task.reads == "answer":
            return {"answer_rows": begins + marked}
        if self._task.reads != "region":
            return {}
        counts = np.diff(offsets)
        samples = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(offsets[-1]) - offsets[samples]
        most = counts.max(initial=0)
        return {
            "query_rows": begins + marked,
            "region_rows": region_rows(packed, offsets) + self.own_regions,
            "region_samples": samples,
            "region_slots": samples * most + within,
            "most_regions": np.array(most),
        }


def require_named(task: str, named: Sequence[Sequence[int] | None]) -> None:
    """Checks that a task says which regions each of its examples speaks of.

    Raises:
        XdscaleError: it does not.
    """
    if None in named:
        raise XdscaleError(f"model.objects = named: {task} does not say which regions are named; leave it out")


def named_regions(regions: Regions, named: Sequence[Sequence[int]]) -> Regions:
    """Returns those regions of each image that are named.

    Args:
        regions: of several images.
        named: of each image the numbers of its regions, ascending.
    """
    kept = np.zeros(len(regions.boxes), bool)
    for start, numbers in zip(regions.offsets, named):
        kept[start + np.array(numbers)] = True
    return chosen_regions(regions, kept)


def pieces_of(begins: np.ndarray, span: Span) -> tuple[int | None, int]:
    """Returns the first and the last word piece that begins in a part of a text; None if none does.

    Args:
        begins: int [n], the characters at which the text's word pieces begin.
        span: the part.
    """
    inside = np.flatnonzero((begins >= span.start) & (begins < span.end))
    return (int(inside[0]), int(inside[-1])) if len(inside) else (None, 0)


def tokenise(texts: list[str], tokenizer: Tokenizer, *, begins: bool) -> tuple[Texts, Texts | None]:
    """Returns the ids of texts and, if they are asked for, the characters at which their word pieces begin."""
    if not begins:
        return Texts([one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]), None
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return Texts([one.ids for one in encoded]), Texts([[start for start, _ in one.offsets] for one in encoded])


def _repeated(regions: Regions, per_example: int, times: int) -> Regions:
    """Returns the images of each example several times, once for each choice; they were read once."""
    if times == 1 or not len(regions.sizes):
        return regions
    images = np.arange(len(regions.sizes)).reshape(-1, per_example)
    order = np.repeat(images[:, None], times, axis=1).ravel()
    counts = np.diff(regions.offsets)[order]
    offsets = np.concatenate([[0], counts.cumsum()])
    rows = np.arange(offsets[-1]) + np.repeat(regions.offsets[order] - offsets[:-1], counts)
    return Regions(
        regions.features[rows], regions.boxes[rows], regions.confidences[rows], regions.sizes[order], offsets
    )
