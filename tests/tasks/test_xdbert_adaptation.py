import pytest
import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM

from xdscale.errors import XdscaleError
from xdscale.models.cross_modal import CrossModalLayer
from xdscale.models.xdbert import XDBERT
from xdscale.pretrained.clip import load_clip_text_tower
from xdscale.recipes.xdbert.schema import Clip, XDBERTObjectives
from xdscale.shards.manifest import Manifest
from xdscale.systems.xdbert import XDBERTAdaptation, build_adaptation, check_shards


@pytest.fixture(scope="module")
def small(adaptation_spec):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return build_adaptation(adaptation_spec())


def test_losses_are_those_of_the_full_vocabulary(small, batch):
    """Spec xdbert §3: each objective as cross-entropy over all positions with ignored labels."""
    small.eval()
    with torch.no_grad():
        terms = small(batch)
        language, clip = small.model(batch["language_ids"], batch["clip_ids"], batch["clip_lengths"])
        embeddings = small.model.language.embeddings.word_embeddings, small.model.clip.tower.token_embedding
        for name, head, states, table, positions, labels in (
            ("mlm", small.mlm, language, embeddings[0], "masked_lm_positions", "masked_lm_labels"),
            ("clip_tokens", small.clip_tokens, clip, embeddings[1], "clip_positions", "clip_labels"),
        ):
            logits = F.linear(head.norm(F.gelu(head.transform(states))), table.weight, head.decoder_bias)
            everything = torch.full(states.shape[:2], -1)
            everything.view(-1)[batch[positions]] = batch[labels]
            expected = F.cross_entropy(logits.flatten(0, 1), everything.flatten(), ignore_index=-1, reduction="sum")
            assert len(batch[labels]) > 20
            assert terms[name][0].item() == pytest.approx(expected.item(), rel=1e-5)
            assert terms[name].metrics["accuracy"] == (logits.argmax(-1) == everything).sum()
        assert batch["match_labels"].tolist().count(-1) == 1
        expected, _ = small.match(language[:3, 0], batch["match_labels"][:3])
        assert terms["match"][0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_first_losses_are_those_of_guessing(small, batch):
    """Fresh heads know no more than ln 2 and ln 49,408, BERT's own head more than ln 30,522."""
    small.eval()
    with torch.no_grad():
        terms = small(batch)
    targets = len(batch["masked_lm_labels"]), 3, len(batch["clip_labels"])
    mlm, match, clip = (terms[n][0].item() / t for n, t in zip(("mlm", "match", "clip_tokens"), targets, strict=True))
    assert mlm < 10.33 - 0.5
    assert match == pytest.approx(0.69, abs=0.5)
    assert clip == pytest.approx(10.81, abs=1.5)


def test_learns_real_text(adaptation_spec, batch):
    """Twenty steps on one batch of the encyclopedia lower every objective."""
    torch.manual_seed(0)
    module = build_adaptation(adaptation_spec())
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(20):
        terms = module(batch)
        losses.append({name: term[0].item() for name, term in terms.items()})
        (terms["mlm"][0] / 50 + terms["match"][0] / 3 + terms["clip_tokens"][0] / 50).backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, first in losses[0].items():
        assert losses[-1][name] < 0.7 * first


def test_every_trainable_parameter_has_a_gradient_with_and_without_targets(small, batch):
    """Ranks whose micro-batch holds no target must run the same reductions."""
    empty = dict(batch, match_labels=torch.full((4,), -1))
    for name in ("masked_lm_positions", "masked_lm_labels", "clip_positions", "clip_labels"):
        empty[name] = batch[name][:0]
    small.train()
    for arrays, some in ((batch, True), (empty, False)):
        small.zero_grad()
        sum(loss for loss, _ in small(arrays).values()).backward()
        for name, parameter in small.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert some or not parameter.grad.any(), name
    small.zero_grad()


def test_decoders_are_the_embeddings(small):
    embedding = small.model.language.embeddings.word_embeddings.weight
    assert small.mlm.decoder_weight is embedding
    assert small.clip_tokens.decoder_weight is small.model.clip.tower.token_embedding.weight
    small.bfloat16()
    assert small.mlm.decoder_weight is small.model.language.embeddings.word_embeddings.weight
    small.float()


@pytest.mark.parametrize("off", [("match", "clip_tokens"), ("mlm",), ("clip_tokens",)])
def test_only_heads_of_objectives_that_are_on(adaptation_spec, batch, off):
    """Paper table 3's ablations."""
    module = build_adaptation(adaptation_spec(objectives=dict.fromkeys(off)))
    on = {"mlm", "match", "clip_tokens"} - set(off)
    targets = {
        "mlm": {"masked_lm_positions", "masked_lm_labels"},
        "match": {"match_labels"},
        "clip_tokens": {"clip_positions", "clip_labels"},
    }
    unused = set().union(*(names for name, names in targets.items() if name in off))
    assert unused <= set(batch)
    arrays = {name: array for name, array in batch.items() if name not in unused}
    assert set(module(arrays)) == on
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == on | {"model"}


def test_electra_maps_to_its_embedding_size():
    """Spec xdbert §2.4: ELECTRA's transform maps to embedding_size; here 48 of 64."""
    from transformers import ElectraConfig, ElectraModel

    clip = load_clip_text_tower(Clip(name="clip-tiny.json", weights="random"))
    config = ElectraConfig(
        vocab_size=99,
        embedding_size=48,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = XDBERT(ElectraModel(config), clip, [CrossModalLayer(64, 128, 2, 2, 32, 0.1)])
    module = XDBERTAdaptation(model, XDBERTObjectives())
    assert module.mlm.transform.weight.shape == (48, 64)
    assert module.mlm.decoder_weight.shape == (99, 48)
    assert module.clip_tokens.transform.weight.shape == (128, 128)


def test_bf16_losses_are_fp32_and_near(small, batch):
    small.eval()
    with torch.no_grad():
        expected = small(batch)
        state = {name: value.clone() for name, value in small.state_dict().items()}
        found = small.bfloat16()(batch)
    small.float().load_state_dict(state)
    for name, (loss, _) in found.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name][0].item(), rel=0.02)


