"""Builds XDBERT's batches from packed sequences (spec xdbert §2.2, §3, §4)."""

import numpy as np

from xdscale.data.masking import drawn_masks, mask_language_ids, select_clip_targets
from xdscale.data.pairing import PADDING, draw_partners
from xdscale.padding import clip_layout
from xdscale.recipes.xdbert.schema import XDBERTObjectives
from xdscale.shards.sources.text_build import LanguageTokenizer, TextBuild
from xdscale.shards.table import Table
from xdscale.systems.contract import MicroBatch, Slots

CLIP_LENGTH = 77
CLIP_CONTENT = CLIP_LENGTH - 2


class XDBERTCollator:
    """Turns slots into batches; what is drawn depends on (seed, epoch, sample id) alone.

    Arrays, with b samples, S = sequence length + 2, and N blocks, as many as the longest text needs:
        language_ids [b, S]: [CLS] ids [SEP], masked.
        clip_ids [b, N, 77], clip_lengths [b, N]: see `pack_clip_blocks`.
        clip_blocks, clip_valid, clip_longest: see `clip_layout`.
        masked_lm_positions [m]: flat index into b * S; masked_lm_labels [m]: the original ids.
        clip_positions [c]: flat index into b * N * 77, content tokens only; clip_labels [c]: the ids there.
        match_labels [b]: 1 same text, 0 other text, -1 padding sample.
    An objective that is off has no arrays and no entry in `targets`; without MATCH both texts are the same.
    """

    def __init__(self, split: Table, *, seed: int, objectives: XDBERTObjectives) -> None:
        """Sets the collator up.

        Args:
            split: where the sequences are.
            seed: of all draws, below 2**32.
            objectives: those that are on, with their rates.
        """
        self.split = split
        self.seed = seed
        self.objectives = objectives
        self.text = TextBuild.of(split.manifest)
        self._language, self._clip = self.text.language_tokenizer, self.text.clip_tokenizer

    def prefetch(self, step: list[Slots]) -> None:
        """Says that the samples of a step and their partners will be read soon; errors as `Table.prefetch`."""
        pairs = [self._pair(slots) for slots in step]
        self.split.prefetch(
            np.concatenate([rows for slots, text_ids, _ in pairs for rows in (slots.sample_ids, text_ids)])
        )

    def __call__(self, slots: Slots) -> MicroBatch:
        """Reads and prepares the samples of one micro-batch."""
        arrays: dict[str, np.ndarray] = {}
        targets: dict[str, int] = {}
        slots, text_ids, match_labels = self._pair(slots)
        ids = language_ids(self.split, self._language, slots.sample_ids)
        arrays["language_ids"] = ids
        if self.objectives.mlm is not None:
            positions, labels = mask_language_ids(ids, slots, self.objectives.mlm, self._language, seed=self.seed)
            arrays["masked_lm_positions"], arrays["masked_lm_labels"] = positions, labels
            targets["mlm"] = len(positions)
        if match_labels is not None:
            arrays["match_labels"] = match_labels
            targets["match"] = int(slots.real.sum())
        flat, offsets = self.split.read_ragged("clip", text_ids)
        clip_ids, clip_lengths = pack_clip_blocks(flat, offsets, start_id=self._clip.start_id, end_id=self._clip.end_id)
        arrays["clip_ids"], arrays["clip_lengths"] = clip_ids, clip_lengths
        arrays |= clip_layout(clip_lengths, CLIP_LENGTH)
        if self.objectives.clip_tokens is not None:
            row, token = select_clip_targets(np.diff(offsets), slots, self.objectives.clip_tokens, seed=self.seed)
            positions = row * clip_ids[0].size + token + 2 * (token // CLIP_CONTENT) + 1
            arrays["clip_positions"], arrays["clip_labels"] = positions, clip_ids.reshape(-1)[positions]
            targets["clip_tokens"] = len(positions)
        return MicroBatch(arrays, targets, tokens=int(slots.real.sum()) * ids.shape[1])

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns masked positions and what is put there, whose text each sample is paired with, and CLIP targets.

        No shard is read: language ids count as 0 and texts as the longest that shards hold. So nothing of it depends
        on world size, rank, micro-batch and padding, nor on shards in quarantine, whose samples keep their places.
        """
        build = self.text
        drawn = drawn_masks(
            build.sequence_length + 2, slots, self.objectives.mlm, build.language_tokenizer, seed=self.seed
        )
        if self.objectives.match is not None:
            drawn += draw_partners(slots, len(self.split), self.objectives.match, seed=self.seed)
        if self.objectives.clip_tokens is not None:
            longest = np.full(len(slots.sample_ids), build.clip_blocks * CLIP_CONTENT)
            drawn += select_clip_targets(longest, slots, self.objectives.clip_tokens, seed=self.seed)
        return drawn

    def _pair(self, slots: Slots) -> tuple[Slots, np.ndarray, np.ndarray | None]:
        """Draws whose text goes with each sample, and turns pairs that touch a quarantined shard into padding.

        Such a pair keeps its place in the batch, so all other draws stay as they are, but has weight zero in every
        objective: drawing another partner would favour some samples. What is read in its place does not matter.
        """
        text_ids, labels = slots.sample_ids, None
        if self.objectives.match is not None:
            text_ids, labels = draw_partners(slots, len(self.split), self.objectives.match, seed=self.seed)
        usable = self.split.usable(slots.sample_ids) & self.split.usable(text_ids)
        if usable.all():
            return slots, text_ids, labels
        instead = self.split.first_usable()
        slots = Slots(slots.epochs, np.where(usable, slots.sample_ids, instead), slots.real & usable)
        labels = None if labels is None else np.where(usable, labels, PADDING)
        return slots, np.where(usable, text_ids, instead), labels


def readable(table: Table, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which rows lie in no quarantined shard, and the rows with one that does not in place of those that do."""
    usable = table.usable(rows)
    return usable, rows if usable.all() else np.where(usable, rows, table.first_usable())


def language_lengths(table: Table) -> np.ndarray:
    """Returns the tokens of each row for a language encoder, with [CLS] and [SEP]: as many in all of them."""
    return np.full(len(table), TextBuild.of(table.manifest).sequence_length + 2)


def language_ids(split: Table, tokenizer: LanguageTokenizer, sample_ids: np.ndarray) -> np.ndarray:
    """Reads sequences; returns int64 [b, S]: [CLS] ids [SEP]."""
    sequences = split.read("language", sample_ids)
    ids = np.empty((len(sequences), sequences.shape[1] + 2), np.int64)
    ids[:, 0] = tokenizer.cls_id
    ids[:, 1:-1] = sequences
    ids[:, -1] = tokenizer.sep_id
    return ids


def pack_clip_blocks(
    flat: np.ndarray, offsets: np.ndarray, *, start_id: int, end_id: int, blocks: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Lays ragged CLIP texts out in blocks of 77: start, at most 75 ids, end, zeros.

    Args:
        flat: uint16 [total], the ids of all texts one after the other; an id 0 among them is a word like any
            other.
        offsets: int64 [b + 1]; text i is flat[offsets[i]:offsets[i + 1]].
        start_id: id of the start token.
        end_id: id of the end token.
        blocks: for each text; None for as many as the longest one needs.

    Returns:
        (clip_ids int64 [b, blocks, 77], clip_lengths int64 [b, blocks]): a length counts start and end, and is 0 for
        the trailing blocks that a text does not need. An empty text has its first block, with nothing between the two.
    """
    counts = np.diff(offsets)
    blocks = blocks or max(1, -(-int(counts.max(initial=0)) // CLIP_CONTENT))
    content = np.zeros((len(counts), blocks * CLIP_CONTENT), np.int64)
    content[np.arange(blocks * CLIP_CONTENT) < counts[:, None]] = flat
    inside = np.clip(counts[:, None] - np.arange(blocks) * CLIP_CONTENT, 0, CLIP_CONTENT)  # [b, N]
    used = inside > 0
    used[:, 0] = True
    clip_ids = np.zeros((len(counts), blocks, CLIP_LENGTH), np.int64)
    clip_ids[:, :, 1:-1] = content.reshape(len(counts), blocks, CLIP_CONTENT)
    clip_ids[:, :, 0] = np.where(used, start_id, 0)
    row, block = np.nonzero(used)
    clip_ids[row, block, inside[row, block] + 1] = end_id
    return clip_ids, np.where(used, inside + 2, 0)
