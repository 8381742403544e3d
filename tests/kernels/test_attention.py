import math

import pytest
import torch

from xdscale.kernels.attention import attention, attention_probabilities


def plain_attention(query, key, value, key_mask):
    """Paper eq. 1, one sample, head and query at a time, in fp64."""
    query, key, value = query.double(), key.double(), value.double()
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b in range(query.shape[0]):
        valid = key_mask[b].nonzero()[:, 0].tolist()
        for h in range(query.shape[1]):
            for q in range(query.shape[2]):
                scores = [float(query[b, h, q] @ key[b, h, k]) / math.sqrt(query.shape[-1]) for k in valid]
                total = sum(math.exp(score) for score in scores)
                for k, score in zip(valid, scores, strict=True):
                    out[b, h, q] += math.exp(score) / total * value[b, h, k]
    return out


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    key_mask = torch.tensor([[True] * 7, [True, False, True, True, False, False, False]])
    return query, key, value, key_mask


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_the_formula(inputs, dtype, tolerance):
    query, key, value, key_mask = (x.to(dtype) if x.is_floating_point() else x for x in inputs)
    out = attention(query, key, value, key_mask)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), plain_attention(query, key, value, key_mask), rtol=tolerance, atol=tolerance
    )


def test_no_mask_means_all_keys(inputs):
    query, key, value, key_mask = inputs
    everything = torch.ones_like(key_mask)
    torch.testing.assert_close(
        attention(query, key, value).double(), plain_attention(query, key, value, everything), rtol=1e-5, atol=1e-5
    )


def test_masked_keys_get_neither_weight_nor_gradient(inputs):
    query, key, value, key_mask = inputs
    value.requires_grad_()
    key.requires_grad_()
    attention(query, key, value, key_mask).square().sum().backward()
    assert not value.grad[1, :, ~key_mask[1]].any()
    assert not key.grad[1, :, ~key_mask[1]].any()
    assert value.grad[1, :, key_mask[1]].abs().min() > 0


def test_sample_without_valid_keys_gets_zeros(inputs):
    query, key, value, key_mask = inputs
    key_mask[1] = False
    out = attention(query, key, value, key_mask)
    assert out.isfinite().all()
    assert not out[1].any()
    assert not attention_probabilities(query, key, key_mask)[1].any()


def test_probabilities_are_the_weights_of_attention(inputs):
    query, key, value, key_mask = inputs
    weights = attention_probabilities(query, key, key_mask)
    torch.testing.assert_close(weights @ value, attention(query, key, value, key_mask))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))


def test_probabilities_of_bf16_are_fp32(inputs):
    query, key, _, key_mask = inputs
    assert attention_probabilities(query.bfloat16(), key.bfloat16(), key_mask).dtype == torch.float32


def test_dropout_drops_weights_and_keeps_the_mean():
    """With all weights 1/k and values 1, an output is (kept keys) / (k (1 - p)): mean 1, variance p / (k (1 - p))."""
    torch.manual_seed(0)
    keys, rate = 50, 0.1
    shape = (4, 2, 200, 8)
    out = attention(torch.zeros(shape), torch.zeros(4, 2, keys, 8), torch.ones(4, 2, keys, 8), dropout=rate)[..., 0]
    kept = out * keys * (1 - rate)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert abs(out.mean() - 1) < 0.01
    assert abs(out.var() - rate / (keys * (1 - rate))) < 4e-4
