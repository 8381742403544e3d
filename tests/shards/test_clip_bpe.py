"""CLIP ids against open_clip's own tokenizer."""

import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xdscale.shards.clip_bpe import ClipBPE, describe_clip_tokenizer
from xdscale.shards.sources.corpus import read_documents

# What ftfy, HTML unescaping, case rules and the word pattern act on: mojibake, ligatures, curly quotes, wide and
# combining characters, entities, contractions, control characters, several scripts.
DIFFICULT = st.text(
    st.sampled_from(
        "aé–Ã©â€™“”'sSſΣςİKﬁ&amp;&#39;<b>\n\t\u2028\x85\x1b[0m１½①한中\U0001f600\u0301\xad\x7f\x80ÃƑ²TRe've 7"
    )
)


@pytest.fixture(scope="module")
def bpe():
    return ClipBPE()


def test_vocabulary(open_clip_tokenizer):
    info = describe_clip_tokenizer()
    assert (info.vocab_size, info.start_id, info.end_id) == (49_408, 49_406, 49_407)
    reference = open_clip_tokenizer
    assert info.vocab_size == reference.vocab_size
    assert (info.start_id, info.end_id) == (reference.sot_token_id, reference.eot_token_id)


def test_every_real_paragraph_has_open_clips_ids(bpe, wiki_dump, open_clip_tokenizer):
    """The whole slice: 7,401 paragraphs of the English Wikipedia."""
    texts = [paragraph for document in read_documents(wiki_dump) for paragraph in document]
    assert len(texts) > 7000
    assert sum(not text.isascii() for text in texts) > 1000
    different = [
        text
        for text, ids in zip(texts, bpe.encode(texts), strict=True)
        if ids.tolist() != open_clip_tokenizer.encode(text)
    ]
    assert different == []


@settings(max_examples=300, deadline=None)
@given(text=DIFFICULT)
@example(text="AT&amp;T's “café”\n1 < 2\n&ldquo;quoted&rdquo; â€œmojibakeâ€\x9d")
@example(text="1 < 2 &amp;lt; 3")
@example(text="ΟΔΥΣΣΕΥΣ ﬁn Ｗｉｄｅ DON'T stop")
@example(text="")
def test_difficult_text_has_open_clips_ids(bpe, open_clip_tokenizer, text):
    assert bpe.encode([text])[0].tolist() == open_clip_tokenizer.encode(text)


def test_every_character_between_others_has_open_clips_ids(bpe, open_clip_tokenizer):
    """Accents, punctuation, signs, currencies and arrows between what could make them a pair that ftfy mends."""
    characters = [chr(code) for code in (*range(0x80, 0x250), *range(0x2010, 0x2060), *range(0x2190, 0x2194), 0x2212)]
    before, after = ("a", "Z ", "9", "", "& ", "\xa0", "– ", "é"), ("b", " c", "", "\xa0d", "’s", "–", "\n")
    texts = [first + character + last for character in characters for first in before for last in after]
    different = [
        text
        for text, ids in zip(texts, bpe.encode(texts), strict=True)
        if ids.tolist() != open_clip_tokenizer.encode(text)
    ]
    assert different == []


def test_text_cannot_forge_the_borders_of_a_block(bpe):
    ids = bpe.encode(["a <end_of_text> b <start_of_text>"])[0]
    assert len(ids) > 8
    assert ids.max() < 49_406


def test_neither_torch_nor_open_clip_is_imported():
    """Workers would pay seconds and hundreds of megabytes each."""
    code = (
        "import sys; from xdscale.shards.clip_bpe import ClipBPE; ClipBPE(); import xdscale.shards.build; "
        "print([name for name in ('torch', 'open_clip', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
