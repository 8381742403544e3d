"""Batches for masked-LM alone (spec xdbert §3)."""

import numpy as np

from xdscale.data.collate import language_ids, readable
from xdscale.data.masking import drawn_masks, mask_language_ids
from xdscale.recipes.mlm.schema import MaskedLMObjectives
from xdscale.shards.sources.text_build import TextBuild
from xdscale.shards.table import Table
from xdscale.systems.contract import MicroBatch, Slots


class MaskedLMCollator:
    """Turns slots into batches; what is drawn depends on (seed, epoch, sample id) alone.

    Arrays, int64, with b samples and S = sequence length + 2:
        language_ids [b, S]: [CLS] ids [SEP], masked.
        masked_lm_positions [m]: flat index into b * S; masked_lm_labels [m]: the original ids.
    """

    def __init__(self, split: Table, *, seed: int, objectives: MaskedLMObjectives) -> None:
        """Sets the collator up.

        Args:
            split: where the sequences are.
            seed: of all draws, below 2**32.
            objectives: the rates.
        """
        self.split = split
        self.seed = seed
        self.objectives = objectives
        self.text = TextBuild.of(split.manifest)

    def __call__(self, slots: Slots) -> MicroBatch:
        """Reads and prepares samples; those in quarantine become padding."""
        usable, rows = readable(self.split, slots.sample_ids)
        slots = Slots(slots.epochs, rows, slots.real & usable)
        tokenizer = self.text.language_tokenizer
        ids = language_ids(self.split, tokenizer, slots.sample_ids)
        positions, labels = mask_language_ids(ids, slots, self.objectives.mlm, tokenizer, seed=self.seed)
        arrays = {"language_ids": ids, "masked_lm_positions": positions, "masked_lm_labels": labels}
        return MicroBatch(arrays, {"mlm": len(positions)}, tokens=int(slots.real.sum()) * ids.shape[1])

    def prefetch(self, step: list[Slots]) -> None:
        """Says that the samples of a step will be read soon; errors as `Table.prefetch`."""
        self.split.prefetch(np.concatenate([slots.sample_ids for slots in step]))

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns masked positions and what is put there; the ids count as 0."""
        length, tokenizer = self.text.sequence_length + 2, self.text.language_tokenizer
        return drawn_masks(length, slots, self.objectives.mlm, tokenizer, seed=self.seed)
