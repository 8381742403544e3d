"""Builds finetuning batches from a task's examples (spec xdbert §4, paper appendix B)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from xdscale.data.collate import CLIP_CONTENT, CLIP_LENGTH, pack_clip_blocks
from xdscale.data.task_files import NO_LABEL, Example
from xdscale.padding import clip_layout, language_layout
from xdscale.shards.clip_bpe import ClipBPE
from xdscale.shards.sources.text_build import ClipTokenizer, LanguageTokenizer
from xdscale.systems.contract import MicroBatch, Slots

CLIP_BLOCKS = 2
"""Blocks of 77 per sentence (appendix B: 2 for one sentence, 4 for a pair; two sentences never share a block)."""


class Texts:
    """Token ids of many texts, one after the other."""

    def __init__(self, ids: list[list[int]] | list[np.ndarray]) -> None:
        lengths = np.array([len(text) for text in ids], np.int64)
        self._flat = np.concatenate([np.asarray(text, np.int32) for text in ids])
        self._offsets = np.concatenate([[0], lengths.cumsum()])

    def __getitem__(self, index: int) -> np.ndarray:
        return self._flat[self._offsets[index] : self._offsets[index + 1]]

    def lengths(self) -> np.ndarray:
        """Returns the number of ids of each text, int64 [n]."""
        return np.diff(self._offsets)


@dataclass(frozen=True)
class EncodedSplit:
    """A split's examples as token ids.

    Attributes:
        examples: in file order.
        targets: what the loss compares with, of some of them; see `xdscale.tasks.contract.Task`.
        index: int64 [n, choices or 1, sentences], the number of each text in `language` and `clip`.
        language: the distinct texts; None when no language encoder reads them.
        clip: the same in CLIP's ids.
    """

    examples: Sequence[Example]
    targets: Callable[[Sequence[Example]], np.ndarray]
    index: np.ndarray
    language: Texts | None
    clip: Texts | None

    def __len__(self) -> int:
        return len(self.examples)


def distinct_texts(examples: Sequence[Example]) -> tuple[list[str], np.ndarray]:
    """Returns the distinct texts of examples, and of each example their numbers: int64 [n, choices or 1, sentences]."""
    numbers: dict[str, int] = {}
    index = [
        [[numbers.setdefault(text, len(numbers)) for text in choice] for choice in example.texts]
        for example in examples
    ]
    return list(numbers), np.array(index, np.int64)


def first_longer(texts: Texts, index: np.ndarray, room: int) -> tuple[int, int]:
    """Returns how many examples, `index` as `distinct_texts` has it, have more ids than `room`, and the first one."""
    cut = np.flatnonzero(texts.lengths()[index].sum(-1).max(1) > room)
    return len(cut), int(cut[0]) if len(cut) else -1


def encode_examples(
    examples: Sequence[Example],
    targets: Callable[[Sequence[Example]], np.ndarray],
    language: Tokenizer | None,
    clip: ClipBPE | None,
) -> EncodedSplit:
    """Tokenises a split.

    Args:
        examples: in file order; all have as many choices and sentences.
        targets: of the task.
        language: the language encoder's tokenizer, set to give plain ids; None when no language encoder reads.
        clip: CLIP's tokenizer; None when CLIP does not read.
    """
    texts, index = distinct_texts(examples)
    return EncodedSplit(
        examples,
        targets,
        index,
        Texts([encoding.ids for encoding in language.encode_batch_fast(texts, add_special_tokens=False)])
        if language
        else None,
        Texts(clip.encode(texts)) if clip else None,
    )


class TaskCollator:
    """Turns slots into finetuning batches.

    With b examples and c choices (no such dimension unless the task has choices):
        language_ids, segments int64 [b, c, S] and language_mask bool [b, c, S]: [CLS] first [SEP] second [SEP], S as
            long as the longest of them needs; segments are 1 from the second sentence on. language_valid: see
            `language_layout`.
        clip_ids int64 [b, c, N, 77] and clip_lengths int64 [b, c, N]: 2 blocks for each sentence. clip_blocks,
            clip_valid, clip_longest: see `clip_layout`.
        labels [b, …]: the task's targets, int64 and `NO_LABEL` where not real, or float32.
        real bool [b]: False for padding examples and unlabelled ones.
    The one objective is called "task".
    """

    def __init__(
        self, split: EncodedSplit, language: LanguageTokenizer | None, clip: ClipTokenizer | None, *, max_length: int
    ) -> None:
        """Sets the collator up.

        Args:
            split: the examples.
            language: ids of the language encoder's special tokens; None when it does not read.
            clip: ids of CLIP's markers; None when CLIP does not read.
            max_length: language tokens with [CLS] and [SEP]; the longer sentence is cut first.
        """
        self.split = split
        self._language = language
        self._clip = clip
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self.split)

    def first_cut(self) -> tuple[int, int]:
        """Returns how many examples are longer than the language encoder reads, and the first one."""
        if self.split.language is None:
            return 0, -1
        return first_longer(self.split.language, self.split.index, self._max_length - 1 - self.split.index.shape[-1])

    def __call__(self, slots: Slots) -> MicroBatch:
        """Prepares the examples of one micro-batch."""
        arrays, tokens = {}, 0
        index = self.split.index[slots.sample_ids]  # [b, choices or 1, sentences]
        shape = index.shape[:2] if index.shape[1] > 1 else index.shape[:1]
        pairs = index.reshape(-1, index.shape[-1]).tolist()
        if self._language is not None:
            language = _language_arrays(self.split.language, pairs, self._language, self._max_length)
            tokens = int(language["language_mask"].reshape(shape[0], -1).sum(1)[slots.real].sum())
            arrays |= language
        if self._clip is not None:
            clip = _clip_arrays(self.split.clip, pairs, self._clip)
            if self._language is None:
                tokens = int(clip["clip_lengths"].reshape(shape[0], -1).sum(1)[slots.real].sum())
            arrays |= clip
        arrays = {name: array.reshape(*shape, *array.shape[1:]) for name, array in arrays.items()}
        if self._language is not None:
            arrays |= language_layout(arrays["language_mask"])
        if self._clip is not None:
            arrays |= clip_layout(arrays["clip_lengths"], CLIP_LENGTH)
        targets = self.split.targets([self.split.examples[sample] for sample in slots.sample_ids.tolist()])
        arrays |= label_arrays(targets, slots.real)
        return MicroBatch(arrays, {"task": int(slots.real.sum())}, tokens)

    def prefetch(self, step: list[Slots]) -> None:
        """Does nothing: the examples are in memory."""

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns nothing: an example is read as it is."""
        return []


