"""A split held in memory, with the methods and the manifest that the collator uses."""

import numpy as np
import pytest

from xdscale.shards.manifest import Manifest, TableManifest
from xdscale.shards.shard import Ragged
from xdscale.shards.sources.text_build import ClipTokenizer, LanguageTokenizer, TextBuild

NAMED = {"name": "memory", "sha256": "0" * 64}
LANGUAGE = LanguageTokenizer(**NAMED, vocab_size=30522, cls_id=101, sep_id=102, mask_id=103, pad_id=0)
CLIP = ClipTokenizer(**NAMED, vocab_size=49408, start_id=49406, end_id=49407)


class MemorySplit:
    def __init__(self, language: np.ndarray, texts: list[np.ndarray]) -> None:
        self.damaged = np.zeros(len(texts), bool)
        self.language = language
        self.texts = texts
        build = TextBuild(
            inputs=[],
            sequence_length=language.shape[1],
            clip_blocks=max(-(-len(text) // 75) for text in texts),
            language_tokenizer=LANGUAGE,
            clip_tokenizer=CLIP,
        )
        table = TableManifest(build=build.model_dump(), columns=build.columns, splits={})
        self.manifest = Manifest(tables={"text": table})

    def __len__(self) -> int:
        return len(self.language)

    def usable(self, sample_ids: np.ndarray) -> np.ndarray:
        return ~self.damaged[sample_ids]

    def first_usable(self) -> int:
        return int(np.argmin(self.damaged))

    def read(self, column: str, rows: np.ndarray) -> np.ndarray:
        assert column == "language"
        assert not self.damaged[rows].any()
        return self.language[rows]

    def read_ragged(self, column: str, rows: np.ndarray) -> Ragged:
        assert column == "clip"
        assert not self.damaged[rows].any()
        chosen = [self.texts[row] for row in rows]
        return Ragged(np.concatenate(chosen), np.cumsum([0, *map(len, chosen)]))


@pytest.fixture(scope="session")
def memory_split():
    """Returns a function (samples, sequence_length, clip_blocks) -> MemorySplit of random ids."""

    def make(samples: int, sequence_length: int, clip_blocks: int) -> MemorySplit:
        draw = np.random.default_rng(samples)
        language = draw.integers(1000, LANGUAGE.vocab_size, (samples, sequence_length)).astype(np.uint16)
        counts = draw.integers(1, 75 * clip_blocks + 1, samples)
        counts[0] = 75 * clip_blocks
        texts = [draw.integers(0, CLIP.start_id, count).astype(np.uint16) for count in counts]
        return MemorySplit(language, texts)

    return make
