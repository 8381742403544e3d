"""The collator over real shards: matched pairs hold the same words, as the tokenizers themselves decode them."""

import html
import re
import unicodedata

import ftfy
import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer

from xdscale.data.collate import XDBERTCollator
from xdscale.data.order import Order
from xdscale.recipes.xdbert.schema import XDBERTObjectives
from xdscale.shards.sources.text import TextOptions, build_shards
from xdscale.shards.table import Table


@pytest.fixture(scope="module")
def cut_shards(wiki_text, cassette_model, tmp_path_factory):
    """Shards of some of the articles with a single CLIP block, so that most CLIP texts are cut."""
    folder = tmp_path_factory.mktemp("cut")
    start = folder / "start.txt"
    start.write_text(wiki_text.read_text(encoding="utf-8")[:300_000], encoding="utf-8")
    build_shards(
        [start], folder / "out", TextOptions(language_tokenizer=str(cassette_model), sequence_length=126, clip_blocks=1)
    )
    return folder / "out"


def decoded_pairs(shards, model):
    """Yields (match label, language side, CLIP side, whether it fills all its blocks) for 400 samples."""
    split = Table(shards, "train")
    language = Tokenizer.from_file(str(model / "tokenizer.json"))
    clip = SimpleTokenizer()
    collate = XDBERTCollator(split, seed=0, objectives=XDBERTObjectives())
    order = Order(len(split), seed=0, global_batch=400, world_size=1, rank=0, micro_batch=50)
    for slots in order.slots(0):
        arrays = collate(slots).arrays
        ids = arrays["language_ids"].reshape(-1)
        ids[arrays["masked_lm_positions"]] = arrays["masked_lm_labels"]
        ids = ids.reshape(arrays["language_ids"].shape)
        for row, label in enumerate(arrays["match_labels"].tolist()):
            pairs = zip(arrays["clip_ids"][row], arrays["clip_lengths"][row])
            content = np.concatenate([block[1 : length - 1] for block, length in pairs if length])
            words = language.decode(ids[row, 1:-1].tolist(), skip_special_tokens=False)
            full = len(content) == split.columns["clip"].most
            yield label, words, clip.decode(content.tolist()), full


def letters(text: str) -> str:
    """Returns the text without what one of the tokenizers drops: case, accents, spaces, HTML escapes."""
    text = html.unescape(html.unescape(re.sub(r"\s+|(?<= )##|^##", "", text)))
    text = unicodedata.normalize("NFD", ftfy.fix_text(text).lower())
    return "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf", "Zs") and c != "\ufffd")


def same_words(language: str, clip: str, cut: bool) -> bool:
    """Tells whether the CLIP side is the language side, or its beginning if it was cut."""
    if cut and "[UNK]" not in language:
        return letters(language).startswith(letters(clip))
    if cut:
        language = language.partition("[UNK]")[0]
        return letters(clip).startswith(letters(language)) or letters(language).startswith(letters(clip))
    known = [re.escape(letters(part)) for part in language.split("[UNK]")]
    return re.fullmatch(".+?".join(known), letters(clip), re.DOTALL) is not None


@pytest.mark.parametrize("shards", ["wiki_shards", "cut_shards"])
def test_matched_pairs_hold_the_same_words_and_others_do_not(shards, cassette_model, request):
    """Spec xdbert §10 fact 8, second half: equal up to truncation. The others show that it can fail."""
    pairs = list(decoded_pairs(request.getfixturevalue(shards), cassette_model))
    matched = [pair[1:] for pair in pairs if pair[0] == 1]
    mismatched = [pair[1:] for pair in pairs if pair[0] == 0]
    assert min(len(matched), len(mismatched)) > 150
    assert any(full for _, _, full in matched) == (shards == "cut_shards")
    assert [pair for pair in matched if not same_words(*pair)] == []
    assert [pair for pair in mismatched if same_words(*pair)] == []
