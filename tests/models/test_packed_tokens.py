import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.models.packed_tokens import chosen_tokens, packed_by_lengths, packed_evenly, unpack
from xdscale.padding import language_layout

MASKS = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5)
)


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_packed_tokens_are_the_samples_valid_tokens_one_after_the_other(mask):
    valid = torch.tensor(mask)
    packed = packed_by_lengths(valid.sum(1), valid.shape[1])
    positions = language_layout(valid.numpy())["language_valid"]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.samples == len(mask)
    assert packed.max_seqlen >= max(map(sum, mask))
    assert len(positions) == packed.cu_seqlens[-1] == sum(map(sum, mask))
    for sample, row in enumerate(mask):
        own = positions[packed.cu_seqlens[sample] : packed.cu_seqlens[sample + 1]].tolist()
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
    packed = packed_by_lengths(torch.tensor(mask).sum(1), len(mask[0]))
    owners = [sample for sample, row in enumerate(mask) for _ in range(sum(row))]
    rows = [row for row in range(len(owners)) if random.random() < 0.5]
    found = chosen_tokens(torch.tensor(rows, dtype=torch.int64), packed)
    assert found.cu_seqlens.dtype == torch.int32
    assert found.cu_seqlens[0] == 0
    kept = [sum(owners[row] == sample for row in rows) for sample in range(len(mask))]
    assert found.cu_seqlens.diff().tolist() == kept
    assert max(kept) <= found.max_seqlen <= len(rows)


def test_a_full_stream_is_the_stream_of_a_full_mask():
    found, expected = packed_evenly(3, 4, torch.device("cpu")), packed_by_lengths(torch.full((3,), 4), 4)
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert found.cu_seqlens.dtype == torch.int32
    assert found.max_seqlen == 4
