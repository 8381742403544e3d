"""The batch that `xdscale bench step` computes on."""

import numpy as np

from xdscale.data.collate import CLIP_LENGTH, Batch, XDBERTCollator
from xdscale.data.order import Slots
from xdscale.errors import XdscaleError
from xdscale.names import resolve_path
from xdscale.recipe import Recipe
from xdscale.shards.manifest import Manifest, TableManifest
from xdscale.shards.sources.text_build import TEXT, ClipTokenizer, LanguageTokenizer, TextBuild
from xdscale.shards.table import Ragged, Table
from xdscale.systems.xdbert import XDBERTAdaptation, check_shards

LANGUAGE_TOKENS = 512
CLIP_TOKENS = 560
"""Positions that the invented CLIP text fills of the 693, start and end tokens counted."""


class _InventedTable:
    """Sequences of uniformly drawn ids, in the place of a `Table`."""

    def __init__(self, module: XDBERTAdaptation, samples: int) -> None:
        config, tower = module.model.language.config, module.model.clip.tower
        generator = np.random.default_rng(0)
        length = min(LANGUAGE_TOKENS, config.max_position_embeddings) - 2
        invented = {"name": "invented", "sha256": "0" * 64}
        ids = {"vocab_size": config.vocab_size, "cls_id": 101, "sep_id": 102, "mask_id": 103, "pad_id": 0}
        ends = {"start_id": tower.vocab_size - 2, "end_id": tower.vocab_size - 1}
        build = TextBuild(
            inputs=[],
            sequence_length=length,
            language_tokenizer=LanguageTokenizer(**invented, **ids),
            clip_tokenizer=ClipTokenizer(**invented, vocab_size=tower.vocab_size, **ends),
        )
        table = TableManifest(build=build.model_dump(), columns=build.columns, splits={})
        self.manifest = Manifest(tables={TEXT: table})
        content = CLIP_TOKENS - 2 * -(-CLIP_TOKENS // CLIP_LENGTH)
        self._language = generator.integers(1000, config.vocab_size, (samples, length)).astype(np.uint16)
        self._clip = generator.integers(1, tower.vocab_size - 2, (samples, content)).astype(np.uint16)

    def __len__(self) -> int:
        return len(self._language)

    def usable(self, rows: np.ndarray) -> np.ndarray:
        return np.ones(len(rows), bool)

    def read(self, column: str, rows: np.ndarray) -> np.ndarray:
        return self._language[rows]

    def read_ragged(self, column: str, rows: np.ndarray) -> Ragged:
        return Ragged(self._clip[rows].ravel(), np.arange(len(rows) + 1) * self._clip.shape[1])


def bench_batch(recipe: Recipe, module: XDBERTAdaptation, sequences: int) -> Batch:
    """Returns a batch of the recipe's shards, or of invented sequences at the true shape where there are none.

    Raises:
        XdscaleError: the shards were not made for the recipe's model.
    """
    try:
        folder = resolve_path(recipe.data.shards)
    except XdscaleError:  # the recipe's data is not on this machine
        split = _InventedTable(module, sequences + 1)  # one more, so that every text has another as its partner
    else:
        split = Table(folder, "train")
        check_shards(recipe.model, split.manifest)
    sample_ids = np.arange(sequences) % len(split)
    slots = Slots(np.zeros_like(sample_ids), sample_ids, np.ones(sequences, bool))
    return XDBERTCollator(split, seed=recipe.training.seed, objectives=recipe.objectives)(slots)
