import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.models.streams import full_stream, rows_of_samples, stream_of, unpack
from xdscale.padding import language_layout

MASKS = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5)
)


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_a_stream_is_the_samples_valid_tokens_one_after_the_other(mask):
    valid = torch.tensor(mask)
    stream = stream_of(valid.sum(1), valid.shape[1])
    positions = language_layout(valid.numpy())["language_valid"]
    assert stream.offsets.dtype == torch.int32
    assert stream.samples == len(mask)
    assert stream.longest >= max(map(sum, mask))
    assert len(positions) == stream.offsets[-1] == sum(map(sum, mask))
    for sample, row in enumerate(mask):
        own = positions[stream.offsets[sample] : stream.offsets[sample + 1]].tolist()
        assert own == [sample * len(row) + place for place, valid in enumerate(row) if valid]


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_unpacking_puts_tokens_back(mask):
    valid = torch.tensor(mask)
    states = torch.randn(*valid.shape, 3)
    positions = torch.from_numpy(language_layout(valid.numpy())["language_valid"])
    found = unpack(states[valid], positions, valid.shape)
    assert torch.equal(found, states * valid[..., None])


@settings(max_examples=60, deadline=None)
@given(MASKS, st.randoms(use_true_random=False))
def test_rows_of_samples_keep_their_sample(mask, random):
    """Samples may keep all, some or none of their rows."""
    stream = stream_of(torch.tensor(mask).sum(1), len(mask[0]))
    owners = [sample for sample, row in enumerate(mask) for _ in range(sum(row))]
    rows = [row for row in range(len(owners)) if random.random() < 0.5]
    found = rows_of_samples(torch.tensor(rows, dtype=torch.int64), stream)
    assert found.offsets.dtype == torch.int32
    assert found.offsets[0] == 0
    kept = [sum(owners[row] == sample for row in rows) for sample in range(len(mask))]
    assert found.offsets.diff().tolist() == kept
    assert max(kept) <= found.longest <= len(rows)


def test_a_full_stream_is_the_stream_of_a_full_mask():
    found, expected = full_stream(3, 4, torch.device("cpu")), stream_of(torch.full((3,), 4), 4)
    assert torch.equal(found.offsets, expected.offsets)
    assert found.offsets.dtype == torch.int32
    assert found.longest == 4
