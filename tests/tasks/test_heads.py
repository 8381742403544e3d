import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xdscale.models.heads import MaskedTokenHead, MatchHead
from xdscale.models.operations import use_definitions

VOCABULARY = 13


@pytest.fixture
def embedding():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(VOCABULARY, 6, dtype=torch.float64))


@pytest.fixture(params=["fused", "plain"])
def head(request, embedding):
    """A head whose states (8) are wider than the embedding (6), as in ELECTRA-small or a CLIP with a projection."""
    head = MaskedTokenHead(8, embedding).double()
    nn.init.normal_(head.decoder_bias)
    return use_definitions(head) if request.param == "plain" else head


@pytest.fixture
def states():
    """At every position of three sequences of five tokens."""
    torch.manual_seed(1)
    return torch.randn(15, 8, dtype=torch.float64, requires_grad=True)


def full_logits(head, states):
    """Logits over the whole vocabulary at every position: Linear-GELU-LN-decoder (spec §2.4)."""
    hidden = F.layer_norm(F.gelu(head.transform(states)), (6,), head.norm.weight, head.norm.bias, 1e-12)
    return hidden @ head.decoder_weight.T + head.decoder_bias


def test_equals_cross_entropy_over_all_positions(head, states):
    """The labelled rows' loss against full logits with ignored labels: value and every gradient, fp64."""
    positions, labels = torch.tensor([1, 3, 7, 12]), torch.tensor([0, 12, 5, 5])
    losses, correct = head(states[positions], labels)
    everything = torch.full((15,), -1)
    everything[positions] = labels
    logits = full_logits(head, states)
    expected = F.cross_entropy(logits, everything, ignore_index=-1, reduction="sum")
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(correct, (logits.argmax(-1) == everything)[positions])
    inputs = [states, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), inputs), torch.autograd.grad(expected, inputs))


def test_counts_right_predictions(head, states):
    predictions = full_logits(head, states).argmax(-1)
    labels = predictions.clone()
    labels[[2, 9, 14]] = (labels[[2, 9, 14]] + 1) % VOCABULARY
    assert head(states, labels)[1].sum().item() == 12


def test_no_targets_give_zero_gradients_everywhere(head, states):
    losses, correct = head(states[:0], torch.zeros(0, dtype=torch.int64))
    assert losses.shape == correct.shape == (0,)
    losses.sum().backward()
    for tensor in (states, *head.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_the_decoder_is_the_embedding(head, embedding):
    """ZeRO-3 must find the tied parameter on the module that uses it; an optimiser must find it once."""
    module = nn.Module()
    module.embedding = nn.Embedding(VOCABULARY, 6)
    module.embedding.weight = embedding
    module.head = head
    assert dict(head.named_parameters())["decoder_weight"] is embedding
    assert [name for name, _ in module.named_parameters()].count("head.decoder_weight") == 0
    assert sum(p is embedding for p in module.parameters()) == 1


def test_tied_gradients_are_the_sum_of_both_uses(head, embedding):
    ids = torch.tensor([3, 7, 1])
    projection = torch.randn(6, 8, dtype=torch.float64)

    def loss(table, tied):
        used = copy.copy(head)
        used._parameters = dict(head._parameters) | {"decoder_weight": tied}
        return used(F.embedding(ids, table) @ projection, torch.tensor([3, 9, 3]))[0].sum()

    as_input, as_decoder = (nn.Parameter(embedding.detach().clone()) for _ in range(2))
    loss(as_input, as_decoder).backward()
    loss(embedding, embedding).backward()
    assert as_input.grad.abs().sum() > 0
    torch.testing.assert_close(embedding.grad, as_input.grad + as_decoder.grad)


def test_bf16(head, states):
    losses, _ = head(states[[1, 3]], torch.tensor([0, 12]))
    half, _ = head.bfloat16()(states[[1, 3]].bfloat16(), torch.tensor([0, 12]))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), losses, rtol=0.05, atol=0)


@pytest.fixture
def first_states():
    """At the first position of three sequences."""
    torch.manual_seed(3)
    return torch.randn(3, 8, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def match():
    torch.manual_seed(2)
    return MatchHead(8).double()


def test_match_is_pooler_and_classifier(match, first_states):
    """Spec xdbert §2.4: Linear, tanh, Linear on [CLS]; -1 is no target."""
    labels = torch.tensor([1, -1, 0])
    loss, correct = match(first_states, labels)
    pooled = torch.tanh(first_states @ match.pooler.weight.T + match.pooler.bias)
    logits = pooled @ match.classifier.weight.T + match.classifier.bias
    log_probabilities = logits - logits.exp().sum(-1, keepdim=True).log()
    expected = -(log_probabilities[0, 1] + log_probabilities[2, 0])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert correct.item() == int(logits[0].argmax() == 1) + int(logits[2].argmax() == 0)
    inputs = [first_states, *match.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_match_without_targets(match, first_states):
    loss, correct = match(first_states, torch.full((3,), -1))
    assert (loss.item(), correct.item()) == (0, 0)
    loss.backward()
    for tensor in (first_states, *match.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_match_bf16(match, first_states):
    loss, _ = match.bfloat16()(first_states.bfloat16(), torch.tensor([1, -1, 0]))
    assert loss.dtype == torch.float32