def label_arrays(targets: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """Returns "real" and "labels": a task's targets, int64 and `NO_LABEL` where not real, or float32.

    Args:
        targets: [b, …], integers or floats.
        real: bool [b].
    """
    labels = targets.astype(np.int64 if np.issubdtype(targets.dtype, np.integer) else np.float32)
    if labels.dtype == np.int64:
        labels[~real] = NO_LABEL
    return {"real": real.copy(), "labels": labels}


def _language_arrays(
    texts: Texts, pairs: list[list[int]], tokenizer: LanguageTokenizer, max_length: int
) -> dict[str, np.ndarray]:
    rows = []
    for pair in pairs:
        parts = cut_longest_first([texts[index] for index in pair], max_length - 1 - len(pair))
        rows.append(np.concatenate([[tokenizer.cls_id], *([*part, tokenizer.sep_id] for part in parts)]))
    length = max(map(len, rows))
    language_ids = np.full((len(rows), length), tokenizer.pad_id, np.int64)
    segments = np.zeros_like(language_ids)
    for row, ids in enumerate(rows):
        language_ids[row, : len(ids)] = ids
        ends = np.flatnonzero(ids == tokenizer.sep_id)  # text that spells [SEP] is no separator
        segments[row, ends[0] + 1 : len(ids)] = 1
    lengths = np.array(list(map(len, rows)))
    return {"language_ids": language_ids, "segments": segments, "language_mask": np.arange(length) < lengths[:, None]}


def cut_longest_first(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Cuts one or two texts to `room` ids together: the longer one first, until both have half.

    As the tokenizers library does: where half is not a whole number, the longer text keeps one more, of equals the
    second.
    """
    if sum(map(len, parts)) <= room:
        return parts
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = parts
    kept = min(len(first), len(second), room // 2)
    return [first[: room - kept], second[:kept]] if len(first) > len(second) else [first[:kept], second[: room - kept]]


def cut_second_from_front(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Cuts two texts to `room` ids together, from the front: the second one down to its last id, then the first one.

    So VisualBERT's release does in VCR; but there the last id goes too, and a first text that is too long ends
    the run.
    """
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = parts
    excess = max(0, len(first) + len(second) - room)
    of_second = min(excess, max(0, len(second) - 1))
    return [first[excess - of_second :], second[of_second:]]


def _clip_arrays(texts: Texts, pairs: list[list[int]], tokenizer: ClipTokenizer) -> dict[str, np.ndarray]:
    cut = [texts[index][: CLIP_BLOCKS * CLIP_CONTENT] for pair in pairs for index in pair]
    offsets, ends = np.cumsum([0, *map(len, cut)]), {"start_id": tokenizer.start_id, "end_id": tokenizer.end_id}
    clip_ids, clip_lengths = pack_clip_blocks(np.concatenate(cut), offsets, **ends, blocks=CLIP_BLOCKS)
    return {
        "clip_ids": clip_ids.reshape(len(pairs), -1, CLIP_LENGTH),
        "clip_lengths": clip_lengths.reshape(len(pairs), -1),
    }
