"""A small corpus, its tokenizer, and datasets built from it."""

import functools
import random
from pathlib import Path

import pytest

from xdscale.shards import build as build_module
from xdscale.shards import unit as unit_module
from xdscale.shards.build import build_shards
from xdscale.shards.clip_bpe import ClipBPE
from xdscale.shards.language import load_language_tokenizer

WORDS = "the river runs slowly past old café walls while seven birds sing; don't stop, it’s 1984 AT&T naïve".split()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 1 to 6 paragraphs of 5 to 60 words, blank lines between the documents."""
    chance = random.Random(7)
    documents = [
        "\n".join(" ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(chance.randint(1, 6)))
        for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_build(small_corpus: Path, cassette_model: Path):
    """Builds the small corpus in sequences of 30 ids, some shards of each split."""

    def build(out: Path, **options):
        defaults = {
            "language_tokenizer": str(cassette_model),
            "sequence_length": 30,
            "clip_blocks": 1,
            "validation_fraction": 0.2,
            "shard_text_bytes": 6000,
        }
        return build_shards([small_corpus], out, **(defaults | options))

    return build


@pytest.fixture(scope="session")
def small_dataset(small_build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That dataset, not to be changed."""
    out = tmp_path_factory.mktemp("small") / "dataset"
    small_build(out)
    return out


@pytest.fixture(scope="session")
def open_clip_tokenizer():
    """open_clip's own tokenizer, the reference for CLIP ids."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def loaded_once():
    """Tokenizers are loaded once for all builds of a module, which are small and many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_module, "ClipBPE", functools.cache(ClipBPE))
        patch.setattr(build_module, "load_language_tokenizer", functools.cache(load_language_tokenizer))
        yield