def test_attention_is_recorded_although_the_last_layer_is_cut(small, batch):
    """Of the first sample, at all of its positions."""
    small.eval()
    with torch.no_grad():
        with small.model.recorded_attention() as maps:
            terms = small(batch)
        without = small(batch)
        with small.model.recorded_attention() as expected:
            small.model(*(batch[name] for name in ("language_ids", "clip_ids", "clip_lengths")))
    assert all(terms[name][0] == without[name][0] for name in without)
    tokens = batch["clip_lengths"][0].sum().item()
    assert tokens < batch["clip_ids"][0].numel()
    assert [tuple(weights.shape) for weights in maps] == [(128, tokens)] * 2
    for weights, whole in zip(maps, expected, strict=True):
        torch.testing.assert_close(weights.sum(-1), torch.ones(128))
        assert weights.min() > 0
        torch.testing.assert_close(weights, whole)


def altered(manifest, **build):
    table = manifest.tables["text"]
    changed = table.model_copy(update={"build": table.build | build})
    return manifest.model_copy(update={"tables": {"text": changed}})


def test_shards_that_fit(wiki_shards, adaptation_spec):
    manifest = Manifest.load(wiki_shards)
    check_shards(adaptation_spec().model, manifest)
    check_shards(adaptation_spec("bert-base-uncased", "ViT-B-32", weights="random").model, manifest)
    check_shards(adaptation_spec().model, altered(manifest, sequence_length=510))


def test_sequences_longer_than_the_positions(wiki_shards, adaptation_spec):
    manifest = altered(Manifest.load(wiki_shards), sequence_length=511)
    with pytest.raises(XdscaleError, match=r"511 tokens, 513 with .* has 512 positions; .*--sequence-length 510"):
        check_shards(adaptation_spec().model, manifest)


def test_another_language_tokenizer(wiki_shards, adaptation_spec):
    manifest = Manifest.load(wiki_shards)
    tokenizer = manifest.tables["text"].build["language_tokenizer"]
    other = altered(manifest, language_tokenizer=tokenizer | {"sha256": "0" * 64})
    with pytest.raises(XdscaleError, match=rf"000000000000.*another one \({tokenizer['sha256'][:12]}\)"):
        check_shards(adaptation_spec().model, other)
    larger = altered(manifest, language_tokenizer=tokenizer | {"vocab_size": 30523})
    with pytest.raises(XdscaleError, match=r"30523 ids, but bert-base-uncased has embeddings for 30522"):
        check_shards(adaptation_spec("bert-base-uncased", weights="random").model, larger)


def test_another_clip_tokenizer(wiki_shards, adaptation_spec):
    manifest = Manifest.load(wiki_shards)
    tokenizer = manifest.tables["text"].build["clip_tokenizer"] | {"vocab_size": 32000}
    with pytest.raises(XdscaleError, match=r"of 32000 ids, but clip-tiny\.json has 49408"):
        check_shards(adaptation_spec().model, altered(manifest, clip_tokenizer=tokenizer))


def test_a_pretrained_bert_brings_its_masked_lm_head(adaptation_spec, cassette_model):
    """Logits of head and encoder equal those of transformers' own masked-LM model."""
    module = build_adaptation(adaptation_spec()).eval()
    reference = BertForMaskedLM.from_pretrained(cassette_model).eval()
    ids = torch.randint(1000, 30000, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.flatten()
    with torch.no_grad():
        states = module.model.language(ids).last_hidden_state
        losses, correct = module.mlm(states.flatten(0, 1), labels)
        logits = reference(ids).logits.flatten(0, 1)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(correct, logits.argmax(-1) == labels)
    assert module.mlm.decoder_weight is module.model.language.embeddings.word_embeddings.weight
