"""What a plan knows of a model, against published counts and throughputs, and against autograd."""

import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.plan.profile import build_on_meta, modules, parameter_table, profile_model
from xdscale.plan.states import count
from xdscale.recipe import load_recipe, shipped_recipes
from xdscale.systems.contract import open_system, recompute_activations
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.engine import to_device
from xdscale.training.tracing import on_meta, trace

LARGE_BERT = ("xdbert-base-wikitext103", ["model.language.name=bert-large-uncased"])
ARCHITECTURES = [(path.stem, []) for path in shipped_recipes()] + [LARGE_BERT]
RANDOM = ["model.language.weights=random", "model.language.sha256=null"]


@pytest.mark.parametrize(("name", "overrides"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES[:-1]] + ["large"])
def test_every_parameter_of_every_shipped_recipe_in_torchs_order(name, overrides):
    spec = load_recipe(name, overrides)
    module = build_on_meta(spec)
    found = modules(module)
    assert [size for each in found for size in each.own] == [p.numel() for p in module.parameters()]
    assert count(found, trained=True) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert count(found) == parameter_table(spec)[-1].parameters
    tied = {each.name: each.tied for each in found if each.tied}
    clip = getattr(module.model, "clip", None)
    language = getattr(module.model, "language", module.model).config
    expected = {"mlm": language.vocab_size * getattr(language, "embedding_size", language.hidden_size)}
    if "clip_tokens" in spec.objectives.weights():
        expected["clip_tokens"] = clip.tower.vocab_size * clip.tower.width
    assert tied == expected


def test_counts_of_the_paper():
    """Table 6 (spec xdbert §2.5) without heads."""
    found = modules(build_on_meta(load_recipe("xdelectra-large-wikitext103")))
    assert sum(each.elements for each in found if each.name.startswith("model.")) == 442_671_617


def test_what_no_loss_reaches_is_counted_apart():
    """BERT's own pooler and CLIP's logit scale."""
    found = modules(build_on_meta(load_recipe("xdbert-base-wikitext103")))
    assert count(found, trained=False) == 768 * 768 + 768 + 1


def test_a_local_folder_with_projected_embeddings(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "electra", "hidden_size": 64, "embedding_size": 32, "num_hidden_layers": 1, '
        '"num_attention_heads": 1, "intermediate_size": 128}'
    )
    spec = load_recipe("quickstart", [f"model.language.name={tmp_path}", *RANDOM])
    found = {each.name: each for each in modules(build_on_meta(spec))}
    assert found["model.language.embeddings_project"].own == (32 * 64, 64)
    assert found["mlm.transform"].own == (64 * 32, 32)
    assert profile_model(spec, precision="bf16").sequence_length == 512


@pytest.mark.parametrize(("length", "sequences_per_second", "tflops"), [(128, 272, 64), (512, 52, 53)])
def test_deepspeeds_bert_large_points(length, sequences_per_second, tflops):
    """DeepSpeed's post of 2020-05-28 "fastest BERT training": one V100, masked positions only in the head."""
    profile = profile_model(load_recipe("bert-large-mlm-wikitext103"), precision="fp16", sequence_length=length)
    assert profile.flops_per_sequence * sequences_per_second / 1e12 == pytest.approx(tflops, rel=0.03)


def test_examples_are_as_long_as_the_measured_text():
    """docs/measurements.md: 560 of 693 CLIP positions filled on average, never more than 9 blocks."""
    spec = load_recipe("xdbert-base-wikitext103")
    module = build_on_meta(spec)
    system = open_system(spec)
    arrays = system.example(module, 64).arrays
    assert arrays["language_ids"].shape == (64, 512)
    assert len(arrays["clip_valid"]) / 64 == pytest.approx(560, rel=0.01)
    assert len(arrays["clip_blocks"]) / 64 == pytest.approx(0.57 * 7 + 0.42 * 8 + 0.01 * 9, rel=0.01)
    assert len(arrays["masked_lm_positions"]) / 64 == pytest.approx(0.15 * 510, rel=0.03)
    assert len(system.example(module, 8, longest=True).arrays["clip_blocks"]) == 8 * 9
    with pytest.raises(XdscaleError, match="sequence length 513: the encoder takes 3 to 512"):
        system.example(module, 1, 513)


@pytest.mark.parametrize(
    ("precision", "checkpointing", "layers", "dropout", "frozen"),
    [
        (torch.bfloat16, False, 2, 0.0, False),
        (torch.float32, False, 3, 0.0, False),
        (torch.bfloat16, True, 2, 0.0, False),
        (torch.float32, False, 2, 0.1, False),
        (torch.float32, False, 2, 0.0, True),
    ],
)
def test_kept_bytes_within_a_tenth_of_what_autograd_keeps(
    precision, checkpointing, layers, dropout, frozen, kept_bytes
):
    spec = load_recipe("quickstart", [*RANDOM, f"model.dropout={dropout}", f"model.cross_layers={layers}"])
    module = build_adaptation(spec).to(precision).train()
    if checkpointing:
        recompute_activations(module)
    module.model.clip.requires_grad_(not frozen)
    arrays = open_system(spec).example(module, 3, 128, longest=True).arrays
    kept = kept_bytes(module, to_device(arrays, torch.device("cpu")))
    assert trace(on_meta(module), arrays, spec.objectives.weights()).kept_bytes == pytest.approx(kept, rel=0.1)


def test_dropout_keeps_the_mask_of_the_embeddings_alone():
    """One byte for each of 512 x 768; the sublayers draw theirs again."""
    kept = []
    for rate in (0.1, 0.0):
        spec = load_recipe("xdbert-base-wikitext103", ["model.cross_layers=1", f"model.dropout={rate}"])
        kept.append(profile_model(spec, precision="bf16").kept.per_sample)
    assert kept[0] - kept[1] == pytest.approx(512 * 768, rel=1e-3)


def test_bytes_lie_on_the_lines_that_two_traces_give():
    spec = load_recipe("xdelectra-large-wikipedia")
    profile = profile_model(spec, precision="bf16")
    module = build_on_meta(spec).train().to(torch.bfloat16)
    for samples in (1, 9, 150):
        arrays = open_system(spec).example(module, samples, longest=True).arrays
        found = trace(module, arrays, spec.objectives.weights())
        assert profile.kept(samples) == pytest.approx(found.kept_bytes, rel=0.01)
        assert profile.peak(samples) == pytest.approx(found.peak_bytes, rel=0.01)


def test_logits_never_exist_as_a_whole():
    """64 sequences of 512: dense fp32 logits of the masked positions alone are 0.6 GB."""
    profile = profile_model(load_recipe("xdelectra-large-wikipedia"), precision="bf16")
    assert profile.peak(64) - profile.kept(64) < 64 * 77 * 30522 * 4 / 2


def test_recomputing_layers_keeps_little_and_costs_no_useful_work():
    spec = load_recipe("xdbert-base-wikitext103")
    kept, recomputed = (profile_model(spec, precision="bf16", checkpointing=on) for on in (False, True))
    assert recomputed.kept(8) < kept.kept(8) / 8
    assert recomputed.kept(8) < recomputed.peak(8) < kept.peak(8) / 3
    assert recomputed.flops_per_sequence == kept.flops_per_sequence
