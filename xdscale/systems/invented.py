"""Invented text in the place of a table: what plans and measurements compute on where there is none at hand."""

from collections.abc import Callable

import numpy as np
from transformers import PretrainedConfig

from xdscale.data.collate import CLIP_CONTENT
from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Manifest, TableManifest
from xdscale.shards.shard import Ragged
from xdscale.shards.sources.text_build import TEXT, ClipTokenizer, LanguageTokenizer, TextBuild
from xdscale.systems.contract import Slots

TextLengths = Callable[[int, int], np.ndarray]
"""Maps a number of texts and of word pieces in each to the CLIP ids of each text, int64."""

_MOST_CLIP_IDS = 9 * CLIP_CONTENT
_INVENTED = {"name": "invented", "sha256": "0" * 64}


def invented_tokenizer(vocabulary: int) -> LanguageTokenizer:
    """Returns what is known of a tokenizer of so many ids, of which the special ones are BERT's."""
    return LanguageTokenizer(**_INVENTED, vocab_size=vocabulary, cls_id=101, sep_id=102, mask_id=103, pad_id=0)


def average_texts(texts: int, word_pieces: int) -> np.ndarray:
    """Texts that have on average as many CLIP ids, and blocks, as those of Wikipedia (docs/measurements.md).

    545 ids for 510 word pieces: they would fill 7.28 blocks, and take 7.44. So each has 12 places free in its last one.
    """
    blocks = max(1.0, (1.07 * word_pieces + 12) / CLIP_CONTENT)
    whole = np.diff(np.floor(np.arange(texts + 1) * blocks + 0.5).astype(np.int64))
    return np.minimum(whole * CLIP_CONTENT - 12, _MOST_CLIP_IDS)


def longest_texts(texts: int, word_pieces: int) -> np.ndarray:
    """Of Wikipedia's texts of 510 word pieces 1 % need nine blocks and none more; all are of those here."""
    return np.full(texts, min(int(1.25 * word_pieces) + 1, _MOST_CLIP_IDS))


class InventedText:
    """Sequences of random ids, in the place of a `Table`."""

    def __init__(
        self,
        config: PretrainedConfig,
        samples: int,
        length: int | None = None,
        clip_vocabulary: int = 49_408,
        texts: TextLengths = average_texts,
    ) -> None:
        """Draws ids.

        Args:
            config: of the language encoder.
            samples: how many sequences.
            length: language tokens with [CLS] and [SEP]; None for as many as the encoder has positions.
            clip_vocabulary: of CLIP's text tower.
            texts: how long the CLIP texts are.

        Raises:
            XdscaleError: the encoder has fewer positions than `length`.
        """
        positions = config.max_position_embeddings
        length = positions if length is None else length
        if not 3 <= length <= positions:
            raise XdscaleError(f"sequence length {length}: the encoder takes 3 to {positions}")
        ends = {"start_id": clip_vocabulary - 2, "end_id": clip_vocabulary - 1}
        build = TextBuild(
            inputs=[],
            sequence_length=length - 2,
            language_tokenizer=invented_tokenizer(config.vocab_size),
            clip_tokenizer=ClipTokenizer(**_INVENTED, vocab_size=clip_vocabulary, **ends),
        )
        table = TableManifest(build=build.model_dump(), columns=build.columns, splits={})
        self.manifest = Manifest(tables={TEXT: table})
        generator, lengths = np.random.default_rng(0), texts(samples, length - 2)
        self._language = generator.integers(0, config.vocab_size, (samples, length - 2)).astype(np.uint16)
        self._clip = generator.integers(1, clip_vocabulary - 2, lengths.sum()).astype(np.uint16)
        self._offsets = np.concatenate([[0], lengths.cumsum()])

    def __len__(self) -> int:
        return len(self._language)

    def slots(self, samples: int) -> Slots:
        """Returns the first samples."""
        return Slots.of(np.arange(samples))

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """Returns that all rows are."""
        return np.ones(len(rows), bool)

    def read(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Returns the word pieces of some rows."""
        return self._language[rows]

    def read_ragged(self, column: str, rows: np.ndarray) -> Ragged:
        """Returns the CLIP ids of some rows."""
        texts = [self._clip[self._offsets[row] : self._offsets[row + 1]] for row in rows]
        return Ragged(np.concatenate(texts), np.concatenate([[0], np.cumsum([len(text) for text in texts])]))
