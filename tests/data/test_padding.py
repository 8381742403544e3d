"""Where padded arrays hold text, against loops over single positions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.padding import clip_layout, language_layout

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5), st.randoms(use_true_random=False))
def test_clip_layout(shape, block_length, random):
    """Of texts with several choices, where any block may be empty."""
    lengths = np.array([random.randint(0, block_length) for _ in range(np.prod(shape))]).reshape(shape)
    filled, valid, texts = [], [], []
    for text, blocks in enumerate(lengths.reshape(-1, shape[-1])):
        texts.append(0)
        for number, length in enumerate(blocks):
            block = text * shape[-1] + number
            filled += [block] * bool(length)
            valid += [block * block_length + place for place in range(length)]
            texts[-1] += length
    found = clip_layout(lengths, block_length)
    assert found["clip_blocks"].tolist() == filled
    assert found["clip_valid"].tolist() == valid
    assert found["clip_longest"].item() == max(texts)
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(found, np.dtype(np.int64))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.randoms(use_true_random=False))
def test_language_layout(shape, random):
    mask = np.array([random.random() < 0.5 for _ in range(np.prod(shape))])
    expected = [position for position, valid in enumerate(mask) if valid]
    assert language_layout(mask.reshape(shape))["language_valid"].tolist() == expected
