"""Rates, norms, activations and first values that a configuration states arrive in every module that has such."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, VisualBertConfig
from transformers.activations import SiLUActivation

from xdscale.errors import XdscaleError
from xdscale.models.encoders import use_kernels
from xdscale.models.heads import MaskedTokenHead, masked_lm_head
from xdscale.models.operations import ActivatedLinear
from xdscale.models.visualbert import VisualBERT
from xdscale.models.vlbert import VLBERT, VLBertConfig
from xdscale.pretrained import visualbert, vlbert
from xdscale.pretrained.language import check_sizes
from xdscale.recipes.vlbert.schema import GroundedObjectives
from xdscale.systems.vlbert import VLBERTPretraining
from xdscale.tasks.contract import find_task
from xdscale.tasks.vlbert import VLBERTClassifier

RATE, EPS, STD = 0.3, 0.125, 0.5
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"vocab_size": 99, "max_position_embeddings": 40, "pad_token_id": 0}
STATED = {"hidden_dropout_prob": RATE, "attention_probs_dropout_prob": RATE, "layer_norm_eps": EPS}
STATED |= {"hidden_act": "silu", "initializer_range": STD}


def encoder_of(kind, config, **more):
    encoder = kind(config(**SIZES, **STATED, **more))
    use_kernels(encoder)
    return encoder


MODELS = {
    "bert": lambda: encoder_of(BertModel, BertConfig),
    "electra": lambda: encoder_of(ElectraModel, ElectraConfig, embedding_size=16),
    "visualbert": lambda: VisualBERT(VisualBertConfig(**SIZES, **STATED, visual_embedding_dim=9)),
    "late": lambda: VisualBERT(VisualBertConfig(**SIZES, **STATED, visual_embedding_dim=9, bypass_transformer=True)),
    "vlbert": lambda: VLBERT(VLBertConfig(**SIZES, **STATED, appearance_size=9, with_pooler=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_configuration_states_holds_in_every_module(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name != "electra":  # whose own head activates with GELU
        model = nn.ModuleList([model, masked_lm_head(model)])
    modules = list(model.modules())
    assert {module.eps for module in modules if isinstance(module, nn.LayerNorm)} == {EPS}
    rates = [module.p for module in modules if isinstance(module, nn.Dropout)]
    rates += [module.dropout for module in modules if isinstance(getattr(module, "dropout", None), float)]
    assert set(rates) == {RATE}
    activations = [module.activation for module in modules if isinstance(module, ActivatedLinear | MaskedTokenHead)]
    states = torch.linspace(-3, 3, 7)
    assert len(activations) >= 2
    assert all(torch.equal(activation(states), nn.functional.silu(states)) for activation in activations)
    encoder = model if name == "electra" else model[0]
    first = {which: value for which, value in encoder.named_parameters() if value.numel() > 1000 and value.dim() > 1}
    assert all(value.std().item() == pytest.approx(STD, rel=0.1) for value in first.values())


def test_a_head_with_words_of_its_own_begins_as_the_encoder_does():
    torch.manual_seed(0)
    model = VLBERT(VLBertConfig(**SIZES, **STATED, appearance_size=9, tie_word_embeddings=False))
    words = masked_lm_head(model).decoder_weight
    assert words is not model.get_input_embeddings().weight
    assert words.std().item() == pytest.approx(STD, rel=0.1)


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("vocab_size", 1, 2**24),
        ("hidden_size", 1, 2**16),
        ("num_hidden_layers", 1, 2**10),
        ("intermediate_size", 1, 2**18),
        ("max_position_embeddings", 1, 2**20),
        ("type_vocab_size", 1, 2**10),
        ("embedding_size", 1, 2**16),
        ("appearance_size", 1, 2**20),
        ("visual_embedding_dim", 1, 2**20),
        ("num_attention_heads", 1, 32),
        ("pad_token_id", -99, 98),
        ("hidden_dropout_prob", 0.0, 1.0),
        ("attention_probs_dropout_prob", 0.0, 1.0),
        ("layer_norm_eps", 0.0, 1.0),
        ("initializer_range", 0.0, 1.0),
    ],
)
def test_sizes_and_shares_at_their_limits_are_an_encoders(key, least, most):
    def config(value):
        found = BertConfig(**SIZES | {"pad_token_id": None})
        if key == "hidden_size":
            found.num_attention_heads = 1
        setattr(found, key, value)
        return found

    step = 1e-9 if isinstance(most, float) else 1
    for value in (least, most):
        check_sizes(config(value), "here")
    for value in (least - step, most + step):
        with pytest.raises(XdscaleError, match="^here: "):
            check_sizes(config(value), "here")


@pytest.mark.parametrize("published", [visualbert, vlbert], ids=lambda module: module.__name__.rpartition(".")[2])
def test_all_that_a_bert_states_is_stated_of_what_is_made_of_it(published):
    more = {"region_size": 9} if published is visualbert else {"appearance_size": 9}
    bert = BertConfig(**SIZES, **STATED | {"attention_probs_dropout_prob": 0.2}, tie_word_embeddings=False)
    made = published.config_from_bert(bert, **more)
    stated = SIZES | STATED | {"attention_probs_dropout_prob": 0.2, "tie_word_embeddings": False}
    assert {key: getattr(made, key) for key in stated} == stated
    model = published.from_bert(BertModel(bert), **more)
    assert {key: getattr(model.config, key) for key in stated} == stated


@pytest.mark.parametrize("kind", ["masked_region", "objects"])
def test_a_head_of_classes_activates_and_begins_as_the_encoder_does(kind):
    torch.manual_seed(0)
    encoder = VLBERT(VLBertConfig(**SIZES, **STATED, appearance_size=9, with_pooler=True))
    if kind == "masked_region":
        head = VLBERTPretraining(encoder, GroundedObjectives(), 70).masked_region
    else:
        head = VLBERTClassifier(encoder, find_task("vcr_qa"), dropout=0.1, loss="sigmoid", object_count=70).objects
    assert isinstance(head.activation, SiLUActivation)
    for linear in (head.transform, head.classifier):
        assert linear.weight.std().item() == pytest.approx(STD, rel=0.1)
        assert not linear.bias.any()
    assert head.classifier.out_features == 70


@pytest.mark.parametrize(("task", "rate"), [("vqa", 0.4), ("vcr_qa", 0.4), ("refcoco", 0.0)])
def test_a_tasks_head_drops_what_finetuning_says(task, rate):
    encoder = VLBERT(VLBertConfig(**SIZES, **STATED, appearance_size=9, with_pooler=True))
    task = find_task(task)
    task = replace(task, labels=("yes", "no")) if task.reads == "answer" else task
    head = VLBERTClassifier(encoder, task, dropout=0.4, loss="sigmoid", object_count=0)
    assert head.dropout.p == rate
    assert head.objects is None
    assert head.norm is None or head.norm.eps == EPS
    assert (head.norm is None) == (task.reads != "answer")
