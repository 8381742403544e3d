"""VL-BERT's pretraining against its release's computation, and through the whole engine."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from xdscale.bench.padded_vlbert import padded_targets
from xdscale.data.vlbert_pretraining import VLBERTCollator
from xdscale.errors import XdscaleError
from xdscale.export import export_run
from xdscale.plan.profile import build_on_meta, parameter_table, profile_model
from xdscale.pretrained.vlbert import load_vlbert, save_release
from xdscale.recipe import load_recipe
from xdscale.shards.manifest import Manifest
from xdscale.shards.table import Table
from xdscale.systems.contract import Place, Slots, open_system
from xdscale.systems.vlbert import check_tables, continuations, invented
from xdscale.training.distributed import Ranks
from xdscale.training.engine import to_device
from xdscale.training.run_folder import read_log
from xdscale.training.stored import build_module
from xdscale.training.tracing import on_meta, trace

from ..models import padded_vlbert

TABLES = ["model.region_size=12", "model.region_classes=7", "model.max_elements=24"]
FIXED = [*TABLES, "model.dropout=0", "training.global_batch=8", "training.steps=4"]
FIXED += ["run.eval_samples=30", "run.eval_every=2", "run.checkpoint_every=2"]
NAMES = ("mlm", "text_mlm", "masked_region")


def recipe(*overrides, name="quickstart-vlbert"):
    return load_recipe(name, [*TABLES, "model.dropout=0", *overrides])


def built(*overrides):
    torch.manual_seed(0)
    return build_module(open_system(recipe(*overrides)), continued=False)


def collator(folder, *overrides):
    found = recipe(*overrides)
    names = ("captions",) if found.objectives.text_mlm is None else ("captions", "text")
    tables = [Table(folder, "train", name) for name in names]
    return VLBERTCollator(*tables, recipe=found, continues=continuations(found.model.language))


def slots_of(collate, captions, texts, real=True):
    """Captions and texts in turn."""
    ids = [number for pair in zip(captions, len(collate.captions) + np.asarray(texts)) for number in pair]
    return Slots(np.zeros(len(ids), int), np.array(ids), np.full(len(ids), real))


@pytest.fixture
def micro_batch(grounded_pictures):
    """Sixteen samples of different lengths, the last one padding."""
    collate = collator(grounded_pictures, "objectives.masked_region.select=0.4")
    slots = slots_of(collate, range(5, 85, 10), range(8))
    slots.real[-1] = False
    return collate(slots)


def batch_of(micro_batch, dtype=torch.float32):
    batch = to_device(micro_batch.arrays, torch.device("cpu"))
    wide = ("features", "places", "masked_region_labels")
    return {name: value.to(dtype) if name in wide else value for name, value in batch.items()}


def test_losses_are_those_of_the_release(micro_batch, tmp_path):
    """All three, with the weights that the release would load."""
    module = built().eval()
    with torch.no_grad():  # what is seen shall count
        for name, parameter in module.model.named_parameters():
            if "visual_norm" in name or name.startswith(("regions", "region_tokens", "text_only")):
                parameter.normal_(std=0.3)
    save_release(module.state_dict(), tmp_path / "vl-bert.model")
    theirs = padded_vlbert.loaded(tmp_path / "vl-bert.model", module.model.config, classes=7)
    wanted = theirs.losses(padded_targets(micro_batch.arrays))
    terms = module(batch_of(micro_batch))
    assert tuple(terms) == NAMES
    for (name, term), loss in zip(terms.items(), wanted, strict=True):
        assert micro_batch.targets[name] > 3
        torch.testing.assert_close(term.loss_sum / micro_batch.targets[name], loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vlbert-base-precomputed", 114_491_515),
        ("vlbert-large-precomputed", 342_071_675),
        ("vlbert-base-precomputed-paper", 114_491_515),
        ("vlbert-base-precomputed-no-text", 114_491_515),
    ],
)
def test_parameters_of_published_runs(name, parameters):
    """Spec VL-BERT fact 1."""
    counted = {row.part: row.parameters for row in parameter_table(load_recipe(name))}
    assert counted["model during training"] == parameters
    size = "large" if "large" in name else "base"
    inner = {"base": 108_896_256, "large": 334_098_432}[size]
    assert counted[f"embeddings and layers of bert-{size}-uncased"] == inner


def test_the_table_that_holds_nothing_out_is_named(grounded_pictures, monkeypatch):
    monkeypatch.setattr(VLBERTCollator, "sizes", property(lambda collate: (0, len(collate.texts))))
    system = open_system(recipe(f"data.shards={grounded_pictures}"))
    message = "the split validation of captions holds 0 samples; .* larger --validation-fraction, or say otherwise what"
    with pytest.raises(XdscaleError, match=message):
        system.open(Place(Ranks(0, 1, 0), 2))


@pytest.mark.parametrize("more", [(), ("objectives.text_mlm=null",), ("objectives.masked_region=null",)])
def test_every_trained_parameter_gets_a_gradient(grounded_pictures, more):
    """Also where a micro-batch has no targets, no captions or no texts: so that all ranks do the same."""
    module, collate = built(*more), collator(grounded_pictures, *more)
    mixed = collate.texts is not None
    cases = [slots_of(collate, (1, 2), (3, 4)) if mixed else Slots(np.zeros(2, int), np.arange(2), np.ones(2, bool))]
    cases.append(Slots(cases[0].epochs, cases[0].sample_ids, np.zeros(len(cases[0].real), bool)))
    cases += [Slots(*(part[which::2] for part in vars(cases[0]).values())) for which in range(2 if mixed else 0)]
    for case in cases:
        module.zero_grad()
        terms = module(batch_of(collate(case)))
        sum(term.loss_sum for term in terms.values()).backward()
        assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        norms = sum(p.grad.norm() for p in module.parameters() if p.grad is not None)
        assert (norms > 0) == case.real.any()


def test_a_batch_is_the_sum_of_its_samples(grounded_pictures):
    """The gradient of a batch, of its thirds and of its samples one by one, in fp64."""
    module, collate = built().double(), collator(grounded_pictures)
    with torch.no_grad():
        module.model.embeddings.visual_norm_text.weight.fill_(0.5)
    slots, found = slots_of(collate, (3, 40, 77), (5, 1, 8)), []
    for size in (6, 4, 1):
        module.zero_grad()
        for first in range(0, 6, size):
            part = Slots(*(array[first : first + size] for array in vars(slots).values()))
            terms = module(batch_of(collate(part), torch.float64))
            sum(term.loss_sum for term in terms.values()).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    for split in found[1:]:
        assert (split - found[0]).norm() / found[0].norm() < 1e-10


@pytest.mark.parametrize(("texts", "images"), [(True, 3), (False, 5)])
def test_every_second_sample_of_a_plan_is_a_text_where_texts_are_trained_on(texts, images):
    made = invented(recipe(*([] if texts else ["objectives.text_mlm=null"])), 5, longest=True)
    assert made.arrays["features"].shape == (images * 12, 12)  # half of 24 elements, the whole image among them
    assert (made.targets.get("text_mlm", 0) > 0) == texts
    assert np.diff(made.arrays["cu_seqlens"]).tolist() == [25] * 5


@pytest.mark.parametrize(
    ("kept", "length", "longest", "caption"),
    [
        # A caption has 12 word pieces on average, [CLS] and [SEP]; half of the elements and one more at most.
        (64, None, False, 14),
        (27, None, False, 14),
        (25, None, False, 13),
        (64, 10, False, 5),
        (64, 5, False, 3),
        (64, None, True, 32),
        (25, None, True, 12),
    ],
)
def test_samples_of_a_plan_are_captions_and_as_many_regions_as_are_kept(kept, length, longest, caption):
    made = invented(recipe(f"model.max_elements={kept}"), 6, length, longest=longest)
    elements = kept if length is None else length - 1
    assert np.diff(made.arrays["cu_seqlens"]).tolist() == [elements + 1] * 6  # and the end
    assert made.arrays["features"].shape == (3 * (elements - caption), 12)  # every second sample is a text


@pytest.mark.parametrize(("long", "longest", "width"), [(160, False, 120), (100, False, 100), (160, True, 160)])
def test_pictures_of_a_plan_are_four_to_three_or_as_wide_as_may_be(long, longest, width):
    pixels = f"model.pixels={{weights: random, short_side: 90, long_side: {long}}}"
    found = recipe("model.region_size=2048", pixels)
    given = {"longest": True} if longest else {}  # else what a plan goes by of itself
    arrays = open_system(found).example(None, 4, **given).arrays
    images = [array.shape for name, array in arrays.items() if name.startswith("picture_")][::2]  # the others are blank
    assert images == [(3, 90, width)] * 2


def test_the_plan_runs_on_batches_like_real_ones(micro_batch):
    found = profile_model(recipe(), precision="bf16")
    assert found.sequence_length == 25
    assert found.kept.per_sample > 0
    system, module = open_system(recipe()), build_on_meta(recipe())
    real = trace(module, micro_batch.arrays, NAMES)
    alike = system.example(module, 16, length=int(round(micro_batch.arrays["cu_seqlens"][-1] / 16)))
    assert real.flops == pytest.approx(trace(module, alike.arrays, NAMES).flops, rel=0.15)
    assert trace(on_meta(built()), micro_batch.arrays, NAMES).flops == real.flops
    for length in (4, 26):
        with pytest.raises(XdscaleError, match=f"sequence length {length}: a sample has 5 to 25 elements"):
            system.example(module, 2, length=length)


def test_what_does_not_fit_is_refused_before_weights_are_read(grounded_pictures, captioned_pictures, photographs):
    manifest = Manifest.load(grounded_pictures)
    check_tables(recipe(), manifest)
    cases = {
        r"region_size = 13, but the regions' features are 12 wide; write model\.region_size=12": "model.region_size=13",
        r"region_classes = 9, but the regions have distributions over 7 classes": "model.region_classes=9",
        r"model\.max_elements = 511: package:cognition/model has 512 positions": "model.max_elements=511",
    }
    for message, override in cases.items():
        with pytest.raises(XdscaleError, match=message):
            check_tables(recipe(override), manifest)
    check_tables(recipe("model.max_elements=510"), manifest)
    with pytest.raises(XdscaleError, match=r"have no features; take some that have, or state model\.pixels, which"):
        check_tables(recipe(), Manifest.load(photographs))
    with pytest.raises(XdscaleError, match="no table of packed text, only captions, regions"):
        check_tables(recipe(), Manifest.load(captioned_pictures))
    check_tables(recipe("objectives.text_mlm=null"), Manifest.load(captioned_pictures))
    with pytest.raises(XdscaleError, match=r"objectives\.text_mlm: mask 0\.95 \+ random 0\.1 is more than 1"):
        recipe("objectives.text_mlm.mask=0.95")


@pytest.mark.parametrize(
    ("name", "rate", "warmup", "steps"),
    [
        ("vlbert-base-precomputed", 1e-7 * 256, 16_000, 10 * 3_300_000 // 128),
        ("vlbert-large-precomputed", 1e-7 * 256, 16_000, 10 * 3_300_000 // 128),
        ("vlbert-base-precomputed-no-text", 1e-7 * 256, 8_000, 10 * 3_300_000 // 256),
        ("vlbert-base-precomputed-paper", 2e-5, 8_000, 250_000),
        ("vlbert-base-e2e", 1e-7 * 256, 16_000, 10 * 3_300_000 // 128),
        ("vlbert-large-e2e", 1e-7 * 256, 16_000, 10 * 3_300_000 // 128),
        ("vlbert-base-e2e-paper", 2e-5, 8_000, 250_000),
    ],
)
def test_published_runs(name, rate, warmup, steps):
    """Spec VL-BERT §4 and §5.1: rates per sample, times 256."""
    found = load_recipe(name)
    assert found.optim.learning_rate == pytest.approx(rate)
    assert found.training.steps == pytest.approx(steps, abs=10)
    assert round(found.optim.warmup_ratio * found.training.steps) == warmup
    assert (found.training.global_batch, found.optim.weight_decay, found.optim.gradient_clipping) == (256, 1e-4, 10)
    assert found.optim.decayed == "all"
    reads = found.model.corners, found.model.end_sees_image, found.model.own_masked_token
    paper = name.endswith("paper")
    assert reads == ((True, True, False) if paper else (False, False, True))
    assert found.objectives.masked_region.target == ("class" if paper else "distribution")


@pytest.mark.parametrize(
    ("letter", "off"), [("a", ("text_mlm", "masked_region")), ("b", ("text_mlm",)), ("d", ()), ("full", ())]
)  # fmt: skip
def test_ablations_leave_objectives_out_and_take_half_of_the_epochs(letter, off):
    """Spec VL-BERT §6."""
    full, found = load_recipe("vlbert-base-precomputed"), load_recipe(f"vlbert-ablation-{letter}")
    wanted = full.identity()
    wanted["objectives"] |= dict.fromkeys(off)
    if letter == "full":
        wanted["model"] |= {
            name: load_recipe("vlbert-base-e2e").identity()["model"][name] for name in ("pixels", "flip")
        }
    captions = 256 if "text_mlm" in off else 128
    wanted["training"]["steps"] = 3_300_000 // captions * 5
    assert found.identity() == wanted


@pytest.fixture(scope="module")
def runs(run_by_stage, grounded_pictures, narrow_bert):
    """Run folders by ZeRO stage: stopped after 2 of 4 steps, continued on another number of ranks."""
    starts = {0: (1,), 1: (2, 1), 2: (2,), 3: (1, 2)}
    micro_batches = {0: 8, 1: 2, 2: 1, 3: 2}  # of 1 a rank has captions alone, the other one texts
    settings = [*narrow_bert, f"data.shards={grounded_pictures}", *FIXED]
    return run_by_stage("quickstart-vlbert", settings, starts, micro_batches)


@pytest.mark.slow
def test_it_trains_alike_under_every_stage_and_goes_on_at_another_number_of_ranks(runs):
    """Of 8 samples a step: one rank with all, two with passes of 2 and 1, and runs continued from 2 on 1 and 1 on 2."""
    found = {}
    for stage, run in runs.items():
        steps = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "step"]
        found[stage] = np.array([[entry[f"loss/{name}"] for name in NAMES] for entry in steps])
        held_out = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "validation"]
        assert all(float(held_out[-1][f"validation/loss/{name}"]) > 0 for name in NAMES)
    assert found[0].shape == (4, 3)
    for stage in (1, 2, 3):
        np.testing.assert_allclose(found[stage], found[0], rtol=1e-4)


@pytest.mark.slow
def test_an_export_is_read_and_begun_with(runs, narrow_bert, tmp_path):
    out = tmp_path / "export"
    said = export_run(runs[2], out)
    assert re.search(r"VL-BERT \([\d,]+ parameters\), with the heads of mlm, text_mlm, masked_region", said)
    ours, heads = load_vlbert(out)
    assert ours.config.features_of == {"model": "drawn", "sha256": None}
    assert AutoTokenizer.from_pretrained(out)("a dog")["input_ids"][0] == 101
    assert sorted(heads) == sorted(name for name in heads if name.startswith(("mlm.", "masked_region.")))
    save_release({f"model.{name}": value for name, value in ours.state_dict().items()} | heads, tmp_path / "vl.model")
    for place in (out, runs[2], tmp_path / "vl.model"):
        begun = built(*narrow_bert, f"model.start={place}")
        for name, value in ours.state_dict().items():
            assert torch.equal(begun.model.state_dict()[name], value), name
        for name, value in heads.items():
            assert torch.equal(begun.state_dict()[name], value), name
    for place in (out, runs[2], tmp_path / "vl.model"):
        with pytest.raises(XdscaleError, match=r"trained with model\.corners=false, which this recipe has not"):
            built(*narrow_bert, f"model.start={place}", "model.corners=true")
    wrong = r"model\.regions\.projection\.weight, model\.regions\.mask\.weight of this recipe"
    with pytest.raises(XdscaleError, match=rf"model\.start = .*: holds no fitting weights for {wrong}"):
        built(*narrow_bert, f"model.start={out}", "model.region_size=13")
