"""Packing against its definition, written with the public encodings and open_clip's tokenizer."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from xdscale.shards.clip_bpe import ClipBPE
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.sources import pack
from xdscale.shards.sources.corpus import read_documents
from xdscale.shards.sources.pack import Packer, is_validation

PARAGRAPHS = st.lists(
    st.lists(
        st.sampled_from("the Unbelievably café “quoted” don't 3.14 naïve AT&T 中文 ﬁne x² --- o'clock 😀".split()),
        min_size=1,
        max_size=25,
    ).map(" ".join),
    max_size=12,
)


@pytest.fixture(scope="module")
def tools(cassette_model):
    return load_language_tokenizer(str(cassette_model))[0], ClipBPE()


@pytest.fixture(scope="module")
def plain_tokenizer(cassette_model):
    return Tokenizer.from_file(str(cassette_model / "tokenizer.json"))


def defined_sequences(tokenizer, paragraphs, length):
    """Spec xdbert §4 word for word: all tokens in a row, cut every `length`, each token with its characters."""
    tokens = []
    for number, paragraph in enumerate(paragraphs):
        encoding = tokenizer.encode(paragraph, add_special_tokens=False)
        tokens += [(number, token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)]
    sequences = []
    for first in range(0, len(tokens) - length + 1, length):
        chunk = tokens[first : first + length]
        pieces = []
        for number in sorted({item[0] for item in chunk}):
            spans = [item[2:] for item in chunk if item[0] == number]
            pieces.append(paragraphs[number][spans[0][0] : spans[-1][1]])
        sequences.append(([item[1] for item in chunk], " ".join(pieces)))
    return sequences, len(tokens) % length


def packed(tools, paragraphs, length, blocks):
    packer = Packer(*tools, sequence_length=length, clip_blocks=blocks)
    packer.add(paragraphs)
    return packer.finish()


@settings(max_examples=150, deadline=None)
@given(paragraphs=PARAGRAPHS, length=st.integers(2, 40))
def test_sequences_equal_the_definition(tools, plain_tokenizer, open_clip_tokenizer, paragraphs, length):
    result = packed(tools, paragraphs, length, blocks=9)
    expected, left_over = defined_sequences(plain_tokenizer, paragraphs, length)
    assert result.language.tolist() == [ids for ids, _ in expected]
    assert result.dropped_tokens == left_over
    bounds = result.clip_offsets
    for number, (_, text) in enumerate(expected):
        found = result.clip[bounds[number] : bounds[number + 1]].tolist()
        assert found == open_clip_tokenizer.encode(text)
    assert bounds[-1] == len(result.clip)


@settings(max_examples=50, deadline=None)
@given(paragraphs=PARAGRAPHS, calls=st.integers(1, 4), characters=st.integers(1, 200))
def test_neither_calls_nor_batches_matter(tools, paragraphs, calls, characters):
    whole = packed(tools, paragraphs, 7, blocks=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "ENCODE_CHARACTERS", characters)
        packer = Packer(*tools, sequence_length=7, clip_blocks=9)
        for part in np.array_split(np.array(paragraphs, dtype=object), calls):
            packer.add(part.tolist())
        parts = packer.finish()
    assert np.array_equal(whole.language, parts.language)
    assert np.array_equal(whole.clip, parts.clip)
    assert np.array_equal(whole.clip_offsets, parts.clip_offsets)
    assert (whole.blocks_needed, whole.dropped_tokens) == (parts.blocks_needed, parts.dropped_tokens)


def test_clip_side_is_cut_and_the_need_is_counted(tools, open_clip_tokenizer):
    # One language token per number word; CLIP spells digits one by one: 200 tokens of BERT are 800 of CLIP.
    text = " ".join(["1984"] * 400)
    result = packed(tools, [text], 200, blocks=9)
    assert result.blocks_needed == [0] * 10 + [2]  # 800 tokens fill 11 blocks of 75
    assert np.diff(result.clip_offsets).tolist() == [675, 675]
    assert result.clip.tolist() == 2 * open_clip_tokenizer.encode(" ".join(["1984"] * 200))[:675]


def test_a_sequence_without_clip_text_is_left_out(tools):
    # BERT reads "&", "nbsp", ";" and so on; CLIP's cleaning makes nothing of it.
    tokens = len(tools[0].encode("&nbsp;", add_special_tokens=False).ids)
    result = packed(tools, ["&nbsp;", "one more river"], tokens, blocks=9)
    assert len(result.language) == 3 // tokens
    assert result.dropped_tokens == tokens + 3 % tokens
    assert (np.diff(result.clip_offsets) > 0).all()


def test_same_text_on_both_sides(tools, wiki_dump, plain_tokenizer, open_clip_tokenizer):
    """Spec xdbert §10 fact 8: decoded language chunk = decoded CLIP text, up to truncation."""
    documents = read_documents(wiki_dump)
    result = packed(tools, next(documents) + next(documents), 126, blocks=9)
    compared = 0
    for number, ids in enumerate(result.language.tolist()):
        tokens = [plain_tokenizer.id_to_token(token).removeprefix("##") for token in ids]
        language = "".join(tokens)
        # BERT strips accents and has [UNK]; CLIP's cleaning rewrites typographic marks: compare plain letters.
        if not language.isascii() or "[UNK]" in tokens or "&" in language:
            continue
        bounds = result.clip_offsets[number : number + 2]
        clip = open_clip_tokenizer.decode(result.clip[slice(*bounds)].tolist()).replace(" ", "")
        letters = [c for c in unicodedata.normalize("NFD", clip) if not unicodedata.combining(c)]
        assert "".join(letters) == language
        compared += 1
    assert compared > 0.5 * len(result.language) > 50


def test_validation_share_and_stability():
    documents = [[f"document {number} of many", "with two paragraphs"] for number in range(20_000)]
    held_out = [is_validation(document, 0.05) for document in documents]
    # Binomial, 20,000 draws at 5 %: standard deviation 31.
    assert abs(sum(held_out) - 1000) < 5 * 31
    assert [is_validation(document, 0.05) for document in reversed(documents)] == held_out[::-1]
    # A larger share keeps what a smaller one held out.
    assert all(is_validation(d, 0.2) for d, held in zip(documents, held_out, strict=True) if held)
    assert not any(is_validation(document, 0) for document in documents)
    assert all(is_validation(document, 1) for document in documents[:100])
