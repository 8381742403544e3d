import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.kernels.masked_token_loss import masked_token_loss


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    return hidden, weight, bias, torch.tensor([0, 3, 10, 3, 7, 1])


def test_value_and_count_follow_the_definition(inputs):
    hidden, weight, bias, labels = inputs
    loss, correct = masked_token_loss(hidden, weight, bias, labels)
    total, right = 0.0, 0
    for row, label in zip(hidden.tolist(), labels.tolist(), strict=True):
        logits = [
            sum(a * b for a, b in zip(row, column, strict=True)) + c
            for column, c in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
        right += logits[label] == max(logits)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert correct.item() == right
    assert correct.dtype == torch.int64


def test_gradients_are_those_of_softmax_minus_one_hot(inputs):
    hidden, weight, bias, labels = inputs
    masked_token_loss(hidden, weight, bias, labels)[0].backward()
    with torch.no_grad():
        delta = (hidden @ weight.T + bias).exp()
        delta = delta / delta.sum(-1, keepdim=True)
        delta[torch.arange(6), labels] -= 1
        torch.testing.assert_close(hidden.grad, delta @ weight)
        torch.testing.assert_close(weight.grad, delta.T @ hidden)
        torch.testing.assert_close(bias.grad, delta.sum(0))


def test_no_labels_give_zero_loss_and_zero_gradients(inputs):
    hidden, weight, bias, _ = inputs
    loss, correct = masked_token_loss(hidden[:0], weight, bias, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
    assert correct.item() == 0
    loss.backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_correct_counts_predictions():
    hidden = torch.eye(3)
    loss, correct = masked_token_loss(hidden, 50 * torch.eye(3), torch.zeros(3), torch.tensor([0, 1, 0]))
    assert correct.item() == 2
    assert loss.item() == pytest.approx(50, abs=1e-3)


def test_bf16_inputs_give_an_fp32_loss_near_the_fp64_one(inputs):
    hidden, weight, bias, labels = (x.detach() for x in inputs)
    exact = masked_token_loss(hidden, weight, bias, labels)[0]
    loss, _ = masked_token_loss(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-500, 500), rows=st.integers(1, 6))
def test_a_shift_of_all_logits_changes_nothing(shift, rows):
    torch.manual_seed(rows)
    hidden, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((rows, 4), (9, 4), (9,)))
    labels = torch.arange(rows)
    loss, correct = masked_token_loss(hidden, weight, bias, labels)
    shifted_loss, shifted_correct = masked_token_loss(hidden, weight, bias + shift, labels)
    assert shifted_loss.item() == pytest.approx(loss.item(), abs=1e-9)
    assert shifted_correct == correct
